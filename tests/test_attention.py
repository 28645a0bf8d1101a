"""The fast attention is the formula: the same values, the same gradients, and dropout that acts on weights alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxlm.attention import causal_attention, causal_attention_reference, dropout

Float32 = npt.NDArray[np.float32]

# Around the edges of the blocks of 64 queries: within one, exactly one, one more, several with a rest.
LENGTHS = [1, 2, 63, 64, 65, 131]

attend = jax.jit(causal_attention, static_argnames="dropout_rate")


def random_inputs(seed: int, time: int, heads: int, width: int, batch: int = 2) -> tuple[Float32, ...]:
    """q, k, v and a gradient to come from above, all of shape (B, T, H, K)."""
    return tuple(np.random.default_rng(seed).normal(size=(4, batch, time, heads, width)).astype(np.float32))


def attention_by_hand(q: npt.NDArray, k: npt.NDArray, v: npt.NDArray) -> npt.NDArray[np.float64]:
    """One position, one head after another, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for b, t, h in np.ndindex(q.shape[:3]):
        scores = [math.fsum(q[b, t, h] * k[b, s, h]) / math.sqrt(q.shape[3]) for s in range(t + 1)]
        weights = [math.exp(score - max(scores)) for score in scores]
        out[b, t, h] = sum(weight / math.fsum(weights) * v[b, s, h] for s, weight in enumerate(weights))
    return out


def weights_of(q_BTHK: Float32, k_BTHK: Float32, rate: float, key: jax.Array | None) -> Float32:
    """The attention weights that `causal_attention` used, (B, T, H, S): values that are the identity show them."""
    batch, time, heads, _ = q_BTHK.shape
    assert q_BTHK.shape[3] == time, "the identity needs heads as wide as the sequence is long"
    identity = np.broadcast_to(np.eye(time, dtype=np.float32)[None, :, None, :], (batch, time, heads, time))
    return np.asarray(attend(q_BTHK, k_BTHK, identity, dropout_rate=rate, dropout_key=key))


def test_both_are_the_formula() -> None:
    q, k, v, _ = random_inputs(0, time=65, heads=2, width=3)
    expected = attention_by_hand(q, k, v)
    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-6)
    np.testing.assert_allclose(causal_attention_reference(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize(("time", "heads", "width"), [*((time, 2, 3) for time in LENGTHS), (65, 1, 8), (7, 4, 1)])
def test_equals_the_reference_in_values_and_gradients(time: int, heads: int, width: int) -> None:
    *qkv, above = random_inputs(time * 100 + heads, time, heads, width)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> list[tuple[jax.Array, ...]]:
        outputs = []
        for attention in (causal_attention, causal_attention_reference):
            values, pull_back = jax.vjp(attention, q, k, v)
            outputs.append((values, *pull_back(above)))
        return outputs

    fast, plain = both(*qkv)
    for name, got, expected in zip(("values", "dq", "dk", "dv"), fast, plain, strict=True):
        assert got.shape == expected.shape == (2, time, heads, width)
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)


def test_large_scores_neither_overflow_nor_lose_their_gradients() -> None:
    q, k, v, above = random_inputs(1, time=65, heads=2, width=3)
    values, pull_back = jax.vjp(attend, q * 300, k * 300, v)
    assert np.isfinite(values).all()
    assert all(np.isfinite(gradient).all() for gradient in pull_back(above))


def test_the_first_position_sees_itself_alone_and_no_position_a_later_one() -> None:
    q, k, v, _ = random_inputs(2, time=131, heads=2, width=3)
    before = attend(q, k, v)
    np.testing.assert_allclose(before[:, 0], v[:, 0], rtol=1e-6)
    for cut in (1, 63, 64, 130):
        later_k, later_v = k.copy(), v.copy()
        later_k[:, cut:] += 7.0
        later_v[:, cut:] -= 3.0
        after = attend(q, later_k, later_v)
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert (after[:, cut:] != before[:, cut:]).all()


# ---- dropout


def test_without_a_rate_or_without_a_key_nothing_changes() -> None:
    q, k, v, _ = random_inputs(3, time=65, heads=2, width=3)
    plain = attend(q, k, v)
    key = jax.random.key(0)
    np.testing.assert_array_equal(attend(q, k, v, dropout_rate=0.5, dropout_key=None), plain)
    np.testing.assert_array_equal(attend(q, k, v, dropout_rate=0.0, dropout_key=key), plain)
    assert dropout(v, 0.5, None) is v
    assert dropout(v, 0.0, key) is v
    assert not np.array_equal(attend(q, k, v, dropout_rate=0.5, dropout_key=key), plain)


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.5, 0.9])
def test_the_kept_share_and_the_scale(rate: float) -> None:
    x = jnp.full((1000, 1000), 3.0)
    kept = np.asarray(dropout(x, rate, jax.random.key(4)))
    deviation = math.sqrt(rate * (1 - rate) / kept.size)
    assert abs((kept != 0).mean() - (1 - rate)) < 5 * deviation + 2**-16
    np.testing.assert_allclose(kept[kept != 0], 3.0 / (1 - rate), rtol=2**-16 / (1 - rate))


