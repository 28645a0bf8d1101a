"""Names beside the points of a chart, placed so that they cover neither points nor one another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

_CLEARANCE = 6.0  # half the side of the square that a label keeps free around each point, in points


def place_labels(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    *,
    colour: str,
    rule: str,
    halo: str,
    avoid: Sequence[tuple[float, float]] = (),
    farthest: float = 60,
) -> None:
    """Writes each name at the nearest free place, with a thin line to its point if that is not beside it.

    A name for which there is no free place inside the axes within `farthest` points is left out. `avoid` holds more
    points that no name may cover. The layout of the figure is settled by this.
    """
    figure = axis.figure.get_figure(root=True)
    assert figure is not None
    FigureCanvasAgg(figure)  # which can measure text
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    unit = figure.dpi / 72  # pixels a point
    centres = axis.transData.transform(np.asarray(points, float).reshape(-1, 2))
    reach = _CLEARANCE * unit
    avoided = axis.transData.transform(np.asarray(avoid, float).reshape(-1, 2))
    taken = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in centres]
    taken += [Bbox.from_bounds(x - unit, y - unit, 2 * unit, 2 * unit) for x, y in avoided]
    frame = axis.bbox
    for name, (x, y) in zip(names, centres, strict=True):
        text = axis.text(0, 0, name, color=colour, ha="center", va="center", fontsize=10, zorder=5)
        size = text.get_window_extent()
        for distance, angle in _places(farthest):
            # The label's edge, not its middle, is at this distance from the point.
            across, up = math.cos(angle), math.sin(angle)
            centre_x = x + across * (distance * unit + size.width / 2)
            centre_y = y + up * (distance * unit + size.height / 2)
            box = Bbox.from_bounds(centre_x - size.width / 2, centre_y - size.height / 2, size.width, size.height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                x_data, y_data = axis.transData.inverted().transform((centre_x, centre_y))
                text.set_position((float(x_data), float(y_data)))
                text.set_path_effects([withStroke(linewidth=2.5, foreground=halo)])
                if distance > 8:
                    _connect(axis, (x, y), box, rule)
                break
        else:
            text.remove()


def _places(farthest: float) -> list[tuple[float, float]]:
    """Distances (points) and angles, the best first: beside, above and below, then farther away all around."""
    near = [(7.0, turn * math.pi / 4) for turn in (0, 4, 2, 6, 1, 7, 3, 5)]
    return near + [
        (float(far), turn * math.pi / 8) for far in (14, 22, 32, 44, 58) if far <= farthest for turn in range(16)
    ]


def _connect(axis: Axes, point: tuple[float, float], box: Bbox, rule: str) -> None:
    nearest = (min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1))
    ends = axis.transData.inverted().transform([point, nearest])
    axis.plot(ends[:, 0], ends[:, 1], color=rule, linewidth=0.7, zorder=2, scalex=False, scaley=False)
