"""One library's tokenizer in a process of its own, which does what it is told and says how long that took.

    python -m experiments.benchmarks.tokenizer_libraries jaxlm 2 builtin

Reads commands, one JSON object a line, from standard input, and answers each with one on standard output. Started by
`experiments.benchmarks.tokenizers`, so that memory and threads of one library have nothing to do with another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.data.documents import open_corpus
from jaxlm.tokenizers import BPETokenizer, load_tokenizer
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS, encode, split, train

PATTERN = SPLIT_PATTERNS["gpt4"]


class Library:
    """What all have in common. A library that can't train, or can't encode, doesn't say how."""

    tokenizer: Any

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        raise NotImplementedError

    def learned(self) -> list[bytes] | None:
        """The bytes of the tokens learned, in order; None if the algorithm is another one."""
        return None

    def load(self, directory: str, texts: Sequence[str]) -> None:
        """Takes the tokenizer in `directory`, or trains its own of the same size."""
        self.tokenizer = load_tokenizer(directory)

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        raise NotImplementedError


class Jaxlm(Library):
    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        self.tokenizer = BPETokenizer.train(texts, vocab_size, special_tokens=(), num_threads=self.threads)

    def learned(self) -> list[bytes]:
        return [self.tokenizer.token_bytes(token_id) for token_id in range(256, self.tokenizer.vocab_size)]

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        if len(texts) == 1:
            return [self.tokenizer.encode(texts[0], allowed_special="none")]
        batch = self.tokenizer.encode_batch(texts, allowed_special="none", num_threads=self.threads)
        assert isinstance(batch, list)
        return batch

    def decode(self, ids: Sequence[Any]) -> list[str]:
        return self.tokenizer.decode_batch(ids)


class Reference(Library):
    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        chunks = (chunk for text in texts for chunk in split(text, PATTERN))
        self.tokenizer = BPETokenizer(train(chunks, vocab_size - 256), special_tokens=())

    def learned(self) -> list[bytes]:
        return [self.tokenizer.token_bytes(token_id) for token_id in range(256, self.tokenizer.vocab_size)]

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        merges = self.tokenizer.merges
        return [[i for chunk in split(text, PATTERN) for i in encode(chunk, merges)] for text in texts]


class Rustbpe(Library):
    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        import rustbpe

        self.tokenizer = rustbpe.Tokenizer()
        self.tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=PATTERN)

    def learned(self) -> list[bytes]:
        return [bytes(token) for token, _ in self.tokenizer.get_mergeable_ranks()][256:]

    def load(self, directory: str, texts: Sequence[str]) -> None:
        self.train(texts, load_tokenizer(directory).vocab_size)

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        if len(texts) == 1:
            return [self.tokenizer.encode(texts[0])]
        return self.tokenizer.batch_encode(list(texts))


class Bpeasy(Library):
    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        import bpeasy

        self.ranks = bpeasy.train_bpe(iter(texts), PATTERN, 1_000, vocab_size)

    def learned(self) -> list[bytes]:
        return sorted(self.ranks, key=self.ranks.__getitem__)[256:]


class HuggingFace(Library):
    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        import tokenizers
        from tokenizers import pre_tokenizers, trainers

        with tempfile.TemporaryDirectory() as folder:  # the split as it is said in that library's regular expressions
            BPETokenizer([], special_tokens=()).to_huggingface(f"{folder}/tokenizer.json")
            self.tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
        self.tokenizer.train_from_iterator(texts, trainer, length=len(texts))

    def learned(self) -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(f"{folder}/tokenizer.json")
            read = BPETokenizer.from_huggingface(f"{folder}/tokenizer.json")
        return [read.token_bytes(token_id) for token_id in read.ids[256:]]

    def load(self, directory: str, texts: Sequence[str]) -> None:
        import tokenizers

        with tempfile.TemporaryDirectory() as folder:
            _bpe(directory).to_huggingface(f"{folder}/tokenizer.json")
            self.tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        if len(texts) == 1:
            return [self.tokenizer.encode(texts[0]).ids]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]


