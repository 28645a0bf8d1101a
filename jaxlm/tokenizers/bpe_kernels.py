"""What the kernels of the BPE engine are made with: eight bytes at once, and a hash table of chunks.

Arrays that turn out too small for a kernel are made larger between two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from jaxlm.machine_code import COMPILED, inlined, kernel

TEXT_END = 0xFF  # closes a text or a chunk; UTF-8 contains no such byte
_U = np.uint64
_Number = TypeVar("_Number", bound=np.generic)
BYTE_MASK = _U(0xFF)


@kernel
def load8(buffer, i):
    """The eight bytes from i, the first one lowest, as uint64. The compiler makes one load of it."""
    j = _U(i)
    low = _U(buffer[j]) | _U(buffer[j + _U(1)]) << _U(8) | _U(buffer[j + _U(2)]) << _U(16)
    low |= _U(buffer[j + _U(3)]) << _U(24) | _U(buffer[j + _U(4)]) << _U(32) | _U(buffer[j + _U(5)]) << _U(40)
    return low | _U(buffer[j + _U(6)]) << _U(48) | _U(buffer[j + _U(7)]) << _U(56)


@kernel
def store8(buffer, i, word):
    """The inverse of `load8`."""
    j = _U(i)
    for k in range(8):
        buffer[j + _U(k)] = np.uint8(word >> _U(8 * k) & BYTE_MASK)


@intrinsic
def _prefetch(context, array, index):
    """Asks for the cache line of `array[index]`, which is needed soon, and doesn't wait for it."""

    def generate(target, builder, signature, arguments):
        items = target.make_array(signature.args[0])(target, builder, arguments[0])
        place = cgutils.get_item_pointer(target, builder, signature.args[0], items, [arguments[1]])
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(place, byte), flag(0), flag(3), flag(1)])
        return target.get_dummy_value()

    return types.void(array, types.intp), generate


prefetch = _prefetch if COMPILED else lambda array, index: None


# ---- a hash table of chunks: open addressing, one row a slot
#
# A row fits into half a cache line: the first sixteen bytes of the chunk, which are all of it for nearly every chunk; a
# value; and, below the chunk's length in the highest byte (17 for all longer ones), where a longer one stands in an
# arena. The length is 0 in an empty slot. In the arena, chunks are closed by 0xFF, as texts are in a buffer.

FIRST, SECOND, VALUE, PLACE = range(4)
LONG = 17
_FIRST_MASKS = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(LONG + 1)], np.uint64)
_SECOND_MASKS = np.array([(1 << 8 * min(max(length - 8, 0), 8)) - 1 for length in range(LONG + 1)], np.uint64)
LENGTH_SHIFT = _U(56)
_PLACE_MASK = _U((1 << 56) - 1)
_FACTOR_1, _FACTOR_2 = _U(0x9E3779B97F4A7C15), _U(0xD6E8FEB86659FD93)


def aligned_rows(
    number: int, columns: int, kind: type[_Number], make: Callable[..., Any] = np.zeros
) -> npt.NDArray[_Number]:
    """Rows that begin where a cache line does: none of 16, 32 or 64 bytes lies across two of them."""
    line = 64 // np.dtype(kind).itemsize
    room = make(number * columns + line, kind)
    begin = -room.ctypes.data % 64 // room.itemsize
    return room[begin : begin + number * columns].reshape(number, columns)


def chunk_table(bits: int) -> npt.NDArray[np.uint64]:
    """An empty table of 2^bits slots."""
    return aligned_rows(1 << bits, 4, np.uint64)


@inlined
def chunk_key(buffer, start, length):
    """The first and the second eight bytes of a chunk, zero after its end, its length up to LONG, and its hash."""
    short = min(length, LONG)
    first = load8(buffer, start) & _FIRST_MASKS[short]
    second = load8(buffer, start + 8) & _SECOND_MASKS[short]
    code = _short_code(first, second, _U(short))
    if length > 16:
        i = start + 16
        end = start + length
        while i < end:
            code = (code ^ load8(buffer, i) & _FIRST_MASKS[min(end - i, 8)]) * _FACTOR_1
            code ^= code >> _U(32)
            i += 8
        code *= _FACTOR_2
    return first, second, short, code ^ code >> _U(29)


@inlined
def _short_code(first, second, short):
    code = (first ^ second * _FACTOR_2 ^ short << LENGTH_SHIFT) * _FACTOR_1
    return (code ^ code >> _U(32)) * _FACTOR_2


@inlined
def row_key(table, slot, arena):
    """The length and the `chunk_key` of the chunk in a slot; its bytes are looked at only if the row lacks some."""
    place = np.int64(table[slot, PLACE] & _PLACE_MASK)
    length = np.int64(table[slot, PLACE] >> LENGTH_SHIFT)
    first, second, short = table[slot, FIRST], table[slot, SECOND], length
    if length < LONG:
        code = _short_code(first, second, _U(short))
        code ^= code >> _U(29)
    else:
        while arena[place + length] != TEXT_END:
            length += 1
        first, second, short, code = chunk_key(arena, place, length)
    return length, first, second, short, code


