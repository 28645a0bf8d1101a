"""Data parallelism: the batch is divided, the parameters aren't, and the step is the same as on one device.

The number of devices is fixed when JAX starts, so several of them need a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parallel import compiler_options, mean_gradients, one_at_a_time, sequences_at_once

ROOT = Path(__file__).parents[1]

STEP = """
import json
import jax, numpy as np
from jax.sharding import AxisType
from jaxlm import evaluation
from jaxlm.data.shards import TokenStream
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.parallel import batch_sharding, data_mesh, mean_gradients, replicated, share_among, sharding_beside
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, init_state, loss_function, make_train_step

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
tokens, ends = batches.reshape(-1) % 15, np.array([3, 50, 90, 272])
tokens[ends - 1] = 15
stream = TokenStream((tokens,), ends, np.diff(ends, prepend=0))
scored = []
score_windows = evaluation._window_scorer(1)
evaluation._window_scorer = lambda _: lambda *arguments: scored.append(score_windows(*arguments)) or scored[-1]
for mesh in (one, data_mesh(8)):
    state = jax.device_put(start, replicated(mesh))
    step = jax.jit(make_train_step(model, config, mesh))
    metrics = []
    for batch in batches:
        divided = jax.device_put(batch, batch_sharding(mesh))
        state, values = step(state, divided)
        metrics.append({name: float(value) for name, value in values.items()})
    score = evaluation.evaluate(state.params, model, stream, 15)
    leaves = jax.tree.leaves(state)
    parameters.append([np.asarray(leaf) for leaf in leaves])
    result["runs"].append({
        "metrics": metrics,
        "step": int(state.step),
        "rows": [shard.data.shape[0] for shard in divided.addressable_shards],
        "document_nats": score.document_nats.tolist(),
        "windows": [shard.data.shape[0] for shard in scored[-1].addressable_shards],
        "copies": sorted({len(leaf.sharding.device_set) * leaf.sharding.is_fully_replicated for leaf in leaves}),
    })
matrices = [np.random.default_rng(n).normal(size=(n, 5, 7)).astype(np.float32) for n in (1, 3, 8)]
turned = jax.jit(lambda *x: share_among(data_mesh(8), lambda part: part @ part.swapaxes(1, 2), x))(*matrices)
result["shared"] = max(float(np.abs(got - x @ x.swapaxes(1, 2)).max()) for got, x in zip(turned, matrices, strict=True))
result["beside"] = [sharding_beside(state.params, n) == batch_sharding(data_mesh(8)) for n in (8, 6)]
result["difference"] = max(float(np.abs(a - b).max()) for a, b in zip(*parameters))
result["change"] = max(float(np.abs(a - b).max()) for a, b in zip(parameters[0], jax.tree.leaves(start)))

