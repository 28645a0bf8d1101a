"""The model is the architecture that it says it is: against one written down anew in numpy, and by its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxlm.model import ModelConfig, Params, count_parameters, forward, init
from jaxlm.tokenizers.base import InputError

Float64 = npt.NDArray[np.float64]
TINY = ModelConfig(vocab_size=11, context=9, width=12, num_layers=2, num_heads=3, feed_forward_width=20, dropout=0.0)
# All of one shape, because drawing parameters is compiled once a shape.
SQUARE = ModelConfig(vocab_size=128, context=128, width=128, feed_forward_width=128, dropout=0.0)

logits_of = jax.jit(forward, static_argnums=2)


def lively(config: ModelConfig, seed: int = 0) -> Params:
    """Parameters far from the initial ones, biases and gains too, so that no term is too small to be seen."""
    random = np.random.default_rng(seed)
    return _parameters(config, lambda name, shape: random.normal(name == "scale", 0.3, shape))


def fresh(config: ModelConfig, seed: int = 0) -> Params:
    """Parameters as small as initial ones."""
    random = np.random.default_rng(seed)
    constants = {"bias": 0.0, "scale": 1.0}
    return _parameters(
        config,
        lambda name, shape: np.full(shape, constants[name]) if name in constants else random.normal(0, 0.02, shape),
    )


def _parameters(config: ModelConfig, draw: Callable[[str, tuple[int, ...]], Float64]) -> Params:
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw(path[-1].key, leaf.shape).astype(np.float32), shapes
    )


def random_tokens(config: ModelConfig, batch: int = 3, time: int | None = None) -> npt.NDArray[np.int32]:
    return np.random.default_rng(0).integers(config.vocab_size, size=(batch, time or config.context), dtype=np.int32)


# ---- the architecture once more, in numpy and float64, a sequence at a time


def plain_forward(params: Any, tokens: npt.NDArray[np.int32], num_heads: int) -> Float64:
    """Logits (T, V) of one sequence (T,)."""
    x = params["embedding"]["embedding"][tokens] + params["positions"][: len(tokens)]
    for layer in range(sum(name.startswith("block_") for name in params)):
        block = params[f"block_{layer}"]
        h = plain_norm(x, block["attention_norm"])
        query, key, value = (h @ block[name]["kernel"] for name in ("query", "key", "value"))
        heads = [
            plain_head(q, k, v)
            for q, k, v in zip(*(np.split(y, num_heads, axis=1) for y in (query, key, value)), strict=True)
        ]
        x = x + plain_affine(np.concatenate(heads, axis=1), block["attention_output"])
        h = np.maximum(plain_affine(plain_norm(x, block["mlp_norm"]), block["mlp_up"]), 0.0)
        x = x + plain_affine(h, block["mlp_down"])
    return plain_affine(plain_norm(x, params["final_norm"]), params["head"])


def plain_head(q: Float64, k: Float64, v: Float64) -> Float64:
    out = np.zeros_like(v)
    for t in range(len(q)):
        weights = np.exp(k[: t + 1] @ q[t] / math.sqrt(q.shape[1]))
        out[t] = weights @ v[: t + 1] / weights.sum()
    return out


def plain_norm(x: Float64, norm: Any) -> Float64:
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * norm["scale"] + norm[
        "bias"
    ]


def plain_affine(x: Float64, dense: Any) -> Float64:
    return x @ dense["kernel"] + dense["bias"]


def plain_loss(params: Any, tokens_BT: npt.NDArray[np.int32], num_heads: int) -> float:
    """Mean nats per target token."""
    nats = []
    for tokens in tokens_BT:
        logits = plain_forward(params, tokens[:-1], num_heads)
        chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
        nats.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    return float(np.mean(nats))


def loss(params: Params, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(forward(params, tokens_BT[:, :-1], config))
    return -jnp.take_along_axis(log_probabilities, tokens_BT[:, 1:, None], axis=-1).mean()


def in_float64(params: Params) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize(
    ("config", "time"),
    [
        (TINY, 9),
        (TINY, 1),
        (replace(TINY, num_layers=1, num_heads=1), 9),
        (replace(TINY, num_layers=1, num_heads=12, context=131), 131),  # more than one block of attention
    ],
)
def test_agrees_with_the_architecture_written_down_anew(config: ModelConfig, time: int) -> None:
    tokens_BT = random_tokens(config, time=time)
    # With small parameters the epsilon of the norms makes a difference of one per cent.
    for params in (lively(config), fresh(config)):
        logits_BTV = logits_of(params, tokens_BT, config)
        assert logits_BTV.shape == (3, time, config.vocab_size)
        assert logits_BTV.dtype == jnp.float32
        for tokens, logits in zip(tokens_BT, logits_BTV, strict=True):
            expected = plain_forward(in_float64(params), tokens, config.num_heads)
            np.testing.assert_allclose(logits, expected, atol=3e-6 * np.abs(expected).max())


def test_the_gradient_is_the_slope_of_the_architecture_written_down_anew() -> None:
    """Central differences in float64, in every direction of a leaf's own and in some of all together."""
    params, tokens_BT = lively(TINY), random_tokens(TINY)
    gradient = in_float64(jax.jit(jax.grad(loss), static_argnums=2)(params, tokens_BT, TINY))
    params = in_float64(params)
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    directions = [[random.normal(size=leaf.shape) for leaf in leaves] for _ in range(3)]
    for chosen in range(len(leaves)):
        directions.append([random.normal(size=leaf.shape) * (i == chosen) for i, leaf in enumerate(leaves)])
    step = 1e-6
    for direction in directions:
        ahead, behind = (
            plain_loss(
                structure.unflatten([x + sign * step * d for x, d in zip(leaves, direction, strict=True)]), tokens_BT, 3
            )
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        expected = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
        assert slope == pytest.approx(expected, rel=1e-4, abs=2e-6)


# ---- size and beginning


@pytest.mark.parametrize(("vocab_size", "expected"), [(98, 453_986), (500, 557_300)])
def test_the_seed_model_has_its_size(vocab_size: int, expected: int) -> None:
    params = jax.eval_shape(lambda key: init(ModelConfig(vocab_size), key), jax.random.key(0))
    found = count_parameters(params)
    assert found == expected, f"the seed model has {found:,} parameters instead of {expected:,} at {vocab_size} ids"


def test_initial_weights_are_normal_biases_zero_and_gains_one() -> None:
    weights = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(init(SQUARE, jax.random.key(0))):
        name = path[-1].key
        assert leaf.dtype == jnp.float32
        if name == "bias":
            assert not leaf.any(), path
        elif name == "scale":
            assert (leaf == 1).all(), path
        else:
            assert name in ("kernel", "embedding", "positions")
            values = np.asarray(leaf, np.float64).ravel() / 0.02
            deviation = 1 / math.sqrt(values.size)
            assert abs(values.mean()) < 5 * deviation, path
            assert values.std() == pytest.approx(1.0, abs=5 * deviation), path
            weights.append(values)
    pooled = np.concatenate(weights)
    assert (pooled**4).mean() == pytest.approx(3.0, abs=0.1), "the weights aren't normal"
    assert np.abs(pooled).max() > 4, "the weights are cut off"
    # Every leaf is drawn by itself: no two begin with the same numbers.
    assert len({tuple(values[:8]) for values in weights}) == len(weights)


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    tokens_BT = random_tokens(SQUARE, batch=4, time=SQUARE.context + 1)
    first = jax.jit(loss, static_argnums=2)(init(SQUARE, jax.random.key(0)), tokens_BT, SQUARE)
    assert first == pytest.approx(math.log(SQUARE.vocab_size), abs=0.05)


def test_the_same_key_gives_the_same_parameters_and_another_key_others() -> None:
    first, again, other = (init(SQUARE, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        if path[-1].key not in ("bias", "scale"):
            assert not np.array_equal(leaf, _at(other, path)), path
    # Dropout is no part of what a model starts with.
    jax.tree.map(np.testing.assert_array_equal, first, init(replace(SQUARE, dropout=0.5), jax.random.key(0)))


def _at(params: Params, path: tuple[Any, ...]) -> Any:
    for entry in path:
        params = params[entry.key]
    return params


# ---- what a logit depends on


def test_causality_by_gradients() -> None:
    """Each position has a token of its own, so the gradient for a token's embedding is that for its position."""
    time = 66  # more than one block of attention
    config = replace(TINY, vocab_size=time, context=time)
    params = lively(config)
    random = np.random.default_rng(1)
    tokens, mixture_V = random.permutation(time).astype(np.int32), random.normal(size=time)

    @jax.jit
    @jax.jacrev
    def dependence(embedding_VD: jax.Array) -> jax.Array:
        changed = {**params, "embedding": {"embedding": embedding_VD}}
        return forward(changed, tokens[None], config)[0] @ mixture_V

    sensitivity = np.abs(dependence(params["embedding"]["embedding"])).max(axis=2)[:, tokens]  # (T, S)
    later = np.triu(np.ones((time, time), bool), k=1)
    assert not sensitivity[later].any(), "a logit depends on a later token"
    assert (sensitivity[~later] > 0).all(), "a logit doesn't depend on some token before it"


def test_logits_depend_neither_on_what_follows_nor_on_the_rest_of_the_batch() -> None:
    params, tokens_BT = lively(TINY), random_tokens(TINY)
    whole = logits_of(params, tokens_BT, TINY)
    np.testing.assert_allclose(logits_of(params, tokens_BT[:, :4], TINY), whole[:, :4], atol=1e-4)
    np.testing.assert_allclose(logits_of(params, tokens_BT[1:2], TINY), whole[1:2], atol=1e-4)


def test_the_order_of_tokens_matters() -> None:
    params, tokens_BT = lively(TINY), random_tokens(TINY)
    tokens_BT[:, :2] = 1, 2
    swapped_BT = tokens_BT.copy()
    swapped_BT[:, :2] = 2, 1
    change = np.abs(logits_of(params, tokens_BT, TINY) - logits_of(params, swapped_BT, TINY))
    assert (change[:, -1].max(axis=-1) > 1e-3).all()


# ---- dropout

HALF = replace(TINY, dropout=0.5)


def test_dropout_is_on_with_a_key_and_only_then() -> None:
    params, tokens_BT = lively(HALF), random_tokens(HALF)
    plain = logits_of(params, tokens_BT, TINY)
    np.testing.assert_array_equal(logits_of(params, tokens_BT, HALF), plain)
    np.testing.assert_array_equal(logits_of(params, tokens_BT, TINY, dropout_key=jax.random.key(0)), plain)
    first, again, other = (logits_of(params, tokens_BT, HALF, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - plain) > 1e-3).mean() > 0.9
    assert (np.abs(first - other) > 1e-3).mean() > 0.9


@pytest.mark.parametrize("place", ["attention weights", "attention output", "MLP output"])
@pytest.mark.parametrize("layer", [0, 1])
def test_dropout_acts_in_three_places_of_each_layer(place: str, layer: int) -> None:
    """The block writes nothing into the stream except through one place, so a key can act there alone."""
    params, tokens_BT = lively(HALF), random_tokens(HALF)
    for index in range(HALF.num_layers):
        for name in ("attention_output", "mlp_down"):
            params[f"block_{index}"][name] = jax.tree.map(np.zeros_like, params[f"block_{index}"][name])
    assert distinct_outcomes(params, tokens_BT) == [1, 1, 1]
    part = params[f"block_{layer}"]["mlp_down" if place == "MLP output" else "attention_output"]
    if place == "attention weights":
        # Into a single feature, which the dropout of the output keeps or drops: that makes two outcomes, no more.
        part["kernel"][:, 0] = 1.0
    else:
        part["bias"][:] = 1.0
    assert min(distinct_outcomes(params, tokens_BT)) > 2


def distinct_outcomes(params: Params, tokens_BT: npt.NDArray[np.int32]) -> list[int]:
    """For each sequence, how many different logits eight keys give at its last position."""
    keys = [jax.random.key(seed) for seed in range(8)]
    last_BV = [np.asarray(logits_of(params, tokens_BT, HALF, dropout_key=key))[:, -1] for key in keys]
    return [len({logits[row].tobytes() for logits in last_BV}) for row in range(len(tokens_BT))]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size is at least 1, not 0"),
        ({"num_layers": 0}, "num_layers is at least 1, not 0"),
        ({"num_heads": 0}, "num_heads is at least 1, not 0"),
        ({"width": -4}, "width is at least 1, not -4"),
        ({"feed_forward_width": 0}, "feed_forward_width is at least 1, not 0"),
        ({"context": 1}, "context is at least 2 tokens"),
        ({"context": 0}, "context is at least 1, not 0"),
        ({"num_heads": 5}, "width 12 doesn't divide into 5 heads"),
        ({"dropout": -0.1}, "dropout is a share from 0 to below 1, not -0.1"),
        ({"dropout": 1.0}, "dropout is a share from 0 to below 1, not 1.0"),
        ({"dropout": math.nan}, "dropout is a share from 0 to below 1, not nan"),
        ({"dropout": math.inf}, "dropout is a share from 0 to below 1, not inf"),
    ],
)
def test_a_config_checks_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(TINY, **changes)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_config_is_hashable_so_that_it_can_be_static() -> None:
    assert hash(TINY) == hash(replace(TINY))
    assert replace(TINY, width=24) != TINY


def test_the_context_is_a_limit() -> None:
    params = fresh(TINY)
    assert logits_of(params, random_tokens(TINY), TINY).shape == (3, 9, 11)
    with pytest.raises(ValueError, match="10 tokens don't fit into a context of 9"):
        logits_of(params, random_tokens(TINY, time=10), TINY)
