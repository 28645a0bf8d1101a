"""Products in kernels are those of JAX, values and gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.lanes import HAS_PAIRS
from jaxlm.model import ModelConfig, forward, init
from jaxlm.products_numba import STRIP, check_pairs, fits, product, rounded_product


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(4, 1, 1), (256, 3, 2), (260, 1, 5), (300, 17, 1), (12, 5, 17), (516, 4, 4)]
)
def test_values_and_gradients_are_those_of_the_plain_product(rows: int, inputs: int, outputs: int) -> None:
    """Around the edges of the blocks: rows of 4 and of 256, sums of 256; `inputs` and `outputs` are strips."""
    random = np.random.default_rng(rows)
    x, kernel, above = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((rows, inputs * STRIP), (inputs * STRIP, outputs * STRIP), (rows, outputs * STRIP))
    )
    values, pull_back = jax.vjp(jax.jit(product), x, kernel)
    exact = x.astype(np.float64) @ kernel, above.astype(np.float64) @ kernel.T, x.T.astype(np.float64) @ above
    for got, expected in zip((values, *pull_back(above)), exact, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(4, 1, 1), (256, 3, 2), (260, 1, 5), (300, 33, 1), (12, 5, 17), (516, 4, 4)]
)
def test_rounded_values_and_gradients_are_those_of_rounded_factors(rows: int, inputs: int, outputs: int) -> None:
    """Around the edges of the blocks, too; sums are of 512 products, as two go together."""
    random = np.random.default_rng(rows)
    x, kernel, above = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((rows, inputs * STRIP), (inputs * STRIP, outputs * STRIP), (rows, outputs * STRIP))
    )
    values, pull_back = jax.vjp(jax.jit(partial(product, rounded=True)), x, kernel)
    a, b, c = (array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in (x, kernel, above))
    for got, expected in zip((values, *pull_back(above)), (a @ b, c @ b.T, a.T @ c), strict=True):
        assert got.shape == expected.shape
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (5, 31, 98), (66, 112, 33)])
def test_rounded_matrices_may_have_any_size(rows: int, inputs: int, outputs: int) -> None:
    random = np.random.default_rng(rows)
    x, kernel, above = (
        random.normal(size=shape).astype(np.float32) for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )
    values, pull_back = jax.vjp(jax.jit(rounded_product), x, kernel)
    a, b, c = (array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in (x, kernel, above))
    for got, expected in zip((values, *pull_back(above)), (a @ b, c @ b.T, a.T @ c), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


def test_without_the_instruction_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm.products_numba.HAS_PAIRS", False)
    with pytest.raises(ValueError, match="no instruction for pairs of bfloat16"):
        check_pairs()


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = jnp.zeros((4, STRIP)), jnp.zeros((STRIP, 3 * STRIP))
    monkeypatch.setattr(jax, "local_device_count", lambda: 1_000)
    assert fits(x, kernel)
    assert not fits(x[:3], kernel)
    assert not fits(x, kernel[:, :-1])
    assert not fits(x[:, :-1], kernel[:-1])
    assert not fits(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    monkeypatch.setattr(jax, "local_device_count", lambda: 0)  # some core has no device of its own
    assert not fits(x, kernel)


def test_a_model_computes_the_same_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=11, context=16, width=STRIP, num_layers=1, num_heads=4, feed_forward_width=4 * STRIP, dropout=0.0
    )
    params = init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 11)

    def slope(params: jax.Array, rounded: bool) -> jax.Array:
        return jnp.square(forward(params, tokens, config, rounded=rounded)).sum()

    results = []
    for devices, rounded in [(0, False), (1_000, False)] + [(1_000, True)] * HAS_PAIRS:
        monkeypatch.setattr(jax, "local_device_count", lambda devices=devices: devices)
        program = jax.jit(lambda params, rounded=rounded: jax.value_and_grad(slope)(params, rounded))
        text = program.lower(params).as_text()
        assert text.count("custom_call @jaxlm_product") == (3 * 6 if devices and not rounded else 0)
        assert text.count("custom_call @jaxlm_rounded_product") == (3 * 7 if rounded else 0)  # the head, too
        results.append(jax.tree.leaves(program(params)))
    for plain, ours, *rounded_ones in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
        for found in rounded_ones:  # where relu is near zero, it may be another
            assert np.linalg.norm(found - plain) < 0.03 * np.linalg.norm(plain)
