"""What is shown while runs train: one live line an arm, and plain lines where there is no terminal."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from jaxlm import progress
from jaxlm.evaluation import Evaluation
from jaxlm.progress import Figures, LiveTable, Reporter, TerminalReporter


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    return output


def figures(step: int, held_out: float | None = None) -> Figures:
    return Figures(step, loss=2.0, bits_per_byte=3.125, held_out=held_out, tokens_per_second=12_345.0)


def shown(table: LiveTable, width: int = 120) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width).print(table._table())
    return output.getvalue().splitlines()


def test_a_live_line_says_how_far_how_good_how_fast_and_how_long_yet(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with LiveTable(["char-98", "[bold]bpe"]) as table:
        assert sum("waiting" in line for line in shown(table)) == 2
        table.stage("char-98", "4 seeds")
        reporter = table.reporter("char-98")
        reporter.begin(10, 50, [])
        reporter.progress(0, figures(20))
        line = next(line for line in shown(table) if "char-98" in line)
        assert "4 seeds" in line and "3.1250" in line and "12,345" in line and "0:30" in line
        reporter.progress(1, figures(30, held_out=2.5))
        line = next(line for line in shown(table) if "char-98" in line)
        assert "2.5000" in line and "0:20" in line
        table.stage("char-98", "done")
        assert any("[bold]bpe" in line for line in shown(table)), "a name is no markup"
    assert "char-98" in screen.getvalue()


def test_without_a_terminal_each_stage_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=output, width=120))
    with LiveTable(["a[b]"]) as table:
        table.stage("a[b]", "one seed")
        table.reporter("a[b]").begin(0, 5, [])
        table.reporter("a[b]").evaluated(0, 5, 1.0, Evaluation(1.0, 2.0, 0.1, 1, 1, 1, None))  # type: ignore[arg-type]
    assert output.getvalue() == "a[b]: one seed\n"


def test_a_single_run_shows_its_facts_evaluations_and_samples(screen: io.StringIO) -> None:
    reporter = TerminalReporter()
    reporter.end()  # before it began
    reporter.begin(0, 10, ["attention: blocks"])
    reporter.progress(0, figures(3))
    reporter.progress(0, Figures(4, 2.0, 3.0, 2.75, math.nan))
    reporter.evaluated(0, 4, 12.0, Evaluation(1.5, 2.25, 0.01, 3, 10, 20, None))  # type: ignore[arg-type]
    reporter.sampled(0, 4, "la [rue]\nbleue")
    reporter.end()
    text = screen.getvalue()
    for part in ("attention: blocks", "loss 2.000", "held out 2.750", "2.2500 ± 0.0100", "la [rue]", "bleue"):
        assert part in text


def test_the_plain_reporter_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.begin(0, 1, ["x"])
    reporter.progress(0, figures(1))
    reporter.sampled(0, 1, "x")
    reporter.end()
    assert capsys.readouterr().out == ""
