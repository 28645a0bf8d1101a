"""Seeds as one program: how much faster than one after the other?

    python -m experiments.benchmarks.seeds
    python -m experiments.benchmarks.seeds --seeds 8 --model modern

Steps of several seeds in one program, and as many steps of one seed with all devices for itself, alternate in one run.
The ratio is that of their times, the median of the rounds, with the least and the greatest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command_line import check_seeds, program
from experiments.language_model import MODERN_MODEL, MODERN_OPTIMIZER
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.parallel import batch_sharding, data_mesh, replicated, use_cores
from jaxlm.reports.tables import rows_table
from jaxlm.runs import console
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, init_state, make_joint_step, make_train_step


@dataclass(frozen=True)
class Config:
    """Times a step of several seeds as one program against a step of each."""

    seeds: int = 4
    rounds: int = 7
    model: Literal["seed", "modern"] = "seed"

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if self.rounds < 1:
            raise InputError(f"The number of rounds is at least 1, not {self.rounds}.")


PRESETS = {"all": Config()}


SHAPES = ((8, 256), (32, 128), (64, 256))  # batch, context


def main(config: Config) -> None:
    use_cores(math.gcd(config.seeds, 8))
    rows = []
    for batch_size, context in SHAPES:
        model = replace(ModelConfig(98, dropout=0.0) if config.model == "seed" else MODERN_MODEL, context=context)
        optimizer = OptimizerConfig() if config.model == "seed" else MODERN_OPTIMIZER
        configs = [TrainConfig(seed=seed, batch_size=batch_size, optimizer=optimizer) for seed in range(config.seeds)]
        together, alone = joint(model, configs), single(model, configs[0])
        ratios = []
        for index in range(config.rounds + 1):
            times = [timed(together, 1), timed(alone, config.seeds)]
            if index:  # the first one warms up
                ratios.append((times[1] / times[0], *times))
        ratio, ours, theirs = (statistics.median(column) for column in zip(*ratios, strict=True))
        least, greatest = (pick(ratios)[0] for pick in (min, max))
        rows.append(
            (
                f"{batch_size} x {context}",
                f"{1e3 * theirs:.0f} ms",
                f"{1e3 * ours:.0f} ms",
                f"{ratio:.2f} ({least:.2f} to {greatest:.2f})",
            )
        )
    columns = ("batch", "one after the other", "as one program", "times as fast")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    console.print(rows_table(columns, rows, f"{config.seeds} seeds, {config.model} model, {device}"))


def joint(model: ModelConfig, configs: list[TrainConfig]) -> Callable[[], Any]:
    """A function that takes one step of all."""
    mesh = data_mesh(len(configs))
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(init_state(model, each) for each in configs))
    return stepper(make_joint_step(model, configs, mesh), states, model, configs, batch_sharding(mesh), mesh)


def single(model: ModelConfig, config: TrainConfig) -> Callable[[], Any]:
    """A function that takes one step of one."""
    mesh = data_mesh(config.batch_size)
    return stepper(
        make_train_step(model, config, mesh), init_state(model, config), model, [config], replicated(mesh), mesh
    )


def stepper(
    step: Callable[..., Any], state: Any, model: ModelConfig, configs: list[TrainConfig], where: Any, mesh: Any
) -> Callable[[], Any]:
    shape = (len(configs), configs[0].batch_size, model.context + 1)
    batch = np.random.default_rng(0).integers(98, size=shape, dtype=np.int32)
    batch = jax.device_put(batch if len(configs) > 1 else batch[0], batch_sharding(mesh))
    compiled = jax.jit(step, donate_argnums=0)
    held = [jax.device_put(state, where)]

    def take() -> Any:
        held[0], _ = compiled(held[0], batch)
        return jax.block_until_ready(held[0])

    return take


def timed(take: Callable[[], Any], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        take()
    return time.perf_counter() - started


if __name__ == "__main__":
    program("experiments.benchmarks.seeds", PRESETS, main)
