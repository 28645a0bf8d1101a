"""Dropout (Srivastava et al. 2014) whose masks cost less than the products around them.

A mask bit is a hash of the entry's index and of a 32-bit seed for each sequence, some integer operations that fuse with
what they mask. So nothing is stored, the backward pass computes the mask again, and a sequence has the same mask in
whatever batch and on whatever device it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x_BX: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """`x` with a share `rate` of its entries set to zero and the others scaled by 1 / (1 - rate); no keys, no change.

    Args:
      x_BX: any number of axes after the first, which is that of the sequences.
      keys_B: a random key for each sequence.
    """
    if keys_B is None or rate == 0.0:
        return x_BX
    size = x_BX[0].size
    index = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    keep = keep_mask(row_seeds(keys_B, 1), index, rate).reshape(x_BX.shape)
    return jnp.where(keep, x_BX / (1.0 - rate), 0.0).astype(x_BX.dtype)


def row_seeds(keys_B: jax.Array, count: int) -> jax.Array:
    """`count` seeds for each sequence, uint32 of shape (B, count)."""
    return jax.vmap(lambda key: jax.random.bits(key, (count,)))(keys_B)


def keep_mask(seeds: jax.Array, index: jax.Array, rate: float) -> jax.Array:
    """False with probability `rate` (to 1 in 2^32), by a hash of seed and index, which are uint32 and broadcast.

    The hash is two multiplications with a shift between them (constants: Wellons 2018, Prospecting for hash functions);
    its high bits decide, so that a last shift isn't needed.
    """
    x = (seeds ^ index) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * jnp.uint32(0x846CA68B)
    return x >= jnp.uint32(threshold(rate))


def threshold(rate: float) -> int:
    """The least hash that is kept."""
    return min(round(rate * 2**32), 2**32 - 1)


def weight_index(query: jax.Array, key: jax.Array) -> jax.Array:
    """The index of an attention weight of a row, for `keep_mask`: uint32, of the shape that both broadcast to."""
    return query.astype(jnp.uint32) * jnp.uint32(0x10001) + key.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
