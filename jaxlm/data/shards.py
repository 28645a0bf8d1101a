"""A corpus, tokenized once: memory-mapped token shards with their manifest.

A corpus is surveyed (how many documents, bytes, which fingerprint), divided into training and held-out text, and its
documents flow through a grain pipeline into a tokenizer and on to disk. A folder of shards is complete or absent: it is
written under another name and renamed. It is found again by what it was made from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
import numpy.typing as npt

from jaxlm.data.cache import cache_directory, load_json, raise_not_writable, save_json
from jaxlm.data.documents import Corpus
from jaxlm.tokenizers.base import InputError, Tokenizer, content_hash, save_array

SHARD_TOKENS = 1 << 26
_MANIFEST = "manifest.json"
_FORMAT = 1

OnDocument = Callable[[int], None]  # called with the UTF-8 bytes of each document, for progress


# ---- how many documents, and which are held out


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus finds.

    Attributes:
      documents: how many there are.
      bytes: UTF-8 bytes of all of them.
      fingerprint: SHA-256 over the documents in order; equal fingerprints mean the same text, wherever it lies.
    """

    documents: int
    bytes: int
    fingerprint: str

    @property
    def train_documents(self) -> int:
        """The first 90 % are for training, rounded down, and at least one; the rest is held out."""
        return max(1, self.documents * 9 // 10)


def survey_corpus(corpus: Corpus) -> Survey:
    """Counts and fingerprints the documents; remembered on disk as long as the corpus keeps its stamp.

    Raises:
      InputError: fewer than two documents, so that nothing could be held out; whatever reading the corpus raises.
    """
    remembered = cache_directory() / "surveys" / f"{content_hash([_FORMAT, corpus.stamp()])}.json"
    with contextlib.suppress(TypeError):  # nothing remembered, or nothing that makes sense
        return Survey(**load_json(remembered))
    documents = total_bytes = 0
    digest = hashlib.sha256()
    for text in corpus.documents():
        data = text.encode()
        digest.update(_framed(data))
        documents += 1
        total_bytes += len(data)
    if documents < 2:
        raise InputError(
            f"The corpus {corpus.spec!r} is a single document, and one has to be held out; separate documents by blank "
            "lines, or give more files."
        )
    survey = Survey(documents, total_bytes, digest.hexdigest())
    save_json(remembered, asdict(survey))
    return survey


def train_documents(corpus: Corpus, survey: Survey) -> Iterator[str]:
    """The training documents, in order: the text that tokenizers may learn from."""
    return itertools.islice(corpus.documents(), survey.train_documents)


def held_out_documents(corpus: Corpus, survey: Survey) -> Iterator[str]:
    """The held-out documents, in order."""
    return itertools.islice(corpus.documents(), survey.train_documents, survey.documents)


# ---- token shards


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a sequence of documents, end-of-text after each, over one or more memory-mapped shards.

    Attributes:
      shards: 1-D arrays of one integer type; all but the last have `SHARD_TOKENS` entries.
      ends: int64, for each document the position after its end-of-text.
      document_bytes: int64, the UTF-8 bytes of each document.
      first: the token of the shards that the stream begins with.
    """

    shards: tuple[npt.NDArray[np.unsignedinteger], ...]
    ends: npt.NDArray[np.int64]
    document_bytes: npt.NDArray[np.int64]
    first: int = 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the documents over tokens, end-of-text included."""
        return float(self.document_bytes.sum()) / len(self)

    def slice(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Tokens `start` to `stop` as int32, of shape (stop - start,)."""
        size = len(self.shards[0])
        start, stop = start + self.first, stop + self.first
        parts = [
            self.shards[shard][max(0, start - shard * size) : stop - shard * size]
            for shard in range(start // size, (stop - 1) // size + 1)
        ]
        return np.concatenate(parts).astype(np.int32)

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int32]:
        """The `length` tokens from each start on, as int32 of shape (starts, length)."""
        size = len(self.shards[0])
        shard, begin = np.divmod(starts + self.first, size)
        rows = np.empty((len(starts), length), np.int32)
        within = begin + length <= size
        for index in np.flatnonzero(~within):
            rows[index] = self.slice(int(starts[index]), int(starts[index]) + length)
        for number in np.unique(shard[within]):
            here = within & (shard == number)
            rows[here] = np.lib.stride_tricks.sliding_window_view(self.shards[number], length)[begin[here]]
        return rows

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """The tokens of one document, without its end-of-text."""
        return self.slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]) - 1)

    def documents(self, start: int, stop: int) -> TokenStream:
        """Documents `start` to `stop`, at least one, as a stream of their own over the same shards."""
        begin = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - begin
        return TokenStream(self.shards, ends, self.document_bytes[start:stop], self.first + begin)


@dataclass(frozen=True)
class TokenizedCorpus:
    """Training and held-out tokens, and the manifest that says what they were made from."""

    train: TokenStream
    held_out: TokenStream
    manifest: dict[str, Any]

    def for_validation(self) -> TokenizedCorpus:
        """The training documents alone, of which the last 5 %, one at least, take the place of the held-out ones.

        Raises:
          InputError: a single training document.
        """
        count = self.train.num_documents
        if count < 2:
            raise InputError("A part of the training documents is kept out to choose settings, and there is only one.")
        kept = max(1, count * 95 // 100)
        return TokenizedCorpus(self.train.documents(0, kept), self.train.documents(kept, count), self.manifest)


def tokenize_corpus(
    corpus: Corpus, survey: Survey, tokenizer: Tokenizer, *, on_document: OnDocument | None = None
) -> TokenizedCorpus:
    """The corpus as tokens of `tokenizer`: written to the cache once, memory-mapped from there afterwards.

    Each held-out document is decoded again and compared, since bits per byte mean nothing for a tokenizer that loses
    text.

    Raises:
      InputError: a tokenizer without end-of-text or one that isn't lossless; a text that is no longer the one that was
        surveyed; a cache that can't be written.
    """
    key = content_hash([_FORMAT, survey.fingerprint, tokenizer.hash, SHARD_TOKENS])
    folder = cache_directory() / "shards" / key[:32]
    found = open_shards(folder)
    if found is None:
        _write_shards(folder, corpus, survey, tokenizer, on_document)
        found = open_shards(folder)
        assert found is not None
    return found


def open_shards(folder: Path) -> TokenizedCorpus | None:
    """The shards in `folder`; None if there are none, or if a file of theirs is missing or has another size."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        streams = {}
        for split, entry in manifest["splits"].items():
            if any(Path(name).name != name for name in (*entry["shards"], entry["documents"])):
                return None  # a file of another folder
            shards = tuple(np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in entry["shards"])
            index = np.load(folder / entry["documents"], allow_pickle=False)
            stream = TokenStream(shards, index[0], index[1])
            if sum(map(len, shards)) != entry["tokens"] or len(stream) != entry["tokens"]:
                return None
            streams[split] = stream
        return TokenizedCorpus(streams["train"], streams["held_out"], manifest)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError):
        return None


def token_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned integer type that holds all ids."""
    return np.min_scalar_type(vocab_size - 1)


def _write_shards(
    folder: Path, corpus: Corpus, survey: Survey, tokenizer: Tokenizer, on_document: OnDocument | None
) -> None:
    end_of_text = tokenizer.end_of_text_id
    if end_of_text is None:
        raise InputError("The tokenizer has no end-of-text token; train or import it with '<|endoftext|>'.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise_not_writable(error)
    try:
        encoded = iter(_Documents(corpus.documents).map(lambda text: _encode(tokenizer, text)))
        splits = {}
        digest = hashlib.sha256()
        for split, documents in (
            ("train", itertools.islice(encoded, survey.train_documents)),
            ("held_out", encoded),
        ):
            writer = _ShardWriter(temporary, split, token_type(tokenizer.vocab_size))
            for text, ids in documents:
                data = text.encode()
                # An honest count of bytes and a text that comes back: else bits per byte would be those of other text.
                if split == "held_out" and (
                    tokenizer.decode(ids) != text or int(tokenizer.byte_lengths(ids).sum()) != len(data)
                ):
                    raise InputError(
                        f"The {tokenizer.kind} tokenizer isn't lossless: held-out document {len(writer.ends)} comes "
                        "back changed or miscounted, so bits per byte can't be compared; use one that keeps all text."
                    )
                digest.update(_framed(data))
                writer.add(np.append(ids, end_of_text), len(data))
                if on_document is not None:
                    on_document(len(data))
            splits[split] = writer.finish()
        if digest.hexdigest() != survey.fingerprint:
            raise InputError(f"The corpus {corpus.spec!r} changed while it was read; run the same command again.")
        manifest = {
            "version": _FORMAT,
            "tokenizer": {"kind": tokenizer.kind, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
            "corpus": {"spec": corpus.spec, "fingerprint": survey.fingerprint},
            "splits": splits,
        }
        save_json(temporary / _MANIFEST, manifest)
        if open_shards(folder) is None:  # another process may have been quicker
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise_not_writable(error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _ShardWriter:
    """Collects tokens and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.ends: list[int] = []
        self.document_bytes: list[int] = []
        self.names: list[str] = []
        self.pending: list[npt.NDArray[np.unsignedinteger]] = []
        self.num_pending = self.num_tokens = 0

    def add(self, ids: npt.NDArray[np.int32], num_bytes: int) -> None:
        self.pending.append(ids.astype(self.dtype))
        self.num_pending += len(ids)
        self.num_tokens += len(ids)
        self.ends.append(self.num_tokens)
        self.document_bytes.append(num_bytes)
        if self.num_pending >= SHARD_TOKENS:
            self._write_full_shards()

    def finish(self) -> dict[str, Any]:
        """Writes what is left and returns the manifest's entry."""
        self._write_full_shards()
        if self.num_pending:
            self._save(np.concatenate(self.pending))
        index = np.array([self.ends, self.document_bytes], np.int64)
        name = f"{self.split}-documents.npy"
        save_array(self.folder / name, index)
        return {
            "shards": self.names,
            "documents": name,
            "dtype": self.dtype.name,
            "tokens": self.num_tokens,
            "bytes": sum(self.document_bytes),
        }

    def _write_full_shards(self) -> None:
        if self.num_pending < SHARD_TOKENS:
            return
        tokens = np.concatenate(self.pending)
        for start in range(0, len(tokens) - SHARD_TOKENS + 1, SHARD_TOKENS):
            self._save(tokens[start : start + SHARD_TOKENS])
        self.pending = [tokens[len(tokens) - len(tokens) % SHARD_TOKENS :]]
        self.num_pending = len(self.pending[0])

    def _save(self, tokens: npt.NDArray[np.unsignedinteger]) -> None:
        self.names.append(f"{self.split}-{len(self.names):05d}.npy")
        save_array(self.folder / self.names[-1], tokens)


class _Documents(grain.IterDataset[str]):
    """A stream of documents as the source of a grain pipeline."""

    def __init__(self, open_documents: Callable[[], Iterator[str]]) -> None:
        super().__init__()
        self._open_documents = open_documents

    def __iter__(self) -> grain.DatasetIterator[str]:
        return _DocumentIterator(self._open_documents)


class _DocumentIterator(grain.DatasetIterator[str]):
    """The state is the number of documents read, from which reading goes on."""

    def __init__(self, open_documents: Callable[[], Iterator[str]]) -> None:
        super().__init__()
        self._open_documents = open_documents
        self.set_state({"documents": 0})

    def __next__(self) -> str:
        text = next(self._iterator)
        self._num_read += 1
        return text

    def get_state(self) -> dict[str, int]:
        return {"documents": self._num_read}

    def set_state(self, state: dict[str, int]) -> None:
        self._num_read = state["documents"]
        self._iterator = itertools.islice(self._open_documents(), self._num_read, None)


def _framed(data: bytes) -> bytes:
    # The length tells apart texts that differ only in where their documents end.
    return len(data).to_bytes(8, "little") + data


def _encode(tokenizer: Tokenizer, text: str) -> tuple[str, npt.NDArray[np.int32]]:
    # A document that happens to spell a special token has written it as plain text.
    return text, tokenizer.encode(text, allowed_special="none")
