"""What a comparison found, as one JSON-able dictionary: from run directories, tokenizers and the held-out text.

A difference is called one only if its interval excludes zero.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxlm.reports.sentences import answer, claims
from jaxlm.reports.statistics import Estimate, difference, estimate
from jaxlm.runs import NATS_FILE, SAMPLES_FILE, read_metrics
from jaxlm.tokenizers.base import Tokenizer, visible
from jaxlm.tokenizers.measures import MEASURES, Measure, longest_tokens, measure, overlap

RESULTS_VERSION = 1

_MORE_MEASURES = (
    Measure(
        "embedding_share", "parameters in embedding and head", "",
        "parameters whose number grows with the vocabulary, over all parameters", "counted", ".1%",
    ),
    Measure(
        "seconds_to_train", "training the tokenizer", "s",
        "wall-clock time on the training documents, once, compilation included if there was any", "measured", ".2f",
    ),
    Measure(
        "encoding_speed", "encoding", "MB/s",
        "UTF-8 bytes of the held-out documents over the time to encode them, the second time", "measured", ".1f",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class ArmRecord:
    """An arm, however it ended.

    Attributes:
      name, family, size: as they are shown; size is layers x width.
      tokenizer, seconds_to_train: and how long its training took, NaN if it was there already.
      parameters, embedding_parameters, context, batch_size, updates, flops_per_token, bytes_per_token: of its model and
        training; bytes per token of the training text, end-of-text counted as a token.
      learning_rate, muon_learning_rate: of AdamW, and of Muon if it had the matrices; grid: what they were chosen
        from, the factor, AdamW's rate and the bits per byte of each.
      runs: the run directory of each seed; empty if it failed.
      reason: why it failed; None if it didn't.
    """

    name: str
    family: str
    size: str
    tokenizer: Tokenizer
    seconds_to_train: float
    parameters: int
    embedding_parameters: int
    context: int
    batch_size: int
    updates: int
    flops_per_token: int
    bytes_per_token: float
    learning_rate: float
    muon_learning_rate: float | None
    grid: Sequence[tuple[float, float, float]]
    runs: Mapping[int, Path]
    reason: str | None


@dataclass(frozen=True)
class HeldOut:
    """The documents that all arms are scored on."""

    texts: Sequence[str]

    @cached_property
    def document_bytes(self) -> npt.NDArray[np.int64]:
        return np.array([len(text.encode()) for text in self.texts])


def collect(
    arms: Sequence[ArmRecord], held_out: HeldOut, about: Mapping[str, Any], left_out: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """The results of a comparison.

    Args:
      about: what the results say of themselves: title, command, versions, machine, corpus, budget and so on.
      left_out: names of arms that could not be made, and why.
    """
    nats = {
        arm.name: np.stack([np.load(path / NATS_FILE, allow_pickle=False) for path in arm.runs.values()])
        for arm in arms
        if arm.reason is None
    }
    scores = {name: estimate(nats_SD, held_out.document_bytes) for name, nats_SD in nats.items()}
    done = [_done(arm, scores[arm.name], held_out) for arm in arms if arm.name in scores]
    described = {entry["name"]: entry for entry in done}
    differences = [
        _difference(a, b, difference(nats[a], nats[b], held_out.document_bytes), (len(nats[a]), len(nats[b])))
        for a, b in itertools.combinations(nats, 2)
    ]
    tokenizers = {arm.name: arm.tokenizer for arm in arms if arm.name in scores}
    return {
        "version": RESULTS_VERSION,
        **about,
        "answer": answer(done, differences, about["budget"]),
        "arms": [described.get(arm.name) or _failed(arm) for arm in arms],
        "measures": [vars(entry) for entry in (*MEASURES, *_MORE_MEASURES)],
        "overlap": {"names": list(tokenizers), "shared": overlap(tokenizers)},
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out],
        "differences": differences,
        "claims": claims(done, differences),
        "paragraphs": [
            {
                "title": f"Paragraph {index}",
                "text": text,
                "tokens": {n: _tokens(t, text) for n, t in tokenizers.items()},
            }
            for index, text in enumerate(paragraphs(held_out.texts), start=1)
        ],
        "evaluations": [row for arm in arms for row in _evaluations(arm)],
    }


def _described(arm: ArmRecord) -> dict[str, Any]:
    return {
        "name": arm.name,
        "family": arm.family,
        "tokenizer": arm.tokenizer.kind,
        "vocab_size": arm.tokenizer.vocab_size,
        "size": arm.size,
        "status": "done",
        "reason": None,
        "grid": [
            {"factor": factor, "learning_rate": rate, "bits_per_byte": _finite(score)}
            for factor, rate, score in arm.grid
        ],
    }


def _failed(arm: ArmRecord) -> dict[str, Any]:
    return {**_described(arm), "status": "failed", "reason": arm.reason}


def _done(arm: ArmRecord, score: Estimate, held_out: HeldOut) -> dict[str, Any]:
    finals = [read_metrics(path)[-1] for path in arm.runs.values()]
    tokens = arm.updates * arm.batch_size * arm.context
    measures = measure(arm.tokenizer, held_out.texts)
    return {
        **_described(arm),
        "parameters": arm.parameters,
        "embedding_parameters": arm.embedding_parameters,
        "bytes_per_token": measures["bytes_per_token"],
        "context": arm.context,
        "context_bytes": arm.context * arm.bytes_per_token,
        "batch_size": arm.batch_size,
        "updates": arm.updates,
        "tokens": tokens,
        "bytes": round(tokens * arm.bytes_per_token),
        "flops": float(tokens * arm.flops_per_token),
        "seconds": float(np.mean([final["seconds"] for final in finals])),
        "learning_rate": arm.learning_rate,
        "muon_learning_rate": arm.muon_learning_rate,
        "loss": float(np.mean([final["final/loss"] for final in finals])),
        "bits_per_byte": score.value,
        "low": score.low,
        "high": score.high,
        "by_seed": [final["final/bits_per_byte"] for final in finals],
        "measures": {
            **{key: _finite(value) for key, value in measures.items()},
            "embedding_share": arm.embedding_parameters / arm.parameters,
            "seconds_to_train": _finite(arm.seconds_to_train),
            "encoding_speed": _encoding_speed(arm.tokenizer, held_out),
        },
        "longest_tokens": [visible(token) for token in longest_tokens(arm.tokenizer)],
        "samples": [{"seed": seed, "text": _sample(path)} for seed, path in arm.runs.items()],
    }


def _evaluations(arm: ArmRecord) -> list[dict[str, Any]]:
    """One row a seed and evaluation, those of the run's end too."""
    rows = []
    for seed, path in arm.runs.items():
        for line in read_metrics(path):
            kind = next((kind for kind in ("eval", "final") if f"{kind}/loss" in line), None)
            if kind is None:
                continue
            rows.append(
                {
                    "arm": arm.name,
                    "seed": seed,
                    "step": line["step"],
                    "tokens": line["tokens"],
                    "bytes": line["bytes"],
                    "flops": float(line["tokens"] * arm.flops_per_token),
                    "seconds": line["seconds"],
                    "loss": line[f"{kind}/loss"],
                    "bits_per_byte": line[f"{kind}/bits_per_byte"],
                    "bits_per_byte_se": line[f"{kind}/bits_per_byte_se"],
                    "final": kind == "final",
                }
            )
    return rows


