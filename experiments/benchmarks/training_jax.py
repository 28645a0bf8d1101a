"""A training step of ours as a process that takes steps when it is told to, as `training_torch` does.

    python -m experiments.benchmarks.training_jax '{"plain": false, "batch_size": 64, "context": 256, ...}'

"plain" is the same model without what makes it fast here: attention by the formula, flax's norms, products and
gradients as JAX has them, the batch in one piece, one device.
"at_once" steps are one program, and "timed" steps, a multiple of that, are timed together.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxlm.model
from jaxlm.model import ModelConfig, count_parameters, flops_per_token
from jaxlm.parallel import batch_sharding, compiler_options, data_mesh, peak_flops, replicated, stacked, use_cores
from jaxlm.training import TrainConfig, init_state, make_train_step, several_steps


class PlainNorm(nn.LayerNorm):
    """Flax's, that returns its input, too, as ours does."""

    def __call__(self, x_ND: jax.Array) -> tuple[jax.Array, jax.Array]:  # type: ignore[override]
        return x_ND, super().__call__(x_ND)


def main() -> None:
    config = json.loads(sys.argv[1])
    plain = config["plain"]
    use_cores(config["batch_size"], num_devices=1 if plain else None)
    model = ModelConfig(
        vocab_size=config["vocab_size"],
        context=config["context"],
        width=config["width"],
        num_layers=config["layers"],
        num_heads=config["heads"],
        feed_forward_width=4 * config["width"],
        dropout=config["dropout"],
        tied_head=config["tied_head"],
    )
    training = TrainConfig(
        batch_size=config["batch_size"],
        compute_type=config["compute_type"],
        attention="reference" if plain else config["attention"],
    )
    if plain:
        parts: Any = jaxlm.model
        parts._norm = lambda _, name: PlainNorm(epsilon=1e-5, use_fast_variance=False, name=name)
        parts._ACTIVATIONS["relu"] = nn.relu
        parts._product = lambda x, kernel, rounded: x @ kernel
        parts._add_to_rows = jnp.add
        jaxlm.training.rounds = lambda compute_type: False
        jaxlm.parallel.sequences_at_once = lambda batch_size, time: batch_size
    mesh = data_mesh(training.batch_size)
    state = jax.device_put(init_state(model, training), replicated(mesh))
    at_once = config["at_once"]
    shape = at_once, training.batch_size, model.context + 1
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=shape).astype(np.int32)
    batches = jax.device_put(tokens, stacked(batch_sharding(mesh)))
    steps = several_steps(make_train_step(model, training, mesh))
    options = compiler_options(training.batch_size * model.context * model.width // mesh.size)
    program = jax.jit(steps, donate_argnums=0).lower(state, batches).compile(options)
    for line in sys.stdin:
        seconds = []
        for _ in range(max(1, int(line) // config["timed"])):
            started = time.perf_counter()
            for _ in range(config["timed"] // at_once):
                state, metrics = program(state, batches)
            jax.block_until_ready((state, metrics))
            seconds.append((time.perf_counter() - started) / config["timed"])
        device = jax.devices()[0]
        statistics = device.memory_stats() or {}
        answer = {
            "seconds": seconds,
            "loss": float(metrics["train/loss"][-1]),
            "memory": statistics.get("peak_bytes_in_use", resource.getrusage(0).ru_maxrss * 1024),
            "parameters": count_parameters(state.params),
            "flops": flops_per_token(state.params, model) * training.batch_size * model.context,
            "peak": None if device.platform == "cpu" else peak_flops(),  # which is measured there, by the parent
            "device": f"{jax.device_count()} x {device.device_kind}",
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
