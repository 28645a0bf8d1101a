"""The model is the architecture that it says it is: against one written down anew in numpy, and by its gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxlm import model
from jaxlm.model import (
    ModelConfig,
    Params,
    _rotate,
    abstract_params,
    count_parameters,
    flops_per_token,
    forward,
    init,
    num_parameters,
)
from jaxlm.tokenizers.base import InputError

Float64 = npt.NDArray[np.float64]
TINY = ModelConfig(vocab_size=11, context=9, width=12, num_layers=2, num_heads=3, feed_forward_width=20, dropout=0.0)
# Each option alone, and with others.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "rms norm": {"norm": "rms"},
    "rope": {"positions": "rope", "rope_base": 30.0},
    "normed queries and keys": {"qk_norm": True},
    "relu2": {"activation": "relu2"},
    "gelu": {"activation": "gelu"},
    "swiglu": {"activation": "swiglu"},
    "groups of heads": {"num_kv_heads": 1},
    "window": {"window": 4},
    "tied head": {"tied_head": True},
    "logit cap": {"logit_cap": 3.0},
    "input tokens": {"input_tokens": 3},
    "no biases": {"biases": False},
}
ALL = replace(
    TINY, width=16, num_heads=4, num_kv_heads=2, norm="rms", positions="rope", qk_norm=True, activation="swiglu",
    biases=False, window=5, tied_head=True, logit_cap=10.0, input_tokens=2,
)  # fmt: skip
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
    shapes = abstract_params(config)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw(path[-1].key, leaf.shape).astype(np.float32), shapes
    )


def random_tokens(config: ModelConfig, batch: int = 3, time: int | None = None) -> npt.NDArray[np.int32]:
    return np.random.default_rng(0).integers(config.vocab_size, size=(batch, time or config.context), dtype=np.int32)


# ---- the architecture once more, in numpy and float64, a sequence at a time


def plain_forward(params: Any, tokens: npt.NDArray[np.int32], config: ModelConfig) -> Float64:
    """Logits (T, V) of one sequence (T,)."""
    x = np.array([plain_input(params, tokens, t, config) for t in range(len(tokens))])
    if config.norm == "rms":
        x = plain_unit(x)
    for layer in range(config.num_layers):
        block = params[f"block_{layer}"]
        h = plain_norm(x, block["attention_norm"], config)
        x = x + plain_affine(plain_attention(h, block, config), block["attention_output"])
        h = plain_norm(x, block["mlp_norm"], config)
        x = x + plain_affine(plain_activation(h, block, config), block["mlp_down"])
    x = plain_norm(x, params["final_norm"], config)
    logits = x @ params["embedding"]["embedding"].T if config.tied_head else plain_affine(x, params["head"])
    return logits if config.logit_cap is None else config.logit_cap * np.tanh(logits / config.logit_cap)


def plain_input(params: Any, tokens: npt.NDArray[np.int32], t: int, config: ModelConfig) -> Float64:
    """The embedding of token t, those of tokens before it from their own tables, and that of the position."""
    x = params["embedding"]["embedding"][tokens[t]]
    for back in range(1, min(config.input_tokens, t + 1)):
        x = x + params[f"embedding_{back}"]["embedding"][tokens[t - back]]
    return x + params["positions"][t] if config.positions == "learned" else x


def plain_attention(h: Float64, block: Any, config: ModelConfig) -> Float64:
    """The outputs of all heads side by side."""
    width, kv_heads = config.width // config.num_heads, config.num_kv_heads or config.num_heads
    heads = []
    for head in range(config.num_heads):
        group = head // (config.num_heads // kv_heads)
        q, k, v = (
            h @ block[name]["kernel"][:, number * width : (number + 1) * width]
            for name, number in (("query", head), ("key", group), ("value", group))
        )
        if config.qk_norm:
            q, k = 2 * plain_unit(q), plain_unit(k)
        if config.positions == "rope":
            q, k = plain_rope(q, config.rope_base), plain_rope(k, config.rope_base)
        heads.append(plain_head(q, k, v, config.window or config.context))
    return np.concatenate(heads, axis=1)


def plain_head(q: Float64, k: Float64, v: Float64, window: int) -> Float64:
    out = np.zeros_like(v)
    for t in range(len(q)):
        seen = slice(max(0, t + 1 - window), t + 1)
        weights = np.exp(k[seen] @ q[t] / math.sqrt(q.shape[1]))
        out[t] = weights @ v[seen] / weights.sum()
    return out


def plain_rope(x: Float64, base: float) -> Float64:
    """Numbers i and i + K / 2 as one complex number, which turns by t / base^(2 i / K)."""
    half = x.shape[1] // 2
    speeds = np.array([base ** (-2 * i / (2 * half)) for i in range(half)])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(np.arange(len(x)), speeds))
    return np.concatenate([turned.real, turned.imag], axis=1)


def plain_activation(h: Float64, block: Any, config: ModelConfig) -> Float64:
    up = plain_affine(h, block["mlp_up"])
    if config.activation == "swiglu":
        gate = plain_affine(h, block["mlp_gate"])
        return up * gate / (1 + np.exp(-gate))
    if config.activation == "gelu":  # with the hyperbolic tangent (Hendrycks and Gimpel 2016)
        return up / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return np.maximum(up, 0.0) ** (2 if config.activation == "relu2" else 1)


def plain_norm(x: Float64, norm: Any, config: ModelConfig) -> Float64:
    if config.norm == "rms":
        return plain_unit(x) * norm["scale"]
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * norm["scale"] + norm[
        "bias"
    ]


def plain_unit(x: Float64) -> Float64:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)


def plain_affine(x: Float64, dense: Any) -> Float64:
    return x @ dense["kernel"] + dense.get("bias", 0.0)


def plain_loss(params: Any, tokens_BT: npt.NDArray[np.int32], config: ModelConfig) -> float:
    """Mean nats per target token."""
    nats = []
    for tokens in tokens_BT:
        logits = plain_forward(params, tokens[:-1], config)
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
        *((replace(TINY, **options), 9) for options in OPTIONS.values()),
        (TINY, 1),
        (ALL, 9),
        (replace(ALL, positions="learned", norm="layer", biases=True, activation="relu2", tied_head=False), 9),
        (replace(ALL, num_layers=1, context=131, window=70), 131),  # more than one block of attention
        (replace(TINY, num_layers=1, num_heads=12, context=131), 131),
    ],
    ids=[*OPTIONS, "one position", "all", "all others", "all, long", "long"],
)
def test_agrees_with_the_architecture_written_down_anew(config: ModelConfig, time: int) -> None:
    tokens_BT = random_tokens(config, time=time)
    # With small parameters the epsilon of the norms makes a difference of one per cent.
    for params in (lively(config), fresh(config)):
        logits_BTV = logits_of(params, tokens_BT, config)
        assert logits_BTV.shape == (3, time, config.vocab_size)
        assert logits_BTV.dtype == jnp.float32
        for tokens, logits in zip(tokens_BT, logits_BTV, strict=True):
            expected = plain_forward(in_float64(params), tokens, config)
            np.testing.assert_allclose(logits, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("config", [TINY, ALL], ids=["none", "all"])
def test_the_gradient_is_the_slope_of_the_architecture_written_down_anew(config: ModelConfig) -> None:
    """Central differences in float64, in every direction of a leaf's own and in some of all together."""
    params, tokens_BT = lively(config), random_tokens(config)
    gradient = in_float64(jax.jit(jax.grad(loss), static_argnums=2)(params, tokens_BT, config))
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
                structure.unflatten([x + sign * step * d for x, d in zip(leaves, direction, strict=True)]),
                tokens_BT,
                config,
            )
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        expected = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
        assert slope == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_scores_with_rope_depend_on_distances_alone() -> None:
    """The same query and the same key at all positions; in float32 an angle of 255 is known to 1.5e-5."""
    q, k = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    turned_q, turned_k = (
        np.asarray(_rotate(np.broadcast_to(x, (1, 256, 1, 8)), 50.0), np.float64)[0, :, 0] for x in (q, k)
    )
    scores_TS = turned_q @ turned_k.T
    pairs_q, pairs_k = (x[:4].astype(np.float64) + 1j * x[4:] for x in (q, k))
    for distance in range(256):
        turn = np.exp(1j * distance * 50.0 ** (-np.arange(4) / 4))
        expected = (pairs_q * turn * pairs_k.conj()).sum().real
        np.testing.assert_allclose(np.diagonal(scores_TS, -distance), expected, atol=1e-4)
    assert np.diagonal(scores_TS).std() < 1e-4 < 0.1 < scores_TS[255].std()


