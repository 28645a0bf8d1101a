"""The benchmark that fuzzes counts what it did, and tells what failed."""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks.fuzz import Config, run


def test_some_examples_in_two_processes(tmp_path: Path) -> None:
    result = run(Config(examples=60, batch=30, workdir=str(tmp_path)), "documents")
    assert result.failures == ()
    assert result.examples >= 60
    assert result.peak > 0
    assert not list(tmp_path.iterdir())


def test_a_process_that_may_have_no_memory_fails(tmp_path: Path) -> None:
    result = run(Config(examples=30, memory_gb=0.2, workdir=str(tmp_path)), "documents")
    assert len(result.failures) == 1
    assert Path(result.failures[0]).is_file()
