"""Layer norm and RMSNorm, with a gradient that keeps their input as it is and two numbers a row.

Of bfloat16, nothing as large as the input is kept or written in float32. On a GPU each direction is a kernel of ours.

Shapes: N positions, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.parallel import has_triton

_WIDEST = 16_384  # numbers of the longest row that a kernel takes


class Norm(nn.Module):
    """Layer norm (Ba et al. 2016): each row x as (x - mean) / deviation * scale + bias; (N, D) -> twice (N, D).

    RMSNorm (Zhang and Sennrich 2019), if there is no `shift`, leaves out the mean and the bias. Computed in float32
    and returned in the type of x, after x itself: where that is used further, the gradients of both are added on the
    way.
    """

    shift: bool
    epsilon: float  # added to the variance, or to the mean square

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale_D = self.param("scale", nn.initializers.ones, (x_ND.shape[1],), jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, (x_ND.shape[1],), jnp.float32) if self.shift else None
        return _normalize(x_ND, scale_D, bias_D, self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(
    x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    return _forward(x_ND, scale_D, bias_D, epsilon)[0]


def _in_kernels(x_ND: jax.Array) -> bool:
    return has_triton() and x_ND.shape[1] <= _WIDEST


def _forward(
    x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    if _in_kernels(x_ND):
        from jaxlm.rows_triton import normalize  # pallas takes its time to import

        y_ND, *of_rows = normalize(x_ND, scale_D, bias_D, epsilon)
        return (x_ND, y_ND), (x_ND, *of_rows, scale_D)
    x = x_ND.astype(jnp.float32)
    mean_N1 = None if bias_D is None else x.mean(axis=1, keepdims=True)
    deviations = x if mean_N1 is None else x - mean_N1
    # Of deviations, since E[x^2] - (E x)^2 cancels.
    inverse_N1 = jax.lax.rsqrt(jnp.square(deviations).mean(axis=1, keepdims=True) + epsilon)
    y_ND = deviations * (inverse_N1 * scale_D)
    y_ND = y_ND if bias_D is None else y_ND + bias_D
    return (x_ND, y_ND.astype(x_ND.dtype)), (x_ND, mean_N1, inverse_N1, scale_D)


def _backward(
    epsilon: float, saved: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    # With z the normalised rows and g = d * scale: (g - mean(g) - z mean(g z)) / deviation.
    d_same_ND, d_ND = gradients
    if _in_kernels(d_ND):
        from jaxlm.rows_triton import normalize_backward

        x_ND, mean_N, inverse_N, scale_D = saved
        return normalize_backward(x_ND, mean_N, inverse_N, scale_D, d_same_ND, d_ND)
    # Without the barriers XLA computes each row's numbers anew wherever they are used, and writes float32 arrays as
    # large as x on the way.
    x_ND, mean_N1, inverse_N1, scale_D = jax.lax.optimization_barrier(saved)
    d = d_ND.astype(jnp.float32)
    z = (x_ND.astype(jnp.float32) - (0.0 if mean_N1 is None else mean_N1)) * inverse_N1
    g = d * scale_D
    g_N1 = None if mean_N1 is None else g.mean(axis=1, keepdims=True)
    gz_N1 = (g * z).mean(axis=1, keepdims=True)
    g_N1, gz_N1 = jax.lax.optimization_barrier((g_N1, gz_N1))
    d_x = (g - (0.0 if g_N1 is None else g_N1) - z * gz_N1) * inverse_N1
    d_bias_D = None if mean_N1 is None else d.sum(axis=0).astype(scale_D.dtype)
    return d_same_ND + d_x.astype(x_ND.dtype), (d * z).sum(axis=0).astype(scale_D.dtype), d_bias_D


_normalize.defvjp(_forward, _backward)
