"""Products of matrices on one core of a CPU, whose sums stay in its registers.

XLA computes most of its products as fast, but the gradients of weights at half of the speed, on threads that other
devices need. Rounded to bfloat16, the factors of two products go through one instruction, if the processor has it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.lanes import HAS_PAIRS, LANES, floats, fma, load, load_one, pairs_across, pairs_along, store, transpose
from jaxlm.machine_code import expanded, kernel
from jaxlm.tokenizers.threads import num_cores
from jaxlm.xla_calls import dimension, integer, is_question, operand, register, result, result_of_uints

ROWS = 4  # of a strip that are summed together
STRIP = 2 * LANES  # columns
_DEPTH = 256  # products of each sum at once: a strip of so many rows is as large as the first cache, or half
_ROWS_AT_ONCE = 256  # of the first matrix, which are read again for each strip


def fits(x_NI: jax.Array, kernel_IO: jax.Array) -> bool:
    """Whether `product` takes matrices of these types and shapes, and each device has a core of its own."""
    return (
        x_NI.dtype == kernel_IO.dtype == jnp.float32
        and x_NI.shape[0] > 0
        and x_NI.shape[0] % ROWS == 0
        and x_NI.shape[1] == kernel_IO.shape[0]
        and not any(size % STRIP for size in kernel_IO.shape)
        and jax.local_device_count() >= num_cores()
    )


def product_with_itself(x_MN: jax.Array) -> jax.Array:
    """x x^T, its factors rounded to bfloat16. Both sizes are those of whole strips."""
    return _call(True, x_MN, x_MN, second_turned=1)


def rounded_product(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x kernel, its factors rounded to bfloat16, in matrices with a few more rows and columns, of any size."""
    rows, features = x_NI.shape[0], kernel_IO.shape[1]
    x_NI = jnp.pad(x_NI, ((0, -rows % ROWS), (0, -x_NI.shape[1] % STRIP)))
    return product(x_NI, pad_to_strips(kernel_IO), True)[:rows, :features]


