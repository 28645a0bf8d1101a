"""Step 2 of the BPE engine: unique chunks are counted, since they are all that training sees of a text."""

from __future__ import annotations

import numpy as np

from jaxlm.machine_code import inlined, kernel
from jaxlm.tokenizers.bpe_kernels import (
    LONG,
    TEXT_END,
    VALUE,
    chunk_key,
    chunk_place,
    chunk_table,
    enter_chunk,
    find_slot,
    home_slot,
    prefetch,
    row_key,
)
from jaxlm.tokenizers.bpe_split import DONE, KNOWN, START, Chunks, next_chunks

_U = np.uint64
_TOGETHER = 16  # chunks whose rows of the table are asked for before the first of them is counted


class ChunkCounts:
    """Unique chunks with 64-bit counts. Memory grows with the unique chunks, not with the text.

    Attributes:
      table: a chunk table; its values are the counts.
      arena: the bytes of the chunks that are too long for the table, each closed by 0xFF.
      size: how many chunks there are; how much of the arena is used; and how many places the chunks take as symbols,
        their bytes and one more for each.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all chunks, and gives back their memory."""
        self.table = chunk_table(12)
        self.arena = np.empty(1 << 16, np.uint8)
        self.size = np.zeros(3, np.int64)
        self._keys = np.empty((_TOGETHER, 5), np.uint64)

    def add(self, chunks: Chunks) -> None:
        """Counts the chunks of a buffer."""
        *_, ends, where = chunks
        while not count(*chunks, self.table, self.arena, self.size, self._keys):
            self._make_room(int(ends[where[DONE]] - where[START]))

    def update(self, other: ChunkCounts) -> None:
        """Adds the counts of other chunks."""
        slot = 0
        while (slot := add_table(other.table, other.arena, slot, self.table, self.arena, self.size)) < len(other.table):
            self._make_room(int(other.size[1]))

    def _make_room(self, length: int) -> None:
        if _is_full(self.size, self.table):
            bits = len(self.table).bit_length() - 1
            table = chunk_table(bits + 2 if bits < 18 else bits + 1)  # to fill a table anew takes time, too
            copy_table(self.table, self.arena, table)
            self.table = table
        if self.size[1] + length + 17 > len(self.arena):
            self.arena = np.concatenate([self.arena[: self.size[1]], np.empty(self.size[1] + length + 17, np.uint8)])


@kernel
def count(buffer, classes, scheme, ends, where, table, arena, size, keys):
    """Counts chunks until all are done; False if there is no room for the next one.

    As many at once as `keys` has rows: for all of them memory is asked for first, so that it is waited for once.
    """
    while next_chunks(buffer, classes, scheme, ends, where):
        while where[DONE] < where[KNOWN]:
            number = min(len(keys), where[KNOWN] - where[DONE])
            start = where[START]
            for index in range(number):
                while buffer[start] == TEXT_END:
                    start += 1
                end = ends[where[DONE] + index]
                first, second, short, code = chunk_key(buffer, start, end - start)
                prefetch(table, home_slot(table, code))
                keys[index, 0] = first
                keys[index, 1] = second
                keys[index, 2] = _U(short)
                keys[index, 3] = code
                keys[index, 4] = _U(start)
                start = end
            for index in range(number):
                start = np.int64(keys[index, 4])
                first, second, short, code = keys[index, 0], keys[index, 1], np.int64(keys[index, 2]), keys[index, 3]
                length = ends[where[DONE]] - start
                if not _add(buffer, start, length, first, second, short, code, _U(1), table, arena, size):
                    where[START] = start
                    return False
                where[DONE] += 1
            where[START] = ends[where[DONE] - 1]
    return True


@kernel
def add_table(others, other_arena, slot, table, arena, size):
    """Adds the counts of another table from `slot` on; returns the first slot for which there is no room."""
    while slot < len(others):
        place = chunk_place(others, slot)
        if place >= 0:
            length, first, second, short, code = row_key(others, slot, other_arena)
            amount = others[slot, VALUE]
            if not _add(other_arena, place, length, first, second, short, code, amount, table, arena, size):
                break
        slot += 1
    return slot


@inlined
def _add(buffer, start, length, first, second, short, code, amount, table, arena, size):
    slot, found = find_slot(table, arena, buffer, start, length, first, second, short, code)
    if found:
        table[slot, VALUE] += amount
        return True
    if _is_full(size, table) or (short == LONG and size[1] + length + 17 > len(arena)):
        return False
    size[0] += 1
    size[2] += length + 1
    size[1] = enter_chunk(table, slot, arena, size[1], buffer, start, length, first, second, short, amount)
    return True


@kernel
def _is_full(size, table):
    return 4 * size[0] >= 3 * len(table)


@kernel
def copy_table(table, arena, larger):
    """Enters all rows of a table into a larger, empty one."""
    for slot in range(len(table)):
        place = chunk_place(table, slot)
        if place >= 0:
            length, first, second, short, code = row_key(table, slot, arena)
            new, _ = find_slot(larger, arena, arena, place, length, first, second, short, code)
            for column in range(4):
                larger[new, column] = table[slot, column]
