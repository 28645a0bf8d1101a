"""The priority queue of step 3 of the BPE engine: buckets by count, of which the highest is opened and put in order.

A bucket is opened when all above it are empty. If all its pairs have one count, they are sorted once, by their ids,
into a run that is read from its front: so it is known which pairs come next, and their memory can be asked for ahead.
What comes into the bucket after that goes into a heap, as do pairs of buckets that are small or of several counts.
"""

from __future__ import annotations

import numpy as np

from jaxlm.machine_code import inlined, kernel
from jaxlm.tokenizers.bpe_work import (
    BLOCK,
    BLOCKS,
    BOUND,
    BUCKET,
    EXACT,
    FREE,
    HEAP,
    MERGES,
    OPENED_AT,
    PAIR,
    RUN,
    RUN_END,
)

_LEAST_SORTED = 64  # pairs; fewer are sooner in the heap


@inlined
def _bucket_of(pair_count):
    """A number that doesn't fall as the count rises: the count to 1,023, then its highest ten bits and their place."""
    octave = 0
    while pair_count >= EXACT:
        pair_count >>= 1
        octave += 1
    return pair_count + 512 * octave


@inlined
def drop_into_bucket(bound, pair, blocks, buckets, state):
    bucket = _bucket_of(bound)
    at = buckets[bucket] + 1
    if at & (BLOCK - 1) < 2:  # after a full block, or the first of all
        start = state[FREE]
        if start:
            state[FREE] = blocks[start]
        else:
            state[BLOCKS] += 1
            start = BLOCK * state[BLOCKS]
        blocks[start] = at - 1
        at = start + 1
    blocks[at] = pair
    buckets[bucket] = at


@kernel
def open_bucket(work):
    """Takes the pairs out of the highest bucket that has some and writes them into the run; returns how many."""
    state, opened = work.state, 0
    while state[BUCKET] > 0 and opened == 0:
        state[BUCKET] -= 1
        at = np.int64(work.buckets[state[BUCKET]])
        work.buckets[state[BUCKET]] = 0
        while at:
            start = at & -BLOCK
            for index in range(start + 1, at + 1):
                work.run[opened, 1] = work.blocks[index]
                opened += 1
            at = np.int64(work.blocks[start])
            work.blocks[start] = state[FREE]
            state[FREE] = start
    state[RUN] = state[RUN_END] = 0
    state[OPENED_AT] = state[MERGES]
    return opened


@kernel
def put_in_order(work, opened):
    """Queues the opened pairs again, whose true counts stand in the run; those that are still of the bucket, sorted."""
    number = 0
    for index in range(opened):
        pair_count, pair = work.run[index, 0], work.run[index, 1]
        work.pairs[pair, BOUND] = pair_count
        if pair_count == work.state[BUCKET] and pair_count < EXACT and opened >= _LEAST_SORTED:
            work.run[number, 0] = work.pairs[pair, PAIR]
            work.run[number, 1] = pair
            number += 1
        elif pair_count:
            enqueue(pair_count, work.pairs[pair, PAIR], pair, work.heap, work.blocks, work.buckets, work.state)
    work.state[RUN_END] = number
    if number:
        _sort_run(work.run, work.spare, work.state, work.digits)


@inlined
def _sort_run(run, spare, state, digits):
    """A radix sort: digit by digit of the ids, the lowest first."""
    for base in (0, 32):
        for shift in range(0, 24, 8):
            if (256 + state[MERGES]) >> shift == 0:
                break
            _sort_by_digit(run, spare, state[RUN_END], base + shift, digits)
            run, spare = spare, run  # as often for the left ids as for the right ones, so all end where they began


@kernel
def _sort_by_digit(run, sorted_run, number, shift, ends):
    ends[:] = 0
    for index in range(number):
        ends[run[index, 0] >> shift & 0xFF] += 1
    for digit in range(1, len(ends)):
        ends[digit] += ends[digit - 1]
    for index in range(number - 1, -1, -1):  # what is alike stays in order
        digit = run[index, 0] >> shift & 0xFF
        ends[digit] -= 1
        sorted_run[ends[digit], 0] = run[index, 0]
        sorted_run[ends[digit], 1] = run[index, 1]


@inlined
def is_in_run(run, heap, state):
    """Whether the first pair of all, that with the highest bound and of those the lowest ids, is the run's."""
    return state[RUN] < state[RUN_END] and (state[HEAP] == 0 or run[state[RUN], 0] < heap[0, 1])


@inlined
def enqueue(bound, key, pair, heap, blocks, buckets, state):
    """A pair goes into the heap, or into its bucket if that hasn't been opened yet."""
    if _bucket_of(bound) >= state[BUCKET]:
        _push(heap, state, bound, key, pair)
    else:
        drop_into_bucket(bound, pair, blocks, buckets, state)


@inlined
def _push(heap, state, bound, key, pair):
    """Rows of the heap are (count, left << 32 | right, pair); its top has the highest count, then the lowest ids."""
    i = state[HEAP]
    state[HEAP] += 1
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent, 0] > bound or (heap[parent, 0] == bound and heap[parent, 1] < key):
            break
        for column in range(3):
            heap[i, column] = heap[parent, column]
        i = parent
    heap[i, 0] = bound
    heap[i, 1] = key
    heap[i, 2] = pair


@inlined
def pop(heap, state):
    """Removes the top of the heap, `heap[0]`."""
    state[HEAP] -= 1
    last = state[HEAP]
    bound, key = heap[last, 0], heap[last, 1]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            break
        if child + 1 < last and (
            heap[child + 1, 0] > heap[child, 0]
            or (heap[child + 1, 0] == heap[child, 0] and heap[child + 1, 1] < heap[child, 1])
        ):
            child += 1
        if bound > heap[child, 0] or (bound == heap[child, 0] and key < heap[child, 1]):
            break
        for column in range(3):
            heap[i, column] = heap[child, column]
        i = child
    for column in range(3):
        heap[i, column] = heap[last, column]
