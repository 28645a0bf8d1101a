"""Ids to bytes, the inverse of step 4 of the BPE engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import kernel
from jaxlm.tokenizers.bpe_kernels import load8, store8


def decode_ids(
    ids: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | int:
    """The bytes of ids, and where the texts whose ids end at `ends` end there; or the index of an id without bytes."""
    byte_ends = np.zeros(len(ends), np.int64)
    done = measure(ids, ends, starts, byte_ends)
    if done < len(ids):
        return int(done)
    size = int(byte_ends[-1]) if len(ends) else 0
    out = np.empty(size + 8, np.uint8)
    decode(ids, starts, tokens, out)
    return out[:size], byte_ends


@kernel
def measure(ids, ends, starts, byte_ends):
    """Writes where the bytes of each text end, up to the first id that stands for nothing; returns that one's index.

    Token i has the bytes from starts[i] to starts[i + 1].
    """
    total = 0
    index = 0
    for text in range(len(ends)):
        while index < ends[text]:
            token = ids[index]
            if token < 0 or token >= len(starts) - 1 or starts[token] == starts[token + 1]:
                return index
            total += starts[token + 1] - starts[token]
            index += 1
        byte_ends[text] = total
    return index


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
