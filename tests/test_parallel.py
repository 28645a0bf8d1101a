"""Data parallelism: the batch is divided, the parameters aren't, and the step is the same as on one device.

The number of devices is fixed when JAX starts, so several of them need a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

STEP = """
import json
import jax, numpy as np
from jax.sharding import AxisType
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.parallel import batch_sharding, data_mesh, replicated
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, init_state, make_train_step

model = ModelConfig(vocab_size=16, context=16, width=16, num_layers=1, num_heads=2, feed_forward_width=16, dropout=0.2)
config = TrainConfig(steps=9, batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-2))
start = jax.tree.map(np.asarray, jax.jit(init_state, static_argnums=(0, 1))(model, config))
batches = np.random.default_rng(0).integers(16, size=(2, 8, 17), dtype=np.int32)
result = {"devices": jax.device_count(), "refused": None, "runs": []}
try:
    data_mesh(6)
except InputError as error:
    result["refused"] = str(error)
one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
parameters = []
for mesh in (one, data_mesh(8)):
    state = jax.device_put(start, replicated(mesh))
    step = jax.jit(make_train_step(model, config, mesh))
    metrics = []
    for batch in batches:
        divided = jax.device_put(batch, batch_sharding(mesh))
        state, values = step(state, divided)
        metrics.append({name: float(value) for name, value in values.items()})
    leaves = jax.tree.leaves(state)
    parameters.append([np.asarray(leaf) for leaf in leaves])
    result["runs"].append({
        "metrics": metrics,
        "step": int(state.step),
        "rows": [shard.data.shape[0] for shard in divided.addressable_shards],
        "copies": sorted({len(leaf.sharding.device_set) * leaf.sharding.is_fully_replicated for leaf in leaves}),
    })
result["difference"] = max(float(np.abs(a - b).max()) for a, b in zip(*parameters))
result["change"] = max(float(np.abs(a - b).max()) for a, b in zip(parameters[0], jax.tree.leaves(start)))
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def four_devices() -> dict[str, Any]:
    """What two steps gave on one of four devices and on all of them."""
    # Compiled in haste: the steps are few, and the two programs take longer to compile than to run.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    process = subprocess.run(
        [sys.executable, "-c", STEP], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_a_batch_that_does_not_divide_is_refused(four_devices: dict[str, Any]) -> None:
    assert four_devices["devices"] == 4
    assert four_devices["refused"] == "A batch of 6 doesn't divide among 4 devices; make it a multiple of them."


def test_the_batch_is_divided_and_the_state_is_whole_on_each_device(four_devices: dict[str, Any]) -> None:
    one, all_of_them = four_devices["runs"]
    assert one["rows"] == [8]
    assert all_of_them["rows"] == [2, 2, 2, 2]
    assert one["copies"] == [1]
    assert all_of_them["copies"] == [4]


def test_steps_on_all_devices_are_those_on_one(four_devices: dict[str, Any]) -> None:
    """With dropout, whose masks don't depend on where a row is."""
    one, all_of_them = four_devices["runs"]
    assert one["step"] == all_of_them["step"] == 2
    for alone, together in zip(one["metrics"], all_of_them["metrics"], strict=True):
        assert together == {name: pytest.approx(value, rel=1e-5) for name, value in alone.items()}
    assert four_devices["change"] > 1e-3
    assert four_devices["difference"] < 1e-5
