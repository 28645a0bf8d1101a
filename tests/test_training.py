"""The step: its loss, its dropout, several runs in one step, and the settings of a training."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.lanes import HAS_PAIRS
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.parallel import data_mesh
from jaxlm.tokenizers import InputError
from jaxlm.training import (
    TrainConfig,
    init_state,
    loss_function,
    make_joint_step,
    make_train_step,
    run_identity,
    stored_settings,
)

TINY = ModelConfig(vocab_size=30, context=16, width=16, num_layers=1, num_heads=2, feed_forward_width=32, dropout=0.1)
CONFIG = TrainConfig(
    steps=20,
    batch_size=4,
    optimizer=OptimizerConfig(learning_rate=0.01, schedule="cosine", warmup_steps=2, clip_norm=1.0),
    log_every=1,
    eval_every=10,
    eval_documents=2,
    sample_every=20,
    sample_prompt="le ",
    checkpoint_every=5,
)


def test_loss_is_the_mean_over_targets_end_of_text_included() -> None:
    params = init_state(TINY, CONFIG).params
    batch = jax.numpy.asarray(np.random.default_rng(0).integers(0, 30, (3, 9)), jax.numpy.int32)
    from jaxlm.model import forward

    logits = np.asarray(forward(params, batch[:, :-1], TINY), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([log_p[b, t, batch[b, t + 1]] for b in range(3) for t in range(8)])
    assert float(loss_function(TINY, params, batch, None)) == pytest.approx(expected, rel=1e-5)


def test_dropout_differs_from_step_to_step_and_repeats_with_the_seed() -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e-12))
    step = jax.jit(make_train_step(TINY, config))
    batch = jax.numpy.zeros((4, 17), jax.numpy.int32)
    state = init_state(TINY, config)
    after_one, first = step(state, batch)
    _, second = step(after_one, batch)
    _, again = step(state, batch)
    assert float(first["train/loss"]) == float(again["train/loss"])
    assert float(first["train/loss"]) != float(second["train/loss"])
    other = jax.jit(make_train_step(TINY, replace(config, seed=1)))
    assert float(other(state, batch)[1]["train/loss"]) != float(first["train/loss"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("log_every", 0), ("eval_documents", 0), ("checkpoint_every", 0), ("seed", -1)],
)
def test_settings_out_of_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(InputError, match=r"from [01] to"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, math.nan, math.inf])
def test_a_policy_or_spike_factor_that_makes_no_sense_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match="spike factor"):
        TrainConfig(spike_factor=factor)
    with pytest.raises(InputError, match="one of stop, skip, rewind, not 'ignore'"):
        TrainConfig(on_fault="ignore")  # type: ignore[arg-type]


def test_the_identity_ignores_what_may_change() -> None:
    free = replace(
        CONFIG, log_every=7, eval_every=3, eval_documents=5, sample_every=9, checkpoint_every=2, keep_checkpoints=9,
        on_fault="skip", spike_factor=2.0,
    )  # fmt: skip
    assert free.identity() == CONFIG.identity()
    for change in ({"seed": 5}, {"batch_size": 8}, {"optimizer": OptimizerConfig()}, {"steps": 21}):
        assert replace(CONFIG, **change).identity() != CONFIG.identity()


@pytest.mark.parametrize(
    ("optimizer", "vectorize"),
    [(CONFIG.optimizer, False), (CONFIG.optimizer, True), (replace(CONFIG.optimizer, name="muon"), False)],
)
def test_a_step_of_several_runs_is_the_step_of_each(optimizer: OptimizerConfig, vectorize: bool) -> None:
    configs = [
        replace(
            CONFIG,
            seed=seed,
            optimizer=replace(
                optimizer, learning_rate=factor * 0.01, muon_learning_rate=factor * optimizer.muon_learning_rate
            ),
        )
        for seed, factor in ((0, 1.0), (3, 0.5))
    ]
    states = [init_state(TINY, config) for config in configs]
    batches = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 4, 17)), jnp.int32)
    step = jax.jit(make_joint_step(TINY, configs, data_mesh(2), vectorize=vectorize))
    together, metrics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), {}
    for _ in range(3):
        together, metrics = step(together, batches)
    for index, (config, state) in enumerate(zip(configs, states, strict=True)):
        alone = jax.jit(make_train_step(TINY, config))
        values: dict[str, jax.Array] = {}
        for _ in range(3):
            state, values = alone(state, batches[index])
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b[index]), rtol=1e-3, atol=1e-5)
        for name, value in values.items():
            np.testing.assert_allclose(value, metrics[name][index], rtol=1e-4)


def test_runs_that_differ_in_more_than_seed_and_rate_are_no_joint_step() -> None:
    for other in (replace(CONFIG, batch_size=8), replace(CONFIG, optimizer=replace(CONFIG.optimizer, beta1=0.5))):
        with pytest.raises(ValueError, match="differ in seed"):
            make_joint_step(TINY, [CONFIG, other], data_mesh(2))


def test_settings_of_another_type_are_refused() -> None:
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (ModelConfig, {"vocab_size": "98"}),
        (ModelConfig, {"vocab_size": 98.0}),
        (ModelConfig, {"vocab_size": True}),
        (ModelConfig, {"vocab_size": 98, "biases": 1}),
        (ModelConfig, {"vocab_size": 98, "norm": ["layer"]}),
        (ModelConfig, {"vocab_size": 98, "window": "256"}),
        (ModelConfig, {"vocab_size": 10**30}),
        (ModelConfig, {"vocab_size": 98, "num_layers": 10**9}),
        (OptimizerConfig, {"learning_rate": "0.1"}),
        (OptimizerConfig, {"learning_rate": 10**400}),
        (TrainConfig, {"steps": 2**31}),
        (TrainConfig, {"seed": 0.5}),
        (TrainConfig, {"optimizer": {"name": "adamw"}}),
    ]
    for kind, fields in wrong:
        with pytest.raises(InputError) as caught:
            kind(**fields)
        assert len(str(caught.value)) < 200
    assert ModelConfig(vocab_size=np.int64(98), dropout=0).vocab_size == 98  # type: ignore[arg-type]


def test_the_settings_of_an_identity_come_back() -> None:
    model = ModelConfig(vocab_size=98, window=64)
    training = TrainConfig(steps=500, seed=3, batch_size=8, optimizer=OptimizerConfig(schedule="cosine"))
    identity = run_identity("c" * 64, {"kind": "char"}, model, training)
    assert stored_settings(identity) == (model, training)
    for name in ("model", "optimizer", "seed", "batch_size"):
        for other in (None, [], "x", {"a": 1}):
            with pytest.raises(InputError):
                stored_settings(identity | {name: other})
    with pytest.raises(InputError, match="model and a training"):
        stored_settings({})


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
def test_a_step_in_bfloat16_rounds_all_products_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_device_count", lambda: 1_000)  # a device for each core
    model = replace(TINY, width=32, feed_forward_width=64)
    texts = []
    for name in ("adamw", "muon"):
        optimizer = replace(CONFIG.optimizer, name=name)
        losses = {}
        for compute_type in ("float32", "bfloat16"):
            config = replace(CONFIG, compute_type=compute_type, optimizer=optimizer)
            step = jax.jit(make_train_step(model, config))
            losses[compute_type] = float(step(init_state(model, config), BATCH)[1]["train/loss"])
        assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 1e-3
        texts.append(step.lower(init_state(model, config), BATCH).as_text())
        for kernel in ("jaxlm_product", "jaxlm_attention_forward(", "jaxlm_attention_backward(", "xbf16"):
            assert kernel not in texts[-1]
        # Products that are left are those with a vector, sums of rows.
        others = re.findall(r"dot_general.*\(tensor<([\dx]+)xf32>, tensor<([\dx]+)xf32>\)", texts[-1])
        assert others
        assert all("x" not in left or "x" not in right for left, right in others)
        assert "jaxlm_attention_backward_rounded" in texts[-1]
    in_model, with_muon = (text.count("custom_call @jaxlm_rounded_product") for text in texts)
    assert in_model == 3 * 7  # four in attention, two in the MLP, the head
    assert with_muon > in_model


# ---- a step at fault

BATCH = jnp.asarray(np.random.default_rng(1).integers(0, 30, (4, 17)), jnp.int32)


def changed_leaves(before: Any, after: Any) -> list[str]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if np.asarray(a).tobytes() != np.asarray(b).tobytes()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_over_the_limit_counts_and_changes_nothing_else(name: str) -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name=name))  # type: ignore[arg-type]
    step = jax.jit(make_train_step(TINY, config))
    before, metrics = step(init_state(TINY, config), BATCH)
    assert not metrics["skipped"]
    after, metrics = step(before, BATCH, 0.1)
    assert metrics["skipped"]
    # The rate goes on by its schedule, so that the next step has the rate of its own index.
    changed = changed_leaves(before, after)
    assert ".step" in changed
    assert all(leaf == ".step" or leaf.endswith(".count") for leaf in changed)
    assert [leaf for leaf in changed if ".params" in leaf or "mu" in leaf.rsplit("]", 1)[-1]] == []
    assert float(step(after, BATCH)[1]["learning_rate"]) == float(
        step(replace(before, step=after.step), BATCH)[1]["learning_rate"]
    )
    good = float(metrics["train/loss"])
    assert not step(before, BATCH, good)[1]["skipped"], "the limit itself is allowed"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_not_finite_never_reaches_the_state(name: str, poison: float) -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name=name))  # type: ignore[arg-type]
    state = init_state(TINY, config)
    leaves, tree = jax.tree.flatten(state.params)
    leaves[1] = leaves[1].at[(0,) * leaves[1].ndim].set(poison)
    poisoned = replace(state, params=jax.tree.unflatten(tree, leaves))
    after, metrics = jax.jit(make_train_step(TINY, config))(poisoned, BATCH)
    if metrics["skipped"]:
        assert changed_leaves(poisoned.params, after.params) == []
    else:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
