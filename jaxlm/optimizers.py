"""Optimizers and learning-rate schedules, as optax chains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from jaxlm.tokenizers.base import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019). The defaults are the seed recipe."""

    learning_rate: float = 3e-4  # the highest of the schedule
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to a tenth at the last step
    warmup_steps: int | None = 0  # steps in which the learning rate rises linearly; None is a tenth of the run
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01  # times the learning rate, as in AdamW
    decay: Literal["all", "matrices"] = "all"  # what the weight decay acts on
    clip_norm: float | None = None  # gradients of a larger global norm are scaled down to it

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"The learning rate is a positive number, not {self.learning_rate}.")
        for name, known in (("schedule", ("constant", "cosine")), ("decay", ("all", "matrices"))):
            if getattr(self, name) not in known:
                raise InputError(f"The optimizer's {name} is one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise InputError(f"The number of warm-up steps is at least 0, not {self.warmup_steps}.")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"The optimizer's {name} is from 0 to below 1, not {getattr(self, name)}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"The weight decay is a number of at least 0, not {self.weight_decay}.")
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise InputError(f"The clipping norm is a positive number, not {self.clip_norm}.")


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of completed steps."""
    warmup_steps = num_steps // 10 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps >= num_steps and warmup_steps:
        raise InputError(f"A warm-up of {warmup_steps} steps is no shorter than the run of {num_steps}.")
    if config.schedule == "constant":
        main = optax.constant_schedule(config.learning_rate)
    else:
        main = optax.cosine_decay_schedule(config.learning_rate, num_steps - warmup_steps, alpha=0.1)
    if not warmup_steps:
        return main
    first = config.learning_rate / warmup_steps
    warmup = optax.linear_schedule(first, config.learning_rate, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, main], [warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, if any, then AdamW."""
    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask if config.decay == "matrices" else None,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(params: Any) -> Any:
    """True for kernels; False for embeddings, positions, biases and gains, which zero is no rest for."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
