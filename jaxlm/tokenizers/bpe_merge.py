"""Step 3 of the BPE engine: the most frequent pair is merged, again and again.

The merges are those of `bpe_reference.train`, and what makes them fast are two facts about its loop.

* A pair that a merge creates holds the new id. So all the places where a pair ever stands are known once the newer of
  its two ids has been made: they are listed then, one after the other, and no list ever grows (`_list_new_pairs`).
* From then on a pair's count can only fall. So the priority queue may hold counts that are too high: the true one is
  taken when a pair's bucket is opened, and at the top again if one of its ids has been merged since; the pair goes
  back if it was lower (`merge`). For pairs of the first ids, whose lists are the longest, it is kept up to date; for
  others the list is looked through.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import kernel
from jaxlm.tokenizers.base import InputError
from jaxlm.tokenizers.bpe_count import ChunkCounts
from jaxlm.tokenizers.bpe_kernels import (
    AHEAD,
    BYTE_MASK,
    FIRST,
    LENGTH_SHIFT,
    LONG,
    PLACE,
    SECOND,
    TEXT_END,
    VALUE,
    chunk_place,
    prefetch,
    replace_pair,
)
from jaxlm.tokenizers.bpe_queue import (
    BOUND,
    BUCKET,
    BUCKETS,
    HEAP,
    LENGTH,
    LIST,
    MERGES,
    OPENED_AT,
    PAIR,
    PAIRS,
    PLACES,
    drop_into_bucket,
    enqueue,
    open_bucket,
    pop,
)

_U = np.uint64
Array64 = npt.NDArray[np.int64]
Array32 = npt.NDArray[np.int32]
_Whole = TypeVar("_Whole", np.int32, np.int64)

_SHARE_BITS = 18  # a thread of its own pays for a share of so many bytes
_KNOWN = 512  # so many ids, the first ones, have pairs whose counts are kept up to date
_LOW = (1 << 32) - 1


def learn(
    counts: ChunkCounts, num_merges: int, *, rounds: int = 1, num_threads: int = 1
) -> Iterator[tuple[Array32, Array64]]:
    """Learns up to `num_merges` merges from counts, which it clears, in so many rounds.

    What comes before the first merge is divided among threads.

    Yields the merges learned so far after each round, with their counts.

    Merges are int32 of shape (n, 2), counts int64 of shape (n,): how often the merged pair stood in the text.

    Raises:
      InputError: more than 2 GiB of different chunks.
    """
    size = int(counts.size[1])
    if size > np.iinfo(np.int32).max:
        raise InputError("The text has more than 2 GiB of different chunks; use less of it, or a finer split.")
    num_merges = min(num_merges, size)  # each leaves a symbol less
    # No more than twice the places can be listed anew. What isn't written to takes no memory.
    places = np.empty(3 * size + 1, np.int32)
    pairs = np.empty((max(1 << 17, size // 4), 4), np.int64)  # enough for natural text
    next_pairs: Array32 = np.empty(len(pairs), np.int32)  # of the same bucket
    heap = np.empty((len(pairs), 3), np.int64)
    buckets = np.full(BUCKETS, -1, np.int32)
    state = np.zeros(6, np.int64)
    state[BUCKET] = BUCKETS
    symbols, amounts, known_counts = _list_byte_pairs(counts, places, pairs, next_pairs, buckets, state, num_threads)
    counts.clear()

    num_ids = 256 + num_merges
    lengths = np.ones(num_ids, np.int32)
    merges, merge_counts = np.empty((num_merges, 2), np.int32), np.empty(num_merges, np.int64)
    neighbours = np.empty(size + 2, np.int32)  # of a pair's places, of which there are half as many as bytes
    # For each id as a neighbour of the new one, left and right of it: how many places their pair has, and its count.
    beside = np.zeros((num_ids, 4), np.int64)
    touched = np.empty(2 * num_ids, np.int64)
    merged_at = np.zeros(num_ids, np.int32)  # how many merges there were when an id was last part of one
    for goal in np.linspace(0, num_merges, max(1, rounds) + 1).astype(int)[1:].tolist():
        while merge(
            symbols, amounts, lengths, places, pairs, next_pairs, heap, buckets, state, merges, merge_counts, goal,
            neighbours, beside, touched, known_counts, merged_at,
        ):  # fmt: skip
            pairs, next_pairs, heap = _enlarged(pairs), _enlarged(next_pairs), _enlarged(heap)
        done = int(state[MERGES])
        yield merges[:done], merge_counts[:done]
        if done < goal:
            return


def _enlarged(array: npt.NDArray[_Whole]) -> npt.NDArray[_Whole]:
    """The same rows and three times as many new ones, which take no memory before they are written to."""
    larger = np.empty((4 * len(array), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def _list_byte_pairs(
    counts: ChunkCounts,
    places: Array32,
    pairs: Array64,
    next_pairs: Array32,
    buckets: Array32,
    state: Array64,
    num_threads: int,
) -> tuple[Array32, npt.NDArray[np.int32 | np.int64], Array64]:
    """Lays the chunks out and lists their pairs of bytes, each thread those of its own share of the table.

    Returns the symbols; how often the chunk at each place occurs; and a table of known counts, those of pairs of bytes.
    """
    size = int(counts.size[1])
    num_threads = max(1, min(num_threads, size >> _SHARE_BITS))
    symbols = np.empty(size + 1, np.int32)
    symbols[size] = -1
    share_counts, share_ends = np.zeros((2, num_threads, 1 << 16), np.int64)
    with ThreadPoolExecutor(num_threads) as pool:
        chunks, sizes = zip(
            *pool.map(lambda index: _sorted_chunks(counts, index, num_threads), range(num_threads)), strict=True
        )
        least = min((int(rows[:, VALUE].min()) for rows in chunks if len(rows)), default=0)
        most = max((int(rows[:, VALUE].max()) for rows in chunks if len(rows)), default=0)
        kind: type[np.int32 | np.int64] = np.int32 if most < 1 << 31 else np.int64
        # Where all occur equally often, as where each text is one chunk, it is said once.
        amounts = np.full(1, most, kind) if least == most else np.empty(size, kind)
        spans = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))

        def lay_out_share(index: int) -> None:
            begin, end = spans[index]
            own = amounts[begin:end] if len(amounts) > 1 else amounts
            lay_out(chunks[index], counts.arena, symbols[begin:end], own)
            count_byte_pairs(symbols[begin:end], own, share_counts[index], share_ends[index])

        def list_share(index: int) -> None:
            list_places(symbols, *spans[index], places, share_ends[index])

        list(pool.map(lay_out_share, range(num_threads)))
        byte_counts = share_counts.sum(0)
        enter_byte_pairs(byte_counts, share_ends, pairs, next_pairs, buckets, state)
        known_counts = np.zeros((_KNOWN, _KNOWN), np.int64)
        known_counts[:256, :256] = byte_counts.reshape(256, 256)
        list(pool.map(list_share, range(num_threads)))
    return symbols, amounts, known_counts


def _sorted_chunks(counts: ChunkCounts, index: int, number: int) -> tuple[npt.NDArray[np.uint64], int]:
    """The rows of one of so many parts of the chunk table, by the first bytes of the chunks.

    Chunks that begin alike become neighbours. So most pairs have places near each other, in the processor's cache.

    Returns the rows, and how many places the chunks take.
    """
    table = counts.table
    slots = np.empty(len(table) // number + 1, np.uint64)
    found = np.zeros(2, np.int64)
    list_slots(table, counts.arena, len(table) * index // number, len(table) * (index + 1) // number, slots, found)
    slots = slots[: found[0]]
    low = _U(len(table) - 1)  # numbers are sorted much faster than what numbers are the keys of
    keys = table[slots, FIRST].byteswap() & ~low | slots
    keys.sort()
    chunks = np.empty((len(keys), 4), np.uint64)
    take_rows(table, keys & low, chunks)
    return chunks, int(found[1])


@kernel
def list_slots(table, arena, begin, end, slots, found):
    """Writes down the slots from `begin` to `end` that have chunks, their number, and how many places they take."""
    for slot in range(begin, end):
        place = chunk_place(table, slot)
        if place >= 0:
            slots[found[0]] = slot
            found[0] += 1
            length = np.int64(table[slot, PLACE] >> LENGTH_SHIFT)
            if length == LONG:
                while arena[place + length] != TEXT_END:
                    length += 1
            found[1] += length + 1


@kernel
def take_rows(table, slots, rows):
    for index in range(len(slots)):
        for column in range(4):
            rows[index, column] = table[slots[index], column]


@kernel
def lay_out(chunks, arena, symbols, amounts):
    """Writes the bytes of chunks as symbols, and how often the chunk of each occurs."""
    at = 0
    for number in range(len(chunks)):
        length = np.int64(chunks[number, PLACE] >> LENGTH_SHIFT)
        if length < LONG:  # all of it stands in the row
            for k in range(min(length, 8)):
                symbols[at + k] = np.int32(chunks[number, FIRST] >> _U(8 * k) & BYTE_MASK)
            for k in range(8, length):
                symbols[at + k] = np.int32(chunks[number, SECOND] >> _U(8 * k - 64) & BYTE_MASK)
        else:
            place = chunk_place(chunks, number)
            length = 0
            while arena[place + length] != TEXT_END:
                symbols[at + length] = arena[place + length]
                length += 1
        for k in range(length if len(amounts) > 1 else 0):
            amounts[at + k] = chunks[number, VALUE]
        symbols[at + length] = -1
        at += length + 1


@kernel
def count_byte_pairs(symbols, amounts, byte_counts, numbers):
    """How often each pair of bytes occurs in the text, and at how many places."""
    for place in range(len(symbols) - 1):
        if symbols[place] >= 0 and symbols[place + 1] >= 0:
            pair = symbols[place] << 8 | symbols[place + 1]
            byte_counts[pair] += _amount(amounts, place)
            numbers[pair] += 1


@kernel
def enter_byte_pairs(byte_counts, share_ends, pairs, next_pairs, buckets, state):
    """Enters the pairs of bytes. The numbers of places become where each share's places of a pair begin."""
    for pair in range(1 << 16):
        place = state[PLACES]
        for share in range(len(share_ends)):
            number = share_ends[share, pair]
            share_ends[share, pair] = place
            place += number
        if place > state[PLACES]:
            key = np.int64(pair >> 8) << 32 | pair & 0xFF
            _enter_pair(pairs, state, key, byte_counts[pair], place - state[PLACES])
            drop_into_bucket(pairs, next_pairs, buckets, state[PAIRS] - 1)


