"""The loop: it learns, resumes to the bit, stops when it diverges, and logs what it says."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import loop, training
from jaxlm.checkpoints import Checkpoints, saved_steps
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import TokenizedCorpus, survey_corpus, tokenize_corpus
from jaxlm.faults import Faults
from jaxlm.final_score import evaluate_run
from jaxlm.loop import _Signals, train, train_together
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.progress import Reporter
from jaxlm.runs import NATS_FILE, Run, RunFailed, RunInterrupted, read_config, read_metrics
from jaxlm.tokenizers import CharTokenizer, InputError
from jaxlm.training import (
    TrainConfig,
    TrainState,
    init_state,
    load_trained,
    load_warm_start,
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


@pytest.fixture
def data(tmp_path: Path) -> tuple[CharTokenizer, TokenizedCorpus, str]:
    text = "\n\n".join(f"le chat numéro {i} dort sur le toit de la maison {i % 7}" for i in range(60))
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "corpus.txt"))
    survey = survey_corpus(corpus)
    tokenizer = CharTokenizer.train(corpus.documents(), 30)
    return tokenizer, tokenize_corpus(corpus, survey, tokenizer), survey.fingerprint


SETTINGS = {"kind": "char", "vocab_size": 30}


def open_run(path: Path, fingerprint: str, config: TrainConfig = CONFIG, **more: Any) -> Run:
    return training.open_run(path, fingerprint, SETTINGS, TINY, config, **more)


def run_training(path: Path, data: tuple[CharTokenizer, TokenizedCorpus, str], config: TrainConfig) -> TrainState:
    tokenizer, tokens, fingerprint = data
    run = open_run(path, fingerprint, config)
    state = train(run, tokenizer, tokens, TINY, config)
    evaluate_run(run, tokenizer, tokens, TINY, config, state)
    return state


def assert_equal_bits(left: TrainState, right: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def losses(path: Path) -> dict[int, str]:
    """The training losses as they are written, by step."""
    return {line["step"]: repr(line["train/loss"]) for line in read_metrics(path) if "train/loss" in line}


def test_training_learns_and_logs_every_field(tmp_path: Path, data: tuple) -> None:
    state = run_training(tmp_path / "run", data, replace(CONFIG, steps=150))
    lines = read_metrics(tmp_path / "run")
    train_lines = [line for line in lines if "train/loss" in line]
    assert int(state.step) == 150
    assert [line["step"] for line in train_lines] == list(range(1, 151))
    assert abs(train_lines[0]["train/loss"] - math.log(30)) < 0.2
    assert train_lines[-1]["train/loss"] < 0.6 * train_lines[0]["train/loss"]
    assert train_lines[9]["tokens"] == 10 * 4 * 16
    bytes_per_token = data[1].train.bytes_per_token
    assert train_lines[9]["bytes"] == round(10 * 4 * 16 * bytes_per_token)
    for name in ("seconds", "tokens_per_second", "learning_rate", "grad_norm"):
        assert train_lines[9][name] > 0
    assert train_lines[1]["learning_rate"] == pytest.approx(0.01)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == list(range(10, 151, 10))
    assert evaluations[-1]["eval/bits_per_byte"] < evaluations[0]["eval/bits_per_byte"]
    assert lines[-1]["final/documents"] == data[1].held_out.num_documents
    assert lines[-1]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    samples = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- step ") == 8
    assert "--- step 20\nle " in samples
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_resumed_training_equals_uninterrupted_training_to_the_bit(tmp_path: Path, data: tuple) -> None:
    config = replace(CONFIG, steps_at_once=4)  # or one, where something is due sooner
    straight = run_training(tmp_path / "straight", data, config)

    class Stop(Exception):
        pass

    # A fault at step 13, after the checkpoint of step 10: the three steps between are trained a second time.
    tokenizer, tokens, fingerprint = data
    run = open_run(tmp_path / "resumed", fingerprint)
    log = run.log

    def fail_at_13(step: int, **values: float) -> None:
        if step == 13:
            raise Stop
        log(step, **values)

    run.log = fail_at_13  # type: ignore[method-assign]
    with pytest.raises(Stop):
        train(run, tokenizer, tokens, TINY, config)
    first = losses(tmp_path / "resumed")
    resumed = run_training(tmp_path / "resumed", data, config)

    assert_equal_bits(straight, resumed)
    assert max(first) == 12
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert first.items() <= losses(tmp_path / "straight").items()
    for name in ("samples.txt",):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert read_metrics(tmp_path / "resumed")[-1]["seconds"] > 0


def assert_alike(left: Path, right: Path) -> None:
    """The logs of two runs are the same but for rounding and time."""
    lines = [read_metrics(path) for path in (left, right)]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "tokens_per_second", "mfu"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_several_steps_as_one_program_are_the_steps_one_by_one(tmp_path: Path, data: tuple) -> None:
    config = replace(CONFIG, steps_at_once=4)
    assert list(config.programs(0)) == [4, *[1] * 12, 4]  # a checkpoint is due after each fifth step
    assert list(config.programs(13)) == [1, 1, 1, 4]
    assert list(replace(config, spike_factor=2.0).programs(17)) == [1, 1, 1]
    assert config.program_sizes(0) == {1, 4}
    assert replace(config, checkpoint_every=8, eval_every=4).program_sizes(0) == {4}
    rare = replace(config, steps=10**9 + 1, eval_every=10**9, sample_every=10**9, checkpoint_every=10**9)
    assert rare.program_sizes(0) == rare.program_sizes(3) == {1, 4}
    single, several = (
        run_training(tmp_path / str(one.steps_at_once), data, one) for one in (replace(config, steps_at_once=1), config)
    )
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
    assert_alike(tmp_path / "1", tmp_path / "4")
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "4") if "train/loss" in line]
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, data: tuple) -> None:
    first = run_training(tmp_path / "run", data, CONFIG)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = run_training(tmp_path / "run", data, CONFIG)
    assert_equal_bits(first, again)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert "final/loss" in json.loads(metrics.splitlines()[-1])


def test_a_constant_schedule_can_be_prolonged_and_a_cosine_cannot(tmp_path: Path, data: tuple) -> None:
    constant = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=0.01))
    run_training(tmp_path / "run", data, replace(constant, steps=10))
    prolonged = run_training(tmp_path / "run", data, constant)
    assert_equal_bits(prolonged, run_training(tmp_path / "straight", data, constant))
    with pytest.raises(InputError, match="20 steps already, and 10 were asked for"):
        run_training(tmp_path / "run", data, replace(constant, steps=10))
    run_training(tmp_path / "cosine", data, CONFIG)
    with pytest.raises(InputError, match=r"steps \(20 there, 40 asked"):
        open_run(tmp_path / "cosine", data[2], replace(CONFIG, steps=40))


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path, data: tuple) -> None:
    good = replace(CONFIG, steps=5, optimizer=OptimizerConfig(learning_rate=0.01))
    run_training(tmp_path / "run", data, good)
    tokenizer, tokens, fingerprint = data
    bad = replace(good, steps=40)
    run = open_run(tmp_path / "run", fingerprint, bad)
    # Parameters that are finite still, and overflow in the next step.
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    state, record = checkpoints.restore(init_state(TINY, bad), 5), checkpoints.record(5)
    broken = replace(state, params=jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(3e38), state.params))
    checkpoints.save(6, replace(broken, step=broken.step + 1), {**record, "step": 6})
    checkpoints.close()
    with pytest.raises(RunFailed, match=r"diverged at step 7 .* the checkpoint of step 6 is kept"):
        train(run, tokenizer, tokens, TINY, bad)
    kept = Checkpoints(tmp_path / "run" / "checkpoints")
    assert kept.latest_step == 6
    kept.close()


def test_a_signal_saves_and_stops(tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, tokens, fingerprint = data
    run = open_run(tmp_path / "run", fingerprint)
    log = run.log

    def interrupt_at_7(step: int, **values: float) -> None:
        log(step, **values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    run.log = interrupt_at_7  # type: ignore[method-assign]
    with pytest.raises(RunInterrupted, match="after step"):
        train(run, tokenizer, tokens, TINY, CONFIG)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest_step is not None
    assert 8 <= checkpoints.latest_step <= 9
    checkpoints.close()
    assert max(losses(tmp_path / "run")) == checkpoints.latest_step


def test_a_signal_in_the_last_step_is_not_forgotten(
    tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, tokens, fingerprint = data
    run = open_run(tmp_path / "run", fingerprint)
    log_sample = run.log_sample

    def interrupt(step: int, text: str) -> None:
        log_sample(step, text)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "log_sample", interrupt)
    with pytest.raises(RunInterrupted, match="after step 20"):
        train(run, tokenizer, tokens, TINY, CONFIG)
    straight = run_training(tmp_path / "straight", data, CONFIG)
    assert_equal_bits(run_training(tmp_path / "run", data, CONFIG), straight)


def test_two_processes_do_not_train_one_run(tmp_path: Path, data: tuple) -> None:
    tokenizer, tokens, fingerprint = data
    first = open_run(tmp_path / "run", fingerprint)
    first.start(tokenizer, {})
    with pytest.raises(InputError, match=f"Another process .process {os.getpid()} on "):
        train(open_run(tmp_path / "run", fingerprint), tokenizer, tokens, TINY, CONFIG)
    first.close()
    run_training(tmp_path / "run", data, CONFIG)


def test_reading_a_run_leaves_a_save_in_progress_alone(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "run", data, CONFIG)
    unfinished = tmp_path / "run" / "checkpoints" / "25.orbax-checkpoint-tmp"
    unfinished.mkdir()
    load_trained(tmp_path / "run")
    assert unfinished.exists()


def test_the_best_evaluation_is_kept(tmp_path: Path, data: tuple) -> None:
    # The rate is so high in the end that an evaluation before the last stays the best.
    config = replace(
        CONFIG, steps=60, eval_every=6, checkpoint_every=50, keep_checkpoints=1,
        optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=50),
    )  # fmt: skip
    run_training(tmp_path / "run", data, config)
    scores = {
        line["step"]: line["eval/bits_per_byte"] for line in read_metrics(tmp_path / "run") if "eval/loss" in line
    }
    best = min(scores, key=lambda step: scores[step])
    assert best < 60
    kept = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {best, 60}


def test_a_second_signal_stops_at_once() -> None:
    with _Signals() as signals:
        signals._note(2, None)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            signals._note(2, None)


def test_load_trained_gives_back_the_model_of_the_run(tmp_path: Path, data: tuple) -> None:
    state = run_training(tmp_path / "run", data, CONFIG)
    tokenizer, model, params = load_trained(tmp_path / "run")
    assert tokenizer.hash == data[0].hash
    assert model == TINY
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_load_trained_without_a_checkpoint_says_so(tmp_path: Path, data: tuple) -> None:
    with pytest.raises(InputError, match="There is no run"):
        load_trained(tmp_path / "nothing")
    open_run(tmp_path / "run", data[2]).start(data[0], {})
    with pytest.raises(InputError, match="no checkpoint"):
        load_trained(tmp_path / "run")


def test_config_records_the_environment_and_the_tokenizer(tmp_path: Path, data: tuple) -> None:
    open_run(tmp_path / "run", data[2]).start(data[0], {"devices": ["test"]})
    config = read_config(tmp_path / "run")
    assert config["environment"] == {"devices": ["test"]}
    assert config["tokenizer_hash"] == data[0].hash


def damage(folder: Path) -> None:
    """One byte of the largest file of a checkpoint."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_leads_to_the_same_bits(
    tmp_path: Path, data: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = run_training(tmp_path / "straight", data, CONFIG)
    run_training(tmp_path / "run", data, CONFIG)
    damage(tmp_path / "run" / "checkpoints" / "20")
    capsys.readouterr()
    assert_equal_bits(straight, run_training(tmp_path / "run", data, CONFIG))
    text = capsys.readouterr().out.replace("\n", " ")
    assert "The checkpoint of step 20 is broken" in text
    assert "Continuing" in text and "after step 15" in text, text
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "broken_checkpoints").iterdir()] == ["20"]
    damage(tmp_path / "run" / "checkpoints" / "20")
    capsys.readouterr()
    assert int(jax.tree.leaves(load_trained(tmp_path / "run")[2])[0].size) > 0, "a reader takes the one before, too"
    assert "is broken" in capsys.readouterr().out
    assert saved_steps(tmp_path / "run" / "checkpoints") == {15, 20}, "and leaves it where it is"
    assert [path.name for path in (tmp_path / "run" / "broken_checkpoints").iterdir()] == ["20"]


