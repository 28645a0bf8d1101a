"""How a text is encoded, step by step, as a table to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

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

    def show(symbols: list[int]) -> tuple[str, str]:
        ids = [tokenizer.ids[symbol] for symbol in symbols]
        return "│".join(visible(tokenizer.token_bytes(i)) for i in ids), " ".join(map(str, ids))

    for chunk in tokenizer.chunks(text):
        if chunk in tokenizer.whole:
            token_id = tokenizer.whole[chunk]
            table.add_row(visible(chunk), "", "a token as a whole", visible(chunk), str(token_id), end_section=True)
            continue
        so_far, ids = show(list(chunk))
        table.add_row(visible(chunk), "", f"{len(chunk)} byte{'s' * (len(chunk) > 1)}", so_far, ids)
        for pair, symbols in _merges(list(chunk), rank):
            left, right = (visible(tokenizer.token_bytes(tokenizer.ids[symbol])) for symbol in pair)
            so_far, ids = show(symbols)
            table.add_row("", f"{rank[pair] + 1:,}", f"{left} + {right}", so_far, ids)
        table.add_section()
    return table


def _merges(symbols: list[int], rank: dict[Pair, int]) -> Iterator[tuple[Pair, list[int]]]:
    """Each merge of one chunk, and the symbols after it: the textbook's loop, looked at while it runs."""
    while found := [pair for pair in itertools.pairwise(symbols) if pair in rank]:
        pair = min(found, key=rank.__getitem__)
        symbols = merge(symbols, pair, 256 + rank[pair])
        yield pair, symbols
