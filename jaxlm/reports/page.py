"""The report of a tokenizer comparison as one HTML file that needs nothing else, now or in ten years."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from jaxlm.reports import page_tables
from jaxlm.reports.charts import charts, shown_differences, with_verdict
from jaxlm.reports.comparison import RESULTS_VERSION
from jaxlm.reports.drawing import arm_styles, done_arms, legend_entry
from jaxlm.reports.svg import inline_svg
from jaxlm.tokenizers.base import write_file

SHOWN_ARMS = 4  # tokenizers whose tokens are shown until others are chosen
_FOLDER = Path(__file__).parent


def write_page(results: Mapping[str, Any], path: Path) -> None:
    """Writes the page of `results`, whole or not at all.

    Raises:
      ValueError: results of another version than this page knows.
      InputError: it can't be written there.
    """
    write_file(path, page_html(results))


def page_html(results: Mapping[str, Any]) -> str:
    """The page of `results`. Everything in it that a user could have chosen is text, whatever it looks like.

    Raises:
      ValueError: results of another version than this page knows.
    """
    if results["version"] != RESULTS_VERSION:
        raise ValueError(
            f"These results are of version {results['version']}, and the page knows version {RESULTS_VERSION}."
        )
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    done = done_arms(results)
    rows = shown_differences(results) if done else []
    styles = arm_styles(results)
    html = _template().render(
        results=results,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The page runs this script and no other: a name that got past the escaping would still do nothing.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts={chart.key: {"chart": chart, "svg": Markup(inline_svg(chart))} for chart in charts(results)},
        legend=[
            (index, arm["name"], Markup(legend_entry(styles[arm["name"]])))
            for index, arm in enumerate(results["arms"])
            if arm["status"] == "done"
        ],
        done=done,
        others=[arm for arm in results["arms"] if arm["status"] != "done"],
        facts=page_tables.facts(results),
        differences=page_tables.difference_table(rows),
        all_differences=page_tables.difference_table([with_verdict(row) for row in results["differences"]])
        if len(rows) < len(results["differences"])
        else None,
        scores=page_tables.score_table(results),
        grid=page_tables.grid_table(results),
        claims=[page_tables.claim_table(claim) for claim in results["claims"]],
        measures=page_tables.measure_table(results),
        paragraphs=[
            {**paragraph, "rows": [(arm["name"], paragraph["tokens"].get(arm["name"], [])) for arm in done]}
            for paragraph in results["paragraphs"]
        ],
        shown_arms=SHOWN_ARMS,
    )
    return html.encode("utf-8", "backslashreplace").decode()  # a lone surrogate in a name or a command


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
