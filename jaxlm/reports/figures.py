"""Figures, as PNG files, from run directories and token lists alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxlm.reports.tables import TOKEN_COLOURS
from jaxlm.tokenizers.base import replacing, visible

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def learning_curve(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Training loss, and held-out bits per byte with its standard error, against source bytes seen."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [line for line in metrics if line.get("train/loss") is not None]
    left.plot(
        [line["bytes"] / 1e6 for line in losses], [line["train/loss"] for line in losses], color=_COLOURS[0], lw=0.8
    )
    _label(left, "source bytes seen (MB)", "training loss (nats per token)")
    scored = [line for line in metrics if line.get("eval/bits_per_byte") is not None]
    right.errorbar(
        [line["bytes"] / 1e6 for line in scored],
        [line["eval/bits_per_byte"] for line in scored],
        yerr=[line["eval/bits_per_byte_se"] or 0.0 for line in scored],
        color=_COLOURS[1], marker="o", markersize=3.5, elinewidth=0.8, capsize=2,
    )  # fmt: skip
    _label(right, "source bytes seen (MB)", "held-out bits per byte")
    figure.suptitle(title)
    _save(figure, path)


def tokenizer_figure(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    sentence: str,
    tokenized: Mapping[str, Sequence[bytes]],
    path: Path,
) -> None:
    """Above: bytes per token against vocabulary size; below: one sentence in coloured tokens under each tokenizer."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.6, 1))
    for index, (name, (sizes, ratios)) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        marker = "o" if len(sizes) < 3 else None
        above.plot(sizes, ratios, label=name, color=colour, marker=marker, markersize=8)
    _label(above, "vocabulary size", "held-out bytes per token")
    above.legend(frameon=False)
    _token_strips(below, tokenized)
    below.set_title(f"« {sentence} »", fontsize=10)
    _save(figure, path)


def _token_strips(axis: Axes, tokenized: Mapping[str, Sequence[bytes]]) -> None:
    """One row of coloured boxes a tokenizer, a character as wide in each."""
    for row, (name, tokens) in enumerate(tokenized.items()):
        left = 0.0
        for index, token in enumerate(tokens):
            shown = visible(token)
            colour = TOKEN_COLOURS[index % len(TOKEN_COLOURS)]
            axis.barh(-row, len(shown), left=left, height=0.62, color=colour, edgecolor="white", linewidth=1)
            axis.text(
                left + len(shown) / 2, -row, shown, ha="center", va="center", fontsize=8.5, family="DejaVu Sans Mono"
            )
            left += len(shown)
        axis.text(-0.8, -row, f"{name}  ({len(tokens)})", ha="right", va="center", fontsize=9)
    axis.axis("off")


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140)