@pytest.mark.parametrize("rate", [1e-6, 0.2, 0.99, 0.9999, 0.999995])
def test_the_expectation_is_preserved(rate: float) -> None:
    """Also at rates that 16 random bits can't express: the scale is that of the share which is really kept."""
    kept = np.asarray(dropout(jnp.ones(5_000_000), rate, jax.random.key(5)), np.float64)
    deviation = math.sqrt(1 / (1 - min(rate, 1 - 2**-16)) / kept.size)  # of the mean: sqrt(rate / (1 - rate) / n)
    assert kept.mean() == pytest.approx(1.0, abs=5 * deviation)


def test_dropout_keeps_the_signs_and_the_gradient_is_the_mask() -> None:
    x, key = np.random.default_rng(6).normal(size=(100, 100)).astype(np.float32), jax.random.key(7)
    mask = np.asarray(dropout(jnp.ones_like(x), 0.3, key))
    np.testing.assert_allclose(dropout(x, 0.3, key), x * mask, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: dropout(x, 0.3, key).sum())(x), mask)


def test_the_same_key_gives_the_same_mask_and_another_key_another() -> None:
    x = jnp.ones((100, 100))
    first, again, other = (np.asarray(dropout(x, 0.5, jax.random.key(seed))) != 0 for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert abs((first == other).mean() - 0.5) < 0.03  # independent masks agree by chance


def test_dropout_acts_on_the_attention_weights_each_by_itself() -> None:
    time, rate = 100, 0.25
    q, k, *_ = random_inputs(8, time, heads=2, width=time)
    plain = weights_of(q, k, 0.0, None)
    dropped = weights_of(q, k, rate, jax.random.key(9))
    allowed = np.broadcast_to(np.tril(np.ones((time, time), bool))[None, :, None, :], plain.shape)
    np.testing.assert_allclose(plain.sum(axis=-1), 1.0, rtol=1e-5)
    assert not plain[~allowed].any()
    assert not dropped[~allowed].any()
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - rate), rtol=1e-4)
    assert kept[allowed].mean() == pytest.approx(1 - rate, abs=0.01)
    # Two masks drawn apart agree in (1 - rate)^2 + rate^2 of their entries, one drawn once and used twice in all.
    by_chance = (1 - rate) ** 2 + rate**2
    heads_first, allowed_first = kept.swapaxes(1, 2), allowed.swapaxes(1, 2)
    blocks = (slice(0, 64), slice(64, time))
    size = 2 * 2 * 36 * time  # of the smaller block, whose random bits may be the first ones of the other
    one, two = (heads_first[:, :, block, : block.stop].ravel()[:size] for block in blocks)
    where = np.logical_and(*(allowed_first[:, :, block, : block.stop].ravel()[:size] for block in blocks))
    assert where.sum() > 2000
    for first, second, seen in (
        (kept[0], kept[1], allowed[0]),
        (kept[:, :, 0], kept[:, :, 1], allowed[:, :, 0]),
        (one, two, where),
    ):
        assert (first == second)[seen].mean() == pytest.approx(by_chance, abs=0.03)
