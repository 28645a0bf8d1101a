"""Triton kernels over the rows of a matrix, for GPUs: norms, the loss, and the gradient of a look-up.

Each takes from memory what it needs, and writes what it gives, once, where XLA makes several kernels that read the same
again. Sums are in float32 and in the same order each time, so that results are the same to the bit.

Shapes: N rows, D width, V vocabulary; in a kernel R rows and C columns of a block, E eight neighbours, P programs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Measured on an H200 for a width of 768. Of norms: numbers of a block, those of a warp forward and backward, programs
# backward.
_BLOCK, _FORWARD, _BACKWARD, _PROGRAMS = 1_024, 512, 256, 792
_LOGITS, _LOGITS_WARPS = 8_192, 16  # of a row, taken together, and the warps of its program
_SAME, _COLUMNS = 8, 256  # rows of one token, and numbers of each, taken together
_LOG2_E, _LOWEST = math.log2(math.e), -1e30


# ---- norms


def normalize(
    x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Layer norm, or RMSNorm without a bias, as in `norms.py`: the result, the rows' means and 1 / their deviations."""
    num_rows, width = x_ND.shape

    def kernel(x_ref: Any, scale_ref: Any, bias_ref: Any, y_ref: Any, mean_ref: Any, inverse_ref: Any) -> None:
        block = _Block(x_ND.shape, pl.program_id(0))
        z_RC = block.load(x_ref).astype(jnp.float32)
        if mean_ref is not None:
            mean_R1 = z_RC.sum(axis=1, keepdims=True) / width
            block.store_rows(mean_ref, mean_R1)
            z_RC = jnp.where(block.inside_RC, z_RC - mean_R1, 0.0)
        inverse_R1 = lax.rsqrt(jnp.square(z_RC).sum(axis=1, keepdims=True) / width + epsilon)
        block.store_rows(inverse_ref, inverse_R1)
        y_RC = z_RC * (inverse_R1 * block.load_columns(scale_ref))
        block.store(y_ref, y_RC if bias_ref is None else y_RC + block.load_columns(bias_ref))

    of_rows = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    y_ND, mean_N, inverse_N = pl.pallas_call(
        kernel,
        grid=(_num_blocks(x_ND.shape),),
        out_shape=(jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype), None if bias_D is None else of_rows, of_rows),
        compiler_params=triton.CompilerParams(num_warps=_warps(x_ND.shape, _FORWARD)),
        name="norm_forward",
    )(x_ND, scale_D, bias_D)
    return y_ND, mean_N, inverse_N


def normalize_backward(
    x_ND: jax.Array,
    mean_N: jax.Array | None,
    inverse_N: jax.Array,
    scale_D: jax.Array,
    d_x_ND: jax.Array,
    d_y_ND: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The gradients of x, scale and bias, from those of the norm's result and of x as it is used elsewhere."""
    width, num_blocks = x_ND.shape[1], _num_blocks(x_ND.shape)
    programs = min(_PROGRAMS, num_blocks)

    def kernel(
        x_ref: Any, mean_ref: Any, inverse_ref: Any, scale_ref: Any, d_x_ref: Any, d_y_ref: Any, *outputs: Any
    ) -> None:
        d_ref, sum_refs = outputs
        program = pl.program_id(0)

        def load(turn: Any) -> tuple[jax.Array | None, ...]:
            block = _Block(x_ND.shape, turn * programs + program)
            of_rows = (None if ref is None else block.load_rows(ref) for ref in (mean_ref, inverse_ref))
            return *(block.load(ref) for ref in (x_ref, d_y_ref, d_x_ref)), *of_rows

        def add(turn: jax.Array, carry: Any) -> Any:
            (x_RC, d_y_RC, d_x_RC, mean_R1, inverse_R1), sums_RC = carry
            next_ones = load(turn + 1)  # which takes its time
            block = _Block(x_ND.shape, turn * programs + program)
            z_RC, d_y_RC = x_RC.astype(jnp.float32), d_y_RC.astype(jnp.float32)
            if mean_R1 is not None:
                z_RC = jnp.where(block.inside_RC, z_RC - mean_R1, 0.0)
            z_RC = z_RC * inverse_R1
            # As in `norms.py`.
            g_RC = d_y_RC * block.load_columns(scale_ref)
            d_RC = g_RC - z_RC * ((g_RC * z_RC).sum(axis=1, keepdims=True) / width)
            if mean_R1 is not None:
                d_RC = d_RC - g_RC.sum(axis=1, keepdims=True) / width
            block.store(d_ref, d_x_RC + d_RC * inverse_R1)
            return next_ones, tuple(sum_RC + d for sum_RC, d in zip(sums_RC, (d_y_RC * z_RC, d_y_RC), strict=False))

        zeros = (jnp.zeros(_block_shape(x_ND.shape)),) * len(sum_refs)
        _, sums_RC = lax.fori_loop(0, pl.cdiv(num_blocks, programs), add, (load(0), zeros))
        column_C = jnp.arange(zeros[0].shape[1])
        for sum_ref, sum_RC in zip(sum_refs, sums_RC, strict=True):
            triton.store(sum_ref.at[program, column_C], sum_RC.sum(axis=0), mask=column_C < width)

    of_columns = (jax.ShapeDtypeStruct((programs, width), jnp.float32),)
    d_ND, sums_PD = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=(jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype), of_columns * (1 if mean_N is None else 2)),
        compiler_params=triton.CompilerParams(num_warps=_warps(x_ND.shape, _BACKWARD)),
        name="norm_backward",
    )(x_ND, mean_N, inverse_N, scale_D, d_x_ND, d_y_ND)
    d_scale_D, *d_bias_D = (sum_PD.sum(axis=0).astype(scale_D.dtype) for sum_PD in sums_PD)
    return d_ND, d_scale_D, d_bias_D[0] if d_bias_D else None


