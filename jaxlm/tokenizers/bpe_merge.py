"""Step 3 of the BPE engine: the most frequent pair is merged, again and again.

The merges are those of `bpe_reference.train`, and what makes them fast are two facts about its loop.

* A pair that a merge creates holds the new id. So all the places where a pair ever stands are known once the newer of
  its two ids has been made: they are listed then, one after the other, and no list ever grows (`_list_new_places`).
* From then on a pair's count can only fall. So the priority queue may hold counts that are too high: the true one is
  taken when a pair's bucket is opened, and at the top again if one of its ids has been merged since; the pair goes
  back if it was lower (`merge`). For pairs of the first ids, whose lists are the longest, it is kept up to date; for
  others the list is looked through.

Long steps are shared by two threads. Half of an opened bucket's pairs are one's, and half of a pair's places, where the
border is one between chunks: so neither reads a symbol that the other writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxlm.machine_code import COMPILED, inlined, kernel
from jaxlm.tokenizers.base import InputError
from jaxlm.tokenizers.bpe_count import ChunkCounts
from jaxlm.tokenizers.bpe_kernels import AHEAD, AMOUNT_BITS, amount_at, prefetch, replace_pair
from jaxlm.tokenizers.bpe_layout import laid_out
from jaxlm.tokenizers.bpe_queue import enqueue, is_in_run, open_bucket, pop, put_in_order
from jaxlm.tokenizers.bpe_team import KIND, close_board, offer, open_board, report, take_back, wait_for_offer
from jaxlm.tokenizers.bpe_work import (
    BEGIN,
    BOUND,
    END,
    HEAP,
    LEAST_SHARED,
    LENGTH,
    LIST,
    MERGES,
    OPENED_AT,
    PAIR,
    PAIRS,
    RUN,
    RUN_END,
    TOUCHED,
    Array32,
    Array64,
    Work,
    enter_pair,
)
from jaxlm.tokenizers.threads import num_cores, workers

_LOOKED_AT = 256  # symbols, for the border between two chunks
_LEAST_HELPED = 1 << 16  # bytes of different chunks to a round of merges; for fewer it doesn't pay to call a helper
_LEAST_SHARED = 512  # places of a pair, or pairs of a bucket, that two threads share
_LOW = (1 << 32) - 1


def learn(
    counts: ChunkCounts, num_merges: int, *, rounds: int = 1, num_threads: int = 1
) -> Iterator[tuple[Array32, Array64]]:
    """Learns up to `num_merges` merges from counts, which it clears, in so many rounds.

    What comes before the first merge is divided among all threads, the merges among two.

    Yields the merges learned so far after each round, with their counts.

    Merges are int32 of shape (n, 2), counts int64 of shape (n,): how often the merged pair stood in the text.

    Raises:
      InputError: more than 2 GiB of different chunks.
    """
    size = int(counts.size[2])
    if size > np.iinfo(np.int32).max:
        raise InputError("The text has more than 2 GiB of different chunks; use less of it, or a finer split.")
    num_merges = min(num_merges, size)  # each leaves a symbol less
    # Without a core of its own a helper would be in the way.
    helped = COMPILED and min(num_threads, num_cores()) > 1 and size >= max(1, rounds) * _LEAST_HELPED
    with workers(num_threads) as pool:
        work = laid_out(counts, num_merges, num_threads, pool)
        counts.clear()
        work.state[LEAST_SHARED] = _LEAST_SHARED if helped else np.iinfo(np.int64).max
        for goal in np.linspace(0, num_merges, max(1, rounds) + 1).astype(int)[1:].tolist():
            while _merge_with_help(work, goal, pool) if helped else merge(work, goal):
                work = work.with_room()
            done = int(work.state[MERGES])
            yield work.merges[:done], work.merge_counts[:done]
            if done < goal:
                return


def _merge_with_help(work: Work, goal: int, pool: ThreadPoolExecutor) -> bool:
    open_board(work.board)
    try:
        helper = pool.submit(help_merging, work)
        needs_room = merge(work, goal)
    finally:
        close_board(work.board)
    helper.result()  # has gone home before the board is opened again
    return needs_room


@kernel
def merge(work, goal):
    """Merges until there are `goal` merges or no pair is left; True if it needs a larger table of pairs first."""
    state, pairs, run, heap, merged_at = work.state, work.pairs, work.run, work.heap, work.merged_at
    while state[MERGES] < goal:
        if state[HEAP] == 0 and state[RUN] == state[RUN_END]:
            opened = open_bucket(work)
            if opened == 0:
                return False
            is_shared = _divide(work, state[RUN], opened // 2 if opened >= state[LEAST_SHARED] else opened, opened)
            offer(work.board, _RECOUNT, is_shared)
            for share in range(1 + is_shared):
                if share == 0 or take_back(work.board):
                    _recount(work, share)
            put_in_order(work, opened)
            continue
        from_run = is_in_run(run, heap, state)
        pair = run[state[RUN], 1] if from_run else heap[0, 2]
        if state[PAIRS] + 2 * min(pairs[pair, LENGTH], 256 + state[MERGES]) > len(pairs):
            return True
        if from_run:
            state[RUN] += 1
        else:
            pop(heap, state)
        _prefetch_next(work)
        left, right = pairs[pair, PAIR] >> 32, pairs[pair, PAIR] & _LOW
        true_count = pairs[pair, BOUND]
        # Its count was exact when its bucket was opened or, if that came later, when the pair was made: there are
        # n - 255 merges once there is the id n. It still is, unless one of its ids has been part of a merge since.
        exact_at = max(state[OPENED_AT], left - 255, right - 255)
        if max(merged_at[left], merged_at[right]) > exact_at:
            true_count = _true_count(work, pair)
        if true_count < pairs[pair, BOUND]:
            pairs[pair, BOUND] = true_count
            if true_count:
                enqueue(true_count, pairs[pair, PAIR], pair, heap, work.blocks, work.buckets, state)
            continue
        work.merges[state[MERGES], 0] = left
        work.merges[state[MERGES], 1] = right
        work.merge_counts[state[MERGES]] = true_count
        work.lengths[256 + state[MERGES]] = work.lengths[left] + work.lengths[right]
        state[MERGES] += 1
        merged_at[left] = merged_at[right] = state[MERGES]
        begin = pairs[pair, LIST]
        end = begin + pairs[pair, LENGTH]
        middle = _chunk_border(work.symbols, work.places, begin, end) if end - begin >= state[LEAST_SHARED] else end
        is_shared = _divide(work, begin, middle, end)
        offer(work.board, _REPLACE, is_shared)
        for share in range(1 + is_shared):
            if share == 0 or take_back(work.board):
                _replace(work, share)
        _enter_new_pairs(work, left, right, is_shared)
        offer(work.board, _LIST, is_shared)
        for share in range(1 + is_shared):
            if share == 0 or take_back(work.board):
                _list_new_places(work, share)
    return False


@kernel
def help_merging(work):
    """Does the second shares of the steps of `merge`, as long as they are offered."""
    while True:
        step = wait_for_offer(work.board)
        if not step:
            break
        kind = work.board[KIND, 0]
        if kind == _RECOUNT:
            _recount(work, _SECOND)
        elif kind == _REPLACE:
            _replace(work, _SECOND)
        else:
            _list_new_places(work, _SECOND)
        report(work.board, step)


# ---- steps that can be shared

_RECOUNT, _REPLACE, _LIST = range(3)
_SECOND = np.int64(1)  # share; each step would be compiled once more for a plain 1, which is a type of its own


@inlined
def _divide(work, begin, middle, end):
    """Makes one or two shares of what stands from `begin` to `end`; whether there are two."""
    work.shares[0, BEGIN] = begin
    work.shares[0, END] = work.shares[1, BEGIN] = middle
    work.shares[1, END] = end
    return middle < end


@kernel
def _chunk_border(symbols, places, begin, end):
    """About the middle of `places[begin:end]`, which rise, where one place and the next are of different chunks.

    The end, if there is no such border nearby.
    """
    index = begin + (end - begin) // 2
    at = places[index] - 1
    for _ in range(_LOOKED_AT):
        if symbols[at] == -1:
            return index
        if at > places[index - 1]:
            at -= 1
        else:
            index += 1
            if index == end:
                break
            at = places[index] - 1
    return end


@inlined
def _recount(work, share):
    """Puts the true counts of the pairs in the run beside them."""
    run, pairs, places, last = work.run, work.pairs, work.places, work.shares[share, END] - 1
    for index in range(work.shares[share, BEGIN], last + 1):
        prefetch(pairs, run[min(index + 2 * AHEAD, last), 1])
        prefetch(places, pairs[run[min(index + AHEAD, last), 1], LIST])
        prefetch(work.symbols, places[pairs[run[min(index + AHEAD // 2, last), 1], LIST]])
        run[index, 0] = _true_count(work, run[index, 1])


@inlined
def _true_count(work, pair):
    """The true count of a pair. Places where it no longer stands are taken from its list."""
    left, right = work.pairs[pair, PAIR] >> 32, work.pairs[pair, PAIR] & _LOW
    if max(left, right) < len(work.known_counts):
        return work.known_counts[left, right]
    symbols, places, length = work.symbols, work.places, work.lengths[left]
    kept = work.pairs[pair, LIST]
    end = kept + work.pairs[pair, LENGTH]
    true_count = 0
    for index in range(kept, end):
        place = places[index]
        prefetch(symbols, places[min(index + AHEAD, end - 1)])
        # Without a branch, which would be foreseen wrongly half of the time.
        is_left, is_right = symbols[place] >> AMOUNT_BITS == left, symbols[place + length] >> AMOUNT_BITS == right
        stands = np.int64(is_left) & np.int64(is_right)
        places[kept] = place
        kept += stands
        true_count += stands * amount_at(work.symbols, work.amounts, place)
    work.pairs[pair, LENGTH] = kept - work.pairs[pair, LIST]
    return true_count


@inlined
def _prefetch_next(work):
    """Asks for what the next pairs need: first their rows, then the first of their places, then what stands there."""
    run, heap, pairs, places = work.run, work.heap, work.pairs, work.places
    coming, last = work.state[RUN], work.state[RUN_END] - 1
    if coming <= last:
        prefetch(pairs, run[min(coming + 12, last), 1])
        prefetch(places, pairs[run[min(coming + 8, last), 1], LIST])
        prefetch(work.symbols, places[pairs[run[min(coming + 4, last), 1], LIST]])
    else:
        for index in range(min(3, work.state[HEAP])):  # among them those that come next
            prefetch(work.symbols, places[pairs[heap[index, 2], LIST]])


@inlined
def _replace(work, share):
    """Merges the last pair of `merges`, and adds up what the new id has beside it."""
    new = 255 + work.state[MERGES]
    left, right = work.merges[new - 256, 0], work.merges[new - 256, 1]
    begin, end, places, beside = work.shares[share, BEGIN], work.shares[share, END], work.places, work.beside
    neighbours = work.neighbours[2 * (begin - work.shares[0, BEGIN]) :]  # two for each place
    end = replace_pair(work.symbols, work.lengths, places, begin, end, left, right, new, neighbours)
    touched = 0
    for index in range(end - begin):
        amount = amount_at(work.symbols, work.amounts, places[begin + index])
        for side in range(2):
            neighbour = neighbours[2 * index + side]
            if neighbour >= 0:
                if beside[share, neighbour, 2 * side] == 0:
                    work.touched[share, touched] = 2 * neighbour + side
                    touched += 1
                beside[share, neighbour, 2 * side] += 1
                beside[share, neighbour, 2 * side + 1] += amount
    work.shares[share, END] = end
    work.shares[share, TOUCHED] = touched


@inlined
def _enter_new_pairs(work, left, right, is_shared):
    """Enters and enqueues the pairs of the new id. Of their places, those of the first share come first."""
    new, beside, known_counts = 255 + work.state[MERGES], work.beside, work.known_counts
    for share in range(1 + is_shared):
        for index in range(work.shares[share, TOUCHED]):
            neighbour, column = work.touched[share, index] >> 1, 2 * (work.touched[share, index] & 1)
            number, pair_count = beside[share, neighbour, column], beside[share, neighbour, column + 1]
            if pair_count == 0:
                continue  # it was entered with the first share's
            if is_shared and share == 0:
                number += beside[1, neighbour, column]
                pair_count += beside[1, neighbour, column + 1]
            # The neighbour's pair with the id that was there is gone; so is that between two merged pairs in a row.
            before = left if neighbour == new else neighbour  # what the neighbour began with
            one, other = (right, before) if column else (neighbour, left)
            if max(one, other) < len(known_counts):
                known_counts[one, other] -= pair_count
            one, other = (new, neighbour) if column else (neighbour, new)
            if max(one, other) < len(known_counts):
                known_counts[one, other] = pair_count
            pair = enter_pair(one << 32 | other, pair_count, number, work.pairs, work.state)
            enqueue(pair_count, one << 32 | other, pair, work.heap, work.blocks, work.buckets, work.state)
            # From here on that column says where a share writes its places of the pair: the second one's come last.
            if is_shared and share == 0 and beside[1, neighbour, column]:
                beside[1, neighbour, column + 1] = 0
                beside[1, neighbour, column] = work.pairs[pair, LIST] + beside[0, neighbour, column]
            beside[share, neighbour, column] = work.pairs[pair, LIST]


@inlined
def _list_new_places(work, share):
    """Lists the places of the new pairs, from where `beside` says on, and clears it."""
    begin, beside = work.shares[share, BEGIN], work.beside
    neighbours = work.neighbours[2 * (begin - work.shares[0, BEGIN]) :]  # two for each place
    for index in range(work.shares[share, END] - begin):
        for side in range(2):
            neighbour = neighbours[2 * index + side]
            if neighbour >= 0:
                place = work.places[begin + index] - (0 if side else work.lengths[neighbour])
                work.places[beside[share, neighbour, 2 * side]] = place
                beside[share, neighbour, 2 * side] += 1
    for index in range(work.shares[share, TOUCHED]):
        neighbour, column = work.touched[share, index] >> 1, 2 * (work.touched[share, index] & 1)
        beside[share, neighbour, column] = 0
        beside[share, neighbour, column + 1] = 0
