"""Causal self-attention (Vaswani et al. 2017): one function, the plain reference, and what is fast on each device.

Shapes: B batch, T time, H query heads, G key and value heads (each serves H / G query heads), K head width. In the
blockwise implementation: R = B H rows, Q queries of a block, S keys up to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlm.dropout import keep_mask, row_seeds, weight_index
from jaxlm.parallel import has_triton
from jaxlm.tokenizers.base import InputError
from jaxlm.tokenizers.threads import num_cores

Implementation = Literal["reference", "blocks", "numba", "cudnn", "triton"]
IMPLEMENTATIONS = get_args(Implementation)

_BLOCK = 64  # queries of a block
_SEGMENTS = 16  # a program has so many pieces at most; a longer context has several blocks in each
_WIDEST = 128  # of heads for which there is a fast kernel on a GPU
_NEVER = -1e30  # the score of a key that may not be seen; finite, so that no row is all infinities


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    documents_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_keys_B: jax.Array | None = None,
    implementation: Implementation | None = None,
    rounded: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v, each position looking at itself and at those before it. Returns (B, T, H, K).

    Args:
      scale: None is 1 / sqrt(K).
      window: how many positions each may look at, itself included; None is all.
      documents_BT: int, the document of each position; none looks into another one.
      dropout_rate, dropout_keys_B: dropout on the attention weights, where there is a random key for each sequence.
      implementation: one of IMPLEMENTATIONS; None takes what `default_implementation` says.
      rounded: whether numba attention rounds the factors of its products to bfloat16, if `rounds` says that it can.
    """
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    dropout_rate = dropout_rate if dropout_keys_B is not None else 0.0
    check_implementation(implementation, q_BTHK.dtype, dropout_rate, q_BTHK.shape[1], q_BTHK.shape[3])
    implementation = implementation or default_implementation(q_BTHK.dtype, q_BTHK.shape[3])
    if implementation == "cudnn":
        return _cudnn_attention(q_BTHK, k_BTGK, v_BTGK, scale, window, documents_BT)
    seeds_BH = None
    if dropout_rate:
        assert dropout_keys_B is not None
        seeds_BH = row_seeds(dropout_keys_B, q_BTHK.shape[2])
    attend = attention_reference if implementation == "reference" else _blockwise_attention
    if implementation == "triton":
        from jaxlm.attention_triton import attention_triton as attend  # pallas takes its time to import
    if implementation == "numba":
        from jaxlm.attention_numba import attention_numba  # and so does numba

        attend = partial(attention_numba, rounded=rounded)
    return attend(q_BTHK, k_BTGK, v_BTGK, scale, window, documents_BT, dropout_rate, seeds_BH)


def default_implementation(dtype: Any, head_width: int) -> Implementation:
    """numba on a CPU, triton on a GPU (of compute capability 8 or more), and blocks where they can't be.

    numba computes in float32, and needs its compiler (NUMBA_DISABLE_JIT turns it off). For triton the block of a head
    wider than 128 doesn't fit into a multiprocessor. cudnn isn't taken by itself, as its gradients differ from run to
    run, and a run that goes on would end elsewhere.
    """
    if jax.default_backend() == "cpu":
        return "numba" if has_numba() and jnp.dtype(dtype).itemsize <= 4 else "blocks"
    return "triton" if has_triton() and head_width <= _WIDEST else "blocks"


def has_numba() -> bool:
    """Whether kernels can be compiled for this CPU."""
    from jaxlm.machine_code import COMPILED  # numba takes its time to import

    return COMPILED


def rounds(compute_type: str) -> bool:
    """Whether computing in this type means that the factors of products are rounded, all else being float32.

    For bfloat16 it does where each core of a CPU is a device and has an instruction for pairs of products, which take
    half of the time of float32.
    """
    if compute_type != "bfloat16" or jax.default_backend() != "cpu" or jax.local_device_count() < num_cores():
        return False
    if not has_numba():
        return False
    from jaxlm.lanes import HAS_PAIRS

    return HAS_PAIRS