# Four sequences on each device, and room for two at once.
long = ModelConfig(vocab_size=16, context=256, width=8, num_layers=1, num_heads=1, feed_forward_width=8, dropout=0.2)
params = jax.tree.map(np.asarray, init_state(long, config).params)
batch = np.random.default_rng(1).integers(16, size=(16, 257), dtype=np.int32)
keys = jax.random.split(jax.random.key(2), 16)
result["pieces"] = []
for keys_B in (keys, None):
    sizes = []
    def loss(params, batch, keys_B):
        sizes.append(len(batch))
        return loss_function(long, params, batch, keys_B)
    whole = jax.jit(jax.value_and_grad(loss))(params, batch, keys_B)
    mesh = data_mesh(16)
    arguments = jax.device_put(params, replicated(mesh)), *jax.device_put((batch, keys_B), batch_sharding(mesh))
    divided = jax.jit(lambda *arguments: mean_gradients(loss, *arguments, mesh))(*arguments)
    pairs = list(zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (divided, whole))))
    result["pieces"].append({
        "sizes": sorted(set(sizes)),
        "difference": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs),
        "whole": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(divided)),
    })
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def four_devices() -> dict[str, Any]:
    """What two steps gave on one of four devices and on all of them."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
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


def test_evaluation_is_divided_and_scores_as_on_one_device(four_devices: dict[str, Any]) -> None:
    one, all_of_them = four_devices["runs"]
    assert one["windows"] == [32]
    assert all_of_them["windows"] == [8, 8, 8, 8]
    assert all_of_them["document_nats"] == pytest.approx(one["document_nats"], rel=1e-4)
    assert min(one["document_nats"]) > 1


def test_arrays_are_shared_out_and_come_back_whole(four_devices: dict[str, Any]) -> None:
    assert four_devices["shared"] < 1e-5
    assert four_devices["beside"] == [True, False]


def test_gradients_on_all_devices_in_pieces_are_those_of_the_whole_batch(four_devices: dict[str, Any]) -> None:
    """Of a model, with dropout and without."""
    for found in four_devices["pieces"]:
        assert found["sizes"] == [2, 16]
        assert found["difference"] < 1e-4
        assert found["whole"]


def test_a_batch_in_pieces_has_the_gradients_of_the_whole() -> None:
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(9, 4)).astype(np.float32)}
    batch = random.normal(size=(6, 257, 9)).astype(np.float32)

    def loss(params: Any, batch: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        scale = 1.0 if keys_B is None else jax.vmap(lambda key: jax.random.uniform(key))(keys_B)[:, None, None]
        return (jnp.tanh(batch @ params["w"]) * scale).mean()

    assert sequences_at_once(6, 257) == 2
    for keys_B in (None, jax.random.split(jax.random.key(0), 6)):

        def whole(params: Any, keys_B: Any = keys_B) -> jax.Array:
            return loss(params, batch, keys_B)

        pieces = jax.jit(lambda params, batch, keys: mean_gradients(loss, params, batch, keys, None))
        found, found_grads = pieces(params, batch, keys_B)
        expected, expected_grads = jax.value_and_grad(whole)(params)
        assert float(found) == pytest.approx(float(expected), abs=1e-6)
        np.testing.assert_allclose(found_grads["w"], expected_grads["w"], atol=1e-6)


def test_pieces_divide_the_batch_and_hold_few_tokens() -> None:
    assert [sequences_at_once(64, time + 1) for time in (16, 128, 256, 512, 4096)] == [32, 4, 2, 1, 1]
    assert sequences_at_once(3, 129) == 3
    assert sequences_at_once(7, 129) == 1


def test_a_piece_is_the_largest_divisor_that_fits_and_elsewhere_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch_size in range(1, 40):
        for time in (2, 9, 33, 65, 100, 257, 513, 600):
            fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n * (time - 1) <= 512]
            assert sequences_at_once(batch_size, time) == max(fitting, default=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sequences_at_once(64, 257) == 64


CORES = """
import os, sys
import jax
from jaxlm.parallel import use_cores
os.sched_getaffinity = lambda _: {0, 1, 2, 3, 4, 5}
if sys.argv[2] == "late": jax.devices()
use_cores(int(sys.argv[1]), 3 if sys.argv[2] == "recorded" else None)
print(jax.device_count(), *os.environ["XLA_FLAGS"].split())
"""

TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"


@pytest.mark.parametrize(
    ("batch", "how", "flags", "expected"),
    [
        ("64", "", "", 4),  # the most of six cores that divide the batch
        ("12", "", "", 6),
        ("7", "", "", 1),
        ("12", "recorded", "", 3),
        ("12", "", "--xla_force_host_platform_device_count=2", 2),
        ("12", "", f"--xla_cpu_enable_fast_math=false {TIMEOUT}=50", 6),
        ("12", "late", "", 1),
    ],
)
def test_a_device_for_each_core(batch: str, how: str, flags: str, expected: int) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    process = subprocess.run(
        [sys.executable, "-c", CORES, batch, how],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    timeout = [] if TIMEOUT in flags else [f"{TIMEOUT}=1000000"]
    # What was set is left as it is, and stands once.
    assert process.stdout.split() == [str(expected), *flags.split(), *timeout], process.stderr


@pytest.mark.parametrize(("size", "platform", "waits"), [(2, "cpu", 1), (1, "cpu", 0), (2, "gpu", 0)])
def test_several_devices_of_a_cpu_take_one_step_at_a_time(
    size: int, platform: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    mesh = SimpleNamespace(size=size, devices=np.array([SimpleNamespace(platform=platform)] * size))
    assert one_at_a_time(mesh, "results") is bool(waits)  # type: ignore[arg-type]
    assert waited == ["results"] * waits


def test_options_for_gpus_are_for_gpus_alone_and_are_such_as_xla_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_options(1) == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    large, options = compiler_options(2**25), compiler_options(2**21)
    monkeypatch.undo()
    assert options.items() - large.items() == {("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT")}
    assert options["xla_gpu_autotune_level"] == 0, "or a run could go on with other roundings"
    for given in ({}, {"xla_gpu_there_is_no_such_option": 1}):
        lowered = jax.jit(lambda x: x + 1).lower(1.0)
        if given:
            with pytest.raises(jax.errors.JaxRuntimeError, match="there_is_no_such_option"):
                lowered.compile({**options, **given})
        else:
            assert lowered.compile(options)(1.0) == 2.0