# ---- size and beginning


@pytest.mark.parametrize(("vocab_size", "expected"), [(98, 453_986), (500, 557_300)])
def test_the_seed_model_has_its_size(vocab_size: int, expected: int) -> None:
    params = abstract_params(ModelConfig(vocab_size))
    found = count_parameters(params)
    assert found == expected, f"the seed model has {found:,} parameters instead of {expected:,} at {vocab_size} ids"


# How many numbers an option adds to TINY's 2 layers of width 12, heads of width 4 and feed-forward width 20.
SIZES = {
    "none": 0,
    "rms norm": -5 * 12,  # no biases in five norms
    "rope": -9 * 12,
    "normed queries and keys": 0,
    "relu2": 0,
    "gelu": 0,
    "swiglu": 2 * (12 * 20 + 20),
    "groups of heads": -2 * 2 * 12 * (12 - 4),
    "window": 0,
    "tied head": -(12 * 11 + 11),
    "logit cap": 0,
    "input tokens": 2 * 11 * 12,
    "no biases": -(2 * (12 + 20 + 12) + 11),
}


def size(config: ModelConfig) -> int:
    return count_parameters(abstract_params(config))


def test_each_option_has_its_size() -> None:
    block = 2 * 12 + 3 * 12 * 12 + (12 * 12 + 12) + 2 * 12 + (12 * 20 + 20) + (20 * 12 + 12)
    plain = 11 * 12 + 9 * 12 + 2 * block + 2 * 12 + (12 * 11 + 11)
    found = {name: size(replace(TINY, **options)) - plain for name, options in OPTIONS.items()}
    assert found == SIZES
    block = 16 + 2 * 16 * 16 + 2 * 16 * 8 + 16 + 3 * 16 * 20
    assert size(ALL) == 2 * 11 * 16 + 2 * block + 16


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_parameters_are_counted_without_making_them(options: dict[str, Any]) -> None:
    for config in (replace(TINY, **options), ALL):
        assert num_parameters(config) == size(config)


