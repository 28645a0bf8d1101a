"""Token shards -> batches. Batch i is a function of (tokens, seed, i), so resuming needs the step number alone.

An epoch cuts the tokens into windows of `context + 1` (inputs and targets overlap in all but one), beginning at an
offset of its own, and visits each window once in an order of its own. Shapes: B batch, T = `context`.
"""

from __future__ import annotations

import functools

import grain
import numpy as np
import numpy.typing as npt
from grain.experimental import index_shuffle

from jaxlm.data.shards import TokenStream
from jaxlm.tokenizers.base import InputError

# What a seed is hashed together with, so that the streams drawn from it have nothing to do with one another.
_ORDER, _OFFSET = 1, 2
_WINDOWS = 1 << 61  # no training takes as many


def make_batches(tokens: TokenStream, *, context: int, batch_size: int, seed: int) -> grain.MapDataset:
    """An endless dataset of int32 arrays of shape (B, T + 1); `dataset[i]` computes batch i directly.

    Raises:
      InputError: fewer tokens than one window, or a batch size or seed out of range.
    """
    if batch_size < 1:
        raise InputError(f"The batch size is at least 1, not {batch_size}.")
    if seed < 0:
        raise InputError(f"The seed is at least 0, not {seed}.")
    return _Batches(Windows(tokens, context, seed), batch_size, seed)


class Windows(grain.MapDataset[npt.NDArray[np.int32]]):
    """Windows of `context + 1` tokens, in order; an index beyond the length belongs to a later epoch.

    Window w of epoch e begins at offset(seed, e) + w * context, and ends with the token that the next one begins with.
    """

    def __init__(self, tokens: TokenStream, context: int, seed: int) -> None:
        super().__init__()
        if len(tokens) < context + 1:
            raise InputError(
                f"The training text has {len(tokens)} tokens, and one window of context {context} needs {context + 1}; "
                "use more text or a smaller context."
            )
        self._tokens, self._context, self._seed = tokens, context, seed
        # The length is the same for every offset: as many windows as fit after the largest, if any do.
        self._num_windows = max(1, (len(tokens) - context) // context)
        self._num_offsets = min(context, len(tokens) - self._num_windows * context)
        self._epoch_start = functools.lru_cache(maxsize=2)(self.offset)  # which takes longer than all the rest

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int | slice) -> npt.NDArray[np.int32] | grain.MapDataset:
        if isinstance(index, slice):
            return self.slice(index)
        return self.take([index])[0]

    def take(self, indices: list[int]) -> npt.NDArray[np.int32]:
        """Several windows at once, of shape (indices, context + 1)."""
        places = [divmod(index, self._num_windows) for index in indices]
        starts = [self._epoch_start(epoch) + window * self._context for epoch, window in places]
        return self._tokens.windows(np.array(starts), self._context + 1)

    def offset(self, epoch: int) -> int:
        """Where the windows of an epoch begin, from 0 to below `context`."""
        random = np.random.SeedSequence([self._seed, _OFFSET, epoch]).generate_state(1)[0]
        return int(random) % self._num_offsets


class _Batches(grain.MapDataset[npt.NDArray[np.int32]]):
    """What grain's `windows.shuffle(order).repeat().batch(batch_size)` gives, without its cost for each window."""

    def __init__(self, windows: Windows, batch_size: int, seed: int) -> None:
        super().__init__()
        self._windows, self._batch_size = windows, batch_size
        # grain orders epoch e by seed + e, so that seeds which aren't hashed would share epochs with their neighbours.
        self._order = int(np.random.SeedSequence([seed, _ORDER]).generate_state(1)[0])

    def __len__(self) -> int:
        return _WINDOWS // self._batch_size

    def __getitem__(self, index: int | slice) -> npt.NDArray[np.int32] | grain.MapDataset:
        if isinstance(index, slice):
            return self.slice(index)
        first, count = index * self._batch_size, len(self._windows)
        windows = []
        for number in range(first, first + self._batch_size):
            epoch, place = divmod(number, count)
            window = index_shuffle(place, max_index=count - 1, seed=(self._order + epoch) % 2**32, rounds=4)
            windows.append(epoch * count + window)
        return self._windows.take(windows)
