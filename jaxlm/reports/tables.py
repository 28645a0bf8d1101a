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


def comparison_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row an arm, from the last line of its metrics."""
    num_bytes = max(arm["bytes"] for arm in arms.values())
    table = Table(
        title=f"the same text, the same number of source bytes: {num_bytes / 1e6:.1f} MB", box=box.SIMPLE_HEAD
    )
    table.add_column("tokenizer")
    for name in (
        "ids", "parameters", "bytes per\ntoken", "updates", "loss per\ntoken", "bits per byte", "tokens/s", "seconds"
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    best = min(arm["final/bits_per_byte"] for arm in arms.values())
    for name, arm in arms.items():
        score = f"{arm['final/bits_per_byte']:.4f} ± {deviation(arm)}"
        table.add_row(
            name,
            f"{arm['vocab_size']:,}",
            f"{arm['parameters']:,}",
            f"{arm['final/bytes_per_token']:.2f}",
            f"{arm['step']:,}",
            f"{arm['final/loss']:.3f}",
            f"[bold]{score}[/]" if arm["final/bits_per_byte"] == best else score,
            f"{arm['tokens'] / arm['seconds']:,.0f}",
            f"{arm['seconds']:,.0f}",
        )
    return table


def deviation(arm: Mapping[str, Any]) -> str:
    """The standard error of an arm's bits per byte; a dash where a single document gives none."""
    error = arm["final/bits_per_byte_se"]
    return "-" if error is None else f"{error:.4f}"


def rows_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table of strings: the first column to the left, the others to the right."""
    table = Table(title=title)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # in which rich sees no markup
    return table