def pad_to_strips(array: jax.Array) -> jax.Array:
    """With zeros, so that its last two sizes are those of whole strips."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, -size % STRIP) for size in array.shape[-2:]])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_NI: jax.Array, kernel_IO: jax.Array, rounded: bool = False) -> jax.Array:
    """x kernel, for what `fits`. It can be differentiated once.

    Args:
      rounded: whether factors are rounded to bfloat16, in the gradients too. Sums are float32.

    Raises:
      ValueError: a processor that has no instruction for pairs of bfloat16.
    """
    return _call(rounded, x_NI, kernel_IO)


def _product_backward(
    rounded: bool, saved: tuple[jax.Array, jax.Array], d_NO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_NI, kernel_IO = saved
    return _call(rounded, d_NO, kernel_IO, second_turned=1), _call(rounded, x_NI, d_NO, first_turned=1)


product.defvjp(
    lambda x_NI, kernel_IO, rounded: (product(x_NI, kernel_IO, rounded), (x_NI, kernel_IO)), _product_backward
)


def _call(rounded: bool, a: jax.Array, b: jax.Array, first_turned: int = 0, second_turned: int = 0) -> jax.Array:
    """a b, or with the transpose of either."""
    product = jax.ShapeDtypeStruct((a.shape[first_turned], b.shape[1 - second_turned]), jnp.float32)
    scratch = (
        jax.ShapeDtypeStruct((a.size // 2 + b.size,), jnp.uint32)
        if rounded
        else jax.ShapeDtypeStruct((b.size,), jnp.float32)
    )
    if rounded:
        _register_rounded()
    call: Any = jax.ffi.ffi_call(
        "jaxlm_rounded_product" if rounded else "jaxlm_product", [product, scratch], vmap_method="sequential"
    )
    return call(a, b, first_turned=np.int64(first_turned), second_turned=np.int64(second_turned))[0]


@expanded
def strip_product(c, c_at, c_row, a, a_at, a_row, a_step, b, b_at, b_row, rows, steps, add):
    """c = a b, or c += a b, for so many rows of c, two vectors of its columns, and so many products in each sum.

    c_at: where the first number is; c_row: how far apart rows are; a_step: and numbers of a row, since `a` may lie in
    either order. Four rows at a time, as so many sums fit into registers.
    """
    for row in range(0, rows, ROWS):
        c0, a0 = c_at + row * c_row, a_at + row * a_row
        c1, c2, c3 = c0 + c_row, c0 + 2 * c_row, c0 + 3 * c_row
        a1, a2, a3 = a0 + a_row, a0 + 2 * a_row, a0 + 3 * a_row
        s00 = s01 = s10 = s11 = s20 = s21 = s30 = s31 = floats(np.float32(0.0))
        if add:
            s00, s01, s10, s11 = load(c, c0), load(c, c0 + LANES), load(c, c1), load(c, c1 + LANES)
            s20, s21, s30, s31 = load(c, c2), load(c, c2 + LANES), load(c, c3), load(c, c3 + LANES)
        for step in range(steps):
            b0, b1 = load(b, b_at + step * b_row), load(b, b_at + step * b_row + LANES)
            x = load_one(a, a0 + step * a_step)
            s00, s01 = fma(x, b0, s00), fma(x, b1, s01)
            x = load_one(a, a1 + step * a_step)
            s10, s11 = fma(x, b0, s10), fma(x, b1, s11)
            x = load_one(a, a2 + step * a_step)
            s20, s21 = fma(x, b0, s20), fma(x, b1, s21)
            x = load_one(a, a3 + step * a_step)
            s30, s31 = fma(x, b0, s30), fma(x, b1, s31)
        store_two(c, c0, s00, s01)
        store_two(c, c1, s10, s11)
        store_two(c, c2, s20, s21)
        store_two(c, c3, s30, s31)


@expanded
def store_two(array, index, first, second):
    store(array, index, first)
    store(array, index + LANES, second)


@kernel
def _matrix_product(a, b, c, strips, rows, depth, columns, a_row, a_step, b_turned):
    """c = a b. First b is laid out in strips of columns, one after the other."""
    for column in range(0, columns, STRIP):
        strip = column * depth
        if b_turned:
            for step in range(0, depth, LANES):
                for half in range(0, STRIP, LANES):
                    transpose(b, (column + half) * depth + step, depth, strips, strip + step * STRIP + half, STRIP)
        else:
            for step in range(depth):
                at = step * columns + column
                store_two(strips, strip + step * STRIP, load(b, at), load(b, at + LANES))
    for row in range(0, rows, _ROWS_AT_ONCE):
        number = min(_ROWS_AT_ONCE, rows - row)
        for column in range(0, columns, STRIP):
            for start in range(0, depth, _DEPTH):
                steps, at = min(_DEPTH, depth - start), row * a_row + start * a_step
                strip = column * depth + start * STRIP
                c_at, add = row * columns + column, start > 0
                strip_product(c, c_at, columns, a, at, a_row, a_step, strips, strip, STRIP, number, steps, add)


@kernel
def round_to_pairs(source, target, rows, columns, across):
    """Numbers next to each other in a row as pairs of bfloat16, or those of two rows (`across`).

    There is an even number of rows, and the columns are those of whole strips.
    """
    for row in range(0, rows, 2):
        for column in range(0, columns, 2 * LANES):
            at, below = row * columns + column, (row + 1) * columns + column
            a, b, c, d = load(source, at), load(source, at + LANES), load(source, below), load(source, below + LANES)
            if across:
                store_two(target, row // 2 * columns + column, pairs_across(a, c), pairs_across(b, d))
            else:
                store(target, at // 2, pairs_along(a, b))
                store(target, below // 2, pairs_along(c, d))


@expanded
def _shapes(frame):
    """Rows, depth and columns of a product, and whether either matrix is turned."""
    first_turned, second_turned = integer(frame, 0), integer(frame, 1)
    rows, depth = dimension(frame, 0, first_turned), dimension(frame, 0, 1 - first_turned)
    return rows, depth, dimension(frame, 1, 1 - second_turned), first_turned, second_turned


def _handler(frame):
    if is_question(frame):
        return 0
    rows, depth, columns, first_turned, second_turned = _shapes(frame)
    a_row, a_step = (1, rows) if first_turned else (depth, 1)
    a, b, c, strips = operand(frame, 0), operand(frame, 1), result(frame, 0), result(frame, 1)
    _matrix_product(a, b, c, strips, rows, depth, columns, a_row, a_step, second_turned)
    return 0


def _rounded_handler(frame):
    if is_question(frame):
        return 0
    rows, depth, columns, first_turned, second_turned = _shapes(frame)
    c, scratch, pairs = result(frame, 0), result_of_uints(frame, 1), depth // 2
    a, b, strips = scratch[: rows * pairs], scratch[rows * pairs : -columns * pairs], scratch[-columns * pairs :]
    round_to_pairs(operand(frame, 0), a, dimension(frame, 0, 0), dimension(frame, 0, 1), first_turned)
    round_to_pairs(operand(frame, 1), b, dimension(frame, 1, 0), dimension(frame, 1, 1), not second_turned)
    a_row, a_step = (1, rows) if first_turned else (pairs, 1)
    _matrix_product(a, b, c, strips, rows, pairs, columns, a_row, a_step, second_turned)
    return 0


register("jaxlm_product", _handler)


def check_pairs() -> None:
    """Raises ValueError where rounded factors can't be multiplied."""
    if not HAS_PAIRS:
        raise ValueError("This processor has no instruction for pairs of bfloat16, so that nothing can be rounded.")


@cache
def _register_rounded() -> None:
    """Compiled when it is first needed, as few processors have the instruction."""
    check_pairs()
    register("jaxlm_rounded_product", _rounded_handler)
