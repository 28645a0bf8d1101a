"""AdamW is AdamW, the schedules are what they say, and nonsense is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest

from jaxlm.lanes import HAS_PAIRS
from jaxlm.model import ModelConfig, abstract_params
from jaxlm.optimizers import (
    OptimizerConfig,
    block_matrices,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    orthogonalize,
    tree_norm,
)
from jaxlm.tokenizers.base import InputError

STEPS = 8


def random_tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Arrays under the names that a model's parameters have."""
    random = np.random.default_rng(seed)
    shapes = {"embedding": (5, 3), "kernel": (3, 4), "bias": (4,), "scale": (3,)}
    return {name: {name: (scale * random.normal(size=shape)).astype(np.float32)} for name, shape in shapes.items()}


def learning_rate_by_hand(config: OptimizerConfig, step: int) -> float:
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    share = (step - warmup) / (STEPS - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def adamw_by_hand(config: OptimizerConfig, params: Any, gradients: list[Any]) -> dict[str, Any]:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    x = {name: leaf[name].astype(np.float64) for name, leaf in params.items()}
    m, v = ({name: np.zeros_like(value) for name, value in x.items()} for _ in range(2))
    for step, gradient in enumerate(gradients):
        g = {name: leaf[name].astype(np.float64) for name, leaf in gradient.items()}
        norm = math.sqrt(sum((value**2).sum() for value in g.values()))
        if config.clip_norm is not None and norm > config.clip_norm:
            g = {name: value * config.clip_norm / norm for name, value in g.items()}
        for name in x:
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g[name]
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g[name] ** 2
            m_hat = m[name] / (1 - config.beta1 ** (step + 1))
            v_hat = v[name] / (1 - config.beta2 ** (step + 1))
            decays = config.decay == "all" or name == "kernel"
            pull = config.weight_decay * x[name] if decays else 0.0
            x[name] = x[name] - learning_rate_by_hand(config, step) * (m_hat / (np.sqrt(v_hat) + 1e-8) + pull)
    return {name: {name: value} for name, value in x.items()}


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(),
        OptimizerConfig(learning_rate=0.05, weight_decay=0.3, decay="matrices"),
        OptimizerConfig(learning_rate=0.05, weight_decay=0.3, beta1=0.8, beta2=0.95, clip_norm=2.0),
        OptimizerConfig(learning_rate=0.05, weight_decay=0.0, clip_norm=1e6),
        OptimizerConfig(learning_rate=0.05, schedule="cosine", warmup_steps=3, decay="matrices", clip_norm=2.0),
    ],
    ids=["defaults", "decay of matrices", "clipping", "no clipping", "everything"],
)
def test_updates_are_those_of_adamw_by_hand(config: OptimizerConfig) -> None:
    params = random_tree(0)
    # Gradients on both sides of the clipping norm.
    gradients = [random_tree(1 + step, scale=10.0 ** (step % 3 - 2)) for step in range(STEPS)]
    optimizer = make_optimizer(config, STEPS)
    update = jax.jit(optimizer.update)
    found, state = params, optimizer.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, found)
        found = optax.apply_updates(found, updates)
    expected = adamw_by_hand(config, params, gradients)
    for name in params:
        np.testing.assert_allclose(found[name][name], expected[name][name], atol=1e-5, err_msg=name)
        assert np.abs(expected[name][name] - params[name][name]).max() > 1e-4


def test_clipping_keeps_the_direction_and_bounds_the_norm() -> None:
    """Seen through Adam's first moment, a tenth of the first gradient."""
    gradient = random_tree(1)
    norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    for clip_norm in (0.5, 1e3):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), STEPS)
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        (moment,) = [part.mu for part in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(part)]
        scale = min(1.0, clip_norm / norm)
        jax.tree.map(lambda m, g, s=scale: np.testing.assert_allclose(m, 0.1 * s * g, rtol=1e-5), moment, gradient)


def _is_adam(part: object) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def test_the_decay_mask_picks_out_the_matrices_of_a_model() -> None:
    params = abstract_params(ModelConfig(20))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    chosen = {"/".join(entry.key for entry in path) for path, decays in mask if decays}
    layers = [f"block_{layer}/" for layer in range(2)]
    names = ["query", "key", "value", "attention_output", "mlp_up", "mlp_down"]
    assert chosen == {f"{layer}{name}/kernel" for layer in layers for name in names} | {"head/kernel"}
    assert len(mask) > len(chosen)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="adamw, muon, not 'sgd'"):
        OptimizerConfig(name="sgd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="constant, cosine, linear, wsd, not 'step'"):
        OptimizerConfig(schedule="step")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="all, matrices, not 'none'"):
        OptimizerConfig(decay="none")  # type: ignore[arg-type]


