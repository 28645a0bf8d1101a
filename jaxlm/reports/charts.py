"""Charts of a tokenizer comparison, drawn once for two uses: SVG within the report page, and PNG for a paper.

All of them are drawn from the results of the comparison, JSON-able data, and from nothing else. They are 360 points
wide, the width of a phone, with letters of 10 points and more, so that these can still be read there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from jaxlm.reports import drawing
from jaxlm.reports.drawing import Results, done_arms
from jaxlm.reports.quantities import amount, axis_scale
from jaxlm.reports.sentences import between
from jaxlm.tokenizers.base import replacing

_NAMED = 12  # arms whose numbers a text alternative tells


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
      key: a name for files and ids.
      title: what is shown, in a few words.
      caption: how to read it.
      alternative: the main numbers, for those who don't see the picture.
      draw: the figure; with True it holds its own legend of arms.
    """

    key: str
    title: str
    caption: str
    alternative: str
    draw: Callable[[bool], Figure]


def charts(results: Results) -> list[Chart]:
    """The charts that these results can fill, in the order of the page; none if no arm has a score."""
    if not done_arms(results):
        return []
    found = [forest_chart(results)] if results["differences"] else []
    found += [chart for unit in ("bytes", "flops", "seconds") if (chart := curve_chart(results, unit)) is not None]
    sizes: dict[str, set[int]] = defaultdict(set)
    for arm in done_arms(results):
        sizes[arm["family"]].add(arm["vocab_size"])
    if any(len(family) > 1 for family in sizes.values()):
        found.append(size_chart(results))
    return [*found, compression_chart(results), unit_chart(results)]


def write_figures(results: Results, directory: Path) -> list[Path]:
    """Every chart as a PNG file of 200 dots an inch, each written under a temporary name first; their paths."""
    paths = []
    for chart in charts(results):
        path = directory / f"{chart.key}.png"
        with replacing(path) as temporary, drawing.look():
            chart.draw(True).savefig(temporary, dpi=200, facecolor="white")
        paths.append(path)
    return paths


def curve_chart(results: Results, unit: str) -> Chart | None:
    """Held-out bits per byte against `unit`: the mean over seeds, and a band from the lowest to the highest."""
    curves = {arm["name"]: _curve(results, arm["name"], unit) for arm in done_arms(results)}
    curves = {name: curve for name, curve in curves.items() if curve.size}
    if not curves:
        return None
    nouns = {"bytes": "source bytes seen", "flops": "training FLOPs", "seconds": "training time"}
    captions = {
        "bytes": "Held-out bits per byte as training goes on; lower is better. The first steps lie above the frame. "
        "During training a share of the held-out documents is scored, for the table all of them.",
        "flops": "The same against the arithmetic that it took: what each arm makes of equal computation.",
        "seconds": "The same against the time that it took here, without compilation, evaluation and sampling.",
    }
    divisor, axis_label = axis_scale(unit, max(curve[0].max() for curve in curves.values()))
    ends = [f"{name} {curve[1, -1]:.3f} at {amount(unit, curve[0, -1])}" for name, curve in curves.items()]
    band = " The band goes from the lowest seed to the highest." if len(results["seeds"]) > 1 else ""
    return Chart(
        f"curve-{unit}",
        f"Bits per byte against {nouns[unit]}",
        f"{captions[unit]}{band}",
        f"Line chart. The last evaluation of each: {_listing(ends)}.",
        partial(drawing.draw_curves, results, curves, divisor, axis_label),
    )


def size_chart(results: Results) -> Chart:
    """Final bits per byte against the number of ids, a line for each family."""
    arms = sorted(done_arms(results), key=lambda arm: arm["vocab_size"])
    values = [f"{arm['name']} ({arm['vocab_size']:,} ids) {arm['bits_per_byte']:.3f}" for arm in arms]
    return Chart(
        "vocabulary-size",
        "Bits per byte against the size of the vocabulary",
        "Final bits per byte with 95\u00a0% intervals against the number of ids (logarithmic), a line for each family.",
        f"Line chart by family. Bits per byte: {_listing(values)}.",
        partial(drawing.draw_sizes, results),
    )


