"""Causal self-attention (Vaswani et al. 2017): one function, and the plain reference that it must agree with.

Shapes: B batch, T time (queries), S time (keys), H heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_QUERY_BLOCK = 64


def causal_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, each position looking at itself and at those before it. Returns (B, T, H, K).

    Queries are taken in blocks, and a block computes no score for keys that all its queries may not look at, which is
    nearly half of them. Dropout, if there is a key, acts on the attention weights.
    """
    time = q_BTHK.shape[1]
    blocks = []
    for start in range(0, time, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, time)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        mask_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        blocks.append(_attend(q_BTHK[:, start:end], k_BTHK[:, :end], v_BTHK[:, :end], mask_TS, dropout_rate, key))
    return jnp.concatenate(blocks, axis=1)


def causal_attention_reference(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """The formula as it is written down, without dropout."""
    time, head_width = q_BTHK.shape[1], q_BTHK.shape[3]
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / head_width**0.5
    scores_BHTS = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores_BHTS, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores_BHTS, axis=-1), v_BTHK)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with a share `rate` of its entries set to zero and the others scaled by 1 / (1 - rate); no key, no change.

    The masks cost as much as a matrix product, so an entry is decided by 16 random bits, not 32: the rate is exact to
    1 in 65,536.
    """
    if key is None or rate == 0.0:
        return x
    threshold = min(round(rate * 65_536), 65_535)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= threshold
    return jnp.where(keep, x / (1.0 - threshold / 65_536), 0.0)


def _attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_TS: jax.Array,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BSHK)
    weights_BHTS = jax.nn.softmax(jnp.where(mask_TS, scores_BHTS, -jnp.inf), axis=-1)
    weights_BHTS = dropout(weights_BHTS, dropout_rate, dropout_key)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)