def test_when_all_checkpoints_are_broken_the_run_says_so_and_stops(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "run", data, CONFIG)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for folder in kept:
        damage(folder)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"All checkpoints of .* are broken"):
            run_training(tmp_path / "run", data, replace(CONFIG))
    assert len(list((tmp_path / "run" / "broken_checkpoints").iterdir())) == len(kept)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


# ---- several runs as one program

TOGETHER = [CONFIG, replace(CONFIG, seed=5, optimizer=replace(CONFIG.optimizer, learning_rate=0.02))]


def run_together(path: Path, data: tuple, configs: Sequence[TrainConfig] = TOGETHER) -> list[TrainState | RunFailed]:
    tokenizer, tokens, fingerprint = data
    runs = [open_run(path / str(index), fingerprint, config) for index, config in enumerate(configs)]
    states = train_together(runs, tokenizer, tokens, TINY, configs, Reporter())
    for run, config, state in zip(runs, configs, states, strict=True):
        if not isinstance(state, RunFailed):
            evaluate_run(run, tokenizer, tokens, TINY, config, state)
    return states


def test_runs_end_together_as_they_end_alone(tmp_path: Path, data: tuple) -> None:
    configs = [replace(config, steps_at_once=4) for config in TOGETHER]  # or one, where something is due sooner
    states = run_together(tmp_path / "together", data, configs)
    for index, (config, state) in enumerate(zip(TOGETHER, states, strict=True)):
        alone = run_training(tmp_path / "alone" / str(index), data, config)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
        assert_alike(tmp_path / "alone" / str(index), tmp_path / "together" / str(index))
        nats = np.load(tmp_path / "together" / str(index) / NATS_FILE)
        assert nats.sum() / math.log(2) / data[1].held_out.document_bytes.sum() == pytest.approx(
            read_metrics(tmp_path / "together" / str(index))[-1]["final/bits_per_byte"]
        )


