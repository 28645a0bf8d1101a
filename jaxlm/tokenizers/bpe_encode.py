"""Step 4 of the BPE engine: chunks to ids.

In here symbols are numbered in the order of their merges: the bytes 0 to 255, then 256 + i for merge i. So the pair to
merge first is the one whose result is lowest. Real ids come in where an encoded chunk is written down.

A chunk that was seen before is found, with its ids, in a bounded cache, which is nearly always. Another one is encoded
as the textbook does, if it is short; a long one by lists of places (`_encode_long`), in time that grows with its length
alone. The results are those of `bpe_reference.encode`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import inlined, kernel
from jaxlm.tokenizers.base import InputError
from jaxlm.tokenizers.bpe_kernels import (
    AMOUNT_BITS,
    TEXT_END,
    VALUE,
    chunk_key,
    chunk_table,
    enter_chunk,
    find_slot,
    replace_pair,
)
from jaxlm.tokenizers.bpe_split import DONE, KNOWN, START, Chunks, next_chunks

_U = np.uint64
_LOW = _U(0xFFFFFFFF)
SHORT = 48  # bytes up to which a chunk is encoded as the textbook does, and cached
_CACHE_BITS = 18
_CACHED_CHUNKS = 3 << (_CACHE_BITS - 2)
_COUNT_SHIFT = _U(56)  # a value of the cache: how many ids, in the highest byte, and where they begin


class PairTable:
    """Merges as a hash table from (left, right) to the result; also what each symbol is outside of the engine.

    Args:
      merges: int32 (n, 2), as symbols.
      ids: int32 (256 + n,), the id of each symbol.
      whole: chunks that have an id of their own which no merges lead to.
    """

    def __init__(self, merges: npt.NDArray[np.int32], ids: npt.NDArray[np.int32], whole: dict[bytes, int]) -> None:
        self.table = np.zeros((1 << max(4, (2 * len(merges)).bit_length()), 2), np.uint64)
        self.lengths = np.ones(256 + len(merges), np.int32)
        fill_pairs(merges, self.table, self.lengths)
        self.merges, self.ids = merges, ids
        whole = {chunk: token_id for chunk, token_id in whole.items() if TEXT_END not in chunk}  # others are no text
        self.whole = chunk_table(max(4, (2 * len(whole)).bit_length()))
        self.whole_arena = np.empty(sum(len(chunk) + 1 for chunk in whole) + 24, np.uint8)
        place = 0
        for chunk, token_id in whole.items():
            data = np.frombuffer(chunk + bytes(24), np.uint8)
            place = enter_whole(self.whole, self.whole_arena, place, data, len(chunk), token_id)

    def workspace(self) -> Workspace:
        return Workspace(len(self.ids))


class Workspace:
    """What one thread encodes with: the cache of encoded chunks, and room for long ones."""

    def __init__(self, num_symbols: int) -> None:
        self.cache = chunk_table(_CACHE_BITS)
        self.arena = np.empty(_CACHED_CHUNKS * 24, np.uint8)
        self.ids = np.empty(_CACHED_CHUNKS * 4, np.int32)
        self.size = np.zeros(3, np.int64)  # chunks, bytes of the arena, ids
        self.short = np.empty((2, SHORT + 1), np.int64)
        self.lists = np.zeros((3, num_symbols), np.int32)  # for long chunks, as what `make_room` makes
        self.make_room(0)

    def make_room(self, length: int) -> None:
        """Room for a chunk of so many bytes. What isn't written to takes no memory."""
        if 3 * length > np.iinfo(np.int32).max:  # places are numbered by int32
            raise InputError("The text has a chunk of more than 700 MB; encode it in parts, or use a split.")
        self.symbols = np.empty(length + 1, np.int32)
        self.symbols[-1] = -1  # what stands before the first place, see `replace_pair`
        self.places = np.empty(3 * length, np.int32)
        self.neighbours, self.results = np.empty((2, length + 2), np.int32)

    def release(self) -> None:
        """Gives back the room for a chunk of megabytes."""
        if len(self.symbols) > 1 << 20:
            self.make_room(0)


