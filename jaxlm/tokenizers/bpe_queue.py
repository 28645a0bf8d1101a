"""The priority queue of step 3 of the BPE engine: buckets by count, and a heap of the highest that isn't empty."""

from __future__ import annotations

from jaxlm.machine_code import kernel
from jaxlm.tokenizers.bpe_kernels import prefetch

# Columns of the table of pairs: an upper bound of the count, left << 32 | right, where its list of places begins in the
# array of all lists, and how long it is.
BOUND, PAIR, LIST, LENGTH = range(4)
# The counters of a training: pairs, places in all lists, pairs in the heap, the bucket that the heap is of, how many
# merges there were when it was opened, merges.
PAIRS, PLACES, HEAP, BUCKET, OPENED_AT, MERGES = range(6)
# Buckets of counts: up to 1,023 one each, above 512 to an octave.
BUCKETS = 1024 + 54 * 512


@kernel
def bucket_of(pair_count):
    """A number that doesn't fall as the count rises: the count to 1,023, then its highest ten bits and their place."""
    octave = 0
    while pair_count >= 1024:
        pair_count >>= 1
        octave += 1
    return pair_count + 512 * octave


@kernel
def drop_into_bucket(pairs, next_pairs, buckets, pair):
    """Puts a pair in front of those of its bucket, which are a linked list."""
    bucket = bucket_of(pairs[pair, BOUND])
    next_pairs[pair] = buckets[bucket]
    buckets[bucket] = pair


@kernel
def open_bucket(pairs, next_pairs, heap, buckets, state):
    """Takes the pairs out of the highest bucket that has some, into the rows of the empty heap; returns how many."""
    opened = 0
    while state[BUCKET] > 0 and opened == 0:
        state[BUCKET] -= 1
        pair = buckets[state[BUCKET]]
        buckets[state[BUCKET]] = -1
        while pair >= 0:
            prefetch(pairs, pair)
            heap[opened, 2] = pair
            opened += 1
            pair = next_pairs[pair]
    state[OPENED_AT] = state[MERGES]
    return opened


@kernel
def enqueue(pairs, next_pairs, heap, buckets, state, pair):
    """A pair goes into the heap, or into its bucket if that hasn't been opened yet."""
    if bucket_of(pairs[pair, BOUND]) >= state[BUCKET]:
        push(heap, state, pairs[pair, BOUND], pairs[pair, PAIR], pair)
    else:
        drop_into_bucket(pairs, next_pairs, buckets, pair)


@kernel
def push(heap, state, bound, key, pair):
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


@kernel
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