def test_runs_that_saved_unequally_go_on_from_what_all_have_to_the_same_bits(tmp_path: Path, data: tuple) -> None:
    straight = run_together(tmp_path / "straight", data)

    class Killed(Exception):
        pass

    save = Checkpoints.save
    saves = []

    def killed(self: Checkpoints, step: int, *arguments: object, **keywords: object) -> None:
        saves.append(step)
        if len(saves) == 6:  # the second of two runs, at the third step to be saved
            raise Killed
        save(self, step, *arguments, **keywords)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Killed):
            run_together(tmp_path / "broken", data)
    assert saves == [5, 5, 10, 10, 15, 15]
    for a, b in zip(straight, run_together(tmp_path / "broken", data), strict=True):
        assert_equal_bits(a, b)
    for index in range(2):
        assert losses(tmp_path / "straight" / str(index)) == losses(tmp_path / "broken" / str(index))
    metrics = (tmp_path / "broken" / "1" / "metrics.jsonl").read_text()
    run_together(tmp_path / "broken", data)
    assert (tmp_path / "broken" / "1" / "metrics.jsonl").read_text() == metrics, "finished runs are left as they are"


def test_runs_without_a_common_intact_checkpoint_keep_those_that_they_have(tmp_path: Path, data: tuple) -> None:
    run_together(tmp_path, data)
    for index, step in ((0, 20), (1, 15)):
        damage(tmp_path / str(index) / "checkpoints" / str(step))
    with pytest.raises(RunFailed, match="no step in common with intact checkpoints"):
        run_together(tmp_path, data)
    assert [saved_steps(tmp_path / str(index) / "checkpoints") for index in range(2)] == [{15}, {20}]


