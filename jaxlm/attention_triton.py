"""Causal attention in two Triton kernels, for GPUs: FlashAttention (Dao et al. 2022) with this project's dropout.

Shapes as in `attention.py`; in a kernel Q queries and S keys, a block of each. A program takes a block of one head, and
what it computes on the way isn't written to memory. The forward one takes its queries, over the blocks of
keys; the backward one its keys, over the blocks of queries, and then its queries, over the blocks of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.dropout import keep_mask, weight_index

_BLOCK = 64
_NEVER = -1e30  # the score of a key that may not be seen


def attention_triton(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    scale: float,
    window: int | None = None,
    documents_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    seeds_BH: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `attention_reference`; float32 operands of products are rounded to tf32, which is JAX's default on a GPU too.

    Args:
      interpret: run the kernels as plain JAX, on whatever device.
    """
    time, width = q_BTHK.shape[1], q_BTHK.shape[3]
    # Padding comes after all positions, none of which sees it, and adds nothing to a product.
    late, wide = -time % _BLOCK, max(16, pl.next_power_of_2(width)) - width
    qkv = [jnp.pad(x, ((0, 0), (0, late), (0, 0), (0, wide))) for x in (q_BTHK, k_BTGK, v_BTGK)]
    documents_B1T = None
    if documents_BT is not None:
        documents_B1T = jnp.pad(documents_BT, ((0, 0), (0, late)))[:, None]
    window = None if window is None or window >= time else window
    kernels = _Kernels(scale * math.log2(math.e), window, 0.0 if seeds_BH is None else dropout_rate, interpret)
    return _attend(kernels, *qkv, documents_B1T, seeds_BH)[:, :time, :, :width]