@inlined
def home_slot(table, code):
    """The slot of a chunk with this hash, unless others have taken it."""
    return np.int64(code >> _U(20)) & (len(table) - 1)


@inlined
def find_slot(table, arena, buffer, start, length, first, second, short, code):
    """The slot of a chunk, or the empty one that it belongs into, and whether it is there."""
    mask = len(table) - 1
    slot = home_slot(table, code)
    while True:
        place = table[slot, PLACE]
        if (
            table[slot, FIRST] == first
            and table[slot, SECOND] == second
            and place >> LENGTH_SHIFT == _U(short)
            and (length < LONG or _same_rest(arena, np.int64(place & _PLACE_MASK), buffer, start, length))
        ):
            return slot, True
        if place == _U(0):
            return slot, False
        slot = (slot + 1) & mask


@kernel
def _same_rest(arena, place, buffer, start, length):
    for k in range(16, length):
        if arena[place + k] != buffer[start + k]:
            return False
    return arena[place + length] == TEXT_END


@inlined
def enter_chunk(table, slot, arena, place, buffer, start, length, first, second, short, value):
    """Fills a slot. A long chunk and its 0xFF go into the arena at `place`; returns the place after them."""
    table[slot, FIRST] = first
    table[slot, SECOND] = second
    table[slot, VALUE] = value
    table[slot, PLACE] = _U(short) << LENGTH_SHIFT | _U(place)
    if short < LONG:
        return place
    for k in range(length):
        arena[place + k] = buffer[start + k]
    arena[place + length] = TEXT_END
    return place + length + 1


@kernel
def chunk_place(table, slot):
    """Where a long chunk in a slot begins in the arena; at least 0 for a short one, too, and -1 for an empty slot."""
    place = table[slot, PLACE]
    return np.int64(place & _PLACE_MASK) if place else -1


# ---- symbols: a text while its pairs are merged
#
# Symbols stand in one int32 array, a place for each byte, with -1 between and after chunks. One that stands for n bytes
# keeps their n places, and is written into the first and the last of them: so the symbol before it ends one place to
# its left, and the next one begins n places to the right of its first. "the", after "t" and "h" have become 256, and
# after 256 and "e" have become 257 (what is in the middle is not read as a symbol):
#
#     256 256 'e' -1        257  .  257 -1
#
# Each number is id << 7 | how often the chunk occurs, so that one load brings both. 127 in these seven bits says that
# an array of amounts has the number: of 127 or more, or if all chunks occur equally often.

AMOUNT_BITS = 7  # what is left beside ids below 2^24 and the sign
MANY = (1 << AMOUNT_BITS) - 1


@inlined
def amount_at(symbols, amounts, place):
    """How often the chunk at a place occurs."""
    amount = np.int64(symbols[place]) & MANY
    if amount == MANY:
        amount = np.int64(amounts[place] if len(amounts) > 1 else amounts[0])
    return amount


AHEAD = 16  # places before one is come to, its cache line is asked for
GONE = -2  # in a place where a symbol began that was merged into the one before it


@inlined
def replace_pair(symbols, lengths, places, begin, end, left, right, new, neighbours):
    """Merges a pair, from left to right, where it still stands among `places[begin:end]`, which rise.

    Returns where the places end that are kept: those where it did stand (of "aaa" the first alone). For the i-th of
    them, the ids before and after it go into neighbours[2 * i] and [2 * i + 1], once all are merged; -1 is none.
    Two new ids in a row are each other's neighbours once, in the view of the first.
    """
    kept = begin
    for index in range(begin, end):
        place = places[index]
        prefetch(symbols, places[min(index + AHEAD, end - 1)])
        middle = place + lengths[left]
        if symbols[place] >> AMOUNT_BITS == left and symbols[middle] >> AMOUNT_BITS == right:
            symbol = np.int32(new << AMOUNT_BITS | symbols[place] & MANY)
            symbols[middle] = GONE
            symbols[place] = symbol
            symbols[place + lengths[new] - 1] = symbol
            places[kept] = place
            kept += 1
            if kept - begin > 1:  # nothing changes around the one before any more
                _note_neighbours(symbols, lengths, places[kept - 2], new, neighbours, 2 * (kept - 2 - begin))
    if kept > begin:
        _note_neighbours(symbols, lengths, places[kept - 1], new, neighbours, 2 * (kept - 1 - begin))
    return kept


@inlined
def _note_neighbours(symbols, lengths, place, new, neighbours, at):
    before = symbols[place - 1] >> AMOUNT_BITS  # before the first place of all, this is the -1 at the end
    neighbours[at] = before if before != new else -1
    neighbours[at + 1] = symbols[place + lengths[new]] >> AMOUNT_BITS
