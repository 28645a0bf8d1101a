"""How a text is encoded, step by step, as a table to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from jaxlm.tokenizers.base import visible
from jaxlm.tokenizers.bpe_reference import Pair, merge

if TYPE_CHECKING:
    from jaxlm.tokenizers.bpe import BPETokenizer


def explanation(tokenizer: BPETokenizer, text: str) -> Table:
    """One row a merge: the chunk, the two tokens that are joined, the new one, and the chunk as it is then."""
    rank = {pair: index for index, pair in enumerate(tokenizer.merges)}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("chunk", style="bold", no_wrap=True)
    table.add_column("merge", justify="right")
    table.add_column("joins")
    table.add_column("so far", overflow="fold")
    table.add_column("ids", overflow="fold", style="cyan")

    def shown(*symbols: int, between: str = "│") -> Text:
        """As Text, in which rich sees neither markup nor emoji."""
        return Text(between.join(visible(tokenizer.token_bytes(tokenizer.ids[symbol])) for symbol in symbols))

    def ids(symbols: list[int]) -> str:
        return " ".join(str(tokenizer.ids[symbol]) for symbol in symbols)

    for chunk in tokenizer.chunks(text):
        if chunk in tokenizer.whole:
            whole = Text(visible(chunk))
            table.add_row(whole, "", "a token as a whole", whole, str(tokenizer.whole[chunk]), end_section=True)
            continue
        size = f"{len(chunk)} byte{'s' * (len(chunk) > 1)}"
        table.add_row(Text(visible(chunk)), "", size, shown(*chunk), ids(list(chunk)))
        for pair, symbols in _merges(list(chunk), rank):
            table.add_row("", f"{rank[pair] + 1:,}", shown(*pair, between=" + "), shown(*symbols), ids(symbols))
        table.add_section()
    return table


def _merges(symbols: list[int], rank: dict[Pair, int]) -> Iterator[tuple[Pair, list[int]]]:
    """Each merge of one chunk, and the symbols after it: the textbook's loop, looked at while it runs."""
    while found := [pair for pair in itertools.pairwise(symbols) if pair in rank]:
        pair = min(found, key=rank.__getitem__)
        symbols = merge(symbols, pair, 256 + rank[pair])
        yield pair, symbols