def _difference(a: str, b: str, found: Estimate, seeds: tuple[int, int]) -> dict[str, Any]:
    if found.se_seeds is None:
        verdict = "one seed: not judged"
    elif found.se_documents is None:
        verdict = "one document: not judged"
    elif not found.excludes_zero:
        verdict = "no difference shown"
    else:
        verdict = "a lower" if found.value < 0 else "b lower"
    return {
        "a": a,
        "b": b,
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "se_documents": found.se_documents,
        "se_seeds": found.se_seeds,
        "seeds": list(seeds),
        "verdict": verdict,
    }


def _sample(path: Path) -> str:
    """The last sample of a run."""
    text = (path / SAMPLES_FILE).read_text(encoding="utf-8")
    return text[text.rindex("--- step ") :].split("\n", 1)[1].rstrip("\n")


def _encoding_speed(tokenizer: Tokenizer, held_out: HeldOut) -> float:
    seconds = math.inf
    for _ in range(2):
        started = time.perf_counter()
        tokenizer.encode_batch(held_out.texts, allowed_special="none")
        seconds = time.perf_counter() - started
    return float(held_out.document_bytes.sum() / seconds / 1e6)


def _tokens(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    ids = tokenizer.encode(text, allowed_special="none")
    lengths = tokenizer.byte_lengths(ids)
    return [
        {"id": int(token), "text": visible(tokenizer.token_bytes(int(token))), "bytes": int(length)}
        for token, length in zip(ids, lengths, strict=True)
    ]


def paragraphs(texts: Sequence[str], *, count: int = 3, characters: int = 320) -> list[str]:
    """The first paragraphs of some length of different documents, cut at a word."""
    found = []
    for text in texts:
        paragraph = max(text.split("\n"), key=lambda line: min(len(line), characters)).strip()
        if len(paragraph) > characters:
            paragraph = paragraph[:characters].rsplit(" ", 1)[0]
        if paragraph:
            found.append(paragraph)
        if len(found) == count:
            break
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
