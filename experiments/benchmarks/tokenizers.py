"""Our BPE beside other libraries: training, encoding, decoding, memory, and how cost grows with size and threads.

    pip install -r experiments/benchmarks/requirements.txt
    python -m experiments.benchmarks.tokenizers --corpus "texts/*.parquet"
    python -m experiments.benchmarks.tokenizers --task encoding --corpus "texts/*.parquet"
    python -m experiments.benchmarks.tokenizers --task threads --corpus "texts/*.parquet"
    python -m experiments.benchmarks.tokenizers --task scaling --corpus "texts/*.parquet"
    python -m experiments.benchmarks.tokenizers --task stream --corpus "texts/*.parquet"

Each library runs in a process of its own, all on the same text, the same split and the same vocabulary size. They take
turns, so that all see the same machine, but for those that take over nine seconds, which are measured twice. Ids are
compared before a time is quoted. SentencePiece has another algorithm, whose ids can't be compared; the reference, in
plain Python, gets a part of the text.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from rich.table import Table

from experiments.benchmarks.tokenizer_scaling import measure_scaling, measure_stream, measure_threads
from experiments.command_line import program
from jaxlm.data.documents import open_corpus
from jaxlm.runs import console
from jaxlm.tokenizers import BPETokenizer
from jaxlm.tokenizers.base import InputError, replacing
from jaxlm.tokenizers.bpe import check_highest_id

TRAINERS = ("jaxlm", "rustbpe", "tokenizers", "bpeasy", "sentencepiece")
ENCODERS = ("jaxlm", "rustbpe", "tokenizers", "sentencepiece", "tiktoken", "tiktoken, to numpy")
SHAPES = ("one text", "articles", "lines")
REFERENCE_BYTES = 300_000
SLOW_SECONDS = 9.0


@dataclass(frozen=True)
class Config:
    """Measures tokenizers side by side."""

    task: Literal["training", "threads", "encoding", "scaling", "stream"] = "training"  # what is measured
    corpus: str = "builtin"  # as in the experiments
    vocab_sizes: tuple[int, ...] = (500, 4_096, 32_768, 100_000)  # of training
    encode_vocab_size: int = 4_096  # of encoding
    threads: tuple[int, ...] = (1, os.cpu_count() or 1)  # each library with so many
    repeats: int = 5  # medians are of so many
    figure: str | None = None  # where a picture is written
    stream_gb: float = 5.0  # of the stream

    def __post_init__(self) -> None:
        sizes = (*self.vocab_sizes, self.encode_vocab_size)
        if self.repeats < 1 or min(self.threads, default=0) < 1 or not self.vocab_sizes or min(sizes) < 256:
            raise InputError("There is at least one repeat and one thread, and a vocabulary has at least 256 ids.")
        if max(self.threads) > 1_024:
            raise InputError(f"There are at most 1,024 threads, not {max(self.threads)}.")
        check_highest_id(max(sizes) - 1)
        if not 0 < self.stream_gb <= 1_000:
            raise InputError(f"The stream has more than 0 and at most 1,000 GB, not {self.stream_gb}.")


PRESETS = {"default": Config()}


class Process:
    """A library in a process of its own."""

    def __init__(self, name: str, threads: int, corpus: str) -> None:
        self.name = name
        many = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
        command = [sys.executable, "-m", "experiments.benchmarks.tokenizer_libraries", name, str(threads), corpus]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **many}
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise InputError(f"{self.name} ended before it answered; is it installed?")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure_training(config: Config) -> dict[tuple[str, int], float]:
    """Seconds of training, as a table; the medians by library and vocabulary size, on the first number of threads."""
    medians: dict[tuple[str, int], float] = {}
    for threads in dict.fromkeys(config.threads):
        table = Table(title=f"training, {counted(threads)}: median seconds of {config.repeats}")
        for name in ("library", "vocabulary", "cold", "median", "MB/s", "ours is faster by", "same tokens", "memory"):
            table.add_column(name, justify="left" if name == "library" else "right")
        for vocab_size in config.vocab_sizes:
            processes = {name: Process(name, threads, config.corpus) for name in TRAINERS}
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
            for _ in range(config.repeats + 1):
                for name, process in processes.items():
                    if not is_slow(answers[name]):
                        answers[name].append(process.ask(do="train", vocab_size=vocab_size))
            for process in processes.values():
                process.close()
            ours = statistics.median(answer["seconds"] for answer in answers["jaxlm"][1:])
            for name, given in answers.items():
                median = statistics.median(answer["seconds"] for answer in given[1:])
                if threads == config.threads[0]:
                    medians[name, vocab_size] = median
                table.add_row(
                    name,
                    f"{vocab_size:,}",
                    f"{given[0]['seconds']:.2f}",
                    f"{median:.2f}",
                    f"{given[0]['bytes'] / 1e6 / median:.1f}",
                    f"{median / ours:.1f}",
                    in_common(answers["jaxlm"][0]["tokens"], given[0]["tokens"]),
                    f"{given[0]['peak_mb'] - given[0]['before_mb']:.0f} MB",
                    end_section=name == TRAINERS[-1],
                )
        console.print(table)
    pair = [Process(name, 1, config.corpus) for name in ("jaxlm", "reference")]
    _, plain = [process.ask(do="train", vocab_size=500, max_bytes=REFERENCE_BYTES) for process in pair]
    ours_once = pair[0].ask(do="train", vocab_size=500, max_bytes=REFERENCE_BYTES)
    assert ours_once["tokens"] == plain["tokens"]
    console.print(
        f"The reference, on {plain['bytes'] / 1e6:.1f} MB, vocabulary 500: {plain['seconds']:.1f} s, "
        f"ours {ours_once['seconds'] * 1e3:.1f} ms, the same tokens."
    )
    for process in pair:
        process.close()
    return medians


def is_slow(answers: list[dict[str, Any]]) -> bool:
    """Whether one measurement after the cold one is enough, since it takes so long that its noise is small."""
    return len(answers) > 1 and answers[0]["seconds"] > SLOW_SECONDS


def in_common(ours: list[str], theirs: list[str] | None) -> str:
    """How many of the tokens learned are the same, and how many from the first on."""
    if theirs is None:
        return "-"
    first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    return "all" if ours == theirs else f"{len(set(ours) & set(theirs)) / len(ours):.2%}, first {first:,}"


def measure_encoding(config: Config) -> dict[tuple[str, str], float]:
    """Megabytes a second of encoding and decoding, as tables; by library and shape, on the first number of threads."""
    speeds: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        documents = open_corpus(config.corpus).documents()
        BPETokenizer.train(documents, config.encode_vocab_size, special_tokens=()).save(folder)
        for threads in dict.fromkeys(config.threads):
            table = Table(
                title=f"encoding, vocabulary {config.encode_vocab_size:,}, {counted(threads)}: "
                f"MB/s, median of {config.repeats}"
            )
            for name in ("library", "text", "cold", "warm", "ours is faster by", "ids", "memory"):
                table.add_column(name, justify="left" if name in ("library", "text") else "right")
            for shape in SHAPES:
                processes = {name: Process(name, threads, config.corpus) for name in ENCODERS}
                answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ENCODERS}
                for process in processes.values():
                    process.ask(do="load", directory=folder)
                for _ in range(config.repeats + 1):
                    for name, process in processes.items():
                        if not is_slow(answers[name]):
                            answers[name].append(process.ask(do="encode", shape=shape))
                for process in processes.values():
                    process.close()
                speed = {
                    name: given[0]["bytes"] / 1e6 / statistics.median(answer["seconds"] for answer in given[1:])
                    for name, given in answers.items()
                }
                for name, given in answers.items():
                    if threads == config.threads[0]:
                        speeds[name, shape] = speed[name]
                    same = given[0]["ids"] == answers["jaxlm"][0]["ids"]
                    table.add_row(
                        name,
                        f"{shape} ({given[0]['texts']:,})",
                        f"{given[0]['bytes'] / 1e6 / given[0]['seconds']:.1f}",
                        f"{speed[name]:.1f}",
                        f"{speed['jaxlm'] / speed[name]:.1f}",
                        "the same" if same else "its own",
                        f"{given[0]['peak_mb'] - given[0]['before_mb']:.0f} MB",
                        end_section=name == ENCODERS[-1],
                    )
                decoded = statistics.median(answer["decode_seconds"] for answer in answers["jaxlm"][1:])
                if threads == config.threads[0]:
                    table.caption = f"{table.caption or 'decoding, ours:'} {shape} "
                    table.caption += f"{answers['jaxlm'][0]['bytes'] / 1e6 / decoded:.0f} MB/s;"
            console.print(table)
    return speeds


def counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def draw(values: dict[tuple[str, Any], float], unit: str, better: str, threads: int, path: Path) -> None:
    """Horizontal bars, one panel a text or vocabulary size, ours in colour."""
    groups = list(dict.fromkeys(group for _, group in values))
    figure = Figure(figsize=(3.1 * len(groups), 2.6), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        names = [name for name, other in values if other == group][::-1]
        lengths = [values[name, group] for name in names]
        colours = ["#d1495b" if name == "jaxlm" else "#a9b4c2" for name in names]
        bars = panel.barh(names, lengths, color=colours)
        panel.bar_label(bars, [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in lengths], padding=3)
        panel.set_title(f"{group:,} ids" if isinstance(group, int) else group)
        panel.set_xlim(0, 1.25 * max(lengths))
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supxlabel(f"{unit}, {counted(threads)} ({better})", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    console.print(f"figure: {path}", markup=False)


def main(config: Config) -> None:
    if config.task == "threads":
        measure_threads(config.corpus, config.vocab_sizes, config.threads, config.repeats)
    elif config.task == "scaling":
        measure_scaling(config.corpus, Path(config.figure or "scaling.png"))
    elif config.task == "stream":
        measure_stream(config.corpus, config.stream_gb)
    elif config.task == "training":
        seconds = measure_training(config)
        draw(seconds, "seconds of training", "less is better", config.threads[0], Path(config.figure or "training.png"))
    else:
        speeds = measure_encoding(config)
        draw(speeds, "MB/s of encoding", "more is better", config.threads[0], Path(config.figure or "encoding.png"))


if __name__ == "__main__":
    program("experiments.benchmarks.tokenizers", PRESETS, main)
