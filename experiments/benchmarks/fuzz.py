"""Gives the loaders and the report what nobody would write, and looks whether they refuse it in one sentence.

    python -m experiments.benchmarks.fuzz --examples 100000
    python -m experiments.benchmarks.fuzz --areas documents --examples 2000 --seed 5

The properties are those of tests/test_fuzz.py. Each area runs in processes of its own, some ten thousand examples in
each, with a bound on memory; one that stands still is killed. An example has bounds of its own there: 10 s of processor
time, and 400 MB.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.command_line import program
from jaxlm.reports.tables import rows_table
from jaxlm.runs import RunFailed, console
from jaxlm.tokenizers.base import InputError

Area = Literal["tokenizer", "config", "documents", "report"]
AREAS: tuple[Area, ...] = ("tokenizer", "config", "documents", "report")
_STANDSTILL = 600.0  # seconds without another example, the start of a process included


@dataclass(frozen=True)
class Config:
    """Fuzzes the tokenizer loader, the config loader, the documents readers and the report's escaping."""

    areas: tuple[Area, ...] = AREAS
    examples: int = 100_000  # of each area, divided among its properties
    batch: int = 50_000  # examples of one process
    seed: int = 0  # of the first one; each has another
    memory_gb: float = 8.0  # of addresses, that a process may have
    workdir: str = "runs/fuzz"  # what failed is written there

    def __post_init__(self) -> None:
        if self.examples < 1 or self.batch < 1 or not 0 < self.memory_gb <= 1_000_000:
            raise InputError("There has to be at least one example, in each process too, and up to 1,000,000 GB.")
        if self.seed < 0:
            raise InputError(f"The seed is at least 0, not {self.seed}.")


PRESETS = {"all": Config()}


@dataclass
class Result:
    """What an area came to: examples, their wall-clock seconds with the starts of processes, the slowest one's seconds,
    the most memory in bytes, and the outputs of processes that failed."""

    examples: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    peak: int = 0
    failures: tuple[str, ...] = ()


def main(config: Config) -> None:
    rows = []
    failures: list[str] = []
    for area in config.areas:
        result = run(config, area)
        failures += result.failures
        rows.append(
            (
                area,
                f"{result.examples:,}",
                f"{result.seconds:,.0f}",
                f"{result.slowest:.2f}",
                f"{result.peak / 1e6:,.0f}",
                f"{len(result.failures)}",
            )
        )
    columns = ("area", "examples", "seconds", "slowest example, s", "peak memory, MB", "processes that failed")
    console.print(rows_table(columns, rows))
    if failures:
        raise RunFailed(f"{len(failures)} processes failed: see {', '.join(failures)}.")


def run(config: Config, area: str) -> Result:
    """All examples of an area, process after process."""
    result = Result()
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    started = time.monotonic()
    with progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task(area, total=config.examples)
        for number, first in enumerate(range(0, config.examples, config.batch)):
            log = Path(folder) / f"{number}.json"
            count = min(config.batch, config.examples - first)
            output = Path(config.workdir) / f"{area}-{config.seed + number}.txt"
            output.parent.mkdir(parents=True, exist_ok=True)
            before = result.examples
            with output.open("w") as file:
                process = start(area, count, config.seed + number, log, file, config.memory_gb)
                moved, done = time.monotonic(), 0
                while process.poll() is None:
                    time.sleep(0.5)
                    found = read(log)
                    if found["examples"] != done:
                        moved, done = time.monotonic(), found["examples"]
                        progress.update(task, completed=before + done)
                    if time.monotonic() - moved > _STANDSTILL:
                        file.write("\nIt stood still, and was killed.\n")
                        process.kill()
            found = read(log)
            result.examples += found["examples"]
            result.slowest = max(result.slowest, found["slowest"])
            result.peak = max(result.peak, found["peak"])
            if process.returncode:
                result.failures += (str(output),)
            else:
                output.unlink()
            result.seconds = time.monotonic() - started
            console.print(
                f"{area}: {result.examples:,} examples, {result.seconds:,.0f} s, "
                f"{len(result.failures)} processes that failed",
                style="dim",
            )
    return result


def start(area: str, examples: int, seed: int, log: Path, output: Any, memory_gb: float) -> subprocess.Popen[bytes]:
    """A process that runs the properties of an area."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short"),
            *(f"--hypothesis-seed={seed}", "-k", f"test_{area}", "tests/test_fuzz.py"),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTEST_ADDOPTS": "", "JAXLM_FUZZ_EXAMPLES": str(examples), "JAXLM_FUZZ_LOG": str(log)},
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    limit = round(memory_gb * 2**30)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    return process


def read(log: Path) -> dict[str, Any]:
    """What a process has done so far."""
    try:
        return json.loads(log.read_bytes())
    except (OSError, ValueError):  # not there yet, or half written
        return {"examples": 0, "slowest": 0.0, "peak": 0}


if __name__ == "__main__":
    program("experiments.benchmarks.fuzz", PRESETS, main)