def attention_reference(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    scale: float,
    window: int | None = None,
    documents_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    seeds_BH: jax.Array | None = None,
) -> jax.Array:
    """The formula as it is written down, all scores at once."""
    time, groups = q_BTHK.shape[1], q_BTHK.shape[2] // k_BTGK.shape[2]
    k_BTHK, v_BTHK = (jnp.repeat(x, groups, axis=2) for x in (k_BTGK, v_BTGK))
    scores_BHTS = scale * _product("bthk,bshk->bhts", q_BTHK, k_BTHK)
    t, s = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    seen = _seen(t, s, window)
    if documents_BT is not None:
        seen = seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    weights_BHTS = jax.nn.softmax(jnp.where(seen, scores_BHTS, _NEVER), axis=-1)
    if seeds_BH is not None:
        keep = keep_mask(seeds_BH[:, :, None, None], weight_index(t, s), dropout_rate)
        weights_BHTS = jnp.where(keep, weights_BHTS / (1.0 - dropout_rate), 0.0)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS.astype(v_BTGK.dtype), v_BTHK)


def check_implementation(
    implementation: Implementation | None, dtype: Any, dropout_rate: float, time: int, head_width: int
) -> None:
    """Raises InputError for an attention that doesn't exist, or that this device or these settings don't allow."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(f"Attention is one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}.")
    if implementation in ("cudnn", "triton") and jax.default_backend() != "gpu":
        raise InputError(
            f"{implementation} attention needs a GPU, and JAX runs on {jax.default_backend()} here; leave it out."
        )
    if implementation == "triton" and not has_triton():
        raise InputError(
            f"triton attention needs compute capability 8, and {jax.devices()[0].device_kind} has less; leave it out."
        )
    if implementation == "triton" and head_width > _WIDEST:
        raise InputError(f"triton attention takes heads up to {_WIDEST} wide, not {head_width}; leave it out.")
    if implementation == "numba":
        if jax.default_backend() != "cpu":
            raise InputError(
                f"numba attention needs a CPU, and JAX runs on {jax.default_backend()} here; leave it out."
            )
        if not has_numba():
            raise InputError("numba attention needs numba's compiler, and NUMBA_DISABLE_JIT turns it off; unset it.")
    if implementation == "cudnn":
        if dropout_rate:
            raise InputError("cudnn attention takes no dropout on attention weights here; set the dropout to 0.")
        if jnp.dtype(dtype).itemsize != 2:
            raise InputError(f"cudnn attention computes in 16 bits, not in {dtype}; make the compute type bfloat16.")
        if time % 2 or head_width % 8 or head_width > _WIDEST:
            raise InputError(
                f"cudnn attention takes an even number of tokens, and heads whose width is a multiple of 8 up to "
                f"{_WIDEST}, not {time} and {head_width}; leave it out."
            )


def _cudnn_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    scale: float,
    window: int | None,
    documents_BT: jax.Array | None,
) -> jax.Array:
    if documents_BT is not None:
        raise InputError("cudnn attention takes no documents; leave it out.")
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


# ---- blockwise: memory grows with T, not with its square, in both directions
#
# Queries go in blocks, and a block takes only the keys that its queries may see. The backward pass computes the weights
# of a block again from the logarithms of their sums, as FlashAttention does (Dao et al. 2022). It does so with keys as
# rows, so that every product but one small one is that of two matrices as they lie in memory.


def _blockwise_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    scale: float,
    window: int | None,
    documents_BT: jax.Array | None,
    dropout_rate: float,
    seeds_BH: jax.Array | None,
) -> jax.Array:
    batch, time, heads, width = q_BTHK.shape
    per_segment = -(-time // (_BLOCK * _SEGMENTS))
    length = min(_BLOCK, time) * per_segment
    padding = -time % length

    def rows(x_BTHK: jax.Array) -> jax.Array:
        x_BTHK = jnp.repeat(x_BTHK, heads // x_BTHK.shape[2], axis=2)
        x_RTK = x_BTHK.transpose(0, 2, 1, 3).reshape(batch * heads, time, width)
        return jnp.pad(x_RTK, ((0, 0), (0, padding), (0, 0)))

    documents_RT = None
    if documents_BT is not None:
        documents_RT = jnp.repeat(jnp.pad(documents_BT, ((0, 0), (0, padding))), heads, axis=0)
    seeds_R = None if seeds_BH is None else seeds_BH.reshape(-1)
    attend = partial(_attend_rows, _Blocks(length // per_segment, per_segment, window, dropout_rate))
    out_RTK = attend(rows(q_BTHK) * scale, rows(k_BTGK), rows(v_BTGK), documents_RT, seeds_R)[:, :time]
    return out_RTK.reshape(batch, heads, time, width).transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class _Blocks:
    """How T positions are cut: segments of `per_segment` blocks of `size` queries."""

    size: int
    per_segment: int
    window: int | None
    dropout_rate: float

    def segments(self, time: int) -> Iterator[tuple[slice, slice]]:
        """The queries of each segment, and the keys that any of them may see."""
        length = self.size * self.per_segment
        for start in range(0, time, length):
            first = 0 if self.window is None else max(0, start - self.window + 1)
            yield slice(start, start + length), slice(first - first % self.size, start + length)

    def scan(self, function: Callable[..., Any], carry: Any, queries: slice, *arrays: jax.Array | None) -> Any:
        """`lax.scan` of (carry, first query, *blocks) -> (carry, blocks), the queries being the second axis of all."""
        arrays = jax.tree.map(lambda x: x[:, queries], arrays)
        if self.per_segment == 1:
            return function(carry, queries.start, *arrays)

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0], self.per_segment, self.size, *x.shape[2:]).swapaxes(0, 1)

        firsts = queries.start + self.size * jnp.arange(self.per_segment)
        carry, out = jax.lax.scan(lambda c, x: function(c, *x), carry, (firsts, *jax.tree.map(split, arrays)))
        return carry, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_rows(
    blocks: _Blocks,
    q_RTK: jax.Array,
    k_RTK: jax.Array,
    v_RTK: jax.Array,
    documents_RT: jax.Array | None,
    seeds_R: jax.Array | None,
) -> jax.Array:
    return _attend_rows_forward(blocks, q_RTK, k_RTK, v_RTK, documents_RT, seeds_R)[0]


def _attend_rows_forward(
    blocks: _Blocks,
    q_RTK: jax.Array,
    k_RTK: jax.Array,
    v_RTK: jax.Array,
    documents_RT: jax.Array | None,
    seeds_R: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    k_RKT = k_RTK.swapaxes(1, 2)
    outs, log_sums = [], []
    for queries, keys in blocks.segments(q_RTK.shape[1]):

        def block(_: None, first: Any, q_RQK: jax.Array, documents_RQ: Any, keys: slice = keys) -> Any:
            t, s = first + jnp.arange(q_RQK.shape[1])[:, None], jnp.arange(keys.start, keys.stop)[None, :]
            seen = _seen(t, s, blocks.window)
            if documents_RT is not None:
                seen = seen & (documents_RQ[:, :, None] == documents_RT[:, None, keys])
            scores_RQS = jnp.where(seen, _product("rqk,rks->rqs", q_RQK, k_RKT[:, :, keys]), _NEVER)
            highest_RQ1 = scores_RQS.max(axis=-1, keepdims=True)
            weights_RQS = jnp.exp(scores_RQS - highest_RQ1)
            sums_RQ1 = weights_RQS.sum(axis=-1, keepdims=True)
            weights_RQS = _drop(weights_RQS, blocks.dropout_rate, seeds_R, t, s)
            out_RQK = _product("rqs,rsk->rqk", weights_RQS.astype(v_RTK.dtype), v_RTK[:, keys]) / sums_RQ1
            return None, (out_RQK.astype(v_RTK.dtype), (highest_RQ1 + jnp.log(sums_RQ1))[..., 0])

        _, (out_RQK, log_sums_RQ) = blocks.scan(block, None, queries, q_RTK, documents_RT)
        outs.append(out_RQK)
        log_sums.append(log_sums_RQ)
    out_RTK = jnp.concatenate(outs, axis=1)
    return out_RTK, (q_RTK, k_RTK, v_RTK, documents_RT, seeds_R, out_RTK, jnp.concatenate(log_sums, axis=1))


def _attend_rows_backward(blocks: _Blocks, saved: tuple[Any, ...], d_out_RTK: jax.Array) -> tuple[Any, ...]:
    q_RTK, k_RTK, v_RTK, documents_RT, seeds_R, out_RTK, log_sums_RT = saved
    k_RKT = k_RTK.swapaxes(1, 2)
    dots_RT = _product("rtk,rtk->rt", out_RTK, d_out_RTK)  # of each query's weights with their gradients
    dq, dk_RTK, dv_RTK = [], jnp.zeros(k_RTK.shape, jnp.float32), jnp.zeros(v_RTK.shape, jnp.float32)
    for queries, keys in blocks.segments(q_RTK.shape[1]):

        def block(
            carry: Any, first: Any, q_RQK: Any, d_out_RQK: Any, log_sums_RQ: Any, dots_RQ: Any, documents_RQ: Any,
            keys: slice = keys,
        ) -> Any:  # fmt: skip
            t, s = first + jnp.arange(q_RQK.shape[1])[None, :], jnp.arange(keys.start, keys.stop)[:, None]
            seen = _seen(t, s, blocks.window)
            if documents_RT is not None:
                seen = seen & (documents_RQ[:, None, :] == documents_RT[:, keys, None])
            scores_RSQ = _product("rsk,rkq->rsq", k_RTK[:, keys], q_RQK.swapaxes(1, 2))
            weights_RSQ = jnp.where(seen, jnp.exp(scores_RSQ - log_sums_RQ[:, None, :]), 0.0)
            dropped_RSQ = _drop(weights_RSQ, blocks.dropout_rate, seeds_R, t, s)
            d_dropped_RSQ = _product("rsk,rkq->rsq", v_RTK[:, keys], d_out_RQK.swapaxes(1, 2))
            # d_weights = d_dropped where it was kept, over 1 - rate; times the weights, that is d_dropped x dropped.
            d_scores_RSQ = (dropped_RSQ * d_dropped_RSQ - weights_RSQ * dots_RQ[:, None, :]).astype(k_RTK.dtype)
            dk_RSK = _product("rsq,rqk->rsk", d_scores_RSQ, q_RQK)
            dv_RSK = _product("rsq,rqk->rsk", dropped_RSQ.astype(v_RTK.dtype), d_out_RQK)
            dq_RKQ = _product("rks,rsq->rkq", k_RKT[:, :, keys], d_scores_RSQ).astype(q_RTK.dtype)
            dq_RKQ = jax.lax.optimization_barrier(dq_RKQ)  # or XLA would turn the product around, to a slower one
            return (carry[0] + dk_RSK, carry[1] + dv_RSK), dq_RKQ.swapaxes(1, 2)

        (dk_RSK, dv_RSK), dq_RQK = blocks.scan(
            block, (dk_RTK[:, keys], dv_RTK[:, keys]), queries, q_RTK, d_out_RTK, log_sums_RT, dots_RT, documents_RT
        )
        dk_RTK, dv_RTK = dk_RTK.at[:, keys].set(dk_RSK), dv_RTK.at[:, keys].set(dv_RSK)
        dq.append(dq_RQK)
    return jnp.concatenate(dq, axis=1), dk_RTK.astype(k_RTK.dtype), dv_RTK.astype(v_RTK.dtype), None, None


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


def _product(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` that adds up in float32, whatever the operands are."""
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _seen(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


def _drop(weights: jax.Array, rate: float, seeds_R: jax.Array | None, query: jax.Array, key: jax.Array) -> jax.Array:
    if seeds_R is None:
        return weights
    return jnp.where(keep_mask(seeds_R[:, None, None], weight_index(query, key), rate), weights / (1.0 - rate), 0.0)
