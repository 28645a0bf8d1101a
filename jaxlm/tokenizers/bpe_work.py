"""What step 3 of the BPE engine works on: arrays, which its kernels pass on together, by their names."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import inlined
from jaxlm.tokenizers.bpe_kernels import aligned_rows

Array64 = npt.NDArray[np.int64]
Array32 = npt.NDArray[np.int32]

# Columns of `pairs`: an upper bound of the count, left << 32 | right, where its list of places begins in the array of
# all lists, and how long it is.
BOUND, PAIR, LIST, LENGTH = range(4)
# The numbers in `state`: pairs, places in all lists, pairs in the heap, the next one in the run and its end, the bucket
# that both are of, how many merges there were when it was opened, merges; blocks ever used, and where the first of
# those that are free begins; and how much there is to do where two threads share it.
PAIRS, PLACES, HEAP, RUN, RUN_END, BUCKET, OPENED_AT, MERGES, BLOCKS, FREE, LEAST_SHARED = range(11)
# Buckets of counts: up to 1,023 one each, above 512 to an octave.
EXACT = 1024
BUCKETS = EXACT + 54 * 512
# The pairs of a bucket stand in blocks of so many numbers, of which the first is where the block before it ends, or 0.
BLOCK = 16
# Columns of `shares`: from where to where in the array that the step goes through, and how many entries of `touched`.
BEGIN, END, TOUCHED = range(3)

_LEAST_PAIRS = 1 << 17  # that there is room for; no fewer than pairs of bytes
_KNOWN = 512  # so many ids, the first ones, have pairs whose counts are kept up to date


class Work(NamedTuple):
    """The arrays of a training, n bytes of different chunks and m ids.

    Attributes:
      symbols: int32 of shape (n + 1,), the text, as `bpe_kernels` says under "symbols".
      amounts: int32 or int64 of shape (n,), how often the chunk of each place occurs, written only where its symbols
        have no room for it; or (1,), if all occur equally often.
      lengths: int32 of shape (m,), the bytes of each id.
      places: int32 of shape (3 n,), the lists of places, one after the other. Those of pairs of bytes have fewer than n
        places, and each symbol that a merge takes away, fewer than n in all, has two places listed anew.
      pairs: int64 of shape (p, 4), a row for each pair that was found.
      blocks: int32, the pairs in buckets.
      buckets: int32 of shape (BUCKETS,), where in `blocks` each one ends, or 0.
      run, spare: int64 of shape (p, 2), the opened bucket's pairs in order, as (left << 32 | right, row of `pairs`);
        and room to sort them. While true counts are taken, they stand in the first column.
      heap: int64 of shape (p, 3), what else is in the opened bucket, as (count, left << 32 | right, row of `pairs`).
      digits: int64 of shape (256,), where what has each digit goes, while sorting.
      state: int64 of shape (11,), numbers.
      merges, merge_counts: int32 of shape (m - 256, 2), and int64 of shape (m - 256,).
      neighbours: int32 of shape (2 n,), the ids on both sides of a merged pair's places.
      beside: int64 of shape (2, m, 4), for each share of a merge, and for each id as a neighbour of the new one, on its
        left and on its right: how many places their pair has (then where they are written), and its count.
      touched: int64 of shape (2, 2 m), the rows of `beside` that are in use, as neighbour << 1 | side.
      known_counts: int64 of shape (512, 512), the true counts of pairs of the first ids.
      merged_at: int32 of shape (m,), how many merges there were when an id was last part of one.
      shares: int64 of shape (2, 3), what of a step is whose.
      board: int64 of shape (3, 8), see `bpe_team`.
    """

    symbols: Array32
    amounts: npt.NDArray[np.int32 | np.int64]
    lengths: Array32
    places: Array32
    pairs: Array64
    blocks: Array32
    buckets: Array32
    run: Array64
    spare: Array64
    heap: Array64
    digits: Array64
    state: Array64
    merges: Array32
    merge_counts: Array64
    neighbours: Array32
    beside: Array64
    touched: Array64
    known_counts: Array64
    merged_at: Array32
    shares: Array64
    board: Array64

    def with_room(self) -> Work:
        """The same, with four times as many rows for pairs."""
        state = self.state
        in_use = {
            "pairs": state[PAIRS],
            "blocks": BLOCK * (1 + state[BLOCKS]),
            "run": state[RUN_END],
            "heap": state[HEAP],
        }
        rooms = _rooms(4 * len(self.pairs))
        for name, number in in_use.items():
            rooms[name][:number] = getattr(self, name)[:number]
        return self._replace(**rooms)


def new_work(symbols: Array32, amounts: npt.NDArray[np.int32 | np.int64], num_merges: int) -> Work:
    """No pairs and no merges yet, and room for so many."""
    size, num_ids = len(symbols) - 1, 256 + num_merges
    state = np.zeros(11, np.int64)
    state[BUCKET] = BUCKETS
    return Work(
        symbols=symbols,
        amounts=amounts,
        lengths=np.ones(num_ids, np.int32),
        places=np.empty(3 * size, np.int32),
        **_rooms(max(_LEAST_PAIRS, size // 4)),  # enough for natural text
        buckets=np.zeros(BUCKETS, np.int32),
        digits=np.empty(256, np.int64),
        state=state,
        merges=np.empty((num_merges, 2), np.int32),
        merge_counts=np.empty(num_merges, np.int64),
        neighbours=np.empty(2 * size, np.int32),
        beside=aligned_rows(2 * num_ids, 4, np.int64).reshape(2, num_ids, 4),
        touched=np.empty((2, 2 * num_ids), np.int64),
        known_counts=np.zeros((_KNOWN, _KNOWN), np.int64),
        merged_at=np.zeros(num_ids, np.int32),
        shares=np.zeros((2, 3), np.int64),
        board=aligned_rows(3, 8, np.int64),
    )


def _rooms(num_pairs: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays that have room for so many pairs. What isn't written to takes no memory.

    None is made by np.zeros, which gets small pages: what is read in no order would be waited for longer.
    """
    return {
        "pairs": aligned_rows(num_pairs, 4, np.int64, np.empty),
        # Each bucket may have a block that isn't full.
        "blocks": aligned_rows(2 + BUCKETS + num_pairs // (BLOCK - 1), BLOCK, np.int32, np.empty).reshape(-1),
        "run": np.empty((num_pairs, 2), np.int64),
        "spare": np.empty((num_pairs, 2), np.int64),
        "heap": np.empty((num_pairs, 3), np.int64),
    }


@inlined
def enter_pair(key, pair_count, num_places, pairs, state):
    """A new row of the table of pairs, with room for its places; returns its number."""
    row = state[PAIRS]
    pairs[row, BOUND] = pair_count
    pairs[row, PAIR] = key
    pairs[row, LIST] = state[PLACES]
    pairs[row, LENGTH] = num_places
    state[PAIRS] += 1
    state[PLACES] += num_places
    return row
