"""Charts as SVG that can stand in a page: one beside another, in light and dark, with text that stays text."""

from __future__ import annotations

import html
import io
import re

import matplotlib as mpl

from jaxlm.reports.charts import Chart
from jaxlm.reports.drawing import INK, MUTED, NEUTRAL, PAPER, RULE, SERIES, look

_VARIABLES = {colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)} | {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    NEUTRAL: "var(--neutral)",
}
_COLOUR = re.compile("|".join(_VARIABLES))


def inline_svg(chart: Chart) -> str:
    """The `<svg>` element of a chart, which names itself to a screen reader.

    Its colours are the page's CSS variables, its ids begin with the chart's key, and what belongs to the arm with
    index i has `data-arm="i"`.
    """
    with look(), mpl.rc_context({"svg.hashsalt": chart.key}):
        output = io.StringIO()
        chart.draw(False).savefig(output, format="svg", transparent=True, metadata={"Date": None})
    text = output.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Tags alone are changed: what stands between them is text, which may look like anything.
    text = re.sub(r"<[^>]*>", lambda match: _tag(match[0], chart.key), text)
    (view,) = re.findall(r'viewBox="([^"]*)"', text[: text.index(">")])
    title, description = html.escape(chart.title), html.escape(chart.alternative)
    opening = (
        f'<svg viewBox="{view}" role="img" aria-labelledby="{chart.key}-title {chart.key}-description">'
        f'<title id="{chart.key}-title">{title}</title><desc id="{chart.key}-description">{description}</desc>'
    )
    return opening + text[text.index(">") + 1 :].strip()


def _tag(tag: str, key: str) -> str:
    tag = re.sub(r' id="arm-(\d+)"', r' data-arm="\1"', tag)
    tag = re.sub(r' id="', f' id="{key}-', tag)
    tag = re.sub(r' (?:xlink:)?href="#', f' href="#{key}-', tag)
    tag = tag.replace("url(#", f"url(#{key}-")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    return _COLOUR.sub(lambda match: _VARIABLES[match[0]], tag)
