"""Flags and presets, and the exit status. For bad input see test_bad_input.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from experiments import bpe_lm, bpe_tokenizer, char_lm, compare_tokenizers
from experiments.command_line import parse, program
from jaxlm.runs import RunFailed, RunInterrupted
from jaxlm.tokenizers import InputError

MODULES = {
    "char_lm": char_lm,
    "bpe_lm": bpe_lm,
    "bpe_tokenizer": bpe_tokenizer,
    "compare_tokenizers": compare_tokenizers,
}


def test_the_preset_is_the_default_that_other_flags_override() -> None:
    quick = parse([], char_lm.PRESETS, "x")
    seed = parse(["--preset", "seed"], char_lm.PRESETS, "x")
    changed = parse(["--steps", "7", "--preset=seed", "--width", "64"], char_lm.PRESETS, "x")
    assert quick == char_lm.PRESETS["quick"]
    assert seed == char_lm.PRESETS["seed"]
    assert (changed.training.steps, changed.model.width) == (7, 64)
    assert changed.training.optimizer == seed.training.optimizer


@pytest.mark.parametrize(("module", "vocab_size"), [(char_lm, 98), (bpe_lm, 500)])
def test_the_seed_preset_is_the_recipe_of_the_notebooks(module: ModuleType, vocab_size: int) -> None:
    seed = module.PRESETS["seed"]
    model, training, optimizer = seed.model, seed.training, seed.training.optimizer
    assert (model.vocab_size, model.width, model.num_layers, model.num_heads) == (vocab_size, 128, 2, 4)
    assert (model.context, model.feed_forward_width, model.dropout) == (256, 512, 0.2)
    assert (training.batch_size, optimizer.learning_rate, optimizer.schedule) == (64, 3e-4, "constant")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert (optimizer.clip_norm, optimizer.warmup_steps, optimizer.decay) == (None, 0, "all")


@pytest.mark.parametrize("name", MODULES)
def test_help_lists_the_shared_flags(name: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(MODULES[name], "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--workdir", "--corpus", "--seed", "--steps", "--preset"):
        assert flag in text


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RunFailed("The run diverged."), 1, "The run diverged."),
        (RunInterrupted("Interrupted after step 3, which is saved."), 130, "python -m experiments.char_lm --seed 3"),
        (KeyboardInterrupt(), 130, "python -m experiments.char_lm --seed 3"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "runs/x can't be used: Permission denied"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "No space left on device (metrics.jsonl)"),
        (InputError("Bad."), 2, "Bad."),
    ],
)
def test_exit_status(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["char_lm", "--seed", "3"])
    with pytest.raises(SystemExit) as caught:
        program("experiments.char_lm", char_lm.PRESETS, fail)
    assert caught.value.code == status
    assert words in capsys.readouterr().err


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(sys, "argv", ["char_lm"])
    with pytest.raises(ValueError, match="a bug"):
        program("experiments.char_lm", char_lm.PRESETS, fail)
