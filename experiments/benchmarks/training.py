"""The training step beside PyTorch's and beside plain Flax: the same model, the same machine, turn by turn in one run.

    python -m experiments.benchmarks.training --torch-python torch-venv/bin/python
    python -m experiments.benchmarks.training --task gpu --torch-python torch-venv/bin/python

Each contender is a process of its own that waits while another takes its steps. On a GPU, where a step may take less
time than to wait for it, several are timed together, and some of ours are one program. Ratios are those of neighbours
in a round, so that a change of the machine's speed hits both; the spread is that of the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from experiments.command_line import program
from jaxlm.attention import rounds
from jaxlm.parallel import peak_flops, use_cores
from jaxlm.runs import console
from jaxlm.tokenizers.base import InputError

CPU: dict[str, Any] = {
    "compute_type": "float32", "attention": None, "dropout": 0.0, "tied_head": False, "at_once": 1, "timed": 1,
}  # fmt: skip
GPU = {**CPU, "compute_type": "bfloat16", "at_once": 10, "timed": 50}  # whose steps are too short to wait for each
SEED = {"vocab_size": 98, "width": 128, "layers": 2, "heads": 4}
LARGER = {"vocab_size": 98, "width": 384, "layers": 6, "heads": 6}
GPT2 = {
    **GPU, "vocab_size": 50_304, "width": 768, "layers": 12, "heads": 12, "tied_head": True, "batch_size": 32,
    "context": 1_024, "at_once": 1, "timed": 10,
}  # fmt: skip
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "seed model, 64 x 256": {**CPU, **SEED, "batch_size": 64, "context": 256},
        "the same, dropout 0.2": {**CPU, **SEED, "batch_size": 64, "context": 256, "dropout": 0.2},
        "seed model, 64 x 256, bfloat16": {**CPU, **SEED, "batch_size": 64, "context": 256, "compute_type": "bfloat16"},
        "seed model, 16 x 1,024": {**CPU, **SEED, "batch_size": 16, "context": 1_024},
        "seed model, 4 x 4,096": {**CPU, **SEED, "batch_size": 4, "context": 4_096},
        "10.7 M, 64 x 256": {**CPU, **LARGER, "batch_size": 64, "context": 256},
        "10.7 M, 64 x 256, bfloat16": {**CPU, **LARGER, "batch_size": 64, "context": 256, "compute_type": "bfloat16"},
    },
    "gpu": {
        "seed model, 64 x 256": {**GPU, **SEED, "batch_size": 64, "context": 256},
        "the same, dropout 0.2": {**GPU, **SEED, "batch_size": 64, "context": 256, "dropout": 0.2},
        "10.7 M, 64 x 256": {**GPU, **LARGER, "batch_size": 64, "context": 256},
        "GPT-2 124 M, 32 x 1,024": GPT2,
        "the same, attention by cudnn": {**GPT2, "attention": "cudnn"},
    },
}


@dataclass(frozen=True)
class Config:
    """Measures training steps side by side."""

    torch_python: str  # the interpreter of an environment with PyTorch, see torch_requirements.txt
    task: Literal["cpu", "gpu"] = "cpu"  # which shapes
    only: str = ""  # shapes whose name contains this
    rounds: int = 5
    seconds: float = 3.0  # a contender's turn takes about so long, and one step at least

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.seconds <= 3_600:
            raise InputError("There is at least one round, and a turn takes some time, an hour at most.")


PRESETS = {"default": Config(torch_python=sys.executable)}


class Contender:
    """A process that takes training steps when it is told to."""

    def __init__(self, name: str, command: list[str], settings: dict[str, Any]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # which leaves memory to the others
        )
        self.steps, self.medians = 1, list[float]()

    def begin(self, steps: int) -> None:
        """Tells it to take steps."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()

    def wait(self) -> float:
        """Waits for the answer; the median of the steps' seconds."""
        assert self.process.stdout
        try:
            self.answer = json.loads(self.process.stdout.readline())
        except json.JSONDecodeError:
            raise InputError(f"{self.name} ended before it answered; what it said stands above.") from None
        return statistics.median(self.answer["seconds"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(name: str, shape: dict[str, Any], config: Config, table: Table) -> set[tuple[float, str]]:
    """Adds the rows of one shape. Returns the device's peak, FLOP/s, and where the figure is from; none if unknown."""
    ours = [sys.executable, "-m", "experiments.benchmarks.training_jax"]
    theirs = [config.torch_python, str(Path(__file__).with_name("training_torch.py"))]
    contenders = [
        Contender("jaxlm", ours, {**shape, "plain": False}),
        Contender("torch.compile", theirs, {**shape, "compile": True}),
    ]
    if config.task == "cpu":  # the memory of a GPU has no room for four
        contenders += [
            Contender("PyTorch, SDPA", theirs, {**shape, "compile": False}),
            Contender("plain Flax", ours, {**shape, "plain": True}),
        ]
    for contender in contenders:  # they compile side by side
        contender.begin(1)
    for contender in contenders:
        contender.wait()
    for contender in contenders:
        contender.begin(1)
        contender.wait()
        contender.begin(1)
        contender.steps = max(1, round(config.seconds / contender.wait()))
    for _ in range(config.rounds):
        for contender in contenders:
            contender.begin(contender.steps)
            contender.medians.append(contender.wait())
    first = contenders[0]
    peak = first.answer["peak"] or peak_flops(rounds(shape["compute_type"]))
    flops, tokens = first.answer["flops"], shape["batch_size"] * shape["context"]
    for contender in contenders:
        median = statistics.median(contender.medians)
        ratios = [theirs / ours for theirs, ours in zip(contender.medians, first.medians, strict=True)]
        table.add_row(
            f"{name}\n{first.answer['parameters']:,} parameters" if contender is first else "",
            contender.name,
            f"{median * 1e3:,.{1 if median < 0.1 else 0}f}",
            f"{tokens / median:,.0f}",
            f"{flops / median / peak[0]:.0%}" if peak else "-",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{contender.answer['memory'] / 1e6:,.0f} MB",
            contender.answer["device"],
            end_section=contender is contenders[-1],
        )
        contender.close()
    return {(peak[0], peak[1])} if peak else set()


def main(config: Config) -> None:
    use_cores(64)
    peaks: set[tuple[float, str]] = set()
    table = Table(title=f"training step: median of {config.rounds} rounds; ours is faster by the median ratio (range)")
    for column in ("model", "contender", "ms", "tokens/s", "of peak", "ours is faster by", "memory", "device"):
        table.add_column(column, justify="left" if column in ("model", "contender", "device") else "right")
    for name, shape in SHAPES[config.task].items():
        if config.only in name:
            peaks |= measure(name, shape, config, table)
            console.print(f"{name}: done")
    console.print(table)
    for flops, source in sorted(peaks):
        console.print(f"peak: {flops / 1e9:,.0f} GFLOP/s, {source}")


if __name__ == "__main__":
    program("experiments.benchmarks.training", PRESETS, main)