@kernel
def list_places(symbols, begin, end, places, ends):
    """Lists the places of the pairs of bytes of one share."""
    for place in range(begin, end):
        if symbols[place] >= 0 and symbols[place + 1] >= 0:
            pair = symbols[place] << 8 | symbols[place + 1]
            places[ends[pair]] = place
            ends[pair] += 1


@kernel
def merge(
    symbols, amounts, lengths, places, pairs, next_pairs, heap, buckets, state, merges, merge_counts, goal,
    neighbours, beside, touched, known_counts, merged_at,
):  # fmt: skip
    """Merges until there are `goal` merges or no pair is left; True if it needs a larger table of pairs first."""
    while state[MERGES] < goal:
        if state[HEAP] == 0:
            opened = open_bucket(pairs, next_pairs, heap, buckets, state)
            if opened == 0:
                return False
            for index in range(opened):
                prefetch(places, pairs[heap[min(index + AHEAD, opened - 1), 2], LIST])
                _prefetch_place(symbols, amounts, places[pairs[heap[min(index + AHEAD // 2, opened - 1), 2], LIST]])
                pair = heap[index, 2]
                pairs[pair, BOUND] = _true_count(symbols, amounts, lengths, places, pairs, pair, known_counts)
                if pairs[pair, BOUND]:
                    enqueue(pairs, next_pairs, heap, buckets, state, pair)
            continue
        pair = heap[0, 2]
        if state[PAIRS] + 2 * min(pairs[pair, LENGTH], 256 + state[MERGES]) > len(pairs):
            return True
        pop(heap, state)
        for index in range(min(3, state[HEAP])):  # among them those that come next
            _prefetch_place(symbols, amounts, places[pairs[heap[index, 2], LIST]])
        left, right = pairs[pair, PAIR] >> 32, pairs[pair, PAIR] & _LOW
        true_count = pairs[pair, BOUND]
        if max(merged_at[left], merged_at[right]) > max(state[OPENED_AT], left - 255, right - 255):
            # Something happened to its ids since its bucket was opened or, if that came later, since it was made.
            true_count = _true_count(symbols, amounts, lengths, places, pairs, pair, known_counts)
        if true_count < pairs[pair, BOUND]:
            pairs[pair, BOUND] = true_count
            if true_count:
                enqueue(pairs, next_pairs, heap, buckets, state, pair)
            continue
        new = 256 + state[MERGES]
        merges[state[MERGES], 0] = left
        merges[state[MERGES], 1] = right
        merge_counts[state[MERGES]] = true_count
        state[MERGES] += 1
        merged_at[left] = merged_at[right] = state[MERGES]
        lengths[new] = lengths[left] + lengths[right]
        begin = pairs[pair, LIST]
        end = begin + pairs[pair, LENGTH]
        end = replace_pair(symbols, lengths, places, begin, end, left, right, new, neighbours)
        _list_new_pairs(
            amounts, lengths, places, pairs, next_pairs, heap, buckets, state, begin, end, left, right, new,
            neighbours, beside, touched, known_counts,
        )  # fmt: skip
    return False


@kernel
def _true_count(symbols, amounts, lengths, places, pairs, pair, known_counts):
    left, right = pairs[pair, PAIR] >> 32, pairs[pair, PAIR] & _LOW
    if max(left, right) < len(known_counts):
        return known_counts[left, right]
    return _recount(symbols, amounts, lengths, places, pairs, pair, left, right)


@kernel
def _recount(symbols, amounts, lengths, places, pairs, pair, left, right):
    """The true count of a pair. Places where it no longer stands are taken from its list."""
    length = lengths[left]
    kept = pairs[pair, LIST]
    end = kept + pairs[pair, LENGTH]
    true_count = 0
    for index in range(kept, end):
        place = places[index]
        _prefetch_place(symbols, amounts, places[min(index + AHEAD, end - 1)])
        # Without a branch, which would be foreseen wrongly half of the time.
        stands = np.int64(symbols[place] == left) & np.int64(symbols[place + length] == right)
        places[kept] = place
        kept += stands
        true_count += stands * _amount(amounts, place)
    pairs[pair, LENGTH] = kept - pairs[pair, LIST]
    return true_count


@kernel
def _prefetch_place(symbols, amounts, place):
    prefetch(symbols, place)
    if len(amounts) > 1:
        prefetch(amounts, place)


@kernel
def _list_new_pairs(
    amounts, lengths, places, pairs, next_pairs, heap, buckets, state, begin, end, left, right, new,
    neighbours, beside, touched, known_counts,
):  # fmt: skip
    """Counts, lists and enqueues the pairs that the new id makes with its neighbours."""
    num_touched = 0
    for index in range(end - begin):
        if len(amounts) > 1:
            prefetch(amounts, places[min(begin + index + AHEAD, end - 1)])
        amount = _amount(amounts, places[begin + index])
        for side in range(2):
            neighbour = neighbours[2 * index + side]
            if neighbour >= 0:
                if beside[neighbour, 2 * side] == 0:
                    touched[num_touched] = 2 * neighbour + side
                    num_touched += 1
                beside[neighbour, 2 * side] += 1
                beside[neighbour, 2 * side + 1] += amount
    for index in range(num_touched):
        neighbour, column = touched[index] >> 1, 2 * (touched[index] & 1)
        # The neighbour's pair with the id that was there is gone; so is that between two merged pairs in a row.
        first, second = (right, neighbour if neighbour != new else left) if column else (neighbour, left)
        if max(first, second) < len(known_counts):
            known_counts[first, second] -= beside[neighbour, column + 1]
        first, second = (new, neighbour) if column else (neighbour, new)
        if max(first, second) < len(known_counts):
            known_counts[first, second] = beside[neighbour, column + 1]
        _enter_pair(pairs, state, first << 32 | second, beside[neighbour, column + 1], beside[neighbour, column])
        enqueue(pairs, next_pairs, heap, buckets, state, state[PAIRS] - 1)
        beside[neighbour, column] = pairs[state[PAIRS] - 1, LIST]
    for index in range(end - begin):
        for side in range(2):
            neighbour = neighbours[2 * index + side]
            if neighbour >= 0:
                places[beside[neighbour, 2 * side]] = places[begin + index] - (0 if side else lengths[neighbour])
                beside[neighbour, 2 * side] += 1
    for index in range(num_touched):
        neighbour, column = touched[index] >> 1, 2 * (touched[index] & 1)
        beside[neighbour, column] = 0
        beside[neighbour, column + 1] = 0


@kernel
def _amount(amounts, place):
    """How often the chunk at a place occurs."""
    return amounts[place] if len(amounts) > 1 else amounts[0]


@kernel
def _enter_pair(pairs, state, key, pair_count, num_places):
    """A new row of the table of pairs, with room for its places."""
    row = state[PAIRS]
    pairs[row, BOUND] = pair_count
    pairs[row, PAIR] = key
    pairs[row, LIST] = state[PLACES]
    pairs[row, LENGTH] = num_places
    state[PAIRS] += 1
    state[PLACES] += num_places