def test_runs_whose_checkpoints_have_no_step_in_common_keep_them(tmp_path: Path, data: tuple) -> None:
    run_together(tmp_path, data)
    for index, step in ((0, 20), (1, 15)):
        shutil.rmtree(tmp_path / str(index) / "checkpoints" / str(step))
    with pytest.raises(RunFailed, match="no step in common with intact checkpoints"):
        run_together(tmp_path, data)
    assert [saved_steps(tmp_path / str(index) / "checkpoints") for index in range(2)] == [{15}, {20}]


def test_a_run_that_diverges_leaves_the_others_alone(
    tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, limit = list[int](), Faults.limit
    monkeypatch.setattr(Faults, "limit", lambda faults, step: asked.append(step) or limit(faults, step))
    wild = replace(CONFIG, optimizer=replace(CONFIG.optimizer, learning_rate=1e30))
    bad, good = run_together(tmp_path / "run", data, [wild, CONFIG])
    assert set(asked) == set(range(1, 21)), "jumps are looked for in the other one's steps"
    assert isinstance(bad, RunFailed)
    assert "diverged at step" in str(bad)
    alone = run_training(tmp_path / "alone", data, CONFIG)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(good), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
    with pytest.raises(RunFailed, match="diverged"):
        run_training(tmp_path / "wild", data, wild)


# ---- steps at fault


def fault_at(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Lets no loss be low enough in these steps, whatever the batch."""
    make = loop.make_train_step

    def make_faulty(*arguments: Any) -> Callable[..., Any]:
        step = make(*arguments)

        def faulty(state: TrainState, batch: jax.Array, limit: jax.Array) -> Any:
            return step(state, batch, jnp.where(jnp.isin(state.step + 1, jnp.array(steps)), -math.inf, limit))

        return faulty

    patch.setattr(loop, "make_train_step", make_faulty)


def kept_record(path: Path) -> dict[str, Any]:
    """The newest checkpoint's record."""
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    record = checkpoints.record(max(checkpoints.steps))
    checkpoints.close()
    return record


def test_a_fault_stops_the_run_with_its_figures_and_the_run_can_go_on_without_the_step(
    tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault_at(monkeypatch, 8)
    with pytest.raises(RunFailed, match=r"step 8 \(batch 7, loss .*, gradient norm .*the checkpoint of step 5 is kept"):
        run_training(tmp_path / "run", data, CONFIG)
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["step"], last["skipped"], last["batch"]) == (8, 1, 7)
    assert last["grad_norm"] > 0
    assert open_run(tmp_path / "run", data[2]).failure(CONFIG.fault_policy) is not None
    skipping = replace(CONFIG, on_fault="skip")
    resumed = run_training(tmp_path / "run", data, skipping)
    assert open_run(tmp_path / "run", data[2]).failure(CONFIG.fault_policy) is None
    assert_equal_bits(resumed, run_training(tmp_path / "straight", data, skipping))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_skipped_batch_is_one_that_was_never_there_and_rewinding_ends_alike(
    tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps_at_once=5)
    fault_at(monkeypatch, 3, 12, 13)
    ends = {}
    for policy in ("skip", "rewind"):
        ends[policy] = run_training(tmp_path / policy, data, replace(config, on_fault=policy))  # type: ignore[arg-type]
        lines = read_metrics(tmp_path / policy)
        assert [(line["step"], line["batch"]) for line in lines if line.get("skipped")] == [(3, 2), (12, 11), (13, 12)]
        assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 21)), "each step once"
        seconds = [line["seconds"] for line in lines if "train/loss" in line]
        assert seconds == sorted(seconds) or policy == "rewind", "the clock goes on"
        assert kept_record(tmp_path / policy)["faults"]["skipped"] == [3, 12, 13]
    assert_equal_bits(ends["skip"], ends["rewind"])
    assert losses(tmp_path / "skip") == losses(tmp_path / "rewind")
    samples = [(tmp_path / policy / "samples.txt").read_bytes() for policy in ends]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("stops", [[21, 26, 33]])
