"""The speedrun keeps its rules: what is scored is never trained on, and each token is scored once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from experiments import speedrun
from experiments.speedrun import PRESETS, in_windows, run
from jaxlm.data.batches import make_batches
from jaxlm.data.shards import TokenStream
from jaxlm.model import ModelConfig, abstract_params, count_parameters, forward, init
from jaxlm.tokenizers.base import InputError
from jaxlm.training import init_state, make_train_step

TINY = ModelConfig(vocab_size=11, context=8, width=8, num_heads=2, feed_forward_width=8, dropout=0.0)


def stream_of(lengths: list[int]) -> TokenStream:
    tokens = np.random.default_rng(0).integers(11, size=sum(lengths)).astype(np.uint16)
    return TokenStream((tokens,), np.cumsum(lengths), np.array(lengths))


def test_a_uniform_model_scores_log_v_for_each_token() -> None:
    stream = stream_of([9, 30, 4])
    params = jax.tree.map(np.zeros_like, init(TINY, jax.random.key(0)))
    assert in_windows(params, TINY, stream.slice(0, len(stream)), batch=3) == pytest.approx(
        len(stream) * math.log(11), rel=1e-5
    )


def test_windows_begin_where_the_one_before_ended() -> None:
    stream, params = stream_of([17]), init(TINY, jax.random.key(0))
    ids = stream.slice(0, 17)
    nats = 0.0
    for start in (0, 8):
        logits = np.asarray(forward(params, ids[None, start : start + 8], TINY))[0].astype(np.float64)
        nats -= sum(
            row[target] - math.log(np.exp(row).sum())
            for row, target in zip(logits, ids[start + 1 : start + 9], strict=True)
        )
    assert in_windows(params, TINY, ids) == pytest.approx(nats * 17 / 16, rel=1e-5)


def test_both_parts_of_a_run_take_all_steps_and_as_many_tokens_each() -> None:
    config = PRESETS["short"]
    training = replace(
        config.training, steps=4, batch_size=2, optimizer=replace(config.training.optimizer, warmup_steps=1),
        compute_type="float32",
    )  # fmt: skip
    config = replace(config, model=TINY, training=training, first_context=4)
    before = init(TINY, jax.random.key(0))
    params, seconds, _, tokens = run(config, stream_of([400]))
    assert tokens == 4 * 2 * 8
    assert seconds > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert jax.tree.structure(params) == jax.tree.structure(before)


@pytest.mark.parametrize(("name", "most"), [("long", 453_986), ("bpe-long", 557_300)])
def test_the_models_have_no_more_parameters_than_the_seed(name: str, most: int) -> None:
    shapes = abstract_params(PRESETS[name].model)
    assert 0.97 * most < count_parameters(shapes) <= most


def test_a_first_context_that_does_not_divide_the_other_is_refused() -> None:
    with pytest.raises(InputError, match="first context divides 256; 100 does not"):
        replace(PRESETS["short"], first_context=100)


def test_each_seed_is_trained_and_the_held_out_text_has_a_window(
    call: Callable[..., int], corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = "--vocab-size 30 --width 16 --num-heads 2 --num-layers 1 --feed-forward-width 16 --steps 2 --warmup-steps 1"
    flags = ["--corpus", corpus, *tiny.split(), "--compute-type", "float32", "--seed", "7", "--seeds", "2"]
    assert call(speedrun, *flags, "--context", "16", "--first-context", "8") == 0
    shown = capsys.readouterr().out
    assert "seed 7: " in shown and "seed 8: " in shown and "seed 0" not in shown
    assert "short, char, float32" in shown
    assert call(speedrun, *flags, "--context", "512") == 2
    assert "one window of context 512 needs 513; use more text or a smaller context." in capsys.readouterr().err


def test_several_steps_of_one_program_are_those_steps_one_after_the_other() -> None:
    optimizer = replace(PRESETS["short"].training.optimizer, warmup_steps=2)
    training = replace(
        PRESETS["short"].training, steps=28, batch_size=2, optimizer=optimizer, seed=3, compute_type="float32"
    )
    config = replace(PRESETS["short"], model=TINY, training=training, first_context=4)
    stream = stream_of([400])
    found, *_ = run(config, stream)
    state = init_state(TINY, training)
    step = jax.jit(make_train_step(TINY, training))
    for context in (4, 8):
        batches = make_batches(stream, context=context, batch_size=16 // context, seed=3_000 + context)
        for index in range(14):
            state, _ = step(state, batches[index])
    assert int(state.step) == 28
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, state.params)
