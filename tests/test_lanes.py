"""Vectors in kernels do what the same numbers do one by one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxlm.lanes import (
    HAS_PAIRS,
    LANES,
    exp2,
    fma,
    lane_numbers,
    load,
    load_one,
    maximum,
    pairs_across,
    pairs_along,
    store,
    transpose,
    uints,
    where,
)
from jaxlm.machine_code import kernel


@kernel
def power(x, out):
    for index in range(0, len(x), LANES):
        store(out, index, exp2(load(x, index)))


@kernel
def turn(rows, columns):
    transpose(rows, 1, 2 * LANES, columns, 2, 3 * LANES)


@kernel
def arithmetic(a, b, out):
    x, y = load(a, 0), load(b, 0)
    store(out, 0, maximum(x, y))
    store(out, LANES, x * y - x / y + load_one(a, 1))
    store(out, 2 * LANES, where(lane_numbers() < uints(3), x, y))


@kernel
def integers(a, b, out):
    x, y = load(a, 0), load(b, 0)
    store(out, 0, (x ^ x >> uints(15)) * y + (x << uints(3)) - uints(7))
    store(out, LANES, where(x <= y, x, y))


@kernel
def of_pairs(a, b, c, pairs, out):
    across, along = pairs_across(load(a, 0), load(a, LANES)), pairs_along(load(a, 0), load(a, LANES))
    store(pairs, 0, across)
    store(pairs, LANES, along)
    store(out, 0, fma(across, pairs_across(load(b, 0), load(b, LANES)), load(c, 0)))
    store(out, LANES, fma(along, load_one(pairs, 1), load(c, LANES)))


def test_powers_of_two() -> None:
    x = np.concatenate([-np.arange(128.0), np.random.default_rng(0).uniform(-126, 1, 16_000)]).astype(np.float32)
    out = np.empty_like(x)
    power(x, out)
    np.testing.assert_array_equal(out[:127], 2.0 ** x[:127])  # whole ones exactly
    np.testing.assert_allclose(out[128:], np.exp2(x[128:].astype(np.float64)), rtol=2e-7)
    x[:] = np.float32(-1e30)
    power(x, out)
    assert not out.any()


def test_a_square_is_transposed() -> None:
    rows = np.random.default_rng(0).normal(size=1 + 2 * LANES * LANES).astype(np.float32)
    columns = np.zeros(2 + 3 * LANES * LANES, np.float32)
    turn(rows, columns)
    square = columns[2:].reshape(LANES, 3 * LANES)
    np.testing.assert_array_equal(square[:, :LANES], rows[1:].reshape(LANES, 2 * LANES)[:, :LANES].T)
    assert not square[:, LANES:].any()


@pytest.mark.parametrize("seed", range(3))
def test_floats(seed: int) -> None:
    a, b = np.random.default_rng(seed).normal(size=(2, LANES)).astype(np.float32)
    out = np.empty(3 * LANES, np.float32)
    arithmetic(a, b, out)
    expected = np.concatenate([np.maximum(a, b), a * b - a / b + a[1], np.where(np.arange(LANES) < 3, a, b)])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("seed", range(3))
def test_unsigned_integers(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(2**32, size=(2, LANES), dtype=np.uint32)
    out = np.empty(2 * LANES, np.uint32)
    integers(a, b, out)
    expected = [(a ^ a >> np.uint32(15)) * b + (a << np.uint32(3)) - np.uint32(7), np.minimum(a, b)]
    np.testing.assert_array_equal(out, np.concatenate(expected))


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_bfloat16(seed: int) -> None:
    a, b, c = np.random.default_rng(seed).normal(size=(3, 2 * LANES)).astype(np.float32)
    a[:3] = 0.0, -1.0, 1e30
    pairs, out = np.empty(2 * LANES, np.uint32), np.empty(2 * LANES, np.float32)
    of_pairs(a, b, c, pairs, out)
    rounded, other = a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)
    lanes = rounded.reshape(2, LANES).T
    np.testing.assert_array_equal(pairs[:LANES].view(ml_dtypes.bfloat16), lanes.ravel())
    np.testing.assert_array_equal(pairs[LANES:].view(ml_dtypes.bfloat16), rounded)
    first = (lanes.astype(float) * other.reshape(2, LANES).T.astype(float)).sum(axis=1) + c[:LANES]
    second = (rounded.reshape(LANES, 2).astype(float) * lanes[1].astype(float)).sum(axis=1) + c[LANES:]
    np.testing.assert_allclose(out, [*first, *second], rtol=1e-5, atol=1e-6)
