"""Figures are written whole, show every series that they are given, and leave nothing temporary behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlm.reports import figures

METRICS = [
    {"step": 1, "bytes": 10, "train/loss": 4.0},
    {"step": 2, "bytes": 20, "eval/bits_per_byte": 3.0, "eval/bits_per_byte_se": 0.1},
    {"step": 3, "bytes": 30, "train/loss": None},
    {"step": 4, "bytes": 40, "eval/bits_per_byte": 2.0, "eval/bits_per_byte_se": None},
    {"step": 4, "bytes": 40, "final/loss": 1.4, "final/bits_per_byte": 2.1, "final/bits_per_byte_se": None},
]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the figure that was drawn last."""
    drawn: list[Axes] = []
    save = Figure.savefig

    def remember(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn[:] = figure.axes
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return drawn


def check(path: Path) -> None:
    image = plt.imread(path)
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert np.unique(image.reshape(-1, image.shape[2]), axis=0).shape[0] > 10, "the figure is blank"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_learning_curve(tmp_path: Path, axes: list[Axes]) -> None:
    figures.learning_curve(METRICS, tmp_path / "new" / "curve.png", title="char")
    check(tmp_path / "new" / "curve.png")
    np.testing.assert_allclose(axes[0].lines[0].get_xydata(), [[1e-5, 4.0]])
    np.testing.assert_allclose(axes[1].lines[0].get_xydata(), [[2e-5, 3.0], [4e-5, 2.0]])


def test_tokenizers(tmp_path: Path, axes: list[Axes]) -> None:
    curves = {"BPE": ([257, 300, 400], [1.0, 1.4, 1.9]), "characters": ([98], [1.02])}
    tokenized = {"BPE": [b"L'", "été".encode()], "characters": [b"L", b"'", "é".encode(), b"t", "é".encode()]}
    figures.tokenizer_figure(curves, "L'été", tokenized, tmp_path / "tokenizers.png")
    check(tmp_path / "tokenizers.png")
    assert len(axes[0].lines) == 2
    assert len(axes[1].patches) == 7
    shown = [text.get_text() for text in axes[1].texts]
    assert "été" in shown
    assert "characters  (5)" in shown
