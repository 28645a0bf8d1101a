"""The tables of the report page: rows of strings, from the results of a comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jaxlm.reports.drawing import done_arms
from jaxlm.reports.quantities import count, power, size

NONE = "–"
_NUMBER = re.compile(r"[-−+±]?\.?\d|–$")


@dataclass(frozen=True)
class PageTable:
    """A table of strings; the first column names the rows.

    Attributes:
      columns: the headings.
      rows: the cells. What is not `Markup` will be escaped.
      groups: headings above the headings, each with the number of columns below it; none if empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold only numbers, to be set flush right."""
        return [
            bool(self.rows) and all(_NUMBER.match(re.sub("<[^>]*>", "", row[index])) for row in self.rows)
            for index in range(len(self.columns))
        ]

    @property
    def starts(self) -> set[int]:
        """The columns at which a group begins."""
        ends = [sum(width for _, width in self.groups[: index + 1]) for index in range(len(self.groups))]
        return set(ends[:-1])


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the comparison was made on, as pairs of a word and what it was."""
    corpus, budget = results["corpus"], results["budget"]
    amounts = {
        "bytes": lambda: f"{size(budget['size'])} of source text",
        "tokens": lambda: f"{budget['size']:,.0f} tokens",
        "flops": lambda: f"{power(budget['size'])} FLOPs",
        "seconds": lambda: f"{budget['size']:,.0f} seconds of training",
    }
    sizes = {arm["size"] for arm in results["arms"]}
    seeds = ", ".join(map(str, results["seeds"]))
    return [
        ("Corpus", f"{corpus['spec']}: {corpus['documents']:,} documents, {size(corpus['bytes'])}"),
        ("Held out", f"{corpus['held_out_documents']:,} documents, {size(corpus['held_out_bytes'])}"),
        ("Budget of each model", amounts[budget["unit"]]()),
        ("Context", f"equal in {results['context_unit']}"),
        *([("Model", f"{_model(*sizes)} (layers × width)")] if len(sizes) == 1 else []),
        ("Seeds", seeds or NONE),
    ]


def difference_table(rows: Sequence[Mapping[str, Any]]) -> PageTable:
    """Pairs of arms: the difference, its interval, where its error comes from, and what is shown by it."""
    return PageTable(
        ["Difference", "Bits per byte", "95 % interval", "s.e. documents", "s.e. seeds", "Seeds", "What is shown"],
        [
            [
                f"{row['a']} − {row['b']}",
                _signed(row["difference"]),
                NONE if row["low"] is None else f"{_signed(row['low'])} to {_signed(row['high'])}",
                _fixed(row["se_documents"]),
                _fixed(row["se_seeds"]),
                f"{row['seeds'][0]} and {row['seeds'][1]}" if len(set(row["seeds"])) > 1 else str(row["seeds"][0]),
                row["verdict_text"],
            ]
            for row in rows
        ],
    )


def score_table(results: Mapping[str, Any]) -> PageTable:
    """A row for each arm that has a score: what it is, what it reached, and what that took."""
    # One size for all is told above the table, whose columns are many enough.
    left_out = {7} if len({arm["size"] for arm in results["arms"]}) == 1 else set()
    groups = [("", 1), ("Held-out text", 3), ("Tokenizer", 3), ("Model", 4 - len(left_out)), ("Training", 9)]
    columns = [
        "Arm", "bits per byte", "95 % interval", "nats per token", "kind", "ids", "bytes per token", "size",
        "parameters", "of which embeddings", "context, tokens", "batch", "updates", "tokens",
        "source bytes", "FLOPs", "learning rate", "tokens/s", "seconds", "seeds",
    ]  # fmt: skip
    rows = []
    for arm in done_arms(results):
        row = [
            arm["name"],
            _fixed(arm["bits_per_byte"]),
            NONE if arm["low"] is None else f"{arm['low']:.4f} – {arm['high']:.4f}",
            f"{arm['loss']:.3f}",
            arm["tokenizer"],
            f"{arm['vocab_size']:,}",
            f"{arm['bytes_per_token']:.2f}",
            _model(arm["size"]),
            f"{arm['parameters']:,}",
            f"{arm['embedding_parameters'] / arm['parameters']:.0%}".replace("%", " %"),
            f"{arm['context']:,}",
            f"{arm['batch_size']:,}",
            f"{arm['updates']:,}",
            count(arm["tokens"]),
            size(arm["bytes"]),
            power(arm["flops"]),
            power(arm["learning_rate"]) + (f", Muon {power(muon)}" if (muon := arm.get("muon_learning_rate")) else ""),
            f"{arm['tokens'] / arm['seconds']:,.0f}" if arm["seconds"] > 0 else NONE,
            f"{arm['seconds']:,.0f}",
            f"{len(arm['by_seed'])}",
        ]
        rows.append(row)
    kept = [index for index in range(len(columns)) if index not in left_out]
    return PageTable([columns[index] for index in kept], [[row[index] for index in kept] for row in rows], groups)


def grid_table(results: Mapping[str, Any]) -> PageTable | None:
    """Bits per byte for each factor of the learning rate, the chosen one bold; None if nothing was tried."""
    arms = [arm for arm in results["arms"] if arm.get("grid")]
    factors = sorted({entry["factor"] for arm in arms for entry in arm["grid"]})
    if not factors:
        return None
    rows = []
    for arm in arms:
        entries = {entry["factor"]: entry for entry in arm["grid"]}
        rate = arm.get("learning_rate")  # of an arm that was trained
        chosen = next((factor for factor, entry in entries.items() if entry["learning_rate"] == rate), None)
        cells = [_grid_cell(entries.get(factor), factor == chosen) for factor in factors]
        place = "at the edge of the grid" if chosen in (min(entries), max(entries)) else "inside"
        rows.append([arm["name"], *cells, *((NONE, NONE) if chosen is None else (power(rate), place))])
    return PageTable(["Arm", *(f"× {factor:g}" for factor in factors), "Chosen rate", "Place"], rows)


def _grid_cell(entry: Mapping[str, Any] | None, chosen: bool) -> str:
    if entry is None:
        return NONE
    score = _fixed(entry["bits_per_byte"])
    return Markup("<strong>{}</strong>").format(score) if chosen else score


def claim_table(claim: Mapping[str, Any]) -> dict[str, Any]:
    """A claim with its numbers as a table, or None where it has none."""
    table = PageTable(claim["columns"], claim["rows"]) if claim["columns"] and claim["rows"] else None
    return {"claim": claim["claim"], "finding": claim["finding"], "table": table}


def measure_table(results: Mapping[str, Any]) -> PageTable | None:
    """A row for each arm, a column for each intrinsic measure; None if nothing was measured."""
    measures, arms = results["measures"], done_arms(results)
    if not measures or not arms:
        return None
    columns = [f"{m['label']} ({m['unit']})" if m["unit"] else m["label"] for m in measures]
    rows = [
        [arm["name"], *(_format(arm["measures"].get(measure["key"]), measure["format"]) for measure in measures)]
        for arm in arms
    ]
    return PageTable(["Arm", *columns], rows)


def _model(layers_and_width: str) -> str:
    return layers_and_width.replace("x", " × ")


def _format(value: float | None, specification: str) -> str:
    return NONE if value is None else format(value, specification)


def _fixed(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}".replace("-", "−")
