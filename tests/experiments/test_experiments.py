"""The four experiments from their flags to what they leave behind, on little text and tiny models."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import bpe_lm, bpe_tokenizer, char_lm
from experiments.command_line import parse
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import held_out_documents, survey_corpus
from jaxlm.runs import read_metrics
from jaxlm.tokenizers import InputError, load_tokenizer
from jaxlm.training import load_trained

ROOT = Path(__file__).parents[2]
TINY = (
    "--width 16 --num-heads 2 --num-layers 1 --context 32 --eval-every 10 --sample-every 20 "
    "--checkpoint-every 10 --log-every 1 --eval-documents 2 --corpus-bytes 60000"
).split()


def test_char_lm_trains_shows_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workdir", str(tmp_path / "run"), "--vocab-size", "80", "--steps", "20", *TINY]
    char_lm.main(parse(flags, char_lm.PRESETS, "x"))
    text = capsys.readouterr().out
    assert "bits per byte" in text
    assert "positions" in text
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert set(os.listdir(tmp_path / "run")) == {
        "config.json", "tokenizer", "metrics.jsonl", "tensorboard", "samples.txt", "checkpoints", "lock",
        "learning_curve.png", "final_nats.npy",
    }  # fmt: skip

    outputs = []
    for _ in range(2):
        flags = ["--workdir", str(tmp_path / "run"), "--sample", "La ville de", "--num-tokens", "20", "--top-k", "5"]
        char_lm.main(parse(flags, char_lm.PRESETS, "x"))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("La ville de")
    assert len(outputs[0]) > len("La ville de\n")


def test_char_lm_begins_from_the_weights_of_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*flags: str) -> None:
        char_lm.main(parse([*TINY, *flags], char_lm.PRESETS, "x"))

    monkeypatch.chdir(tmp_path)
    run("--workdir", "a", "--vocab-size", "80", "--steps", "20")
    run("--workdir", "b", "--vocab-size", "80", "--steps", "10", "--warm-start", "a", "--dropout", "0.1")
    shutil.rmtree("a")
    run("--workdir", "b", "--vocab-size", "80", "--steps", "10", "--warm-start", "a", "--dropout", "0.1")
    assert load_tokenizer("b/tokenizer").vocab_size == 80
    with pytest.raises(InputError, match="There is no run in a"):
        run("--workdir", "c", "--vocab-size", "80", "--steps", "10", "--warm-start", "a")
    with pytest.raises(
        InputError, match=r"b is no warm start for this run, since it differs in vocab_size \(80 there, 70 asked"
    ):
        run("--workdir", "c", "--vocab-size", "70", "--steps", "10", "--warm-start", "b")
    assert not Path("c").exists()


def test_bpe_lm_trains_on_its_own_tokenizer(tmp_path: Path) -> None:
    flags = ["--workdir", str(tmp_path / "run"), "--vocab-size", "300", "--steps", "10", *TINY]
    bpe_lm.main(parse(flags, bpe_lm.PRESETS, "x"))
    tokenizer, model, _ = load_trained(tmp_path / "run")
    assert (tokenizer.kind, tokenizer.vocab_size, model.vocab_size) == ("bpe", 300, 300)
    final = read_metrics(tmp_path / "run")[-1]
    corpus = open_corpus("builtin", max_bytes=60_000)
    texts = list(held_out_documents(corpus, survey_corpus(corpus)))
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert final["final/bytes_per_token"] == pytest.approx(num_bytes / num_tokens)
    assert final["final/bits_per_byte"] == pytest.approx(final["final/loss"] / np.log(2) * num_tokens / num_bytes)


def test_bpe_tokenizer_shows_how_it_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workdir", str(tmp_path), "--vocab-size", "400", "--corpus-bytes", "60000"]
    bpe_tokenizer.main(parse(flags, bpe_tokenizer.PRESETS, "x"))
    text = capsys.readouterr().out
    assert "SentencePiece unigram" in text
    assert "L|'" in text, "tokens are divided by bars where there is no colour"
    assert load_tokenizer(tmp_path).vocab_size == 400
    assert (tmp_path / "tokenizers.png").read_bytes().startswith(b"\x89PNG")
    by_steps = parse(
        ["--workdir", str(tmp_path / "b"), "--steps", "143", "--corpus-bytes", "60000"], bpe_tokenizer.PRESETS, "x"
    )
    bpe_tokenizer.main(by_steps)
    assert load_tokenizer(tmp_path / "b").hash == load_tokenizer(tmp_path).hash


def test_bpe_tokenizer_explains_with_what_the_workdir_holds_or_trains_it_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def explained(*flags: str) -> str:
        flags = ("--workdir", str(tmp_path), "--explain", "[/] l'été [sic]", *flags)
        bpe_tokenizer.main(parse(flags, bpe_tokenizer.PRESETS, "x"))
        text = capsys.readouterr().out
        assert "17 bytes" in text and "·[sic]" in text.replace("│", "").replace("|", "")
        return text

    asked = ("--vocab-size", "400", "--corpus-bytes", "60000")
    assert "count  token" in explained(*asked)
    again = explained(*asked)
    assert "count  token" not in again and "holds" not in again
    holds = "holds BPETokenizer(400 ids, split gpt4, 1 special token), not one of 300 ids with the split gpt2."
    assert holds in " ".join(explained("--vocab-size", "300", "--split", "gpt2").split())  # wherever lines break
    assert load_tokenizer(tmp_path).vocab_size == 400


# ---- resume, with real processes and real signals


def start(workdir: Path, cache: Path) -> subprocess.Popen[str]:
    flags = ["--workdir", str(workdir), "--vocab-size", "80", "--steps", "60", *TINY]
    command = [sys.executable, "-m", "experiments.char_lm", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "JAXLM_CACHE": str(cache)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        if any(line["step"] >= step for line in read_metrics(workdir)):
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within four minutes")


def losses(workdir: Path) -> dict[int, str]:
    return {line["step"]: repr(line["train/loss"]) for line in read_metrics(workdir) if "train/loss" in line}


def test_interrupted_thrice_equals_straight_to_the_bit(tmp_path: Path, cache: Path) -> None:
    """60 steps, once straight and once interrupted by SIGINT, by SIGTERM twice, and by SIGKILL: the same bits."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    out, err = (process := start(straight, cache)).communicate()
    assert process.returncode == 0, err

    process = start(broken, cache)
    wait_for_step(process, broken, 14)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Continue with: python -m experiments.char_lm" in err
    before_interrupt = losses(broken)

    process = start(broken, cache)
    wait_for_step(process, broken, 25)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert f"after step {max(before_interrupt)}" in out, "SIGINT saved the step that it stopped after"
    assert "Traceback" not in err

    process = start(broken, cache)
    wait_for_step(process, broken, 37)
    process.kill()
    out, _ = process.communicate()
    assert "Continuing" in out
    before_kill = losses(broken)
    assert max(before_kill) < 60

    out, err = (process := start(broken, cache)).communicate()
    assert process.returncode == 0, err
    assert "Continuing" in out

    expected = losses(straight)
    assert sorted(expected) == list(range(1, 61))
    assert losses(broken) == expected
    for replayed in (before_interrupt, before_kill):
        assert replayed.items() <= expected.items()
    _, _, left = load_trained(straight)
    _, _, right = load_trained(broken)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert (straight / "samples.txt").read_bytes() == (broken / "samples.txt").read_bytes()