def compression_chart(results: Results) -> Chart:
    """Bytes per token on held-out text against final bits per byte."""
    values = [
        f"{arm['name']} {arm['bytes_per_token']:.2f} bytes per token and {arm['bits_per_byte']:.3f} bits per byte"
        for arm in done_arms(results)
    ]
    return Chart(
        "compression",
        "Does better compression predict a better model?",
        "How much held-out text a token holds, against final bits per byte with its 95\u00a0% interval; lower is "
        "better. If compression decided, the points would fall along one line.",
        f"Scatter plot. {_listing(values)}.",
        partial(drawing.draw_compression, results),
    )


def forest_chart(results: Results) -> Chart:
    """Differences of pairs of arms with their intervals."""
    rows = shown_differences(results)
    values = [
        f"{row['a']} minus {row['b']} {row['difference']:+.4f}{_interval(row)}, {row['verdict_text']}" for row in rows
    ]
    return Chart(
        "differences",
        "Differences in bits per byte",
        "Each point is the first arm minus the second, with its 95\u00a0% interval; left of zero the first needs fewer "
        "bits. Filled: a difference is shown. Hollow: none is, or there is one seed only.",
        f"Forest plot of differences in bits per byte: {_listing(values)}.",
        lambda legend: drawing.draw_forest(rows),
    )


def unit_chart(results: Results) -> Chart:
    """Loss per token, which can't be compared, beside bits per byte, which can."""
    arms = done_arms(results)
    values = [
        f"{arm['name']} {arm['loss']:.3f} nats per token, {arm['bits_per_byte']:.3f} bits per byte" for arm in arms
    ]
    return Chart(
        "units",
        "Loss per token beside bits per byte",
        "Left, nats per token: a token is another amount of text in each row, so the bars have different units and no "
        "order. Right, bits per byte of the same text: one unit.",
        f"Two bar charts. {_listing(values)}.",
        lambda legend: drawing.draw_units(arms),
    )


def shown_differences(results: Results) -> list[dict[str, Any]]:
    """All pairs up to six; of more, those with the first arm that has a score, each as another arm minus that one.

    Each row is of `differences`, with `verdict_text`: the verdict with the arm's name.
    """
    rows = list(results["differences"])
    if len(rows) > 6:
        first = done_arms(results)[0]["name"]
        others = [row["b"] if row["a"] == first else row["a"] for row in rows if first in (row["a"], row["b"])]
        rows = [between(other, first, rows) for other in others]
    return [with_verdict(row) for row in rows]


def with_verdict(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `differences` and its verdict in words that stand alone."""
    words = {"a lower": f"{row['a']} lower", "b lower": f"{row['b']} lower"}
    return {**row, "verdict_text": words.get(row["verdict"], row["verdict"])}


# ---- numbers


def _curve(results: Results, name: str, unit: str) -> npt.NDArray[np.float64]:
    """Rows of x, mean, lowest and highest over seeds, at the steps at which every seed of the arm was scored."""
    lines = [
        line for line in results["evaluations"]
        if line["arm"] == name and line["bits_per_byte"] is not None and line[unit] is not None
    ]  # fmt: skip
    lines = [line for line in lines if not line["final"]] or lines  # the final figure is of more documents
    steps: dict[int, dict[int, Any]] = defaultdict(dict)
    for line in lines:
        steps[line["step"]][line["seed"]] = line
    most = max((len(seeds) for seeds in steps.values()), default=0)
    columns = []
    for step in sorted(step for step, seeds in steps.items() if len(seeds) == most):
        scores = [line["bits_per_byte"] for line in steps[step].values()]
        x = np.mean([line[unit] for line in steps[step].values()])
        columns.append((x, np.mean(scores), min(scores), max(scores)))
    return np.array(columns).T


def _interval(row: Mapping[str, Any]) -> str:
    return (
        ""
        if row["low"] is None or row["high"] is None
        else f" (95\u00a0% interval {row['low']:+.4f} to {row['high']:+.4f})"
    )


def _listing(values: Iterable[str]) -> str:
    values = list(values)
    rest = f"; and {len(values) - _NAMED} more, in the table" if len(values) > _NAMED else ""
    return "; ".join(values[:_NAMED]) + rest