def test_what_counts_as_a_jump_is_the_same_after_a_resume(tmp_path: Path, data: tuple, stops: list[int]) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-7)  # so slow that every other loss is over the mean
    config = replace(CONFIG, steps=40, on_fault="skip", spike_factor=1.001, optimizer=optimizer)
    straight = run_training(tmp_path / "straight", data, config)
    skipped = [line["step"] for line in read_metrics(tmp_path / "straight") if line.get("skipped")]
    assert skipped, "or there is nothing to see"
    assert len(skipped) < 15
    for step in stops:
        run = open_run(tmp_path / "run", data[2], config)
        run.log = interrupted_at(run.log, step)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            train(run, data[0], data[1], TINY, config)
    assert_equal_bits(straight, run_training(tmp_path / "run", data, config))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_ten_faults_in_a_row_stop_the_run_whatever_the_policy(
    policy: str, tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault_at(monkeypatch, *range(6, 21))
    config = replace(CONFIG, on_fault=policy, steps_at_once=5)  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match="diverged at step 15 "):
        run_training(tmp_path / "run", data, config)
    assert open_run(tmp_path / "run", data[2]).failure(config.fault_policy) is not None


def test_speed_is_measured_anew_after_going_back(tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    fault_at(monkeypatch, 13)
    run_training(tmp_path / "run", data, replace(CONFIG, on_fault="rewind"))
    assert all(line["tokens_per_second"] > 0 for line in read_metrics(tmp_path / "run") if "tokens_per_second" in line)


def test_skipping_is_advised_only_where_it_helps(tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    fault_at(monkeypatch, *range(3, 21))
    with pytest.raises(RunFailed, match=r"step 12 \(the tenth at fault in a row: .* with a lower learning rate\.$"):
        run_training(tmp_path / "run", data, replace(CONFIG, on_fault="skip"))
    run = open_run(tmp_path / "run", data[2])
    assert run.failure(replace(CONFIG, on_fault="skip").fault_policy) is not None
    assert run.failure(CONFIG.fault_policy) is None, "under another policy it may go well"


def test_runs_that_train_together_cannot_be_rewound(tmp_path: Path, data: tuple) -> None:
    with pytest.raises(InputError, match="don't go back together"):
        run_together(tmp_path, data, [replace(config, on_fault="rewind") for config in TOGETHER])


# ---- other weights, another text, another tokenizer, an earlier version


def test_a_warm_start_begins_with_the_parameters_of_another_run_and_needs_it_no_more(
    tmp_path: Path, data: tuple
) -> None:
    source = run_training(tmp_path / "source", data, CONFIG)
    tokenizer, tokens, fingerprint = data
    warm_tokenizer, params = load_warm_start(tmp_path / "source", SETTINGS, TINY)
    assert warm_tokenizer.hash == tokenizer.hash
    assert_equal_bits(source.params, params)  # type: ignore[arg-type]

    def run_warm(path: Path, params: Any, interrupt_at: int | None = None) -> TrainState:
        run = open_run(path, fingerprint, config, warm_start="source")
        if interrupt_at is not None:
            run.log = interrupted_at(run.log, interrupt_at)  # type: ignore[method-assign]
        return train(run, tokenizer, tokens, TINY, config, params)

    config = replace(CONFIG, seed=9)
    straight = run_warm(tmp_path / "straight", params)
    assert float(losses(tmp_path / "straight")[1]) < 0.8 * float(losses(tmp_path / "source")[1])
    with pytest.raises(KeyboardInterrupt):
        run_warm(tmp_path / "resumed", params, interrupt_at=3)
    assert saved_steps(tmp_path / "resumed" / "checkpoints") == {0}
    assert_equal_bits(straight, run_warm(tmp_path / "resumed", None))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    with pytest.raises(InputError, match=r"warm_start \(source there, None asked for\)"):
        open_run(tmp_path / "resumed", fingerprint, config)


def test_a_warm_start_from_what_does_not_fit_names_the_difference(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "source", data, replace(CONFIG, steps=5))
    with pytest.raises(InputError, match=r"kind \(char there, bpe asked for\), width \(16 there, 32 asked for\)"):
        load_warm_start(tmp_path / "source", {**SETTINGS, "kind": "bpe"}, replace(TINY, width=32))
    with pytest.raises(InputError, match="context"):
        load_warm_start(tmp_path / "source", SETTINGS, replace(TINY, context=8))
    load_warm_start(tmp_path / "source", SETTINGS, replace(TINY, dropout=0.0, window=4))
    with pytest.raises(InputError, match="There is no run"):
        load_warm_start(tmp_path / "nothing", SETTINGS, TINY)


def interrupted_at(log: Callable[..., None], step: int) -> Callable[..., None]:
    """A log that stops the run when this step is to be written."""

    def interrupted(number: int, **values: float) -> None:
        if number == step:
            raise KeyboardInterrupt
        log(number, **values)

    return interrupted


def test_another_corpus_is_refused_with_both_hashes_and_accepted_if_that_is_asked_for(
    tmp_path: Path, data: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, tokens, fingerprint = data
    constant = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=0.01))
    run_training(tmp_path / "run", data, replace(constant, steps=10))
    other = "f" * 64
    with pytest.raises(InputError, match=rf"corpus \({fingerprint[:12]}\.\.\. there, f{{12}}.*by --accept corpus\."):
        open_run(tmp_path / "run", other, constant, accept=[])
    with pytest.raises(InputError, match=r"repeat its settings\."):
        open_run(tmp_path / "run", other, constant)
    capsys.readouterr()
    run = open_run(tmp_path / "run", other, constant, accept=["corpus"])
    train(run, tokenizer, tokens, TINY, constant)
    text = capsys.readouterr().out
    assert "Going on with another corpus" in text and "after step 10" in text
    assert read_config(tmp_path / "run")["identity"]["corpus"] == other
    assert kept_record(tmp_path / "run")["run"]["identity"]["corpus"] == other
    again = open_run(tmp_path / "run", other, constant)
    train(again, tokenizer, tokens, TINY, constant)
    back = open_run(tmp_path / "run", fingerprint, constant, accept=["corpus"])
    with pytest.raises(InputError, match="has all its 20 steps already, and was scored on what it had"):
        train(back, tokenizer, tokens, TINY, constant)
    assert read_config(tmp_path / "run")["identity"]["corpus"] == other
    with pytest.raises(InputError, match="corpus"):
        open_run(tmp_path / "run", fingerprint, constant)


def test_another_tokenizer_is_refused_with_both_hashes_and_accepted_if_that_is_asked_for(
    tmp_path: Path, data: tuple
) -> None:
    tokenizer, tokens, fingerprint = data
    constant = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=0.01))
    run_training(tmp_path / "run", data, replace(constant, steps=10))
    other = CharTokenizer(tokenizer.characters[::-1])
    assert other.hash != tokenizer.hash
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match=f"{tokenizer.hash[:12]}, .* {other.hash[:12]}; .* by --accept tokenizer"):
        train(open_run(tmp_path / "run", fingerprint, constant, accept=[]), other, tokens, TINY, constant)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    train(open_run(tmp_path / "run", fingerprint, constant, accept=["tokenizer"]), other, tokens, TINY, constant)
    stored = open_run(tmp_path / "run", fingerprint, constant).tokenizer()
    assert stored is not None
    assert stored.hash == other.hash == kept_record(tmp_path / "run")["run"]["tokenizer_hash"]


