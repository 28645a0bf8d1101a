"""The comparison: equal budgets, learning rates from the same grid, a sweep that goes on where it stopped, a report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import compare_tokenizers, sweep
from experiments.arms import Arm, Spec, make_arm, make_tokenizer, specs, with_budget, with_parameters
from experiments.command_line import parse
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import survey_corpus
from jaxlm.model import ModelConfig, abstract_params, count_parameters, init
from jaxlm.runs import RunFailed, read_metrics
from jaxlm.tokenizers import BPETokenizer, InputError
from jaxlm.training import TrainConfig

MODEL = ModelConfig(300, context=32, width=16, num_layers=1, num_heads=2, feed_forward_width=32, dropout=0.0)
TINY = (
    "--width 16 --num-heads 2 --num-layers 1 --feed-forward-width 32 --context 32 --eval-every 6 --sample-every 12 "
    "--checkpoint-every 6 --log-every 1 --eval-documents 2 --corpus-bytes 60000 --batch-size 4 --steps 12 --seeds 2 "
    "--rate-factors 0.5 4"
).split()


def compare(workdir: Path, *flags: str) -> None:
    compare_tokenizers.main(parse(["--workdir", str(workdir), *TINY, *flags], compare_tokenizers.PRESETS, "x"))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("metrics.jsonl")}


def test_a_comparison_from_its_flags_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--tokenizers char sentencepiece-bpe --characters 60 --vocab-sizes 400 280".split()
    compare(tmp_path, *flags)
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    names = ["char-60", "sentencepiece-bpe-400"]
    assert [arm["name"] for arm in results["arms"]] == names
    (left_out,) = results["left_out"]
    assert left_out["name"] == "sentencepiece-bpe-280"
    assert "SentencePiece" in left_out["reason"] and "left out: sentencepiece-bpe-280" in text
    assert results["answer"] in " ".join(text.split())

    budget = results["budget"]["size"]
    for arm in results["arms"]:
        # The quick preset's windows are equal in bytes, and so are its updates.
        assert arm["bytes"] == pytest.approx(budget, rel=0.06)
        assert arm["context_bytes"] == pytest.approx(32, rel=0.05)
        assert arm["updates"] in (11, 12, 13)
        assert arm["tokens"] == arm["updates"] * 4 * arm["context"]
        scored = {entry["factor"]: entry["bits_per_byte"] for entry in arm["grid"]}
        assert set(scored) == {0.5, 4.0}
        best = min(scored, key=lambda factor: scored[factor])
        assert arm["learning_rate"] == pytest.approx(best * 0.02)
        for seed in (0, 1):
            final = read_metrics(tmp_path / "arms" / arm["name"] / f"rate-{best:g}" / f"seed-{seed}")[-1]
            assert final["final/bits_per_byte"] == arm["by_seed"][seed]
            assert final["step"] == arm["updates"]
        assert [sample["seed"] for sample in arm["samples"]] == [0, 1]
        assert arm["bits_per_byte"] == pytest.approx(np.mean(arm["by_seed"]))
        assert arm["low"] < arm["bits_per_byte"] < arm["high"]
        assert f"{arm['bits_per_byte']:.4f}" in text
    assert len(results["differences"]) == 1
    rows = results["evaluations"]
    assert {(row["arm"], row["seed"]) for row in rows} == {(name, seed) for name in names for seed in (0, 1)}
    assert sum(row["final"] for row in rows) == 4
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    assert "sentencepiece-bpe-280" in page
    assert list((tmp_path / "figures").glob("*.png"))

    before = everything(tmp_path)
    compare(tmp_path, *flags)
    assert everything(tmp_path) == before, "what is finished is not trained again"


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--tokenizers char bpe --characters 60 --vocab-size 300".split()
    compare(tmp_path / "straight", *flags)

    class Killed(Exception):
        pass

    train_together = sweep.train_together
    calls: list[str] = []

    def killed(runs: Sequence, *arguments: object) -> list:
        calls.append(str(runs[0].path.relative_to(tmp_path / "broken" / "arms")))
        if len(calls) == 4:
            raise Killed
        return train_together(runs, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "train_together", killed)
    with pytest.raises(Killed):
        compare(tmp_path / "broken", *flags)
    assert [call.replace("-4", "-0.5") for call in calls] == [
        "char-60/grid/0.5", "char-60/rate-0.5/seed-0", "bpe-300/grid/0.5", "bpe-300/rate-0.5/seed-0",
    ]  # fmt: skip
    assert not (tmp_path / "broken" / "results.json").exists()
    compare(tmp_path / "broken", *flags)
    assert calls[4:] == [calls[3]], "finished arms and rates are not trained again"
    scores = [
        [arm["by_seed"] for arm in json.loads((tmp_path / name / "results.json").read_bytes())["arms"]]
        for name in ("straight", "broken")
    ]
    assert scores[0] == scores[1]


def test_a_failed_arm_is_shown_with_its_reason_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--tokenizers char bpe --characters 60 --vocab-size 300".split()
    train_together = sweep.train_together

    def diverging(runs: Sequence, *arguments: object) -> list:
        states = train_together(runs, *arguments)  # type: ignore[arg-type]
        for index, run in enumerate(runs):
            if run.path.name == "seed-1" and "char" in str(run.path):
                run.fail("The run diverged at step 7.", TrainConfig().fault_policy)
                states[index] = RunFailed("The run diverged at step 7.")
        return states

    monkeypatch.setattr(sweep, "train_together", diverging)
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"1 of 2 arms failed: char-60 \(Seed 1: The run diverged at step 7"):
            compare(tmp_path, *flags)
        results = json.loads((tmp_path / "results.json").read_bytes())
        assert [arm["status"] for arm in results["arms"]] == ["failed", "done"]
        assert results["arms"][0]["reason"] == "Seed 1: The run diverged at step 7."
        assert "The run diverged at step 7." in (tmp_path / "report.html").read_text(encoding="utf-8")
        monkeypatch.setattr(sweep, "train_together", lambda *_: pytest.fail("a failed run is not tried again"))


@pytest.mark.parametrize("together", ["1", "2"])
def test_a_rate_that_diverges_leaves_the_others_to_choose_from(tmp_path: Path, together: str) -> None:
    flags = f"--tokenizers char --characters 60 --rate-factors 1 1e30 --seeds 1 --together {together}".split()
    compare(tmp_path, *flags)
    (arm,) = json.loads((tmp_path / "results.json").read_bytes())["arms"]
    assert [entry["bits_per_byte"] is None for entry in arm["grid"]] == [False, True]
    assert (
        "diverged"
        in json.loads((tmp_path / "arms" / "char-60" / "grid" / "1e+30" / "failed.json").read_text())["reason"]
    )
    before = everything(tmp_path)
    compare(tmp_path, *flags)
    assert everything(tmp_path) == before


def test_when_every_rate_diverges_the_arm_has_failed(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="Every learning rate of the grid diverged"):
        compare(tmp_path, *"--tokenizers char --characters 60 --rate-factors 1e30 1e32 --clip-norm None".split())


def test_a_program_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_together = sweep.train_together
    sizes: list[int] = []

    def small(runs: Sequence, *arguments: object) -> list:
        sizes.append(len(runs))
        if len(runs) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return train_together(runs, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "train_together", small)
    compare(tmp_path, *"--tokenizers char --characters 60 --seeds 5 --rate-factors 1".split())
    assert sizes == [5, 2, 2, 1]
    (arm,) = json.loads((tmp_path / "results.json").read_bytes())["arms"]
    assert len(arm["by_seed"]) == 5


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path / "run", "--dry-run", *"--tokenizers bytes bpe --vocab-size 300".split())
    text = capsys.readouterr().out
    assert "bytes" in text and "bpe-300" in text and "minutes" in text and "FLOPs" in text
    assert not (tmp_path / "run").exists()


# ---- arms


def arm_of(family: str, vocab_size: int, unit: str = "tokens", model: ModelConfig = MODEL) -> Arm:
    corpus = open_corpus("builtin", max_bytes=60_000)
    survey = survey_corpus(corpus)
    spec = Spec("x", family, vocab_size, (model.num_layers, model.width))
    made = make_tokenizer(spec, corpus, survey, Path("nowhere"))
    return make_arm(spec, made, corpus, survey, model, TrainConfig(steps=10, batch_size=4), unit)  # type: ignore[arg-type]


def test_a_budget_is_met_in_its_unit_as_nearly_as_whole_updates_allow() -> None:
    for family, size in (("bytes", 257), ("char", 60), ("bpe", 400)):
        arm = arm_of(family, size)
        per_token = {"bytes": arm.data.train.bytes_per_token, "tokens": 1.0, "flops": float(arm.flops)}
        for unit, cost in per_token.items():
            budget = 100_000 * cost
            steps = with_budget(arm, unit, budget).training.steps  # type: ignore[arg-type]
            assert abs(steps * 4 * 32 * cost - budget) <= 4 * 32 * cost / 2 + 1e-6
    assert with_budget(arm, "bytes", 1.0).training.steps == 1


def test_flops_count_head_and_embedding() -> None:
    arm = arm_of("bpe", 400)
    matrices = 3 * 16 * 16 + 16 * 16 + 2 * 16 * 32 + 16 * 400
    attention = 12 * 16 * (32 + 1) / 2
    assert arm.flops == round(6 * matrices + attention) + 2 * 16
    assert arm.embedding_parameters == 2 * 16 * 400 + 400
    assert arm.parameters == count_parameters(init(arm.model, jax.random.key(0)))


def test_windows_equal_in_bytes_hold_fewer_tokens_of_a_larger_vocabulary() -> None:
    for family, size in (("char", 60), ("bpe", 400)):
        arm = arm_of(family, size, "bytes")
        assert arm.model.context == round(32 / arm.data.train.bytes_per_token)
        assert arm.bytes_per_update == pytest.approx(4 * 32, rel=0.06)


def test_parameters_are_matched_by_the_nearest_width() -> None:
    arm = arm_of("bpe", 400)

    def size(width: int) -> int:
        model = replace(arm.model, width=width, feed_forward_width=2 * width)
        return count_parameters(abstract_params(model))

    for target in (1, 5_000, 20_000):
        matched = with_parameters(arm, target)
        nearest = min(range(2, 40, 2), key=lambda width: abs(size(width) - target))
        assert matched.model.width == nearest
        assert matched.parameters == size(nearest)
        assert matched.model.feed_forward_width == 2 * nearest


def test_those_that_saved_unequally_go_on_in_groups_that_repeat_little() -> None:
    def groups(*steps: set[int]) -> list[list[int]]:
        return sweep.by_progress(range(len(steps)), steps)

    assert groups(set(), set(), set()) == [[0, 1, 2]]
    assert groups({5, 10}, {10, 15}, {5, 10}) == [[0, 1, 2]], "a kill between two saves"
    assert groups({400, 500}, set(), {500}, {5}) == [[1], [3], [0, 2]]
    assert groups({75}, set()) == [[1], [0]]


def test_names_of_arms(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    BPETokenizer.train(["le chat"], 260).save(own)
    found = specs(["bytes", "char", "bpe-gpt2", str(own)], [300, 500], 98, [(2, 128), (4, 64)])
    own.rename(tmp_path / "run")
    BPETokenizer.train(["le chat"], 260).save(tmp_path / "run" / "tokenizer")
    assert specs([str(tmp_path / "run" / "tokenizer")], [], 98, [(2, 128)])[0].name == "run"
    assert [spec.name for spec in found if spec.size == (4, 64)] == [
        "bytes-4x64", "char-98-4x64", "bpe-gpt2-300-4x64", "bpe-gpt2-500-4x64", "mine-4x64",
    ]  # fmt: skip
    assert found[-1].vocab_size is None
    with pytest.raises(InputError, match="two arms bpe-300"):
        specs(["bpe"], [300, 300], 98, [(2, 128)])


@given(st.integers(0, 20), st.integers(1, 8), st.none() | st.integers(1, 9))
def test_groups_fill_the_devices_or_are_single(count: int, devices: int, most: int | None) -> None:
    groups = sweep.in_groups(list(range(count)), devices, most)
    assert [item for group in groups for item in group] == list(range(count))
    for group in groups:
        assert len(group) == 1 or len(group) % devices == 0
        assert most is None or len(group) <= most
    if (most or count) >= devices:  # no more alone than a full group leaves over
        assert sum(len(group) < devices for group in groups) < devices


def test_a_budget_in_seconds_is_measured_once(tmp_path: Path) -> None:
    flags = "--tokenizers char --characters 60 --budget seconds --budget-size 0.2 --rate-factors 1 --seeds 1".split()
    compare(tmp_path, *flags)
    kept = tmp_path / "arms" / "char-60" / "updates-in-0.2-seconds.json"
    steps = json.loads(kept.read_bytes())["updates"]
    compare(tmp_path, *flags)
    (arm,) = json.loads((tmp_path / "results.json").read_bytes())["arms"]
    assert arm["updates"] == steps
    assert math.isfinite(arm["bits_per_byte"])
