"""Optimizers and learning-rate schedules, as optax chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.model import LARGEST_FLOAT
from jaxlm.parallel import share_among
from jaxlm.tokenizers.base import InputError, check_types


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan 2024) with it. The defaults are the seed recipe."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for all else
    learning_rate: float = 3e-4  # of AdamW, the highest of the schedule
    muon_learning_rate: float = 0.02  # of Muon, whose updates have an RMS of 0.2 times it (Liu et al. 2025)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = (
        "constant"  # after the warm-up; see learning_rate_schedule
    )
    warmup_steps: int | None = 0  # steps in which the learning rate rises linearly; None is a tenth of the run
    decay_share: float = 0.2  # wsd: the last share of the run, in which the learning rate falls to zero
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.95  # of Muon
    muon_iterations: int = 5  # of Newton and Schulz, see `orthogonalize`
    weight_decay: float = 0.01  # times the learning rate, as in AdamW
    decay: Literal["all", "matrices"] = "all"  # what the weight decay acts on
    clip_norm: float | None = None  # gradients of a larger global norm are scaled down to it

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) <= LARGEST_FLOAT:
                raise InputError(
                    f"The {name.replace('_', ' ')} is a positive float32 number, not {getattr(self, name)}."
                )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise InputError(f"The number of warm-up steps is at least 0, not {self.warmup_steps}.")
        if not 1 <= self.muon_iterations <= _MOST_ITERATIONS:
            raise InputError(
                f"The number of Muon's iterations is from 1 to {_MOST_ITERATIONS}, not {self.muon_iterations}."
            )
        if not 0.0 < self.decay_share <= 1.0:
            raise InputError(f"The decay share is above 0 and at most 1, not {self.decay_share}.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"The optimizer's {name} is from 0 to below 1, not {getattr(self, name)}.")
        if not 0 <= self.weight_decay <= LARGEST_FLOAT:
            raise InputError(f"The weight decay is a float32 number of at least 0, not {self.weight_decay}.")
        if self.clip_norm is not None and not 0 < self.clip_norm <= LARGEST_FLOAT:
            raise InputError(f"The clipping norm is a positive float32 number, not {self.clip_norm}.")


_MOST_ITERATIONS = 20  # many more than bring anything nearer to 1


def learning_rate_schedule(config: OptimizerConfig, num_steps: int, *, peak: float | None = None) -> optax.Schedule:
    """The learning rate as a function of the number of completed steps: a linear warm-up, then the schedule.

    constant: no change. cosine: to a tenth at the last step. linear: to zero. wsd: constant, then linearly to zero in
    the last `decay_share` of the run (Hu et al. 2024).

    Args:
      peak: its highest value; None is `config.learning_rate`.
    """
    peak = config.learning_rate if peak is None else peak
    warmup_steps = num_steps // 10 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps >= num_steps and warmup_steps:
        raise InputError(f"A warm-up of {warmup_steps} steps is no shorter than the run of {num_steps}.")
    rest = num_steps - warmup_steps
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=0.1)
    else:
        falling = rest if config.schedule == "linear" else min(rest, max(1, round(config.decay_share * num_steps)))
        main = optax.linear_schedule(peak, 0.0, falling, transition_begin=rest - falling)
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, main], [warmup_steps])


def make_optimizer(
    config: OptimizerConfig, num_steps: int, mesh: Mesh | None = None, *, rounded: bool = False
) -> optax.GradientTransformation:
    """Clipping, if any, then AdamW, or Muon for the matrices inside blocks and AdamW for all else.

    `rounded`: whether Muon rounds the factors of its products to bfloat16, as its author does, see `attention.rounds`.
    """
    optimizer = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask if config.decay == "matrices" else None,
    )
    if config.name == "muon":
        muon = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            optax.stateless(lambda updates, _: orthogonalize(updates, mesh, config.muon_iterations, rounded=rounded)),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps, peak=config.muon_learning_rate)),
        )
        optimizer = optax.partition({True: muon, False: optimizer}, block_matrices)
    return (
        optimizer if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    )


def tree_norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares.

    As `optax.tree.norm`, but for the order: of each row first, and then of all rows together, which saves a GPU a
    kernel for each leaf.
    """
    leaves = [jnp.atleast_1d(leaf) for leaf in jax.tree.leaves(tree)]
    rows = [jnp.square(leaf).sum(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    together = jax.lax.optimization_barrier(jnp.concatenate(rows))  # or XLA would add each leaf up alone
    return jnp.sqrt(together.sum())


def orthogonalize(updates: Any, mesh: Mesh | None = None, iterations: int = 5, *, rounded: bool = False) -> Any:
    """Each matrix with its singular values brought near 1, times 0.2 sqrt(its longer side), for an RMS near 0.2.

    Newton-Schulz iterations with the coefficients of Jordan (2024), who takes five; the scale is that of Liu et al.
    (2025). The matrices of one shape go through them together, divided among the devices of the mesh, which is faster
    than one by one on each device. An axis before the last two numbers the matrices of a leaf.
    """
    leaves, structure = jax.tree.flatten(updates)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, leaf in enumerate(leaves):
        by_shape.setdefault(tuple(sorted(leaf.shape[-2:])), []).append(index)
    stacks = [jnp.concatenate([_wide(leaves[index]) for index in indices]) for indices in by_shape.values()]
    for indices, stack in zip(
        by_shape.values(),
        share_among(mesh, partial(_newton_schulz, iterations=iterations, rounded=rounded), stacks),
        strict=True,
    ):
        for index in indices:
            leaf = leaves[index]
            count = math.prod(leaf.shape[:-2])
            matrices, stack = stack[:count], stack[count:]
            turned = matrices if leaf.shape[-2] <= leaf.shape[-1] else matrices.swapaxes(-1, -2)
            leaves[index] = turned.reshape(leaf.shape) * (0.2 * max(leaf.shape[-2:]) ** 0.5)
    return jax.tree.unflatten(structure, leaves)


def _wide(leaf: jax.Array) -> jax.Array:
    """The matrices of a leaf as (matrices, m, n), transposed if need be so that m <= n."""
    matrices = leaf.reshape(-1, *leaf.shape[-2:])
    return matrices if leaf.shape[-2] <= leaf.shape[-1] else matrices.swapaxes(-1, -2)


def _newton_schulz(x: jax.Array, iterations: int, rounded: bool) -> jax.Array:
    """x of shape (matrices, m, n), m <= n."""
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    if not rounded:
        return _iterate(x, iterations, jnp.matmul, lambda x: x @ x.swapaxes(-1, -2))
    from jaxlm.products_numba import pad_to_strips, product, product_with_itself  # numba takes its time to import

    def iterate(x: jax.Array) -> jax.Array:
        return _iterate(x, iterations, partial(product, rounded=True), product_with_itself)

    return jax.lax.map(iterate, pad_to_strips(x))[:, : x.shape[1], : x.shape[2]]


def _iterate(
    x: jax.Array, iterations: int, product: Callable[..., jax.Array], gram_of: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    for _ in range(iterations):
        gram = gram_of(x)
        x = 3.4445 * x + product(-4.7750 * gram + product(2.0315 * gram, gram), x)
    return x


def decay_mask(params: Any) -> Any:
    """True for kernels; False for embeddings, positions, biases and gains, which zero is no rest for."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def block_matrices(params: Any) -> Any:
    """True for the kernels inside blocks; False for embeddings, head, biases and gains."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel" and path[0].key.startswith("block"), params
    )