def test_a_checkpoint_that_was_copied_from_another_run_is_refused(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "other", data, replace(CONFIG, seed=1))
    run_training(tmp_path / "run", data, CONFIG)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "20", tmp_path / "run" / "checkpoints" / "20")
    with pytest.raises(InputError, match=r"checkpoint of step 20 .* another run, which differs in seed \(1 there, 0 "):
        run_training(tmp_path / "run", data, CONFIG)


def test_a_checkpoint_of_another_model_is_not_taken_for_a_broken_one(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "run", data, replace(CONFIG, steps=5))
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"width": 16', '"width": 8'))
    with pytest.raises(InputError, match=r"step 5 .* isn't of the model in config\.json"):
        load_trained(tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints") == {5}


def test_a_checkpoint_describes_its_run(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "run", data, replace(CONFIG, steps=5))
    described = kept_record(tmp_path / "run")["run"]
    assert described["identity"]["corpus"] == data[2]
    assert described["identity"]["model"]["width"] == 16
    assert described["tokenizer_hash"] == data[0].hash
    assert described["environment"]["jax"] == jax.__version__
    assert "git_commit" in described["environment"]


def test_a_run_from_before_there_was_a_setting_has_its_default(tmp_path: Path, data: tuple) -> None:
    straight = run_training(tmp_path / "straight", data, CONFIG)
    run_training(tmp_path / "run", data, CONFIG)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_bytes())
    del config["identity"]["model"]["input_tokens"], config["identity"]["optimizer"]["muon_learning_rate"]
    del config["environment"]["git_commit"]
    file.write_text(json.dumps(config))
    assert_equal_bits(straight, run_training(tmp_path / "run", data, CONFIG))
    assert load_trained(tmp_path / "run")[1] == TINY


