"""How charts of a comparison are drawn: the look of an arm, and a figure for each kind of chart."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, filterwarnings

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FixedLocator, NullLocator

from jaxlm.reports.labels import place_labels

Results = Mapping[str, Any]

# After Okabe and Ito (2008), which colour-blind readers tell apart; the lighter ones darkened to show on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b8558a", "#c48400", "#3497d2", "#5f6670")
INK, MUTED, RULE, PAPER, NEUTRAL = "#1b1e24", "#5a606b", "#d9dce1", "#fefefe", "#9298a3"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.6), (5, 1.5, 1, 1.5), (1.2, 1.4))
WIDTH = 5.0  # inches, 360 points
MANY = 12  # arms; of more, only what is beside its point gets a label


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in every chart: an index into SERIES, a marker, and a dash pattern in line widths."""

    colour: int
    marker: str
    dash: tuple[float, ...]


def done_arms(results: Results) -> list[dict[str, Any]]:
    """The arms that have a score."""
    return [arm for arm in results["arms"] if arm["status"] == "done"]


def arm_styles(results: Results) -> dict[str, Style]:
    """A style for each arm, no two of up to 56 with the same colour and marker.

    Of more arms than colours, those of a family share one, unless there are too many families, or arms in one.
    """
    arms = results["arms"]
    families: dict[str, list[str]] = defaultdict(list)
    for arm in arms:
        families[arm["family"]].append(arm["name"])
    largest = max(map(len, families.values()), default=0)
    by_family = len(arms) > len(SERIES) >= len(families) > 1 and largest <= len(MARKERS)
    styles = {}
    for index, arm in enumerate(arms):
        # The numbers of colours and of markers have no common divisor, so that pairs of them repeat late.
        colour = list(families).index(arm["family"]) if by_family else index % len(SERIES)
        place = families[arm["family"]].index(arm["name"]) if by_family else index
        dash = DASHES[(place + place // len(MARKERS)) % len(DASHES)]
        styles[arm["name"]] = Style(colour, MARKERS[place % len(MARKERS)], dash)
    return styles


@contextmanager
def look() -> Iterator[None]:
    """Within it figures have the look of the report. A name is never taken for a formula, whatever it holds."""
    settings: Any = {
        "font.size": 10.5, "axes.labelsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": MUTED,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": RULE, "grid.linewidth": 0.7, "axes.grid": True,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        "lines.linewidth": 1.6, "lines.markersize": 5, "text.parse_math": False, "legend.frameon": False,
        "svg.fonttype": "none", "font.family": "DejaVu Sans", "axes.formatter.useoffset": False,
    }  # fmt: skip
    with mpl.rc_context(settings), catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has it, or shows a box as well
        yield


def short(name: str, length: int = 24) -> str:
    """A name that fits into a chart: on one line, printable, cut with an ellipsis if long."""
    name = "".join(character if character.isprintable() else "·" for character in name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def legend_entry(style: Style) -> str:
    """A line and a marker as the content of a 32 × 12 SVG, as the charts draw them."""
    path = MarkerStyle(style.marker)
    shape = path.get_path().transformed(path.get_transform())
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    data = " ".join(
        letters[int(code)]
        + ("" if code == 79 else " ".join(f"{v:.2f}" for v in points * np.tile([8, -8], len(points) // 2)))
        for points, code in shape.iter_segments(curves=True, simplify=False)
    )
    colour = f"var(--series-{style.colour})"
    dashes = " ".join(f"{1.8 * dash:.1f}" for dash in style.dash) or "none"
    return (
        f'<path d="M0 6H32" fill="none" style="stroke:{colour};stroke-width:1.8;stroke-dasharray:{dashes}"/>'
        f'<path d="{data}" transform="translate(16 6)" style="fill:{colour}"/>'
    )


# ---- figures


def draw_curves(
    results: Results, curves: Mapping[str, npt.NDArray[np.float64]], divisor: float, label: str, legend: bool
) -> Figure:
    many = len(curves) > MANY
    columns = 3 if many else 2
    figure, axis = _figure(3.4 + (0.2 * math.ceil(len(curves) / columns) if legend else 0))
    styles = arm_styles(results)
    numbers = {arm["name"]: index for index, arm in enumerate(results["arms"])}
    for place, (name, (x, mean, low, high)) in enumerate(curves.items()):
        style = styles[name]
        colour = SERIES[style.colour]
        every = max(1, len(x) // (3 if many else 6))
        line = axis.plot(
            x / divisor, mean, color=colour, marker=style.marker, linestyle=(0, style.dash) if style.dash else "-",
            markevery=(place % every, every), label=short(name, 14 if many else 24), linewidth=1 if many else 1.6,
        )[0]  # fmt: skip
        line.set_gid(f"arm-{numbers[name]}")
        if np.any(high > low):
            band = axis.fill_between(x / divisor, low, high, color=colour, alpha=0.18, linewidth=0)
            band.set_gid(f"arm-{numbers[name]}")
    # Where training begins a model knows nothing; a frame that holds this would flatten all that follows.
    lowest = min(curve[2].min() for curve in curves.values())
    highest = max(curve[3][curve[0] >= curve[0][-1] / 6].max() for curve in curves.values())
    margin = 0.05 * (highest - lowest) or 0.05
    axis.set_ylim(lowest - margin, highest + margin)
    axis.set_xlim(left=0)
    axis.set(xlabel=label, ylabel="held-out bits per byte")
    if legend:
        figure.legend(loc="outside lower center", ncols=columns)
    return figure


def draw_sizes(results: Results, legend: bool) -> Figure:
    figure, axis = _figure(3.4)
    families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for arm in done_arms(results):
        families[arm["family"], arm["size"]].append(arm)
    several = len({size for _, size in families}) > 1
    points, names, avoided = [], [], _interval_ends(done_arms(results), lambda arm: arm["vocab_size"])
    styles = arm_styles(results)
    for (family, model), arms in families.items():
        arms.sort(key=lambda arm: arm["vocab_size"])
        x, y = [arm["vocab_size"] for arm in arms], [arm["bits_per_byte"] for arm in arms]
        colours = {styles[arm["name"]].colour for arm in arms}
        axis.plot(x, y, color=SERIES[colours.pop()] if len(colours) == 1 else MUTED, linewidth=1, zorder=1)
        _draw_arms(axis, results, arms, x)
        along = np.linspace(0, 1, 20)
        for left, right in itertools.pairwise(zip(np.log(x), y, strict=True)):
            avoided += [(math.exp(left[0] * (1 - t) + right[0] * t), left[1] * (1 - t) + right[1] * t) for t in along]
        points.append((x[-1], y[-1]))
        names.append(short(f"{family} {model}" if several else family))
    axis.set_xscale("log")
    sizes = sorted({arm["vocab_size"] for arm in done_arms(results)})
    gap = math.log(sizes[-1] / sizes[0]) / 7
    kept: list[int] = []
    for size in sizes:
        if not kept or math.log(size / kept[-1]) >= gap:
            kept.append(size)
    axis.xaxis.set_major_locator(FixedLocator(kept))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    axis.margins(x=0.15, y=0.15)
    axis.set(xlabel="vocabulary size (ids)", ylabel="final bits per byte")
    place_labels(axis, points, names, avoid=avoided, colour=INK, rule=MUTED, halo=PAPER)
    return figure


def draw_compression(results: Results, legend: bool) -> Figure:
    arms = done_arms(results)
    # Where points are too many for a label each, a legend names them: that of the page, or on paper one of the figure.
    many = len(arms) > MANY
    figure, axis = _figure((4.2 if many else 3.4) + (0.2 * math.ceil(len(arms) / 3) if many and legend else 0))
    x = [arm["bytes_per_token"] for arm in arms]
    _draw_arms(axis, results, arms, x)
    axis.margins(0.12)
    axis.set(xlabel="bytes per token on held-out text", ylabel="final bits per byte")
    if many and legend:
        figure.legend(loc="outside lower center", ncols=3)
    points = list(zip(x, [arm["bits_per_byte"] for arm in arms], strict=True))
    place_labels(
        axis, points, [short(arm["name"]) for arm in arms], colour=INK, rule=MUTED, halo=PAPER,
        avoid=_interval_ends(arms, lambda arm: arm["bytes_per_token"]), farthest=10 if many else 60,
    )  # fmt: skip
    return figure


def draw_forest(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axis = _figure(0.9 + 0.32 * len(rows))
    for place, row in enumerate(rows):
        shown = row["verdict"] in ("a lower", "b lower")
        colour = SERIES[0] if shown else MUTED
        if row["low"] is not None and row["high"] is not None:
            axis.hlines(place, row["low"], row["high"], color=colour, linewidth=2)
        axis.plot(
            row["difference"], place, marker="o", markersize=6.5, markeredgewidth=1.6, markeredgecolor=colour,
            markerfacecolor=colour if shown else PAPER, linestyle="none",
        )  # fmt: skip
    axis.axvline(0, color=INK, linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{short(row['a'], 18)} − {short(row['b'], 18)}" for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.locator_params(axis="x", nbins=5)
    axis.margins(x=0.08)
    axis.set_xlabel("difference in bits per byte")
    return figure


def draw_units(arms: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.1 + 0.3 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(arms))
    for axis, key, colour, title, digits in (
        (left, "loss", NEUTRAL, "nats per token:\ndifferent units", 2),
        (right, "bits_per_byte", SERIES[0], "bits per byte:\none unit", 3),
    ):
        values = [arm[key] for arm in arms]
        axis.barh(places, values, color=colour, height=0.62)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                f"{value:.{digits}f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=10
            )
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.set_xlim(0, 1.4 * max(values))
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=4)
    left.set_yticks(places, [short(arm["name"], 20) for arm in arms])
    left.set_ylim(len(arms) - 0.5, -0.5)
    return figure


def _draw_arms(axis: Axes, results: Results, arms: Sequence[Mapping[str, Any]], x: Sequence[float]) -> None:
    """A point for each arm at its final bits per byte, with its interval."""
    styles = arm_styles(results)
    numbers = {arm["name"]: index for index, arm in enumerate(results["arms"])}
    for position, arm in zip(x, arms, strict=True):
        style = styles[arm["name"]]
        colour = SERIES[style.colour]
        if arm["low"] is not None and arm["high"] is not None:
            axis.vlines(position, arm["low"], arm["high"], color=colour, linewidth=1.3).set_gid(
                f"arm-{numbers[arm['name']]}"
            )
        point = axis.plot(
            position,
            arm["bits_per_byte"],
            color=colour,
            marker=style.marker,
            linestyle="none",
            zorder=3,
            label=short(arm["name"], 14),
        )
        point[0].set_gid(f"arm-{numbers[arm['name']]}")


def _interval_ends(arms: Sequence[Mapping[str, Any]], x: Callable[[Any], float]) -> list[tuple[float, float]]:
    return [(x(arm), arm[end]) for arm in arms for end in ("low", "bits_per_byte", "high") if arm[end] is not None]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()
