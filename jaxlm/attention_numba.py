"""Causal attention in two kernels for CPUs: FlashAttention (Dao et al. 2022) in the registers of one core.

Queries go in blocks of two vectors. Scores stand transposed, a row for each key and a lane for each query, so that
sums and maxima over keys are those of whole vectors. Two matrices are multiplied four rows at a time, the results of
which stay in registers. Nothing is stored but the results, and, for the backward pass, two numbers for each query.

A device takes its batch on one core: all of them are busy where there is a device for each.

Factors of products are float32, or pairs of bfloat16 whose products are added: neighbours in a row, or of two rows
("across"). Of the arguments `numbers` and `pairs`, both the working memory, the one of the other kind is None, by which
numba leaves out what isn't needed.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.dropout import threshold
from jaxlm.lanes import (
    LANES,
    exp2,
    floats,
    fma,
    lane_numbers,
    load,
    load_one,
    maximum,
    store,
    transpose,
    uints,
    where,
)
from jaxlm.machine_code import expanded, kernel
from jaxlm.products_numba import ROWS, check_pairs, round_to_pairs, store_two, strip_product
from jaxlm.xla_calls import (
    dimension,
    integer,
    is_question,
    number,
    operand,
    operand_of_uints,
    register,
    result,
    result_of_uints,
)

_BLOCK = 2 * LANES  # queries, and keys in the backward pass
_KEYS = 4 * _BLOCK  # keys at once in the forward pass: with their scores they fit into the first cache
_NEVER = np.float32(-1e30)  # the score of a key that may not be seen
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LOG2_E = math.log2(math.e)


def attention_numba(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    scale: float,
    window: int | None = None,
    documents_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    seeds_BH: jax.Array | None = None,
    rounded: bool = False,
) -> jax.Array:
    """As `attention.attention_reference`, computed in float32. On CPUs alone; it can be differentiated once.

    Args:
      rounded: whether factors are rounded to bfloat16, in the gradients too.

    Raises:
      ValueError: shapes that don't belong together, or a processor that has no instruction for pairs of bfloat16.
    """
    batch, time, heads, width = q_BTHK.shape
    groups = k_BTGK.shape[2]
    if k_BTGK.shape != (batch, time, groups, width) or v_BTGK.shape != k_BTGK.shape or heads % max(1, groups):
        raise ValueError(f"Queries {q_BTHK.shape}, keys {k_BTGK.shape} and values {v_BTGK.shape} don't go together.")
    if documents_BT is None:
        documents_BT = jnp.zeros((0, 0), jnp.int32)
    else:
        documents_BT = jnp.broadcast_to(documents_BT.astype(jnp.int32), (batch, time))
    documents_BT = jnp.pad(documents_BT, ((0, 0), (0, _padded(time) - time if len(documents_BT) else 0)))
    if seeds_BH is None:
        seeds_BH, dropout_rate = jnp.zeros((0, 0), jnp.uint32), 0.0
    elif seeds_BH.shape != (batch, heads):
        raise ValueError(f"Seeds of shape {seeds_BH.shape} aren't one for each of {batch} x {heads} heads.")
    settings = scale, time if window is None else min(window, time), dropout_rate, rounded
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHK, k_BTGK, v_BTGK))
    return _attend(settings, q, k, v, documents_BT, seeds_BH).astype(v_BTGK.dtype)


def _padded(size: int) -> int:
    """The next multiple of a block, of positions or of a head's width."""
    return -(-size // _BLOCK) * _BLOCK


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Any, *inputs: jax.Array) -> jax.Array:
    return _attend_forward(settings, *inputs)[0]


def _call(name: str, settings: Any, results: list[Any], scratch_size: int, *operands: jax.Array) -> Any:
    """A kernel, which has its working memory from XLA as another result."""
    scale, window, rate, rounded = settings
    if rounded:
        _register_rounded()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [*results, (scratch_size,)]]
    call = jax.ffi.ffi_call(f"{name}_rounded" if rounded else name, results, vmap_method="sequential")
    attributes = {
        "growth": np.float32(1.0 / (1.0 - rate)),  # of weights that dropout keeps
        "scale": np.float32(scale),
        "threshold": np.int64(threshold(rate) if rate else 0),
        "window": np.int64(window),
    }
    return call(*operands, **attributes)[:-1]


