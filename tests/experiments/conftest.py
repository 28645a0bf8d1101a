"""Experiments called in this process, as from a command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from experiments.command_line import program

TEXT = "\n\n".join(f"Le chat numéro {i} dort sur le toit rouge de la maison {i % 7}, près du puits." for i in range(40))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit status of `python -m MODULE FLAGS`."""

    def status(module: ModuleType, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
        with pytest.raises(SystemExit) as caught:
            program(module.__name__, module.PRESETS, module.main)
        return int(caught.value.code or 0)

    return status


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A small text file of 40 documents."""
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "corpus.txt")