class SentencePiece(Library):
    def train(self, texts: Sequence[str], vocab_size: int) -> None:
        import sentencepiece

        with tempfile.TemporaryDirectory() as folder:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in texts for line in text.splitlines() if line),
                model_prefix=f"{folder}/model", model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=10**6,
                num_threads=self.threads, minloglevel=2,
            )  # fmt: skip
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")

    def load(self, directory: str, texts: Sequence[str]) -> None:
        self.train(texts, load_tokenizer(directory).vocab_size)

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        if len(texts) == 1:
            return [self.tokenizer.encode(texts[0])]
        return self.tokenizer.encode(list(texts), num_threads=self.threads)


class Tiktoken(Library):
    def load(self, directory: str, texts: Sequence[str]) -> None:
        self.tokenizer = _bpe(directory).to_tiktoken_encoding("benchmark")

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        if len(texts) == 1:
            return [self.tokenizer.encode_ordinary(texts[0])]
        if self.threads == 1:
            return [self.tokenizer.encode_ordinary(text) for text in texts]
        return self.tokenizer.encode_ordinary_batch(list(texts), num_threads=self.threads)


class TiktokenNumpy(Tiktoken):
    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        return [self.tokenizer.encode_to_numpy(text, disallowed_special=()) for text in texts]


LIBRARIES: dict[str, type[Library]] = {
    "jaxlm": Jaxlm,
    "rustbpe": Rustbpe,
    "tokenizers": HuggingFace,
    "bpeasy": Bpeasy,
    "sentencepiece": SentencePiece,
    "tiktoken": Tiktoken,
    "tiktoken, to numpy": TiktokenNumpy,
    "reference": Reference,
}


def _bpe(directory: str) -> BPETokenizer:
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


def texts_of(shape: str, documents: Sequence[str]) -> list[str]:
    """One text of 20 million characters, the last 1,330 documents, or up to 100,000 short lines."""
    if shape == "one text":
        return ["\n\n".join(documents)[:20_000_000]]
    if shape == "lines":
        return [line for text in documents for line in text.splitlines() if 0 < len(line) <= 300][:100_000]
    return list(documents[-1_330:])


def fingerprint(encoded: Sequence[Any]) -> str:
    """Equal for equal ids of equal texts."""
    code = hashlib.sha256()
    for ids in encoded:
        code.update(np.asarray(ids, np.int64).tobytes() + b"|")
    return code.hexdigest()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(name: str, threads: int, corpus: str) -> None:
    """Answers commands until standard input ends."""
    library = LIBRARIES[name](threads)
    documents = list(open_corpus(corpus).documents())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        command = json.loads(line)
        texts = documents
        if "max_bytes" in command:
            texts, size = [], 0
            for text in documents:
                size += len(text.encode())
                if size > command["max_bytes"] and texts:
                    break
                texts.append(text)
        before = _peak_mb()
        answer: dict[str, Any] = {}
        started = time.perf_counter()
        if command["do"] == "train":
            library.train(texts, command["vocab_size"])
            answer["seconds"] = time.perf_counter() - started
            answer["peak_mb"] = _peak_mb()
            tokens = library.learned()
            answer["tokens"] = None if tokens is None else [token.hex() for token in tokens]
            answer["bytes"] = sum(len(text.encode()) for text in texts)
        elif command["do"] == "load":
            library.load(command["directory"], texts)
            with contextlib.suppress(IndexError):
                library.encode(["Il fait beau."])  # what is loaded or compiled at the first call
        else:
            texts = texts_of(command["shape"], texts)
            started = time.perf_counter()
            encoded = library.encode(texts)
            answer["seconds"] = time.perf_counter() - started
            answer["ids"] = fingerprint(encoded)
            answer["texts"], answer["bytes"] = len(texts), sum(len(text.encode()) for text in texts)
            if isinstance(library, Jaxlm):
                started = time.perf_counter()
                decoded = library.decode(encoded)
                answer["decode_seconds"] = time.perf_counter() - started
                assert decoded == texts
        answer.setdefault("peak_mb", _peak_mb())
        answer["before_mb"] = before
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
