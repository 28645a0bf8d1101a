"""What is shown while something runs: bars, the lines of a training, and a live table of several."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich import box
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxlm.evaluation import Evaluation
from jaxlm.runs import console


class _Fields(ProgressColumn):
    """Figures of the training so far, as the loop gives them."""

    def render(self, task: Any) -> str:
        return task.fields.get("figures", "")


def training_progress() -> Progress:
    """A bar with step, loss, bits per byte, tokens per second and the time left. Nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Fields(),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


def share_progress(description: str, total: int) -> Progress:
    """A bar that shows which share of `total` is done, bytes or merges; advance its only task."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    progress.add_task(description, total=total)
    return progress


@dataclass(frozen=True)
class Figures:
    """How a run stands.

    Attributes:
      step: completed updates.
      loss: training loss of the last step, nats per token; bits_per_byte: the same in bits per source byte.
      held_out: bits per byte of the last evaluation; None before the first.
      tokens_per_second: lately; NaN before the first line of metrics.
    """

    step: int
    loss: float
    bits_per_byte: float
    held_out: float | None
    tokens_per_second: float


class Reporter:
    """What is shown of runs while they train. This one shows nothing; `run` counts those that train together."""

    def begin(self, step: int, steps: int, facts: Sequence[str]) -> None:
        """Training starts, at `step`; the facts are lines on what it runs on."""

    def progress(self, run: int, figures: Figures) -> None:
        """After each program of steps."""

    def evaluated(self, run: int, step: int, seconds: float, evaluation: Evaluation) -> None:
        """After each evaluation during training."""

    def sampled(self, run: int, step: int, text: str) -> None:
        """After each sample."""

    def end(self) -> None:
        """Training has ended, whichever way."""


class TerminalReporter(Reporter):
    """A progress bar, a line an evaluation, and samples in colour: a single run at the terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def begin(self, step: int, steps: int, facts: Sequence[str]) -> None:
        for fact in facts:
            console.print(fact)
        self._progress = training_progress()
        self._progress.add_task("training", total=steps, completed=step)
        self._progress.start()

    def progress(self, run: int, figures: Figures) -> None:
        assert self._progress is not None
        text = f"loss {figures.loss:.3f}  {figures.bits_per_byte:.3f} bits/byte"
        if figures.held_out is not None:
            text += f" (held out {figures.held_out:.3f})"
        if not math.isnan(figures.tokens_per_second):
            text += f"  {figures.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._progress.task_ids[0], completed=figures.step, figures=text)

    def evaluated(self, run: int, step: int, seconds: float, evaluation: Evaluation) -> None:
        console.print(
            f"step {step:>7,}  {seconds:>7,.0f} s  held-out loss {evaluation.loss:.4f}  "
            f"[bold]{evaluation.bits_per_byte:.4f}[/] ± {evaluation.standard_error:.4f} bits per byte"
        )

    def sampled(self, run: int, step: int, text: str) -> None:
        console.print(f"[bold]{'sample':>12}[/]  ", end="")
        console.print(text.replace("\n", "\n" + " " * 14), style="cyan", markup=False)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class LiveTable:
    """A live line for each of several things that train one after the other: how far, how good, how fast, how long yet.

    Where there is no terminal, a line of text for each stage.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._rows = {name: _Row() for name in names}
        self._live = Live(self._table(), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage(self, name: str, stage: str, *, bits_per_byte: float | None = None) -> None:
        """What a line does now, or how it ended."""
        row = self._rows[name]
        row.stage, row.bits_per_byte, row.seconds_left = stage, bits_per_byte or row.bits_per_byte, None
        if console.is_terminal:
            self._live.update(self._table())
        else:
            text = f"{name}: {stage}"
            console.print(text if bits_per_byte is None else f"{text}, {bits_per_byte:.4f} bits per byte", markup=False)

    def reporter(self, name: str) -> Reporter:
        """What keeps a line up to date while its runs train."""
        return _RowReporter(self, self._rows[name])

    def refresh(self) -> None:
        if console.is_terminal:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("arm")
        table.add_column("")
        table.add_column("progress")
        for name in ("bits per byte", "tokens/s", "time left"):
            table.add_column(name, justify="right")
        for name, row in self._rows.items():
            table.add_row(
                Text(name),
                row.stage,
                ProgressBar(total=row.steps, completed=row.step, width=24) if row.steps else "",
                "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
                "" if math.isnan(row.tokens_per_second) else f"{row.tokens_per_second:,.0f}",
                "" if row.seconds_left is None else f"{row.seconds_left // 60:.0f}:{row.seconds_left % 60:02.0f}",
            )
        return table


@dataclass
class _Row:
    stage: str = "waiting"
    step: int = 0
    steps: int = 0
    bits_per_byte: float | None = None  # held out, else of the training text
    tokens_per_second: float = math.nan
    seconds_left: float | None = None


class _RowReporter(Reporter):
    def __init__(self, table: LiveTable, row: _Row) -> None:
        self._table, self._row = table, row

    def begin(self, step: int, steps: int, facts: Sequence[str]) -> None:
        self._row.step, self._row.steps = step, steps
        self._first, self._started = step, time.monotonic()
        self._table.refresh()

    def progress(self, run: int, figures: Figures) -> None:
        row = self._row
        row.step, row.tokens_per_second = figures.step, figures.tokens_per_second
        row.bits_per_byte = figures.bits_per_byte if figures.held_out is None else figures.held_out
        done = figures.step - self._first
        row.seconds_left = (time.monotonic() - self._started) / done * (row.steps - figures.step)
        self._table.refresh()