def _attend_forward(settings: Any, q: jax.Array, k: jax.Array, v: jax.Array, documents: Any, seeds: Any) -> Any:
    batch, time, heads, head_width = q.shape
    length, width = _padded(time), _padded(head_width)
    scratch = 2 * length * width + 2 * _BLOCK * width + _KEYS * _BLOCK
    of_queries = batch, heads, length
    out, highest, sums = _call(
        "jaxlm_attention_forward", settings, [q.shape, of_queries, of_queries], scratch, q, k, v, documents, seeds
    )
    return out, (q, k, v, documents, seeds, out, highest, sums)


def _attend_backward(settings: Any, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, *_ = saved
    length, width = _padded(q.shape[1]), _padded(q.shape[3])
    scratch = 9 * length * width // 2 + 7 * _BLOCK * width + 4 * _BLOCK * _BLOCK + _BLOCK * LANES + _BLOCK
    gradients = _call("jaxlm_attention_backward", settings, [q.shape, k.shape, v.shape], scratch, *saved, d_out)
    return *gradients, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# ---- pieces of both kernels. All matrices are flat arrays, rows of a fixed distance.


@kernel
def _clear(array):
    for index in range(len(array)):
        array[index] = _ZERO


@kernel
def _copy_rows(source, at, stride, target, target_at, target_stride, rows, width, factor):
    """target = factor source, for so many rows of so many numbers."""
    in_vectors = width // LANES * LANES
    for row in range(rows):
        a, b = at + row * stride, target_at + row * target_stride
        for column in range(0, in_vectors, LANES):
            store(target, b + column, load(source, a + column) * floats(factor))
        for column in range(in_vectors, width):
            target[b + column] = source[a + column] * factor


@kernel
def _transpose(source, rows, columns, target):
    """The transpose of a matrix, both numbers being multiples of LANES."""
    for row in range(0, rows, LANES):
        for column in range(0, columns, LANES):
            transpose(source, row * columns + column, columns, target, column * rows + row, rows)


@kernel
def _round_and_transpose(rows, pairs, width, columns):
    """A block of rows as columns of pairs."""
    round_to_pairs(rows, pairs, _BLOCK, width, False)
    _transpose(pairs, _BLOCK, width // 2, columns)


@expanded
def _hide(scores, keys, query, key, window, documents, documents_at):
    """Sets the scores of those keys to _NEVER that a query may not see. `query`, `key`: the first ones."""
    for row in range(keys):
        for half in range(0, _BLOCK, LANES):
            at = row * _BLOCK + half
            score = load(scores, at)
            # A key after the query is a large number of positions before it, without a sign.
            before = lane_numbers() + uints(query + half - key - row)
            score = where(before < uints(window), score, floats(_NEVER))
            if len(documents):
                of_queries = load(documents, documents_at + query + half)
                of_key = load_one(documents, documents_at + key + row)
                score = where(of_queries ^ of_key < uints(1), score, floats(_NEVER))
            store(scores, at, score)


@expanded
def _is_kept(seed, query, key, limit):
    """Whether dropout keeps the weight of this key for LANES queries: `dropout.keep_mask` of `dropout.weight_index`."""
    queries = (lane_numbers() + uints(query)) * uints(0x10001)
    x = (seed ^ queries + uints(key) * uints(0x9E3779B9)) * uints(0x7FEB352D)
    x = (x ^ x >> uints(15)) * uints(0x846CA68B)
    return uints(limit) <= x


# ---- the kernels


@kernel
def _forward(
    q, k, v, documents, seeds, out, highest, sums, scratch, batch, time, heads, groups, head_width, scale, window,
    limit, growth, numbers, pairs,
):  # fmt: skip
    length, width = -(-time // _BLOCK) * _BLOCK, -(-head_width // _BLOCK) * _BLOCK
    depth = -(-head_width // ROWS) * ROWS
    # Of the working memory: keys and values (`size` each), then two blocks, and the scores. Pairs take half of the room
    # of numbers: their keys and values share the second `size`, behind rows that are yet to be rounded; their weights
    # stand in the place of the scores, whose rows are read before they are written over.
    size, block = length * width, _BLOCK * width
    rest = scratch[2 * size :]
    rows, turned, scores = rest[:block], rest[block : 2 * block], rest[2 * block :]
    if numbers is not None:
        each, columns, weights = 1, turned, scores
        keys, values = scratch[:size], scratch[size : 2 * size]
    if pairs is not None:
        each, columns, weights = 2, pairs[2 * size + block :], pairs[2 * size + 2 * block :]
        keys, values = pairs[size : size + size // 2], pairs[size + size // 2 : 2 * size]
    _clear(scratch)
    factor = floats(np.float32(_LOG2_E))
    kept = floats(growth)
    for sequence in range(batch):
        for head in range(heads):
            group, sharing = head * groups // heads, heads // groups
            if head % sharing == 0:
                start, stride = (sequence * time * groups + group) * head_width, groups * head_width
                if numbers is not None:
                    _copy_rows(k, start, stride, keys, 0, width, time, head_width, scale)
                    _copy_rows(v, start, stride, values, 0, width, time, head_width, _ONE)
                if pairs is not None:
                    _copy_rows(k, start, stride, scratch, 0, width, time, head_width, scale)
                    round_to_pairs(scratch, keys, length, width, False)
                    _copy_rows(v, start, stride, scratch, 0, width, time, head_width, _ONE)
                    round_to_pairs(scratch, values, length, width, True)
            row = sequence * heads + head
            for query in range(0, time, _BLOCK):
                number = min(_BLOCK, time - query)
                start = ((sequence * time + query) * heads + head) * head_width
                _copy_rows(q, start, heads * head_width, rows, 0, width, number, head_width, _ONE)
                if numbers is not None:
                    _transpose(rows, _BLOCK, width, columns)
                if pairs is not None:
                    _round_and_transpose(rows, columns[block // 2 :], width, columns)
                high0 = high1 = floats(_NEVER)
                sum0 = sum1 = floats(_ZERO)
                _clear(rows)
                first = max(0, query - window + 1) // _BLOCK * _BLOCK
                for key in range(first, query + _BLOCK, _KEYS):
                    count = min(_KEYS, query + _BLOCK - key)
                    row_size, at = width // each, key * width // each
                    strip_product(
                        scores, 0, _BLOCK, keys, at, row_size, 1, columns, 0, _BLOCK, count, depth // each, False
                    )  # fmt: skip
                    if key + count > query or query + _BLOCK - key > window or len(documents):
                        _hide(scores, count, query, key, window, documents, sequence * length)
                    new0, new1 = high0, high1
                    for r in range(0, count * _BLOCK, _BLOCK):
                        new0, new1 = maximum(new0, load(scores, r)), maximum(new1, load(scores, r + LANES))
                    less0, less1 = exp2((high0 - new0) * factor), exp2((high1 - new1) * factor)
                    high0, high1 = new0, new1
                    sum0, sum1 = sum0 * less0, sum1 * less1
                    for r in range(count):
                        at = r * _BLOCK
                        weight0 = exp2((load(scores, at) - high0) * factor)
                        weight1 = exp2((load(scores, at + LANES) - high1) * factor)
                        sum0, sum1 = sum0 + weight0, sum1 + weight1
                        if limit:
                            seed = load_one(seeds, row)
                            kept0 = _is_kept(seed, query, key + r, limit)
                            kept1 = _is_kept(seed, query + LANES, key + r, limit)
                            weight0 = where(kept0, weight0 * kept, floats(_ZERO))
                            weight1 = where(kept1, weight1 * kept, floats(_ZERO))
                        store_two(scores, at, weight0, weight1)
                    for at in range(0, depth * _BLOCK, _BLOCK):
                        store_two(rows, at, load(rows, at) * less0, load(rows, at + LANES) * less1)
                    if pairs is not None:
                        round_to_pairs(scores, weights, count, _BLOCK, True)
                    at, steps = key // each * width, count // each
                    strip_product(rows, 0, _BLOCK, values, at, 1, width, weights, 0, _BLOCK, depth, steps, True)
                for at in range(0, depth * _BLOCK, _BLOCK):
                    store_two(rows, at, load(rows, at) / sum0, load(rows, at + LANES) / sum1)
                _transpose(rows, width, _BLOCK, turned)
                _copy_rows(turned, 0, width, out, start, heads * head_width, number, head_width, _ONE)
                _clear(rows)
                at = row * length + query
                store_two(highest, at, high0, high1)
                store_two(sums, at, sum0, sum1)


@kernel
def _backward(
    q, k, v, documents, seeds, out, highest, sums, d_out, dq, dk, dv, scratch, batch, time, heads, groups, head_width,
    scale, window, limit, growth, numbers, pairs,
):  # fmt: skip
    length, width = -(-time // _BLOCK) * _BLOCK, -(-head_width // _BLOCK) * _BLOCK
    depth = -(-head_width // ROWS) * ROWS
    # The working memory, in this order, for numbers and for pairs, which take half of their room:
    #   5 half sizes: keys (2), values (2) | rows that are yet to be rounded (2), keys, keys_across, values (1 each)
    #   4 half sizes: d_keys, d_values
    #   4 blocks: rows, d_rows, out_rows, dq_columns
    #   3 blocks: columns, d_columns | a block to be turned; columns, d_columns, rows_across, d_rows_across (1/2 each)
    #   4 squares: weights, d_scores, and | weights_along, d_scores_along, d_scores_across (1/2 each)
    #   at the end: partial_dots, dots
    size, half_size, block = length * width, length * width // 2, _BLOCK * width
    d_keys, d_values = scratch[5 * half_size : 7 * half_size], scratch[7 * half_size : 9 * half_size]
    rest = scratch[9 * half_size :]
    rows, d_rows, out_rows = rest[:block], rest[block : 2 * block], rest[2 * block : 3 * block]
    dq_columns = rest[3 * block : 4 * block]
    turned, rest = rest[4 * block :], rest[7 * block :]
    weights, d_scores = rest, rest[_BLOCK * _BLOCK :]
    partial_dots, dots = rest[4 * _BLOCK * _BLOCK : -_BLOCK], rest[-_BLOCK:]
    if numbers is not None:
        each, keys, values, columns, d_columns = 1, scratch, scratch[size:], turned, turned[block:]
        keys_across, rows_across, d_rows_across, d_scores_across = keys, rows, d_rows, d_scores
        weights_along, d_scores_along = weights, d_scores
    if pairs is not None:
        each, square = 2, _BLOCK * _BLOCK // 2
        keys, keys_across, values, rest = (
            pairs[size:],
            pairs[3 * half_size :],
            pairs[2 * size :],
            pairs[9 * half_size :],
        )
        turned_pairs, columns, d_columns = rest[4 * block :], rest[5 * block :], rest[5 * block + block // 2 :]
        rows_across, d_rows_across, rest = rest[6 * block :], rest[6 * block + block // 2 :], rest[7 * block :]
        weights_along, d_scores_along, d_scores_across = rest[4 * square :], rest[5 * square :], rest[6 * square :]
    _clear(scratch)
    factor = floats(np.float32(_LOG2_E))
    kept = floats(growth)
    for sequence in range(batch):
        for head in range(heads):
            group, sharing = head * groups // heads, heads // groups
            of_group, group_stride = (sequence * time * groups + group) * head_width, groups * head_width
            if head % sharing == 0:
                if numbers is not None:
                    _copy_rows(k, of_group, group_stride, keys, 0, width, time, head_width, scale)
                    _copy_rows(v, of_group, group_stride, values, 0, width, time, head_width, _ONE)
                if pairs is not None:
                    _copy_rows(k, of_group, group_stride, scratch, 0, width, time, head_width, scale)
                    round_to_pairs(scratch, keys, length, width, False)
                    round_to_pairs(scratch, keys_across, length, width, True)
                    _copy_rows(v, of_group, group_stride, scratch, 0, width, time, head_width, _ONE)
                    round_to_pairs(scratch, values, length, width, False)
                _clear(d_keys)
                _clear(d_values)
            row = sequence * heads + head
            for query in range(0, time, _BLOCK):
                number, stride = min(_BLOCK, time - query), heads * head_width
                start = ((sequence * time + query) * heads + head) * head_width
                if number < _BLOCK:
                    _clear(rows)
                    _clear(d_rows)
                _copy_rows(q, start, stride, rows, 0, width, number, head_width, _ONE)
                _copy_rows(d_out, start, stride, d_rows, 0, width, number, head_width, _ONE)
                _copy_rows(out, start, stride, out_rows, 0, width, number, head_width, _ONE)
                if numbers is not None:
                    _transpose(rows, _BLOCK, width, columns)
                    _transpose(d_rows, _BLOCK, width, d_columns)
                if pairs is not None:
                    _round_and_transpose(rows, turned_pairs, width, columns)
                    _round_and_transpose(d_rows, turned_pairs, width, d_columns)
                    round_to_pairs(rows, rows_across, _BLOCK, width, True)
                    round_to_pairs(d_rows, d_rows_across, _BLOCK, width, True)
                _clear(dq_columns)
                # What the gradient of a weight is measured against: the mean of them all by the weights, out d_out.
                for r in range(_BLOCK):
                    dot = floats(_ZERO)
                    for c in range(r * width, (r + 1) * width, LANES):
                        dot = fma(load(out_rows, c), load(d_rows, c), dot)
                    store(partial_dots, r * LANES, dot)
                for half in range(0, _BLOCK, LANES):
                    at = half * LANES
                    transpose(partial_dots, at, LANES, partial_dots, at, LANES)
                    dot = floats(_ZERO)
                    for r in range(LANES):
                        dot = dot + load(partial_dots, at + r * LANES)
                    store(dots, half, dot)
                dot0, dot1 = load(dots, 0), load(dots, LANES)
                at = row * length + query
                high0, high1 = load(highest, at), load(highest, at + LANES)
                share0, share1 = floats(_ONE) / load(sums, at), floats(_ONE) / load(sums, at + LANES)
                first = max(0, query - window + 1) // _BLOCK * _BLOCK
                for key in range(first, query + _BLOCK, _BLOCK):
                    at, row_size, steps = key * width // each, width // each, depth // each
                    strip_product(weights, 0, _BLOCK, keys, at, row_size, 1, columns, 0, _BLOCK, _BLOCK, steps, False)
                    strip_product(
                        d_scores, 0, _BLOCK, values, at, row_size, 1, d_columns, 0, _BLOCK, _BLOCK, steps, False
                    )  # fmt: skip
                    if key == query or query + _BLOCK - key > window or len(documents):
                        _hide(weights, _BLOCK, query, key, window, documents, sequence * length)
                    for r in range(_BLOCK):
                        at = r * _BLOCK
                        weight0 = exp2((load(weights, at) - high0) * factor) * share0
                        weight1 = exp2((load(weights, at + LANES) - high1) * factor) * share1
                        dropped0, dropped1 = weight0, weight1
                        if limit:
                            seed = load_one(seeds, row)
                            kept0 = _is_kept(seed, query, key + r, limit)
                            kept1 = _is_kept(seed, query + LANES, key + r, limit)
                            dropped0 = where(kept0, weight0 * kept, floats(_ZERO))
                            dropped1 = where(kept1, weight1 * kept, floats(_ZERO))
                        store_two(weights, at, dropped0, dropped1)
                        store_two(
                            d_scores,
                            at,
                            dropped0 * load(d_scores, at) - weight0 * dot0,
                            dropped1 * load(d_scores, at + LANES) - weight1 * dot1,
                        )
                    if pairs is not None:
                        round_to_pairs(weights, weights_along, _BLOCK, _BLOCK, False)
                        round_to_pairs(d_scores, d_scores_along, _BLOCK, _BLOCK, False)
                        round_to_pairs(d_scores, d_scores_across, _BLOCK, _BLOCK, True)
                    at, row_size, steps = key // each * width, _BLOCK // each, _BLOCK // each
                    strip_product(
                        dq_columns, 0, _BLOCK, keys_across, at, 1, width, d_scores_across, 0, _BLOCK, depth, steps, True
                    )  # fmt: skip
                    for c in range(0, width, _BLOCK):
                        at = key * width + c
                        strip_product(
                            d_keys, at, width, d_scores_along, 0, row_size, 1, rows_across, c, width, _BLOCK, steps,
                            True,
                        )  # fmt: skip
                        strip_product(
                            d_values, at, width, weights_along, 0, row_size, 1, d_rows_across, c, width, _BLOCK, steps,
                            True,
                        )  # fmt: skip
                _transpose(dq_columns, width, _BLOCK, turned)
                _copy_rows(turned, 0, width, dq, start, stride, number, head_width, _ONE)
            if (head + 1) % sharing == 0:
                _copy_rows(d_keys, 0, width, dk, of_group, group_stride, time, head_width, scale)
                _copy_rows(d_values, 0, width, dv, of_group, group_stride, time, head_width, _ONE)


# ---- as operations of XLA


@expanded
def _shape(frame):
    """Of q and k: batch, time, heads, groups, head_width."""
    shape = dimension(frame, 0, 0), dimension(frame, 0, 1), dimension(frame, 0, 2), dimension(frame, 1, 2)
    return *shape, dimension(frame, 0, 3)


@expanded
def _settings(frame):
    """scale, window, limit, growth. Attributes come in the order of their names: growth, scale, threshold, window."""
    return number(frame, 1), integer(frame, 3), integer(frame, 2), number(frame, 0)


@expanded
def _call_forward(frame, numbers, pairs):
    q, k, v = operand(frame, 0), operand(frame, 1), operand(frame, 2)
    documents, seeds = operand_of_uints(frame, 3), operand_of_uints(frame, 4)
    out, highest, sums, scratch = result(frame, 0), result(frame, 1), result(frame, 2), result(frame, 3)
    _forward(q, k, v, documents, seeds, out, highest, sums, scratch, *_shape(frame), *_settings(frame), numbers, pairs)


@expanded
def _call_backward(frame, numbers, pairs):
    q, k, v = operand(frame, 0), operand(frame, 1), operand(frame, 2)
    documents, seeds = operand_of_uints(frame, 3), operand_of_uints(frame, 4)
    saved = operand(frame, 5), operand(frame, 6), operand(frame, 7)
    d_out, scratch = operand(frame, 8), result(frame, 3)
    gradients = result(frame, 0), result(frame, 1), result(frame, 2)
    _backward(
        q, k, v, documents, seeds, *saved, d_out, *gradients, scratch, *_shape(frame), *_settings(frame), numbers, pairs
    )


def _forward_handler(frame):
    if not is_question(frame):
        _call_forward(frame, result(frame, 3), None)
    return 0


def _backward_handler(frame):
    if not is_question(frame):
        _call_backward(frame, result(frame, 3), None)
    return 0


def _rounded_forward_handler(frame):
    if not is_question(frame):
        _call_forward(frame, None, result_of_uints(frame, 3))
    return 0


def _rounded_backward_handler(frame):
    if not is_question(frame):
        _call_backward(frame, None, result_of_uints(frame, 3))
    return 0


register("jaxlm_attention_forward", _forward_handler)
register("jaxlm_attention_backward", _backward_handler)


@cache
def _register_rounded() -> None:
    """Compiled when they are first needed, as few processors have the instruction."""
    check_pairs()
    register("jaxlm_attention_forward_rounded", _rounded_forward_handler)
    register("jaxlm_attention_backward_rounded", _rounded_backward_handler)
