"""Dropout keeps the share it says, leaves the mean alone, and no two of its masks have anything in common.

Masks drawn apart have a correlation of zero but for chance, one that is used twice has one of 1. Seeds are fixed, and
bounds are five standard deviations or more: chance alone would break one in two million.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

import jaxlm.model
from jaxlm.attention import causal_attention
from jaxlm.dropout import dropout, keep_mask, row_seeds
from jaxlm.model import ModelConfig, forward, init

Mask = npt.NDArray[np.bool_]


def keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def masks(seed: int, shape: tuple[int, ...], rate: float) -> Mask:
    """True where `dropout` keeps."""
    return np.asarray(dropout(jnp.ones(shape), rate, keys(seed, shape[0]))) != 0


def attention_masks(seed: int, batch: int, heads: int, time: int, rate: float) -> Mask:
    """True where `causal_attention` keeps a weight, (B, H, T, T): equal weights, values that are the identity."""
    same = jnp.zeros((batch, time, heads, time))
    identity = jnp.broadcast_to(jnp.eye(time)[:, None], same.shape)
    weights_BTHT = jax.jit(causal_attention, static_argnames="dropout_rate")(
        same, same, identity, dropout_rate=rate, dropout_keys_B=keys(seed, batch)
    )
    return np.asarray(weights_BTHT).swapaxes(1, 2) != 0


def centred(kept: Mask, rate: float) -> npt.NDArray[np.float32]:
    """Scaled to a mean of 0 and a variance of 1."""
    return (kept.astype(np.float32) - (1 - rate)) / math.sqrt(rate * (1 - rate))


def assert_independent(first: Mask, second: Mask, rate: float, message: object = "") -> None:
    correlation = (centred(first, rate) * centred(second, rate)).mean(dtype=np.float64)
    assert abs(correlation) < 5 / math.sqrt(first.size), message


def assert_every_two_independent(rows: Mask, rate: float) -> None:
    """Their correlations, in standard deviations, vary as chance has it, and none is an exception."""
    assert len({row.tobytes() for row in rows}) == len(rows), "a mask is used twice"
    scores = centred(rows, rate) @ centred(rows, rate).T / math.sqrt(rows.shape[1])
    scores = scores[np.triu_indices(len(rows), k=1)]
    assert np.abs(scores).max() < 6
    assert np.square(scores).mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / scores.size))


# ---- what it does to the numbers


def test_without_a_rate_or_without_keys_nothing_changes() -> None:
    x = jnp.ones((2, 5))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys(0, 2)) is x


@pytest.mark.parametrize("rate", [1e-6, 0.001, 0.2, 0.5, 0.9, 0.9999, 0.999995])
def test_the_kept_share_and_the_scale(rate: float) -> None:
    kept = np.asarray(dropout(jnp.full((2, 1000, 2000), 3.0), rate, keys(4, 2)))
    deviation = math.sqrt(rate * (1 - rate) / kept.size)
    assert abs((kept != 0).mean() - (1 - rate)) < 5 * deviation
    np.testing.assert_allclose(kept[kept != 0], 3.0 / (1 - rate), rtol=1e-6)
    # So the mean is that of the input. Of 20 kept numbers in 4 million too.
    assert kept.mean(dtype=np.float64) == pytest.approx(3.0, abs=5 * 3.0 * deviation / (1 - rate))


def test_the_share_is_that_of_each_sequence_and_varies_as_chance_has_it() -> None:
    kept = masks(5, (500, 64, 32), 0.2)
    errors = (kept.mean(axis=(1, 2)) - 0.8) / math.sqrt(0.2 * 0.8 / (64 * 32))
    assert np.abs(errors).max() < 5
    assert np.square(errors).sum() == pytest.approx(500, abs=5 * math.sqrt(2 * 500))  # chi-square of 500 degrees


def test_the_gradient_is_the_mask_and_what_is_kept_is_only_scaled() -> None:
    x, keys_B = np.random.default_rng(6).normal(size=(10, 10, 100)).astype(np.float32), keys(7, 10)
    mask = np.asarray(dropout(jnp.ones_like(x), 0.3, keys_B))
    np.testing.assert_allclose(dropout(x, 0.3, keys_B), x * mask, rtol=1e-6)
    above = np.random.default_rng(8).normal(size=x.shape).astype(np.float32)
    _, pull_back = jax.vjp(lambda x: dropout(x, 0.3, keys_B), x)
    np.testing.assert_allclose(pull_back(above)[0], above * mask, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_type_of_numbers_stays(dtype: jnp.dtype) -> None:
    x = dropout(jnp.ones((3, 100), dtype), 0.5, keys(0, 3))
    assert x.dtype == dtype
    assert set(np.unique(x.astype(jnp.float32))) == {0.0, 2.0}


# ---- which mask


def test_the_same_keys_give_the_same_masks_and_others_others() -> None:
    np.testing.assert_array_equal(masks(0, (4, 50, 50), 0.5), masks(0, (4, 50, 50), 0.5))
    assert_independent(masks(0, (4, 50, 50), 0.5), masks(1, (4, 50, 50), 0.5), 0.5)


def test_a_sequence_has_the_same_mask_whatever_the_batch_it_is_in() -> None:
    keys_B = keys(9, 6)
    together = dropout(jnp.ones((6, 20, 30)), 0.5, keys_B)
    np.testing.assert_array_equal(dropout(jnp.ones((1, 20, 30)), 0.5, keys_B[4:5]), together[4:5])
    shuffled = np.array([3, 5, 0, 1, 4, 2])
    np.testing.assert_array_equal(dropout(jnp.ones((6, 20, 30)), 0.5, keys_B[shuffled]), together[shuffled])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_any_two_sequences_are_independent(rate: float) -> None:
    assert_every_two_independent(masks(10, (1000, 64, 128), rate).reshape(1000, -1), rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_any_two_heads_are_independent(rate: float) -> None:
    seen = np.tril(np.ones((64, 64), bool))
    kept = attention_masks(11, 16, 8, 64, rate)
    assert not kept[:, :, ~seen].any()
    assert_every_two_independent(kept[:, :, seen].reshape(16 * 8, -1), rate)


def test_no_two_masks_of_a_model_have_anything_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers, of all places in a layer, of all heads in attention, of all sequences: one seed for each mask."""
    config = ModelConfig(9, context=4, width=8, num_layers=3, num_heads=4, feed_forward_width=8, dropout=0.5)
    params, seeds = init(config, jax.random.key(0)), []

    def noted(function: Callable[..., jax.Array], keys_of: Callable[..., tuple[jax.Array, int]]) -> Callable:
        def note(*arguments: Any, **settings: Any) -> jax.Array:
            seeds.append(np.asarray(row_seeds(*keys_of(*arguments, **settings))).ravel())
            return function(*arguments, **settings)

        return note

    weights = noted(causal_attention, lambda q, *_, dropout_keys_B, **__: (dropout_keys_B, q.shape[2]))
    monkeypatch.setattr(jaxlm.model, "causal_attention", weights)
    monkeypatch.setattr(jaxlm.model, "dropout", noted(dropout, lambda x, rate, keys_B: (keys_B, 1)))
    forward(params, jnp.zeros((20, 4), jnp.int32), config, dropout_key=jax.random.key(1))
    assert [row.size for row in seeds] == 3 * [20 * 4, 20, 20]
    index = np.arange(2**12, dtype=np.uint32) * np.uint32(0x9E3779B9)
    kept = np.asarray(jax.jit(keep_mask, static_argnums=2)(np.concatenate(seeds)[:, None], index, 0.5))
    assert_every_two_independent(kept, 0.5)