def test_operations_per_token_by_hand() -> None:
    """Six for each number of a matrix; twelve for each number of each pair of a token with one that it sees."""

    def found(config: ModelConfig) -> int:
        return flops_per_token(abstract_params(config), config)

    # 2 layers of 4 matrices of 128 x 128 and 2 of 128 x 512, a head of 128 x 98; 1 to 256 tokens seen.
    assert found(ModelConfig(98)) == 6 * (2 * (4 * 128**2 + 2 * 128 * 512) + 128 * 98) + 12 * 2 * 128 * 257 // 2
    assert found(ModelConfig(98)) == 2_829_312
    matrices = 2 * (4 * 12**2 + 2 * 12 * 20) + 12 * 11
    for name, more in {"swiglu": 2 * 12 * 20, "groups of heads": -2 * 2 * 12 * 8, "tied head": 0}.items():
        assert found(replace(TINY, **OPTIONS[name])) == 6 * (matrices + more) + 12 * 2 * 12 * 5, name
    for window in range(1, 10):
        seen = sum(min(t + 1, window) for t in range(9))
        assert found(replace(TINY, window=window)) == round(6 * matrices + 12 * 2 * 12 * seen / 9)


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


def test_with_zero_outputs_logits_begin_at_zero_and_other_kernels_keep_the_scale() -> None:
    config = replace(SQUARE, feed_forward_width=512, num_kv_heads=2, activation="swiglu", zero_outputs=True)
    params = init(config, jax.random.key(0))
    assert not logits_of(params, random_tokens(config), config).any()
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        if names[-1] in ("kernel", "embedding", "positions"):
            found[names[-2] if names[-1] == "kernel" else names[-1]] = float(np.asarray(leaf, np.float64).std())
    inputs = dict.fromkeys(("query", "key", "value", "mlp_up", "mlp_gate"), 1 / math.sqrt(128))
    outputs = dict.fromkeys(("attention_output", "mlp_down", "head"), 0.0)
    tables = {"embedding": 0.2, "positions": 0.2}
    assert found == {name: pytest.approx(value, rel=0.03) for name, value in (inputs | outputs | tables).items()}


