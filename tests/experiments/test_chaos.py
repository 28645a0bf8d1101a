"""A short version of the benchmark that kills trainings at random moments."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks.chaos import Config, run


def test_three_kills_leave_no_trace(tmp_path: Path) -> None:
    result = run(Config(kills=3, steps=20, seed=1), tmp_path)
    assert result.kills.total() == 3
    assert result.equal
    # A save is every five steps, and written beside the next five; then the next save waits for it.
    assert result.steps_repeated <= 3 * 10, "no kill costs more than the steps since the last complete save"
