"""The norms are flax's, with gradients that are as close to the exact ones."""

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

    def of(norm: Any, dtype: Any) -> list[Any]:
        """The result and the gradients of parameters and input, computed in this type from the same numbers."""
        args = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x_ND, d_ND))
        y_ND, gradient = jax.vjp(norm.apply, *args[:2])
        return jax.tree.leaves((y_ND, gradient(args[2])))

    exact = of(theirs, "float32")
    for ours, flax, true in zip(of(Norm(shift, epsilon), dtype), of(theirs, dtype), exact, strict=True):
        assert ours.dtype == flax.dtype == dtype
        rounding = float(jnp.finfo(dtype).eps) * float(jnp.abs(true).max())
        np.testing.assert_allclose(ours.astype("float32"), true, atol=4 * rounding, rtol=0)


def test_nothing_as_large_as_the_input_is_kept_in_float32() -> None:
    x_ND, norm = jnp.ones((6, 5), jnp.bfloat16), Norm(True, 1e-5)
    params = norm.init(jax.random.key(0), x_ND)
    _, gradient = jax.vjp(norm.apply, params, x_ND)
    kept = [leaf for leaf in jax.tree.leaves(gradient) if leaf.dtype == jnp.float32 and leaf.size >= x_ND.size]
    assert kept == []
