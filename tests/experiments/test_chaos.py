"""A short version of the benchmark that kills trainings at random moments."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks.chaos import Config, run


def test_five_kills_leave_no_trace(tmp_path: Path) -> None:
    result = run(Config(kills=5, steps=20, seed=1), tmp_path)
    assert result.kills.total() == 5
    assert result.equal
    assert result.steps_repeated <= 5 * 5, "no kill costs more than the steps since the last save"
