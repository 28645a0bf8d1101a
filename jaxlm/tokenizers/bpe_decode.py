"""Ids to bytes, the inverse of step 4 of the BPE engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxlm.tokenizers.bpe_kernels import kernel, load8, store8


def decode_ids(ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], tokens: npt.NDArray[np.uint8]) -> bytes | int:
    """The bytes of ids, or the first index of an id that stands for nothing."""
    size = decoded_size(ids, starts)
    if size < 0:
        return -1 - size
    out = np.empty(size + 8, np.uint8)
    decode(ids, starts, tokens, out)
    return out[:size].tobytes()


@kernel
def decoded_size(ids, starts):
    """The bytes that ids decode to, or -1 - i if ids[i] stands for nothing. Token i has the bytes starts[i:i+2]."""
    total = 0
    for index in range(len(ids)):
        token = ids[index]
        if token < 0 or token >= len(starts) - 1 or starts[token] == starts[token + 1]:
            return -1 - index
        total += starts[token + 1] - starts[token]
    return total


@kernel
def decode(ids, starts, tokens, out):
    """Writes the bytes of ids, eight at a time: both arrays have eight bytes more than are used."""
    at = 0
    for index in range(len(ids)):
        token = ids[index]
        begin = starts[token]
        size = starts[token + 1] - begin
        store8(out, at, load8(tokens, begin))
        for k in range(8, size, 8):
            store8(out, at + k, load8(tokens, begin + k))
        at += size
    return at
