"""What is shown while something runs: bars, and the lines of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

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
        """After each step."""

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
