"""How step 3 of the BPE engine begins: chunks are laid out as symbols, and places of pairs of bytes are listed."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import inlined, kernel
from jaxlm.tokenizers.bpe_count import ChunkCounts
from jaxlm.tokenizers.bpe_kernels import (
    AHEAD,
    AMOUNT_BITS,
    BYTE_MASK,
    FIRST,
    LENGTH_SHIFT,
    LONG,
    MANY,
    PLACE,
    SECOND,
    TEXT_END,
    VALUE,
    amount_at,
    chunk_place,
    prefetch,
)
from jaxlm.tokenizers.bpe_queue import drop_into_bucket
from jaxlm.tokenizers.bpe_work import PLACES, Work, enter_pair, new_work
from jaxlm.tokenizers.threads import in_shares

_U = np.uint64
_SHARE_BITS = 18  # a thread of its own pays for a share of so many bytes


def laid_out(counts: ChunkCounts, num_merges: int, num_threads: int, pool: ThreadPoolExecutor) -> Work:
    """The work of so many merges, with the pairs of bytes listed, each thread those of its own share of the chunks."""
    size = int(counts.size[2])
    num_threads = max(1, min(num_threads, size >> _SHARE_BITS))
    symbols = np.empty(size + 1, np.int32)
    symbols[size] = -1
    share_counts, share_ends = np.zeros((2, num_threads, 1 << 16), np.int64)
    keys, found = zip(
        *in_shares(pool, lambda index: _sorted_keys(counts, index, num_threads), num_threads), strict=True
    )
    sizes, least, most = zip(*found, strict=True)
    kind: type[np.int32 | np.int64] = np.int32 if max(most) < 1 << 31 else np.int64
    # Where all occur equally often, as where each text is one chunk, it is said once.
    amounts = np.full(1, max(most), kind) if min(least) >= max(most) else np.empty(size, kind)
    work = new_work(symbols, amounts, num_merges)
    spans = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))

    def lay_out_share(index: int) -> None:
        begin, end = spans[index]
        own = amounts[begin:end] if len(amounts) > 1 else amounts
        lay_out(counts.table, keys[index], counts.arena, symbols[begin:end], own)
        count_byte_pairs(symbols[begin:end], own, share_counts[index], share_ends[index])

    def list_share(index: int) -> None:
        list_places(symbols, *spans[index], work.places, share_ends[index])

    in_shares(pool, lay_out_share, num_threads)
    byte_counts = share_counts.sum(0)
    work.known_counts[:256, :256] = byte_counts.reshape(256, 256)
    enter_byte_pairs(work, byte_counts, share_ends)
    in_shares(pool, list_share, num_threads)
    return work


def _sorted_keys(counts: ChunkCounts, index: int, number: int) -> tuple[npt.NDArray[np.uint64], list[int]]:
    """The chunks of one of so many parts of the chunk table: their first bytes, and in the lowest bits their slots.

    Sorted, so that chunks which begin alike become neighbours, and most pairs have places near each other, in the
    processor's cache.

    Returns the keys; and how many places the chunks take, and the lowest and the highest count.
    """
    table = counts.table
    keys = np.empty(len(table) // number + 1, np.uint64)
    found = np.array([0, 0, np.iinfo(np.int64).max, 0])
    list_chunks(table, counts.arena, len(table) * index // number, len(table) * (index + 1) // number, keys, found)
    keys = keys[: found[0]]
    keys.sort()
    return keys, found[1:].tolist()


@kernel
def list_chunks(table, arena, begin, end, keys, found):
    """Writes down the keys of the chunks in the slots from `begin` to `end`, and what is found there: see above."""
    low = _U(len(table) - 1)
    for slot in range(begin, end):
        place = chunk_place(table, slot)
        if place >= 0:
            first_bytes = _U(0)
            for k in range(8):
                first_bytes = first_bytes << _U(8) | table[slot, FIRST] >> _U(8 * k) & BYTE_MASK
            keys[found[0]] = first_bytes & ~low | _U(slot)
            length = np.int64(table[slot, PLACE] >> LENGTH_SHIFT)
            if length == LONG:
                while arena[place + length] != TEXT_END:
                    length += 1
            found[0] += 1
            found[1] += length + 1
            found[2] = min(found[2], np.int64(table[slot, VALUE]))
            found[3] = max(found[3], np.int64(table[slot, VALUE]))


@kernel
def lay_out(table, keys, arena, symbols, amounts):
    """Writes the bytes of chunks as symbols, and the amounts that have no room there."""
    low = _U(len(table) - 1)
    at = 0
    for index in range(len(keys)):
        prefetch(table, np.int64(keys[min(index + AHEAD, len(keys) - 1)] & low))
        slot = np.int64(keys[index] & low)
        length = np.int64(table[slot, PLACE] >> LENGTH_SHIFT)
        amount = min(np.int64(table[slot, VALUE]), MANY) if len(amounts) > 1 else MANY
        if length < LONG:  # all of it stands in the row
            for k in range(min(length, 8)):
                symbols[at + k] = np.int32(table[slot, FIRST] >> _U(8 * k) & BYTE_MASK) << AMOUNT_BITS | amount
            for k in range(8, length):
                symbols[at + k] = np.int32(table[slot, SECOND] >> _U(8 * k - 64) & BYTE_MASK) << AMOUNT_BITS | amount
        else:
            place = chunk_place(table, slot)
            length = 0
            while arena[place + length] != TEXT_END:
                symbols[at + length] = np.int32(arena[place + length]) << AMOUNT_BITS | amount
                length += 1
        for k in range(length if amount == MANY and len(amounts) > 1 else 0):
            amounts[at + k] = table[slot, VALUE]
        symbols[at + length] = -1
        at += length + 1


@inlined
def _byte_pair(symbols, place):
    return symbols[place] >> AMOUNT_BITS << 8 | symbols[place + 1] >> AMOUNT_BITS


@kernel
def count_byte_pairs(symbols, amounts, byte_counts, numbers):
    """How often each pair of bytes occurs in the text, and at how many places."""
    for place in range(len(symbols) - 1):
        if symbols[place] >= 0 and symbols[place + 1] >= 0:
            pair = _byte_pair(symbols, place)
            byte_counts[pair] += amount_at(symbols, amounts, place)
            numbers[pair] += 1


@kernel
def enter_byte_pairs(work, byte_counts, share_ends):
    """Enters the pairs of bytes. The numbers of places become where each share's places of a pair begin."""
    for pair in range(1 << 16):
        place = work.state[PLACES]
        for share in range(len(share_ends)):
            number = share_ends[share, pair]
            share_ends[share, pair] = place
            place += number
        if place > work.state[PLACES]:
            key = np.int64(pair >> 8) << 32 | pair & 0xFF
            row = enter_pair(key, byte_counts[pair], place - work.state[PLACES], work.pairs, work.state)
            drop_into_bucket(byte_counts[pair], row, work.blocks, work.buckets, work.state)


@kernel
def list_places(symbols, begin, end, places, ends):
    """Lists the places of the pairs of bytes of one share."""
    for place in range(begin, end):
        if symbols[place] >= 0 and symbols[place + 1] >= 0:
            pair = _byte_pair(symbols, place)
            places[ends[pair]] = place
            ends[pair] += 1