def _block_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    columns = pl.next_power_of_2(shape[1])
    return max(1, _BLOCK // columns), columns


def _warps(shape: tuple[int, ...], of_warp: int) -> int:
    return min(32, max(1, math.prod(_block_shape(shape)) // of_warp))


def _num_blocks(shape: tuple[int, ...]) -> int:
    return pl.cdiv(shape[0], _block_shape(shape)[0])


class _Block:
    """Whole rows of a matrix: a power of two in both directions, where what is outside of it reads as zero."""

    def __init__(self, shape: tuple[int, ...], index: Any) -> None:
        rows, columns = _block_shape(shape)
        self.row_R1, self.column_1C = index * rows + jnp.arange(rows)[:, None], jnp.arange(columns)[None, :]
        self.inside_R1, self.inside_1C = self.row_R1 < shape[0], self.column_1C < shape[1]
        self.inside_RC = self.inside_R1 & self.inside_1C

    def load(self, ref: Any) -> jax.Array:
        return triton.load(ref.at[self.row_R1, self.column_1C], mask=self.inside_RC, other=0.0)

    def store(self, ref: Any, x_RC: jax.Array) -> None:
        triton.store(ref.at[self.row_R1, self.column_1C], x_RC.astype(ref.dtype), mask=self.inside_RC)

    def load_rows(self, ref: Any) -> jax.Array:
        return triton.load(ref.at[self.row_R1], mask=self.inside_R1, other=0.0)

    def store_rows(self, ref: Any, x_R1: jax.Array) -> None:
        triton.store(ref.at[self.row_R1], x_R1, mask=self.inside_R1)

    def load_columns(self, ref: Any) -> jax.Array:
        return triton.load(ref.at[self.column_1C], mask=self.inside_1C, other=0.0).astype(jnp.float32)


# ---- the loss


def nats_and_gradient(logits_NV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-ln p of each target, float32 (N,), and the gradient of their mean, in the place of the logits: (N, V).

    A program takes a row, which comes from memory once, and a second time from the cache.
    """
    num_rows, width = logits_NV.shape
    size = min(_LOGITS, max(8, pl.next_power_of_2(width)))
    whole_turns, rest = divmod(width, size)

    def kernel(logits_ref: Any, target_ref: Any, nats_ref: Any, d_ref: Any) -> None:
        target = target_ref[...]
        known = (target >= 0) & (target < width)
        chosen = triton.load(logits_ref.at[target], mask=known, other=jnp.nan).astype(jnp.float32)

        def bits(turn: Any) -> tuple[jax.Array, jax.Array | None, jax.Array]:
            """Columns of a turn, eight for each thread; which of them there are (None: all); their logits in bits."""
            column_CE = turn * size + 8 * jnp.arange(size // 8)[:, None] + jnp.arange(8)[None, :]
            inside_CE, other = (column_CE < width, -jnp.inf) if isinstance(turn, int) else (None, None)
            logits_CE = triton.load(logits_ref.at[column_CE], mask=inside_CE, other=other)
            return column_CE, inside_CE, logits_CE.astype(jnp.float32) * _LOG2_E

        def add(turn: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            highest_C, sums_C = carry
            _, _, bits_CE = bits(turn)
            new_highest_C = jnp.maximum(highest_C, bits_CE.max(axis=1))
            sums_C = sums_C * jnp.exp2(highest_C - new_highest_C)
            return new_highest_C, sums_C + jnp.exp2(bits_CE - new_highest_C[:, None]).sum(axis=1)

        start = jnp.full(size // 8, _LOWEST), jnp.zeros(size // 8)
        carry = lax.fori_loop(0, whole_turns, add, start)
        highest_C, sums_C = add(whole_turns, carry) if rest else carry
        highest = highest_C.max()
        log_sum = highest + jnp.log2((sums_C * jnp.exp2(highest_C - highest)).sum())
        nats_ref[...] = log_sum / _LOG2_E - chosen

        def write(turn: Any, _: None) -> None:
            column_CE, inside_CE, bits_CE = bits(turn)
            d_CE = jnp.exp2(bits_CE - (log_sum + math.log2(num_rows)))
            d_CE = jnp.where(column_CE == target, d_CE - 1.0 / num_rows, d_CE)
            triton.store(d_ref.at[column_CE], d_CE.astype(d_ref.dtype), mask=inside_CE)

        lax.fori_loop(0, whole_turns, write, None)
        if rest:
            write(whole_turns, None)

    row, number = pl.BlockSpec((None, width), lambda n: (n, 0)), pl.BlockSpec((None,), lambda n: (n,))
    nats_N, d_NV = pl.pallas_call(
        kernel,
        grid=(num_rows,),
        in_specs=(row, number),
        out_specs=(number, row),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
            jax.ShapeDtypeStruct(logits_NV.shape, logits_NV.dtype),
        ),
        input_output_aliases={0: 1},
        compiler_params=triton.CompilerParams(num_warps=_LOGITS_WARPS),
        name="nats_and_gradient",
    )(logits_NV, targets_N)
    return nats_N, d_NV


# ---- the gradient of a look-up


def sums_by_token(tokens_N: jax.Array, x_ND: jax.Array, vocab_size: int) -> jax.Array:
    """The sum of the rows of each token: int (N,), (N, D) -> (V, D), zero where there are none.

    The places of a token stand together once they are sorted, and a program adds up its rows in their order.
    """
    width = x_ND.shape[1]
    columns = min(_COLUMNS, pl.next_power_of_2(width))
    order_N = jnp.argsort(tokens_N, stable=True)
    ends = jnp.searchsorted(tokens_N[order_N], jnp.arange(vocab_size + 1), method="scan_unrolled")

    def kernel(ends_ref: Any, order_ref: Any, x_ref: Any, sums_ref: Any) -> None:
        token, column_C = pl.program_id(0), pl.program_id(1) * columns + jnp.arange(columns)
        start, end = ends_ref[token], ends_ref[token + 1]

        def add(turn: jax.Array, sums_RC: jax.Array) -> jax.Array:
            place_R = start + turn * _SAME + jnp.arange(_SAME)
            row_R1 = triton.load(order_ref.at[place_R], mask=place_R < end, other=0)[:, None]
            inside_RC = (place_R < end)[:, None] & (column_C < width)[None]
            x_RC = triton.load(x_ref.at[row_R1, column_C[None]], mask=inside_RC, other=0.0)
            return sums_RC + x_RC.astype(jnp.float32)

        turns = lax.div(end - start + _SAME - 1, _SAME)
        sums_C = lax.fori_loop(0, turns, add, jnp.zeros((_SAME, columns))).sum(axis=0)
        triton.store(sums_ref.at[token, column_C], sums_C.astype(sums_ref.dtype), mask=column_C < width)

    sums_VD: jax.Array = pl.pallas_call(
        kernel,
        grid=(vocab_size, pl.cdiv(width, columns)),
        out_shape=jax.ShapeDtypeStruct((vocab_size, width), x_ND.dtype),
        compiler_params=triton.CompilerParams(num_warps=2),
        name="sums_by_token",
    )(ends, order_N, x_ND)
    return sums_VD