def test_nothing_is_written_by_a_start_that_comes_too_late(tmp_path: Path, data: tuple) -> None:
    tokenizer, _, fingerprint = data
    late = open_run(tmp_path / "run", fingerprint, replace(CONFIG, seed=9))
    first = open_run(tmp_path / "run", fingerprint)
    first.start(tokenizer, {})
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = CharTokenizer(tokenizer.characters[::-1])
    with pytest.raises(InputError, match="Another process"):
        late.start(other, {})
    first.close()
    with pytest.raises(InputError, match=r"taken meanwhile by another run, which differs in seed \(0 there, 9 asked"):
        late.start(other, {})
    late.close()
    (tmp_path / "run" / "lock").write_bytes(files[tmp_path / "run" / "lock"])
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_nothing_is_accepted_by_a_run_that_does_not_go_on(tmp_path: Path, data: tuple) -> None:
    tokenizer, tokens, fingerprint = data
    constant = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=0.01))
    run_training(tmp_path / "run", data, replace(constant, steps=10))
    shorter = replace(constant, steps=5)
    with pytest.raises(InputError, match="10 steps already"):
        train(open_run(tmp_path / "run", "f" * 64, shorter, accept=["corpus"]), tokenizer, tokens, TINY, shorter)
    assert read_config(tmp_path / "run")["identity"]["corpus"] == fingerprint


def test_a_step_that_is_waited_for_has_its_own_time_also_where_something_is_due(
    tmp_path: Path, data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(mesh: object, results: object) -> bool:
        jax.block_until_ready(results)
        time.sleep(0.02)
        return True

    monkeypatch.setattr(loop, "one_at_a_time", wait)
    run_training(tmp_path / "run", data, CONFIG)
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert len(seconds) == 20
    assert np.diff([0.0, *seconds]).min() > 0.019


def test_a_damaged_log_is_said_before_anything_is_cut_back(tmp_path: Path, data: tuple) -> None:
    run_training(tmp_path / "run", data, replace(CONFIG, steps=20))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], b"?" * len(lines[1]), *lines[2:]]))
    before = file.read_bytes()
    with pytest.raises(InputError, match="line 2 is damaged"):
        run_training(tmp_path / "run", data, CONFIG)
    assert file.read_bytes() == before
