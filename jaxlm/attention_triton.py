"""Causal attention in three Triton kernels, for GPUs: FlashAttention (Dao et al. 2022) with this project's dropout.

Shapes as in `attention.py`; in a kernel Q queries and S keys, a block of each. A program takes a block of one head, and
what it computes on the way isn't written to memory: forward and for the gradients of queries its queries, over the
blocks of keys, and for the gradients of keys and values its keys, over the blocks of queries. Nothing is added up by
several programs, so that results are the same each time.
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

_MOST = 64  # positions of a program
_NEVER = -1e30  # the score of a key that may not be seen


@dataclass(frozen=True)
class _Tiles:
    """How a program works: on `own` positions, going through the others `other` at a time, which divides `own`."""

    own: int
    other: int
    warps: int
    stages: int  # loads of so many turns of a loop are under way


_KERNELS = ("forward", "keys_backward", "queries_backward")


def _tiles(width: int, dtype: Any) -> dict[str, _Tiles]:
    """Of each kernel. The first ones are the fastest of those tried on an H200; the others fit into 100 kB."""
    row_bytes = width * jnp.dtype(dtype).itemsize
    if row_bytes <= 128:
        return dict(zip(_KERNELS, (_Tiles(64, 64, 4, 3), _Tiles(64, 64, 4, 3), _Tiles(64, 32, 4, 3)), strict=True))
    return dict.fromkeys(_KERNELS, _Tiles(64, 64, 8, 2) if row_bytes <= 256 else _Tiles(32, 32, 4, 2))


def attention_triton(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    scale: float,
    window: int | None = None,
    documents_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    seeds_BH: jax.Array | None = None,
) -> jax.Array:
    """As `attention_reference`; float32 operands of products are rounded to tf32, JAX's default on a GPU, too."""
    time, width = q_BTHK.shape[1], q_BTHK.shape[3]
    # Padding comes after all positions, none of which sees it, and adds nothing to a product.
    late, wide = -time % _MOST, max(16, pl.next_power_of_2(width)) - width
    qkv = [jnp.pad(x, ((0, 0), (0, late), (0, 0), (0, wide))) for x in (q_BTHK, k_BTGK, v_BTGK)]
    documents_B1T = None
    if documents_BT is not None:
        documents_B1T = jnp.pad(documents_BT, ((0, 0), (0, late)))[:, None]
    window = None if window is None or window >= time else window
    rate = 0.0 if seeds_BH is None else dropout_rate
    kernels = _Kernels(scale * math.log2(math.e), window, rate)
    return _attend(kernels, *qkv, documents_B1T, seeds_BH)[:, :time, :, :width]