def test_a_model_with_a_tied_head_begins_near_the_uniform_one() -> None:
    config = replace(SQUARE, zero_outputs=True, tied_head=True, norm="rms")
    logits = logits_of(init(config, jax.random.key(0)), random_tokens(config), config)
    assert 0.01 < float(np.std(logits)) < 0.5


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


FAR = 66  # more than one block of attention


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        (replace(TINY, context=FAR), FAR - 1),
        # Each layer looks back by its window, the input by one token.
        (replace(ALL, context=FAR, window=20, logit_cap=50.0), 1 + 2 * 19),
    ],
    ids=["none", "all"],
)
def test_causality_by_gradients(config: ModelConfig, reach: int) -> None:
    """Each position has a token of its own, so the gradient for a token's embeddings is that for its position.

    Half of the vocabulary is for the input and half for the output, which a tied head would mix.
    """
    config = replace(config, vocab_size=2 * FAR)
    params = lively(config)
    tables = {name: part for name, part in params.items() if name.startswith("embedding")}
    random = np.random.default_rng(1)
    tokens, mixture_V = random.permutation(FAR).astype(np.int32), random.normal(size=FAR).astype(np.float32)

    def mixture(tables: Params, rest: Params, weights_T: jax.Array) -> jax.Array:
        return weights_T @ forward({**rest, **tables}, tokens[None], config)[0, :, FAR:] @ mixture_V

    # One position after the other: some batched gradients come out wrong from jaxlib 0.10.2 on a CPU.
    one_by_one = jax.jit(lambda *params: jax.lax.map(partial(jax.grad(mixture), *params), jnp.eye(FAR)))
    slopes = jax.tree.leaves(one_by_one(tables, params))
    assert len(slopes) == config.input_tokens
    sensitivity = sum(np.abs(slope).max(axis=2)[:, tokens] for slope in slopes)  # (T, S)
    back = np.arange(FAR)[:, None] - np.arange(FAR)
    assert not sensitivity[back < 0].any(), "a logit depends on a later token"
    assert not sensitivity[back > reach].any(), "a logit depends on a token that is too far away"
    assert (sensitivity[(back >= 0) & (back <= reach)] > 0).all(), "a logit doesn't depend on a token that it may see"


def test_with_rope_and_a_window_logits_do_not_depend_on_where_a_text_stands() -> None:
    config = replace(ALL, context=30)  # which reaches back by 1 + 2 x 4 = 9 tokens
    params, tokens_BT = lively(config), random_tokens(config)
    whole, later = logits_of(params, tokens_BT, config), logits_of(params, tokens_BT[:, 10:], config)
    np.testing.assert_allclose(later[:, 9:], whole[:, 19:], atol=2e-5)
    assert (np.abs(later[:, :9] - whole[:, 10:19]).max(axis=(0, 2)) > 2e-4).all()


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

NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size is a whole number from 1 to 2147483647, not 0"),
        ({"num_layers": 0}, "num_layers is a whole number from 1 to 10000, not 0"),
        ({"num_heads": 0}, "num_heads is a whole number from 1 to 2147483647, not 0"),
        ({"width": -4}, "width is a whole number from 1 to 2147483647, not -4"),
        ({"feed_forward_width": 0}, "feed_forward_width is a whole number from 1 to 2147483647, not 0"),
        ({"context": 1}, "context is at least 2 tokens"),
        ({"context": 0}, "context is a whole number from 1 to 2147483647, not 0"),
        ({"num_heads": 5}, "width 12 doesn't divide into 5 heads"),
        ({"dropout": -0.1}, "dropout is a share from 0 to below 1, not -0.1"),
        ({"dropout": 1.0}, "dropout is a share from 0 to below 1, not 1.0"),
        ({"dropout": math.nan}, "dropout is a share from 0 to below 1, not nan"),
        ({"dropout": math.inf}, "dropout is a share from 0 to below 1, not inf"),
        ({"input_tokens": 0}, "input_tokens is a whole number from 1 to 2147483647, not 0"),
        ({"input_tokens": 10}, "input_tokens is at most the context of 9, not 10"),
        ({"num_kv_heads": 0}, "3 heads don't divide among 0 of keys and values"),
        ({"num_kv_heads": 2}, "3 heads don't divide among 2 of keys and values"),
        ({"num_kv_heads": 6}, "3 heads don't divide among 6 of keys and values"),
        ({"norm": "batch"}, "norm is one of layer, rms, not 'batch'"),
        ({"positions": "alibi"}, "positions is one of learned, rope, not 'alibi'"),
        ({"activation": "tanh"}, "activation is one of relu, relu2, gelu, swiglu, not 'tanh'"),
        ({"positions": "rope", "num_heads": 4}, "heads of width 3 are odd"),
        ({"window": 0}, "window is from 1 to its context of 9, not 0"),
        ({"window": 10}, "window is from 1 to its context of 9, not 10"),
        ({"rope_base": None}, "rope_base is a number, not None"),
        *(
            ({"rope_base": value}, f"rope_base is a positive float32 number, not {value}")
            for value in (0.0, -1.0, *NOT_FINITE)
        ),
        *(
            ({"logit_cap": value}, f"logit_cap is a positive float32 number, not {value}")
            for value in (0.0, -1.0, *NOT_FINITE)
        ),
    ],
)
def test_a_config_checks_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(TINY, **changes)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert ". " not in message
    assert message.endswith(".")


def test_a_config_is_hashable_so_that_it_can_be_static() -> None:
    assert hash(TINY) == hash(replace(TINY))
    assert replace(TINY, width=24) != TINY


def test_the_context_is_a_limit() -> None:
    params = fresh(TINY)
    assert logits_of(params, random_tokens(TINY), TINY).shape == (3, 9, 11)
    with pytest.raises(ValueError, match="10 tokens don't fit into a context of 9"):
        logits_of(params, random_tokens(TINY, time=10), TINY)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("backend", "few"), [("gpu", 4096), ("gpu", 5), ("tpu", 5)], ids=["a product", "a kernel", "sums"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_up_rows_is_the_same_on_an_accelerator(
    backend: str, few: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(3)
    table = jnp.asarray(random.normal(size=(13, 6)), dtype)
    tokens = random.integers(11, size=(4, 9))  # some many times, some never
    above = jnp.asarray(random.normal(size=(4, 9, 6)), dtype)
    monkeypatch.setattr(model, "_FEW_IDS", few)
    found = {}
    for device in ("cpu", backend):
        monkeypatch.setattr(jax, "default_backend", lambda device=device: device)
        rows, pull_back = jax.vjp(lambda table: model._look_up(table, tokens), table)
        found[device] = rows, *pull_back(above)
    assert found[backend][1].dtype == dtype
    np.testing.assert_array_equal(found["cpu"][0], found[backend][0])
    exact = np.zeros((13, 6))
    np.add.at(exact, tokens, np.asarray(above, np.float64))
    np.testing.assert_allclose(
        np.asarray(found[backend][1], np.float64), exact, rtol=1e-2 if dtype == "bfloat16" else 1e-5
    )


def test_the_slope_of_relu_is_told_from_its_result() -> None:
    x = jnp.array([-3.0, -0.0, 0.0, 1e-30, 2.0, jnp.inf])
    (ours, our_slope), (theirs, their_slope) = (jax.vjp(relu, x) for relu in (model._relu, jax.nn.relu))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(our_slope(jnp.ones(6)), their_slope(jnp.ones(6)))
    assert jnp.isnan(model._relu(jnp.nan))

    # XLA tells it from the result, too, and doesn't look through it to x, which would have to be kept.
    program = jax.jit(lambda x, d: jax.vjp(model._relu, 2.0 * x)[1](d)).lower(x, x).compile().as_text()
    compared = re.findall(r" compare\(%([\w.]+)", program)
    assert compared and set(compared) <= set(re.findall(r"%([\w.]+) = \S+ maximum\(", program))