LAGS = [1, 2, 3, 4, 5, 8, 13, 16, 21, 32, 55, 64, 89]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent_in_time_in_features_and_across(rate: float) -> None:
    kept = masks(12, (4, 300, 256), rate)
    for lag in LAGS:
        assert_independent(kept[:, lag:], kept[:, :-lag], rate, ("time", lag))
        assert_independent(kept[..., lag:], kept[..., :-lag], rate, ("features", lag))
        assert_independent(kept[:, lag:, lag:], kept[:, :-lag, :-lag], rate, ("both", lag))
        assert_independent(kept[:, lag:, :-lag], kept[:, :-lag, lag:], rate, ("against each other", lag))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbouring_attention_weights_are_independent_along_queries_along_keys_and_across(rate: float) -> None:
    kept, seen = attention_masks(13, 4, 2, 256, rate), np.tril(np.ones((256, 256), bool))
    for lag in LAGS:
        here, there = slice(lag, None), slice(None, -lag)
        for name, first, second in (
            ("queries", (here, slice(None)), (there, slice(None))),
            ("keys", (slice(None), here), (slice(None), there)),
            ("both", (here, here), (there, there)),
            ("against each other", (here, there), (there, here)),
        ):
            both_seen = seen[first] & seen[second]
            assert_independent(
                kept[(..., *first)][..., both_seen], kept[(..., *second)][..., both_seen], rate, (name, lag)
            )


def chi_square_of_runs(bits: Mask) -> float:
    """Of the 256 patterns of eight bits along the last axis, which are equally likely at a rate of a half."""
    patterns = np.packbits(bits[..., : bits.shape[-1] // 8 * 8], axis=-1)
    counts = np.bincount(patterns.ravel(), minlength=256)
    expected = patterns.size / 256
    assert expected > 100
    return float(((counts - expected) ** 2 / expected).sum())


def test_eight_neighbours_have_all_patterns_equally_often() -> None:
    """Independence of more than pairs. Chi-square of 255 degrees of freedom has a deviation of sqrt(510)."""
    most = 255 + 5 * math.sqrt(510)
    kept = masks(14, (4, 1024, 256), 0.5)
    assert chi_square_of_runs(kept) < most
    assert chi_square_of_runs(kept.swapaxes(1, 2)) < most
    # Half of the weights are seen: rows from the middle on, and of those the first half.
    kept = attention_masks(15, 8, 4, 256, 0.5)[:, :, 128:, :128]
    assert chi_square_of_runs(kept) < most
    assert chi_square_of_runs(kept.swapaxes(2, 3)) < most


def test_seeds_that_differ_in_one_of_the_lower_22_bits_give_independent_masks() -> None:
    """The ten bits above those reach too few others. Two seeds drawn at random are that close once in 4 million."""
    index, seeds = np.arange(2**14, dtype=np.uint32) * np.uint32(0x9E3779B9), row_seeds(keys(16, 20), 1)
    mask = jax.jit(keep_mask, static_argnums=2)
    for rate in (0.1, 0.5):
        for bit in range(22):
            assert_independent(
                np.asarray(mask(seeds, index, rate)),
                np.asarray(mask(seeds ^ jnp.uint32(1 << bit), index, rate)),
                rate,
                bit,
            )