def encode_chunks(
    chunks: Chunks, num_texts: int, pairs: PairTable, room: Workspace
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The ids of the texts in a buffer, and where those of each text begin and end: offsets, one more than texts."""
    buffer, *_, ends, where = chunks
    out = np.empty(len(buffer) + SHORT, np.int32)
    offsets = np.zeros(num_texts + 1, np.int64)
    progress = np.zeros(2, np.int64)
    while not encode(
        *chunks, offsets[1:], progress,
        room.cache, room.arena, room.ids, room.size, room.short,
        room.lists, room.symbols, room.places, room.neighbours, room.results,
        pairs.table, pairs.merges, pairs.lengths, pairs.ids, pairs.whole, pairs.whole_arena,
        out,
    ):  # fmt: skip
        room.make_room(int(ends[where[DONE]] - where[START]))
    offsets[1 + progress[0] :] = progress[1]
    out.resize(int(progress[1]), refcheck=False)
    room.release()
    return out, offsets


@kernel
def fill_pairs(merges, table, lengths):
    for index in range(len(merges)):
        left, right = merges[index, 0], merges[index, 1]
        slot, _ = _find_pair(table, left, right)
        table[slot, 0] = _U(left) << _U(32) | _U(right)
        table[slot, 1] = _U(256 + index)
        lengths[256 + index] = lengths[left] + lengths[right]


@inlined
def _find_pair(table, left, right):
    """The slot of a pair or the empty one where it belongs, and its result, or 0."""
    key = _U(left) << _U(32) | _U(right)
    code = key * _U(0x9E3779B97F4A7C15)
    mask = len(table) - 1
    slot = np.int64((code ^ code >> _U(32)) & _LOW) & mask
    while table[slot, 1] and table[slot, 0] != key:
        slot = (slot + 1) & mask
    return slot, np.int64(table[slot, 1])


@kernel
def enter_whole(table, arena, place, chunk, length, token_id):
    first, second, short, code = chunk_key(chunk, 0, length)
    slot, _ = find_slot(table, arena, chunk, 0, length, first, second, short, code)
    return enter_chunk(table, slot, arena, place, chunk, 0, length, first, second, short, _U(token_id))


# ---- encoding


@kernel
def encode(
    buffer, classes, scheme, ends, where, text_ids, progress,
    cache, arena, cached_ids, size, short_room,
    lists, symbols, places, neighbours, results,
    pairs, merges, lengths, ids, whole, whole_arena,
    out,
):  # fmt: skip
    """Encodes chunks into `out` until all are done; False if there is no room for the next one, which is long.

    `progress` is (texts done, ids written). Where a text ends, the number of ids so far goes into `text_ids`.
    """
    text, count = progress[0], progress[1]
    room = True
    while room and next_chunks(buffer, classes, scheme, ends, where):
        start = where[START]
        done = where[KNOWN]
        for index in range(where[DONE], where[KNOWN]):
            while buffer[start] == TEXT_END:
                text_ids[text] = count
                text += 1
                start += 1
            length = ends[index] - start
            first, second, short, code = chunk_key(buffer, start, length)
            slot, found = find_slot(cache, arena, buffer, start, length, first, second, short, code)
            if found:
                value = cache[slot, VALUE]
                amount = np.int64(value >> _COUNT_SHIFT)
                at = np.int64(value & _LOW)
                for k in range(4):  # nearly always enough, and what is too much is overwritten
                    out[count + k] = cached_ids[at + k]
                for k in range(4, amount):
                    out[count + k] = cached_ids[at + k]
            elif length > SHORT and length >= len(symbols):
                done = index
                room = False
                break
            else:
                amount = _encode_new(
                    buffer, start, length, short_room, lists, symbols, places, neighbours, results,
                    pairs, merges, lengths, ids, whole, whole_arena, out, count,
                )  # fmt: skip
                if length <= SHORT:
                    _cache_chunk(
                        cache, arena, cached_ids, size, buffer, start, length, slot, first, second, short, code,
                        out, count, amount,
                    )  # fmt: skip
            count += amount
            start += length
        where[START] = start
        where[DONE] = done
    progress[0] = text
    progress[1] = count
    return room


@inlined
def _cache_chunk(
    cache, arena, cached_ids, size, buffer, start, length, slot, first, second, short, code, out, count, amount
):  # fmt: skip
    """Enters an encoded chunk. A cache that is full is emptied first."""
    if size[0] == _CACHED_CHUNKS or size[1] + SHORT + 25 > len(arena) or size[2] + SHORT + 4 > len(cached_ids):
        cache[:] = 0
        size[:] = 0
        slot, _ = find_slot(cache, arena, buffer, start, length, first, second, short, code)
    for k in range(amount):
        cached_ids[size[2] + k] = out[count + k]
    value = _U(size[2]) | _U(amount) << _COUNT_SHIFT
    size[0] += 1
    size[1] = enter_chunk(cache, slot, arena, size[1], buffer, start, length, first, second, short, value)
    size[2] += amount


@inlined
def _encode_new(
    buffer, start, length, short_room, lists, symbols, places, neighbours, results,
    pairs, merges, lengths, ids, whole, whole_arena, out, count,
):  # fmt: skip
    """Writes the ids of one chunk from `out[count]` on; returns how many."""
    first, second, short, code = chunk_key(buffer, start, length)
    slot, found = find_slot(whole, whole_arena, buffer, start, length, first, second, short, code)
    if found:
        out[count] = np.int32(whole[slot, VALUE])
        return 1
    if length > SHORT:
        return _encode_long(
            buffer, start, length, lists, symbols, places, neighbours, results, pairs, merges, lengths, ids, out, count
        )
    return _encode_short(buffer, start, length, short_room, pairs, ids, out, count)


@inlined
def _encode_short(buffer, start, length, room, pairs, ids, out, count):
    """The textbook: the pair with the lowest result is merged until none has any."""
    results = room[1]  # of each symbol with the one after it; 0 is none
    for k in range(length):
        room[0, k] = buffer[start + k]
        results[k] = 0
    for k in range(length - 1):
        _, results[k] = _find_pair(pairs, room[0, k], room[0, k + 1])
    while length > 1:
        best = -1
        lowest = np.int64(1) << 40
        for k in range(length - 1):
            if results[k] and results[k] < lowest:
                lowest = results[k]
                best = k
        if best < 0:
            break
        room[0, best] = lowest
        length -= 1
        for k in range(best + 1, length):
            room[0, k] = room[0, k + 1]
            results[k] = results[k + 1]
        results[best] = 0
        if best + 1 < length:
            _, results[best] = _find_pair(pairs, lowest, room[0, best + 1])
        if best:
            _, results[best - 1] = _find_pair(pairs, room[0, best - 1], lowest)
    for k in range(length):
        out[count + k] = ids[room[0, k]]
    return length


# The rows of the lists: where the list of a result begins among all places, how long it is; and the heap of the results
# that wait to be worked through.
_BEGIN, _LENGTH, _WAITING = range(3)


@kernel
def _encode_long(
    buffer, start, length, lists, symbols, places, neighbours, results, pairs, merges, lengths, ids, out, count
):
    """Merges result by result, the lowest first, each at all its places from left to right.

    A pair that a merge creates has a higher result than that merge, since it holds it, and all its places are known
    once that merge is done. So the list of a result is whole before it is worked through.
    """
    for k in range(length):
        symbols[k] = np.int32(buffer[start + k]) << AMOUNT_BITS
    symbols[length] = -1
    for place in range(length - 1):
        _, results[place] = _find_pair(pairs, symbols[place] >> AMOUNT_BITS, symbols[place + 1] >> AMOUNT_BITS)
    listed, waiting = _open_lists(lists, results, length - 1, 0, 0)
    for place in range(length - 1):
        _append(lists, places, results[place], place)
    while waiting:
        new, waiting = _lowest_waiting(lists, waiting)
        begin = lists[_BEGIN, new] - lists[_LENGTH, new]  # filling it moved its begin to its end
        left, right = merges[new - 256, 0], merges[new - 256, 1]
        end = replace_pair(symbols, lengths, places, begin, lists[_BEGIN, new], left, right, new, neighbours)
        lists[_LENGTH, new] = 0
        for index in range(end - begin):
            before, after = neighbours[2 * index], neighbours[2 * index + 1]
            results[2 * index] = results[2 * index + 1] = 0
            if before >= 0:
                _, results[2 * index] = _find_pair(pairs, before, new)
            if after >= 0:
                _, results[2 * index + 1] = _find_pair(pairs, new, after)
        listed, waiting = _open_lists(lists, results, 2 * (end - begin), listed, waiting)
        for index in range(end - begin):
            if results[2 * index]:
                _append(lists, places, results[2 * index], places[begin + index] - lengths[neighbours[2 * index]])
            _append(lists, places, results[2 * index + 1], places[begin + index])
    place = written = 0
    while place < length:
        symbol = symbols[place] >> AMOUNT_BITS
        out[count + written] = ids[symbol]
        written += 1
        place += lengths[symbol]
    return written


@kernel
def _open_lists(lists, results, number, listed, waiting):
    """Room for the list of each result that occurs among the first `number`, which from now on waits."""
    first = waiting
    for index in range(number):
        result = results[index]
        if result:
            if lists[_LENGTH, result] == 0:
                lists[_WAITING, waiting] = result
                waiting += 1
            lists[_LENGTH, result] += 1
    for index in range(first, waiting):
        result = lists[_WAITING, index]
        lists[_BEGIN, result] = listed
        listed += lists[_LENGTH, result]
        i = index
        while i > 0 and lists[_WAITING, (i - 1) >> 1] > result:
            lists[_WAITING, i] = lists[_WAITING, (i - 1) >> 1]
            i = (i - 1) >> 1
        lists[_WAITING, i] = result
    return listed, waiting


@kernel
def _append(lists, places, result, place):
    if result:
        places[lists[_BEGIN, result]] = place
        lists[_BEGIN, result] += 1


@kernel
def _lowest_waiting(lists, waiting):
    """Takes the lowest result from the heap."""
    lowest = lists[_WAITING, 0]
    waiting -= 1
    last = lists[_WAITING, waiting]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= waiting:
            break
        if child + 1 < waiting and lists[_WAITING, child + 1] < lists[_WAITING, child]:
            child += 1
        if last <= lists[_WAITING, child]:
            break
        lists[_WAITING, i] = lists[_WAITING, child]
        i = child
    lists[_WAITING, i] = last
    return lowest, waiting