# ---- Muon


def muon_by_hand(matrix: npt.NDArray[np.float64], iterations: int = 5) -> npt.NDArray[np.float64]:
    """Jordan 2024, with the scale of Liu et al. 2025, one matrix at a time in float64."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / np.linalg.norm(matrix)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return 0.2 * math.sqrt(max(matrix.shape)) * (x.T if tall else x)


def block_tree(seed: int) -> dict[str, Any]:
    """Parameters under the names that a model has, matrices wide, tall, square, and layers stacked in one array."""
    random = np.random.default_rng(seed)
    shapes = {"up": (4, 9), "down": (9, 4), "query": (4, 4), "key": (4, 4), "stacked": (3, 4, 9)}
    blocks = {name: {"kernel": random.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    return {"block_0": blocks | {"norm": {"scale": random.normal(size=4).astype(np.float32)}}} | random_tree(seed)


def test_matrices_are_orthogonalized_each_by_itself() -> None:
    blocks = block_tree(3)["block_0"]
    matrices = {name: blocks[name]["kernel"] for name in ("up", "down", "query", "key", "stacked")}
    found = jax.jit(orthogonalize)(matrices)
    for name, matrix in matrices.items():
        for got, given in zip(
            found[name].reshape(-1, *matrix.shape[-2:]), matrix.reshape(-1, *matrix.shape[-2:]), strict=True
        ):
            expected = muon_by_hand(given.astype(np.float64))
            np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)
            singular = np.linalg.svd(expected, compute_uv=False) / (0.2 * math.sqrt(max(given.shape)))
            assert (np.abs(singular - 1) < 0.4).all()


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
def test_they_are_with_rounded_factors_too() -> None:
    random = np.random.default_rng(0)
    shapes = {"wide": (32, 96), "tall": (64, 32), "stacked": (3, 64, 64), "odd": (8, 20)}
    matrices = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    exact = jax.jit(orthogonalize)(matrices)
    program = jax.jit(partial(orthogonalize, rounded=True))
    assert "jaxlm_rounded_product" in program.lower(matrices).as_text()
    for name, found in program(matrices).items():
        assert np.abs(found - exact[name]).max() > 0
        assert np.linalg.norm(found - exact[name]) < 0.05 * np.linalg.norm(exact[name])


@pytest.mark.parametrize("iterations", [5, 2])
def test_muon_acts_on_the_matrices_of_blocks_and_adamw_on_all_else(iterations: int) -> None:
    config = OptimizerConfig(
        muon_iterations=iterations,
        name="muon",
        learning_rate=0.05,
        muon_learning_rate=0.3,
        momentum=0.9,
        weight_decay=0.1,
        warmup_steps=2,
    )
    params, gradients = block_tree(0), [block_tree(1 + step) for step in range(3)]
    optimizer = make_optimizer(config, STEPS)
    found, state = params, optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, found)
        found = optax.apply_updates(found, updates)
    rest = {name: leaf for name, leaf in params.items() if name != "block_0"}
    plain = adamw_by_hand(config, rest, [{name: gradient[name] for name in rest} for gradient in gradients])
    for name in rest:
        np.testing.assert_allclose(found[name][name], plain[name][name], atol=1e-5, err_msg=name)
    norm, norms = params["block_0"]["norm"], [gradient["block_0"]["norm"] for gradient in gradients]
    plain = adamw_by_hand(config, {"scale": norm}, [{"scale": gradient} for gradient in norms])
    np.testing.assert_allclose(found["block_0"]["norm"]["scale"], plain["scale"]["scale"], atol=1e-5)
    for name in ("up", "down", "query"):
        x, momentum = params["block_0"][name]["kernel"].astype(np.float64), 0.0
        for step, gradient in enumerate(gradients):
            g = gradient["block_0"][name]["kernel"].astype(np.float64)
            momentum = 0.9 * momentum + g
            rate = 0.3 * min(1.0, (step + 1) / 2)
            x = x - rate * (muon_by_hand(g + 0.9 * momentum, iterations) + 0.1 * x)
        np.testing.assert_allclose(found["block_0"][name]["kernel"], x, atol=2e-4, err_msg=name)


def updates_of(config: OptimizerConfig, params: Any, gradients: list[Any]) -> list[Any]:
    """The updates of one step after the other, the parameters following them."""
    optimizer = make_optimizer(config, STEPS)
    update = jax.jit(optimizer.update)
    state, found = optimizer.init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


WITH_ALL = OptimizerConfig(
    name="muon", learning_rate=0.05, muon_learning_rate=0.3, momentum=0.7, weight_decay=0.5, clip_norm=2.0,
    schedule="cosine", warmup_steps=2, decay="matrices",
)  # fmt: skip


def test_clipping_is_by_the_norm_of_all_gradients_before_muon_takes_its_part() -> None:
    """Gradients on both sides of the clipping norm, which weighs them differently in the momentum."""
    params, gradients = block_tree(0), [block_tree(1 + step) for step in range(4)]
    gradients = [jax.tree.map(lambda x, s=step: x * 10.0 ** (s % 3 - 2), g) for step, g in enumerate(gradients)]
    found = updates_of(WITH_ALL, params, gradients)
    for name in ("up", "down", "query"):
        x, momentum = params["block_0"][name]["kernel"].astype(np.float64), 0.0
        for step, gradient in enumerate(gradients):
            norm = math.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
            g = gradient["block_0"][name]["kernel"].astype(np.float64) * min(1.0, 2.0 / norm)
            momentum = 0.7 * momentum + g
            rate = learning_rate_by_hand(replace(WITH_ALL, learning_rate=0.3), step)
            update = -rate * (muon_by_hand(g + 0.7 * momentum) + 0.5 * x)
            np.testing.assert_allclose(found[step]["block_0"][name]["kernel"], update, atol=1e-4, err_msg=name)
            x = x + update


def test_with_muon_all_but_block_matrices_get_exactly_the_updates_of_adamw() -> None:
    params, gradients = block_tree(0), [block_tree(1 + step) for step in range(4)]
    of_muon, of_adamw = (updates_of(replace(WITH_ALL, name=name), params, gradients)[-1] for name in ("muon", "adamw"))
    for (path, found), expected, is_muon in zip(
        jax.tree_util.tree_leaves_with_path(of_muon),
        jax.tree.leaves(of_adamw),
        jax.tree.leaves(block_matrices(params)),
        strict=True,
    ):
        if is_muon:
            assert np.abs(found - expected).max() > 0.01, path
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(path))


def test_an_update_of_muon_has_the_singular_vectors_of_the_gradient_and_an_rms_near_its_share() -> None:
    gradient = block_tree(1)
    config = OptimizerConfig(name="muon", muon_learning_rate=1.0, weight_decay=0.0)
    (updates,) = updates_of(config, gradient, [gradient])
    for name in ("up", "down", "query", "key"):
        update = np.asarray(updates["block_0"][name]["kernel"], np.float64)
        left, _, right = np.linalg.svd(gradient["block_0"][name]["kernel"], full_matrices=False)
        turned = left.T @ -update @ right.T / (0.2 * math.sqrt(max(update.shape)))
        values = np.diag(turned)
        assert ((values > 0.6) & (values < 1.3)).all()
        np.testing.assert_allclose(turned, np.diag(values), atol=1e-4)
        assert 0.2 * 0.6 < np.sqrt((update**2).mean()) < 0.2 * 1.3


def test_block_matrices_are_those_of_a_model() -> None:
    config = ModelConfig(20, activation="swiglu", input_tokens=2)
    params = abstract_params(config)
    chosen = jax.tree_util.tree_leaves_with_path(block_matrices(params))
    found = {"/".join(entry.key for entry in path) for path, is_one in chosen if is_one}
    names = ["query", "key", "value", "attention_output", "mlp_up", "mlp_gate", "mlp_down"]
    assert found == {f"block_{layer}/{name}/kernel" for layer in range(2) for name in names}


# ---- schedules


def rates(num_steps: int, **settings: Any) -> list[float]:
    """The learning rate before each update, and the one after the last."""
    schedule = learning_rate_schedule(OptimizerConfig(**settings), num_steps)
    return [float(schedule(jnp.int32(step))) for step in range(num_steps + 1)]


def test_constant_means_constant() -> None:
    assert rates(5, learning_rate=0.25) == [0.25] * 6


def test_warm_up_rises_linearly_to_the_highest() -> None:
    found = rates(20, learning_rate=0.4, warmup_steps=8)
    np.testing.assert_allclose(found[:8], 0.05 * np.arange(1, 9), rtol=1e-5)
    assert found[7:] == [pytest.approx(0.4)] * 14
    assert rates(3, learning_rate=0.4, warmup_steps=1) == [pytest.approx(0.4)] * 4


@pytest.mark.parametrize("warmup", [0, 10])
def test_cosine_falls_to_a_tenth(warmup: int) -> None:
    found = rates(50, learning_rate=2.0, schedule="cosine", warmup_steps=warmup)
    assert max(found) == found[warmup] == pytest.approx(2.0)
    assert (np.diff(found[warmup:]) < 0).all()
    assert found[warmup + (50 - warmup) // 2] == pytest.approx(1.1)
    assert found[50] == pytest.approx(0.2)
    assert found[49] == pytest.approx(0.2, rel=0.02), "the last update has about a tenth"


def test_linear_falls_from_the_warm_up_on_and_wsd_in_its_last_part() -> None:
    np.testing.assert_allclose(rates(8, learning_rate=2.0, schedule="linear"), np.linspace(2.0, 0.0, 9), atol=1e-6)
    found = rates(20, learning_rate=2.0, schedule="linear", warmup_steps=4)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 2.0, *np.linspace(2.0, 0.0, 17)], atol=1e-6)
    found = rates(20, learning_rate=2.0, schedule="wsd", warmup_steps=4, decay_share=0.25)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, *[2.0] * 12, *np.linspace(2.0, 0.0, 6)], atol=1e-6)
    found = rates(20, learning_rate=2.0, schedule="wsd", warmup_steps=4, decay_share=1.0)
    assert found == rates(20, learning_rate=2.0, schedule="linear", warmup_steps=4)


def test_wsd_falls_for_a_step_at_least() -> None:
    assert rates(10, learning_rate=1.0, schedule="wsd", decay_share=0.01) == [1.0] * 10 + [0.0]
    assert rates(1, learning_rate=1.0, schedule="wsd") == [1.0, 0.0]


def test_a_warm_up_of_none_is_a_tenth_of_the_run() -> None:
    for schedule in ("constant", "cosine", "linear", "wsd"):
        for num_steps, warmup in ((39, 3), (40, 4), (9, 0), (1, 0)):
            settings = {"learning_rate": 1.0, "schedule": schedule}
            assert rates(num_steps, warmup_steps=None, **settings) == rates(num_steps, warmup_steps=warmup, **settings)


def test_a_schedule_can_have_another_peak() -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule="wsd", warmup_steps=3)
    lower, higher = (learning_rate_schedule(config, 20, peak=peak) for peak in (None, 0.5))
    for step in range(20):
        assert float(higher(step)) == pytest.approx(5 * float(lower(step)), rel=1e-6)


def test_a_warm_up_is_shorter_than_the_run() -> None:
    for schedule in ("constant", "cosine", "linear", "wsd"):
        config = OptimizerConfig(schedule=schedule, warmup_steps=10)
        learning_rate_schedule(config, 11)
        for num_steps in (10, 9, 1):
            with pytest.raises(InputError, match=f"warm-up of 10 steps is no shorter than the run of {num_steps}"):
                make_optimizer(config, num_steps)
    learning_rate_schedule(OptimizerConfig(schedule="cosine"), 1)


# ---- what is refused

NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("learning_rate", (0.0, -1e-3, *NOT_FINITE), "learning rate is a positive float32 number"),
        ("muon_learning_rate", (0.0, -1e-3, *NOT_FINITE), "muon learning rate is a positive float32 number"),
        ("momentum", (-0.1, 1.0, *NOT_FINITE), "momentum is from 0 to below 1"),
        ("muon_iterations", (0, -1, 21), "iterations is from 1 to 20"),
        ("decay_share", (0.0, 1.1, *NOT_FINITE), "decay share is above 0 and at most 1"),
        ("warmup_steps", (-1,), "warm-up steps is at least 0"),
        ("beta1", (-0.1, 1.0, *NOT_FINITE), "beta1 is from 0 to below 1"),
        ("beta2", (-0.1, 1.0, *NOT_FINITE), "beta2 is from 0 to below 1"),
        ("weight_decay", (-0.1, *NOT_FINITE), "weight decay is a float32 number of at least 0"),
        ("clip_norm", (0.0, -1.0, *NOT_FINITE), "clipping norm is a positive float32 number"),
    ],
)
def test_a_config_checks_itself(field: str, values: tuple[float, ...], words: str) -> None:
    for value in values:
        with pytest.raises(InputError) as caught:
            OptimizerConfig(**{field: value})
        message = str(caught.value)
        assert words in message
        assert message.endswith(f"not {value}.")


def test_the_norm_of_a_tree_is_that_of_optax() -> None:
    random = np.random.default_rng(0)
    tree = {str(ndim): jnp.asarray(random.normal(size=(3, 5, 2)[:ndim]), jnp.float32) for ndim in range(4)}
    np.testing.assert_allclose(tree_norm(tree), optax.tree.norm(tree), rtol=1e-6)
    assert jnp.isnan(tree_norm({**tree, "2": tree["2"].at[1, 2].set(jnp.nan)}))
