"""Results of a comparison that was never run: real paragraphs and tokenizers, made-up scores."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from jaxlm.data.documents import open_corpus
from jaxlm.tokenizers import BPETokenizer, CharTokenizer
from jaxlm.tokenizers.base import Tokenizer, visible

MakeResults = Callable[..., dict[str, Any]]

MEASURES = [
    {
        "key": "bytes_per_token", "label": "Compression", "unit": "bytes per token", "format": ".2f", "source": "",
        "definition": "UTF-8 bytes of held-out text divided by the number of its tokens.",
    },
    {
        "key": "renyi", "label": "Rényi efficiency", "unit": "", "format": ".3f",
        "definition": "Rényi entropy (order 2.5) of the token frequencies, divided by the logarithm of the ids.",
        "source": "Zouhar et al., Tokenization and the Noiseless Channel, ACL 2023",
    },
    {
        "key": "unused", "label": "Unused ids", "unit": "%", "format": ".1f", "source": "",
        "definition": "Ids that never occur in the training text, as a share of the vocabulary.",
    },
    {
        "key": "fertility", "label": "Fertility", "unit": "tokens per word", "format": ".2f",
        "definition": "Tokens divided by words, where a word is a run of letters.",
        "source": "Rust et al., How Good is Your Tokenizer?, ACL 2021",
    },
]  # fmt: skip


@pytest.fixture(scope="session")
def make_results() -> MakeResults:
    """Results with a character arm and BPE arms of these vocabulary sizes, each call with data of its own."""
    documents = list(open_corpus("builtin").documents())
    training, held_out = documents[:-20], documents[-20:]
    tokenizers: dict[int | None, Tokenizer] = {}
    made: dict[Any, dict[str, Any]] = {}

    def make(sizes: Sequence[int] = (300, 500), seeds: Sequence[int] = (0, 1)) -> dict[str, Any]:
        for size in (None, *sizes):
            if size not in tokenizers:
                tokenizers[size] = (
                    CharTokenizer.train(training) if size is None else BPETokenizer.train(training, vocab_size=size)
                )
        key = (tuple(sizes), tuple(seeds))
        if key not in made:
            chosen = {"char" if size is None else f"bpe-{size}": tokenizers[size] for size in (None, *sizes)}
            made[key] = _results(chosen, held_out, seeds)
        return copy.deepcopy(made[key])

    return make


def _results(chosen: dict[str, Tokenizer], held_out: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    held_out_bytes = sum(len(text.encode()) for text in held_out)
    paragraphs = [text.split("\n")[-1][:420] for text in held_out[:2]] + ["Œuf à la coque : 3 €, et l’été « naïf » ☃."]
    arms, evaluations = [], []
    for name, tokenizer in chosen.items():
        ratio = held_out_bytes / sum(len(tokenizer.encode(text)) for text in held_out)
        score = 2.05 + 0.9 / (1 + np.log(tokenizer.vocab_size / 60)) + random.normal(0, 0.01)
        by_seed = [float(score + random.normal(0, 0.01)) for _ in seeds]
        score = float(np.mean(by_seed))
        vocabulary = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        embedding = 2 * 128 * tokenizer.vocab_size
        tokens = round(1.8e6 / ratio)
        parameters = 412_000 + embedding
        arms.append({
            "name": name, "family": name.split("-")[0], "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
            "size": "2x128", "status": "done", "reason": None, "parameters": parameters,
            "embedding_parameters": embedding, "bytes_per_token": ratio, "context": round(256 / ratio),
            "batch_size": 64, "updates": 440, "tokens": tokens, "bytes": 1_800_000, "flops": 6.0 * parameters * tokens,
            "seconds": 55 / ratio, "learning_rate": 1e-3,
            "grid": [
                {"factor": f, "learning_rate": f * 1e-3, "bits_per_byte": None if f > 3 else score + abs(f - 1) / 20}
                for f in (0.3, 1.0, 3.0, 10.0)
            ],
            "loss": score * ratio * np.log(2), "bits_per_byte": score, "low": score - 0.019, "high": score + 0.019,
            "by_seed": by_seed,
            "measures": {"bytes_per_token": ratio, "renyi": 0.7 - 0.01 * ratio, "unused": 3.1, "fertility": 5 / ratio},
            "longest_tokens": [visible(token) for token in sorted(vocabulary, key=len)[-12:-1]],
            "samples": [
                {"seed": seed, "text": f"La rivière est un {name} de la forêt\net les pierres de l'eau. " * 5}
                for seed in seeds
            ],
        })  # fmt: skip
        for (place, seed), step in itertools.product(enumerate(seeds), range(0, 441, 40)):
            share = step / 440
            evaluations.append({
                "arm": name, "seed": seed, "step": step, "tokens": round(tokens * share), "bytes": round(1.8e6 * share),
                "flops": arms[-1]["flops"] * share, "seconds": arms[-1]["seconds"] * share * (1 + 0.02 * place),
                "loss": 1.0, "bits_per_byte": by_seed[place] + 5.5 * float(np.exp(-9 * share)),
                "bits_per_byte_se": 0.01, "final": False,
            })  # fmt: skip
    several = len(seeds) > 1
    differences = []
    for a, b in itertools.combinations(arms, 2):
        difference = a["bits_per_byte"] - b["bits_per_byte"]
        shown = ("a lower" if difference < 0 else "b lower") if abs(difference) > 0.02 else "no difference shown"
        differences.append({
            "a": a["name"], "b": b["name"], "difference": difference, "se_documents": 0.008,
            "low": difference - 0.02 if several else None, "high": difference + 0.02 if several else None,
            "se_seeds": 0.005 if several else None, "seeds": [len(seeds), len(seeds)],
            "verdict": shown if several else "one seed: not judged",
        })  # fmt: skip
    words = {
        name: {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} for name, tokenizer in chosen.items()
    }
    return {
        "version": 1, "imported": [], "title": "What does the tokenizer change?",
        "answer": "Per source byte, the larger BPE vocabulary needs 0.21 bits fewer than characters, and the interval "
        "leaves out zero. Loss per token shows the reverse, since a token of one is twice the text of the other.",
        "command": "python -m experiments.compare_tokenizers --preset quick --arms char bpe-300 bpe-500",
        "git_commit": "3c32cb3f0a4e5d7b9a1c2e3f4a5b6c7d8e9f0a1b", "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "machine": {"devices": ["TFRT_CPU_0"], "cores": 2},
        "corpus": {
            "spec": "builtin", "fingerprint": "ab12" * 16, "documents": 196, "bytes": 316_000,
            "held_out_documents": len(held_out), "held_out_bytes": held_out_bytes,
        },
        "budget": {"unit": "bytes", "size": 1.8e6}, "context_unit": "bytes", "seeds": list(seeds), "arms": arms,
        "measures": MEASURES,
        "overlap": {
            "names": list(words),
            "shared": [[len(words[a] & words[b]) / len(words[a]) for b in words] for a in words],
        },
        "left_out": [{"name": "words", "reason": "It is not lossless: “Œuf” comes back as “oeuf”."}],
        "differences": differences,
        "claims": [
            {
                "claim": f"Claim {number}: the tokenizer brings nothing", "finding": "Not shown by these numbers. " * 4,
                "columns": ["Arm", "nats per token", "bits per byte"],
                "rows": [[arm["name"], f"{arm['loss']:.3f}", f"{arm['bits_per_byte']:.3f}"] for arm in arms],
            }
            for number in (1, 2, 3)
        ],
        "paragraphs": [
            {
                "title": f"Paragraph {number}", "text": text,
                "tokens": {
                    name: [
                        {"id": int(i), "text": visible(tokenizer.token_bytes(int(i))), "bytes": int(length)}
                        for i, length in zip(ids, tokenizer.byte_lengths(ids), strict=True)
                    ]
                    for name, tokenizer in chosen.items()
                    for ids in [tokenizer.encode(text)]
                },
            }
            for number, text in enumerate(paragraphs, 1)
        ],
        "evaluations": evaluations,
    }  # fmt: skip