@dataclass(frozen=True)
class _Kernels:
    """Both kernels, for these settings."""

    scale: float  # of scores in bits, whose exponential is the fast one
    window: int | None
    rate: float
    interpret: bool

    def forward(self, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        documents_ref, seed_ref, out_ref, log_sums_ref = refs
        query_block = pl.program_id(0)
        q_QK = q_ref[_positions(query_block)]

        def add(key_block: jax.Array, carry: Any) -> Any:
            highest_Q, sums_Q, out_QK = carry
            scores_QS = self.scores(q_QK, k_ref[_positions(key_block)], query_block, key_block, documents_ref)
            new_highest_Q = jnp.maximum(highest_Q, scores_QS.max(axis=1))
            weights_QS = jnp.exp2(scores_QS - new_highest_Q[:, None])
            rescale_Q = jnp.exp2(highest_Q - new_highest_Q)
            dropped_QS = self.drop(weights_QS, query_block, key_block, seed_ref).astype(v_ref.dtype)
            out_QK = out_QK * rescale_Q[:, None] + triton.dot(dropped_QS, v_ref[_positions(key_block)])
            return new_highest_Q, sums_Q * rescale_Q + weights_QS.sum(axis=1), out_QK

        start = jnp.full(_BLOCK, _NEVER), jnp.zeros(_BLOCK), jnp.zeros(q_QK.shape)
        highest_Q, sums_Q, out_QK = lax.fori_loop(self.first_key_block(query_block), query_block + 1, add, start)
        out_ref[...] = (out_QK / sums_Q[:, None]).astype(out_ref.dtype)
        log_sums_ref[...] = highest_Q + jnp.log2(sums_Q)

    def backward(self, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        documents_ref, seed_ref, d_out_ref, log_sums_ref, dots_ref, dq_ref, dk_ref, dv_ref = refs
        block, num_blocks = pl.program_id(0), pl.num_programs(0)

        def gradients(
            query_block: jax.Array, key_block: jax.Array, q_QK: Any, k_SK: Any, v_SK: Any, d_out_QK: Any
        ) -> Any:
            """Of the scores of a block, and its weights after dropout, (Q, S) each."""
            queries = _positions(query_block)
            scores_QS = self.scores(q_QK, k_SK, query_block, key_block, documents_ref)
            weights_QS = jnp.exp2(scores_QS - log_sums_ref[queries][:, None])
            dropped_QS = self.drop(weights_QS, query_block, key_block, seed_ref)
            d_dropped_QS = triton.dot(d_out_QK, v_SK, trans_b=True)
            d_scores_QS = dropped_QS * d_dropped_QS - weights_QS * dots_ref[queries][:, None]
            return d_scores_QS.astype(q_QK.dtype), dropped_QS.astype(d_out_QK.dtype)

        k_SK, v_SK = k_ref[_positions(block)], v_ref[_positions(block)]

        def add_to_keys(query_block: jax.Array, carry: Any) -> Any:
            q_QK, d_out_QK = q_ref[_positions(query_block)], d_out_ref[_positions(query_block)]
            d_scores_QS, dropped_QS = gradients(query_block, block, q_QK, k_SK, v_SK, d_out_QK)
            dk_SK, dv_SK = carry
            return (
                dk_SK + triton.dot(d_scores_QS, q_QK, trans_a=True),
                dv_SK + triton.dot(dropped_QS, d_out_QK, trans_a=True),
            )

        zeros = jnp.zeros(k_SK.shape)
        dk_SK, dv_SK = lax.fori_loop(block, self.end_of_queries(block, num_blocks), add_to_keys, (zeros, zeros))
        natural = self.scale / math.log2(math.e)
        dk_ref[...], dv_ref[...] = (natural * dk_SK).astype(dk_ref.dtype), dv_SK.astype(dv_ref.dtype)

        q_QK, d_out_QK = q_ref[_positions(block)], d_out_ref[_positions(block)]

        def add_to_queries(key_block: jax.Array, dq_QK: Any) -> Any:
            k_SK, v_SK = k_ref[_positions(key_block)], v_ref[_positions(key_block)]
            d_scores_QS, _ = gradients(block, key_block, q_QK, k_SK, v_SK, d_out_QK)
            return dq_QK + triton.dot(d_scores_QS, k_SK)

        dq_QK = lax.fori_loop(self.first_key_block(block), block + 1, add_to_queries, jnp.zeros(q_QK.shape))
        dq_ref[...] = (natural * dq_QK).astype(dq_ref.dtype)

    def scores(self, q_QK: jax.Array, k_SK: jax.Array, query_block: Any, key_block: Any, documents_ref: Any) -> Any:
        t, s = _numbers(query_block)[:, None], _numbers(key_block)[None, :]
        seen = s <= t if self.window is None else (s <= t) & (t - s < self.window)
        if documents_ref is not None:
            documents_Q, documents_S = documents_ref[_positions(query_block)], documents_ref[_positions(key_block)]
            seen = seen & (documents_Q[:, None] == documents_S[None, :])
        return jnp.where(seen, self.scale * triton.dot(q_QK, k_SK, trans_b=True), _NEVER)

    def drop(self, weights_QS: jax.Array, query_block: Any, key_block: Any, seed_ref: Any) -> jax.Array:
        if not self.rate:
            return weights_QS
        index_QS = weight_index(_numbers(query_block)[:, None], _numbers(key_block)[None, :])
        return jnp.where(keep_mask(seed_ref[...], index_QS, self.rate), weights_QS / (1.0 - self.rate), 0.0)

    def first_key_block(self, query_block: Any) -> Any:
        if self.window is None:
            return 0
        return lax.div(lax.max(query_block * _BLOCK - self.window + 1, 0), _BLOCK)

    def end_of_queries(self, key_block: Any, num_blocks: Any) -> Any:
        if self.window is None:
            return num_blocks
        return lax.min(num_blocks, lax.div(key_block * _BLOCK + _BLOCK - 1 + self.window - 1, _BLOCK) + 1)

    def run(self, kernel: Any, inputs: tuple[Any, ...], outputs: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
        """A program for each block of each head: it sees all of the head's inputs, and its block of the outputs."""
        batch, time, heads, width = inputs[0].shape

        def of_head(x: Any, length: int, block: Any) -> pl.BlockSpec:
            if x.ndim == 2:  # (B, H)
                return pl.BlockSpec((None, None), lambda i, h, b: (b, h))
            if x.ndim == 3:  # (B, H, T), or (B, 1, T)
                return pl.BlockSpec((None, None, length), lambda i, h, b: (b, h * x.shape[1] // heads, block(i)))
            return pl.BlockSpec((None, length, None, width), lambda i, h, b: (b, block(i), h * x.shape[2] // heads, 0))

        return pl.pallas_call(
            kernel,
            grid=(time // _BLOCK, heads, batch),
            in_specs=[None if x is None else of_head(x, time, lambda _: 0) for x in inputs],
            out_specs=[of_head(x, _BLOCK, lambda i: i) for x in outputs],
            out_shape=outputs,
            compiler_params=triton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
            interpret=self.interpret,
            name=f"attention_{kernel.__name__}",
        )(*inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernels: _Kernels, q: jax.Array, k: jax.Array, v: jax.Array, documents: Any, seeds: Any) -> jax.Array:
    return _forward(kernels, q, k, v, documents, seeds)[0]


def _forward(kernels: _Kernels, *inputs: Any) -> tuple[jax.Array, Any]:
    q_BTHK = inputs[0]
    batch, time, heads, _ = q_BTHK.shape
    log_sums_BHT = jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    out_BTHK, log_sums_BHT = kernels.run(
        kernels.forward, inputs, (jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), log_sums_BHT)
    )
    return out_BTHK, (inputs, out_BTHK, log_sums_BHT)


def _backward(kernels: _Kernels, saved: Any, d_out_BTHK: jax.Array) -> tuple[Any, ...]:
    inputs, out_BTHK, log_sums_BHT = saved
    q_BTHK, k_BTGK = inputs[:2]
    dots_BHT = jnp.einsum("bthk,bthk->bht", out_BTHK, d_out_BTHK, preferred_element_type=jnp.float32)
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    of_keys = jax.ShapeDtypeStruct(q_BTHK.shape, k_BTGK.dtype if groups == 1 else jnp.float32)
    dq_BTHK, *of_heads = kernels.run(
        kernels.backward,
        (*inputs, d_out_BTHK, log_sums_BHT, dots_BHT),
        (jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), of_keys, of_keys),
    )
    batch, time, kv_heads, width = k_BTGK.shape
    dk_BTGK, dv_BTGK = (
        x.reshape(batch, time, kv_heads, groups, width).sum(axis=3).astype(k_BTGK.dtype) for x in of_heads
    )
    return dq_BTHK, dk_BTGK, dv_BTGK, None, None


_attend.defvjp(_forward, _backward)


def _positions(block: Any) -> Any:
    return pl.ds(block * _BLOCK, _BLOCK)


def _numbers(block: Any) -> jax.Array:
    return block * _BLOCK + jnp.arange(_BLOCK)
