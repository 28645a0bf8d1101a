"""The norms are flax's, with gradients that are as close to the exact ones as their type allows."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.norms import Norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [True, False])
def test_values_and_gradients_are_those_of_flax(shift: bool, dtype: str) -> None:
    epsilon = 0.02
    theirs = (nn.LayerNorm if shift else nn.RMSNorm)(epsilon=epsilon, use_fast_variance=False)
    random = np.random.default_rng(0)

    def draw(*shape: int, mean: float = 0.0) -> Any:
        return jnp.asarray(random.normal(mean, 1.0, shape), dtype)

    # A mean far from zero, in which squares would cancel, and rows that the epsilon changes.
    x_ND = draw(24, 40, mean=20.0).at[::3].set(draw(8, 40) / 8)
    d_ND = draw(24, 40)
    names = jax.tree.structure(theirs.init(jax.random.key(0), x_ND))
    params = jax.tree.unflatten(names, [draw(40, mean=1.0) for _ in range(names.num_leaves)])
    assert jax.tree.structure(Norm(shift, epsilon).init(jax.random.key(0), x_ND)) == names

    def of(norm: Any) -> list[Any]:
        """The gradients of parameters and input, and the result."""
        y_ND, pull_back = jax.vjp(lambda *given: result(norm.apply(*given)), params, x_ND)
        return [*jax.tree.leaves(pull_back(d_ND)), y_ND]

    def result(found: Any) -> Any:
        return found[1] if isinstance(found, tuple) else found

    *weights, x, d = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((params, x_ND, d_ND)))
    centred = x - x.mean(axis=1, keepdims=True) if shift else x
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon)
    z, g = centred / deviation, d * weights[-1]
    d_x = (g - (g.mean(axis=1, keepdims=True) if shift else 0) - z * (g * z).mean(axis=1, keepdims=True)) / deviation
    exact = [
        *([d.sum(axis=0)] if shift else []),
        (d * z).sum(axis=0),
        d_x,
        z * weights[-1] + (weights[0] if shift else 0),
    ]
    rounding = 2 * float(jnp.finfo(dtype).eps) + 40 * float(jnp.finfo("float32").eps)  # where a mean of 20 cancels
    for ours, flax, true in zip(of(Norm(shift, epsilon)), of(theirs), exact, strict=True):
        assert ours.dtype == flax.dtype == dtype
        for found in (ours, flax):
            np.testing.assert_allclose(np.asarray(found, np.float64), true, atol=rounding * np.abs(true).max(), rtol=0)


def test_nothing_as_large_as_the_input_is_kept_in_float32() -> None:
    x_ND, norm = jnp.ones((6, 5), jnp.bfloat16), Norm(True, 1e-5)
    params = norm.init(jax.random.key(0), x_ND)
    _, gradient = jax.vjp(lambda *given: norm.apply(*given)[1], params, x_ND)
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(gradient) if leaf.size >= x_ND.size}
    assert kept == {"bfloat16"}


def test_the_gradients_of_x_and_of_its_norm_are_added() -> None:
    random = np.random.default_rng(1)
    x_ND, d_x_ND, d_y_ND = (jnp.asarray(random.normal(size=(7, 12)), jnp.float32) for _ in range(3))
    norm = Norm(True, 1e-5)
    params = norm.init(jax.random.key(0), x_ND)
    (same_ND, _), pull_back = jax.vjp(lambda x_ND: norm.apply(params, x_ND), x_ND)
    np.testing.assert_array_equal(same_ND, x_ND)
    (both_ND,), (alone_ND,) = pull_back((d_x_ND, d_y_ND)), pull_back((jnp.zeros_like(d_x_ND), d_y_ND))
    np.testing.assert_array_equal(both_ND, d_x_ND + alone_ND)