@dataclass(frozen=True)
class _Kernels:
    """The kernels, for these settings."""

    scale: float  # of scores in bits, whose exponential is the fast one
    window: int | None
    rate: float

    def forward(self, tiles: _Tiles, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        documents_ref, seed_ref, out_ref, log_sums_ref = refs
        block = pl.program_id(0)
        queries = _Span(block, tiles.own)
        q_QK = q_ref[queries.place]

        def add(is_diagonal: bool, key_block: jax.Array, carry: Any) -> Any:
            highest_Q, sums_Q, out_QK = carry
            keys = _Span(key_block, tiles.other)
            scores_QS = self.scores(is_diagonal, False, q_QK, k_ref[keys.place], queries, keys, documents_ref)
            new_highest_Q = jnp.maximum(highest_Q, scores_QS.max(axis=1))
            weights_QS = jnp.exp2(scores_QS - new_highest_Q[:, None])
            rescale_Q = jnp.exp2(highest_Q - new_highest_Q)
            dropped_QS = self.drop(weights_QS, queries, keys, seed_ref, False).astype(v_ref.dtype)
            out_QK = out_QK * rescale_Q[:, None] + triton.dot(dropped_QS, v_ref[keys.place])
            return new_highest_Q, sums_Q * rescale_Q + weights_QS.sum(axis=1), out_QK

        start = jnp.full(tiles.own, _NEVER), jnp.zeros(tiles.own), jnp.zeros(q_QK.shape)
        highest_Q, sums_Q, out_QK = self.over_keys(tiles, block, add, start)
        out_ref[...] = (out_QK / sums_Q[:, None]).astype(out_ref.dtype)
        log_sums_ref[...] = highest_Q + jnp.log2(sums_Q)

    def keys_backward(self, tiles: _Tiles, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        documents_ref, seed_ref, d_out_ref, log_sums_ref, dots_ref, dk_ref, dv_ref = refs
        of_rows = documents_ref, seed_ref, log_sums_ref, dots_ref
        block = pl.program_id(0)
        keys = _Span(block, tiles.own)
        k_SK, v_SK = k_ref[keys.place], v_ref[keys.place]

        def add(is_diagonal: bool, query_block: jax.Array, carry: Any) -> Any:
            queries = _Span(query_block, tiles.other)
            q_QK, d_out_QK = q_ref[queries.place], d_out_ref[queries.place]
            d_scores_SQ, dropped_SQ = self.gradients(
                is_diagonal, True, q_QK, k_SK, v_SK, d_out_QK, queries, keys, *of_rows
            )
            dk_SK, dv_SK = carry
            dk_SK = dk_SK + triton.dot(d_scores_SQ.astype(q_QK.dtype), q_QK)
            return dk_SK, dv_SK + triton.dot(dropped_SQ.astype(d_out_QK.dtype), d_out_QK)

        zeros = jnp.zeros(k_SK.shape)
        dk_SK, dv_SK = self.over_queries(tiles, block, pl.num_programs(0), add, (zeros, zeros))
        dk_ref[...], dv_ref[...] = (self.natural * dk_SK).astype(dk_ref.dtype), dv_SK.astype(dv_ref.dtype)

    def queries_backward(self, tiles: _Tiles, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        documents_ref, seed_ref, d_out_ref, log_sums_ref, dots_ref, dq_ref = refs
        of_rows = documents_ref, seed_ref, log_sums_ref, dots_ref
        block = pl.program_id(0)
        queries = _Span(block, tiles.own)
        q_QK, d_out_QK = q_ref[queries.place], d_out_ref[queries.place]

        def add(is_diagonal: bool, key_block: jax.Array, dq_QK: Any) -> Any:
            keys = _Span(key_block, tiles.other)
            k_SK, v_SK = k_ref[keys.place], v_ref[keys.place]
            d_scores_QS, _ = self.gradients(is_diagonal, False, q_QK, k_SK, v_SK, d_out_QK, queries, keys, *of_rows)
            return dq_QK + triton.dot(d_scores_QS.astype(k_SK.dtype), k_SK)

        dq_QK = self.over_keys(tiles, block, add, jnp.zeros(q_QK.shape))
        dq_ref[...] = (self.natural * dq_QK).astype(dq_ref.dtype)

    @property
    def natural(self) -> float:
        """The scale without bits."""
        return self.scale / math.log2(math.e)

    def gradients(
        self, is_diagonal: bool, keys_first: bool, q_QK: Any, k_SK: Any, v_SK: Any, d_out_QK: Any, queries: _Span,
        keys: _Span, documents_ref: Any, seed_ref: Any, log_sums_ref: Any, dots_ref: Any,
    ) -> Any:  # fmt: skip
        """Of the scores of a block, but for the scale; and its weights after dropout."""
        log_sums, _ = _across(log_sums_ref[queries.place], keys.numbers, keys_first)
        dots, _ = _across(dots_ref[queries.place], keys.numbers, keys_first)
        weights = jnp.exp2(self.scores(is_diagonal, keys_first, q_QK, k_SK, queries, keys, documents_ref) - log_sums)
        dropped = self.drop(weights, queries, keys, seed_ref, keys_first)
        return dropped * _product(d_out_QK, v_SK, keys_first) - weights * dots, dropped

    def scores(
        self, is_diagonal: bool, keys_first: bool, q_QK: Any, k_SK: Any, queries: _Span, keys: _Span, documents_ref: Any
    ) -> Any:
        """In bits. Off the diagonal, all keys are before all queries."""
        t, s = _across(queries.numbers, keys.numbers, keys_first)
        scores = self.scale * _product(q_QK, k_SK, keys_first)
        seen = s <= t if is_diagonal else None
        if self.window is not None:
            seen = (s <= t) & (t - s < self.window)
        if documents_ref is not None:
            of_query, of_key = _across(documents_ref[queries.place], documents_ref[keys.place], keys_first)
            seen = of_query == of_key if seen is None else seen & (of_query == of_key)
        return scores if seen is None else jnp.where(seen, scores, _NEVER)

    def drop(self, weights: jax.Array, queries: _Span, keys: _Span, seed_ref: Any, keys_first: bool) -> jax.Array:
        if not self.rate:
            return weights
        index = weight_index(*_across(queries.numbers, keys.numbers, keys_first))
        return jnp.where(keep_mask(seed_ref[...], index, self.rate), weights / (1.0 - self.rate), 0.0)

    def over_keys(self, tiles: _Tiles, query_block: Any, turn: Any, carry: Any) -> Any:
        """All blocks of keys that a block of queries sees, those on the diagonal last."""
        ratio = tiles.own // tiles.other
        first: Any = 0
        if self.window is not None:
            first = lax.div(lax.max(query_block * tiles.own - self.window + 1, 0), tiles.other)
        carry = lax.fori_loop(first, query_block * ratio, partial(turn, False), carry)
        return lax.fori_loop(query_block * ratio, (query_block + 1) * ratio, partial(turn, True), carry)

    def over_queries(self, tiles: _Tiles, key_block: Any, num_blocks: Any, turn: Any, carry: Any) -> Any:
        """All blocks of queries that see a block of keys, those on the diagonal first."""
        ratio = tiles.own // tiles.other
        end = num_blocks * ratio
        if self.window is not None:
            last = (key_block + 1) * tiles.own - 1 + self.window - 1
            end = lax.min(end, lax.div(last, tiles.other) + 1)
        carry = lax.fori_loop(key_block * ratio, (key_block + 1) * ratio, partial(turn, True), carry)
        return lax.fori_loop((key_block + 1) * ratio, end, partial(turn, False), carry)

    def run(self, name: str, inputs: tuple[Any, ...], outputs: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
        """A program for each block of each head: it sees all of the head's inputs, and its block of the outputs."""
        batch, time, heads, width = inputs[0].shape
        tiles = _tiles(width, inputs[0].dtype)[name]

        def of_head(x: Any, length: int, block: Any) -> pl.BlockSpec:
            if x.ndim == 2:  # (B, H)
                return pl.BlockSpec((None, None), lambda i, h, b: (b, h))
            if x.ndim == 3:  # (B, H, T), or (B, 1, T)
                return pl.BlockSpec((None, None, length), lambda i, h, b: (b, h * x.shape[1] // heads, block(i)))
            return pl.BlockSpec((None, length, None, width), lambda i, h, b: (b, block(i), h * x.shape[2] // heads, 0))

        return pl.pallas_call(
            partial(getattr(self, name), tiles),
            grid=(time // tiles.own, heads, batch),
            in_specs=[None if x is None else of_head(x, time, lambda _: 0) for x in inputs],
            out_specs=[of_head(x, tiles.own, lambda i: i) for x in outputs],
            out_shape=outputs,
            compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            name=f"attention_{name}",
        )(*inputs)


class _Span:
    """The positions of a block."""

    def __init__(self, block: Any, size: int) -> None:
        self.place, self.numbers = pl.ds(block * size, size), block * size + jnp.arange(size)


def _across(of_queries: jax.Array, of_keys: jax.Array, keys_first: bool) -> tuple[jax.Array, jax.Array]:
    """For blocks of (Q, S), or (S, Q): what a product takes as its first operand can stay in registers."""
    return (of_queries[None, :], of_keys[:, None]) if keys_first else (of_queries[:, None], of_keys[None, :])


def _product(of_queries: jax.Array, of_keys: jax.Array, keys_first: bool) -> jax.Array:
    return triton.dot(*((of_keys, of_queries) if keys_first else (of_queries, of_keys)), trans_b=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernels: _Kernels, q: jax.Array, k: jax.Array, v: jax.Array, documents: Any, seeds: Any) -> jax.Array:
    return _forward(kernels, q, k, v, documents, seeds)[0]


def _forward(kernels: _Kernels, *inputs: Any) -> tuple[jax.Array, Any]:
    q_BTHK = inputs[0]
    batch, time, heads, _ = q_BTHK.shape
    log_sums_BHT = jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    out_BTHK, log_sums_BHT = kernels.run(
        "forward", inputs, (jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), log_sums_BHT)
    )
    return out_BTHK, (inputs, out_BTHK, log_sums_BHT)


def _backward(kernels: _Kernels, saved: Any, d_out_BTHK: jax.Array) -> tuple[Any, ...]:
    inputs, out_BTHK, log_sums_BHT = saved
    q_BTHK, k_BTGK = inputs[:2]
    dots_BHT = jnp.einsum("bthk,bthk->bht", out_BTHK, d_out_BTHK, preferred_element_type=jnp.float32)
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    of_keys = jax.ShapeDtypeStruct(q_BTHK.shape, k_BTGK.dtype if groups == 1 else jnp.float32)
    saved = (*inputs, d_out_BTHK, log_sums_BHT, dots_BHT)
    of_heads = kernels.run("keys_backward", saved, (of_keys, of_keys))
    (dq_BTHK,) = kernels.run("queries_backward", saved, (jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),))
    batch, time, kv_heads, width = k_BTGK.shape
    dk_BTGK, dv_BTGK = (
        x.reshape(batch, time, kv_heads, groups, width).sum(axis=3).astype(k_BTGK.dtype) for x in of_heads
    )
    return dq_BTHK, dk_BTGK, dv_BTGK, None, None


_attend.defvjp(_forward, _backward)
