"""Token shards -> batches. Batch i is a function of (tokens, seed, i), so resuming needs the step number alone.

An epoch cuts the tokens into windows of `context + 1` (inputs and targets overlap in all but one), beginning at an
offset of its own, and visits each window once in an order of its own. Shapes: B batch, T = `context`.
"""

from __future__ import annotations

import grain
import numpy as np
import numpy.typing as npt

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
    # grain orders epoch e by seed + e, so that seeds which aren't hashed would share epochs with their neighbours.
    order = int(np.random.SeedSequence([seed, _ORDER]).generate_state(1)[0])
    windows = Windows(tokens, context, seed)
    # Without end it would be as long as an index can be, and a slice of batches of one would end beyond that.
    return windows.shuffle(seed=order).repeat(_WINDOWS // len(windows)).batch(batch_size)


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

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int | slice) -> npt.NDArray[np.int32] | grain.MapDataset:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, window = divmod(index, self._num_windows)
        start = self.offset(epoch) + window * self._context
        return self._tokens.slice(start, start + self._context + 1)

    def offset(self, epoch: int) -> int:
        """Where the windows of an epoch begin, from 0 to below `context`."""
        random = np.random.SeedSequence([self._seed, _OFFSET, epoch]).generate_state(1)[0]
        return int(random) % self._num_offsets
