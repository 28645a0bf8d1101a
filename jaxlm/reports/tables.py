"""Tables and coloured tokens for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.table import Table
from rich.text import Text

from jaxlm.tokenizers.base import visible

# Backgrounds for neighbouring tokens, light enough for black letters.
TOKEN_COLOURS = ("#a6cee3", "#fdbf6f", "#b2df8a", "#fb9a99", "#cab2d6", "#ffff99")


def parameter_table(params: Any) -> Table:
    """One row a parameter array: its path, shape and size; the sum below."""
    table = Table(show_footer=True)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = sum(leaf.size for _, leaf in leaves)
    table.add_column("parameter", footer="total")
    table.add_column("shape", justify="right")
    table.add_column("size", justify="right", footer=f"{total:,}")
    for path, leaf in leaves:
        name = "/".join(str(entry.key) for entry in path)
        table.add_row(name, " × ".join(map(str, leaf.shape)), f"{leaf.size:,}")
    return table


def token_text(tokens: Iterable[bytes], *, colour: bool = True) -> Text:
    """Tokens side by side, neighbours in different colours, or divided by bars where there is no colour.

    Spaces show as dots, bytes that are no character as `\\xNN`.
    """
    if not colour:
        return Text("|".join(visible(token) for token in tokens))
    text = Text()
    for index, token in enumerate(tokens):
        text.append(visible(token), style=f"black on {TOKEN_COLOURS[index % len(TOKEN_COLOURS)]}")
    return text


def arms_table(results: Mapping[str, Any]) -> Table:
    """One row an arm of a comparison's results; the best in bold, with the half width of its 95 % interval."""
    table = Table(title=f"equal {results['budget']['unit']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")  # where there is little room, names break and numbers don't
    for name in (
        "ids", "parameters", "bytes per\ntoken", "updates", "learning\nrate", "loss per\ntoken", "bits per byte",
        "tokens/s", "seconds",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    done = [arm for arm in results["arms"] if arm["status"] == "done"]
    best = min((arm["bits_per_byte"] for arm in done), default=None)
    for arm in results["arms"]:
        if arm["status"] != "done":
            table.add_row(Text(arm["name"]), f"{arm['vocab_size']:,}", "failed", style="red")
            continue
        half = "" if arm["high"] is None else f" ± {(arm['high'] - arm['low']) / 2:.4f}"
        score = f"{arm['bits_per_byte']:.4f}{half}"
        table.add_row(
            Text(arm["name"]),
            f"{arm['vocab_size']:,}",
            f"{arm['parameters']:,}",
            f"{arm['bytes_per_token']:.2f}",
            f"{arm['updates']:,}",
            f"{arm['learning_rate']:.2g}",
            f"{arm['loss']:.3f}",
            f"[bold]{score}[/]" if arm["bits_per_byte"] == best else score,
            f"{arm['tokens'] / arm['seconds']:,.0f}" if arm["seconds"] else "",
            f"{arm['seconds']:,.0f}",
        )
    return table


def deviation(arm: Mapping[str, Any]) -> str:
    """The standard error of an arm's bits per byte; a dash where a single document gives none."""
    error = arm["final/bits_per_byte_se"]
    return "-" if error is None else f"{error:.4f}"


def rows_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table of strings: the first column to the left, the others to the right."""
    table = Table(title=None if title is None else Text(title))
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # in which rich sees no markup
    return table
