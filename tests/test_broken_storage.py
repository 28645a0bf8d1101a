"""A disk that fills, a folder that is read-only of a sudden: what is said, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.checkpoints import Checkpoints, saved_steps
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import TokenizedCorpus, survey_corpus, tokenize_corpus
from jaxlm.loop import train
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.runs import METRICS_FILE, Run, RunFailed, read_metrics
from jaxlm.tokenizers import CharTokenizer, Tokenizer
from jaxlm.training import TrainConfig, TrainState, open_run

MODEL = ModelConfig(vocab_size=27, context=16, width=8, num_layers=1, num_heads=2, feed_forward_width=16, dropout=0.1)
CONFIG = TrainConfig(
    steps=20,
    batch_size=4,
    optimizer=OptimizerConfig(learning_rate=0.02),
    log_every=1,
    eval_every=20,
    eval_documents=2,
    sample_every=20,
    checkpoint_every=5,
)
Data = tuple[Tokenizer, TokenizedCorpus, str]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"un chat dort sur un toit {i * i}" for i in range(40)))
    corpus = open_corpus(str(tmp_path / "corpus.txt"))
    survey = survey_corpus(corpus)
    tokenizer = CharTokenizer.train(corpus.documents(), 27)
    return tokenizer, tokenize_corpus(corpus, survey, tokenizer), survey.fingerprint


def open_(path: Path, data: Data, config: TrainConfig = CONFIG) -> Run:
    return open_run(path, data[2], {"kind": "char", "vocab_size": 27}, MODEL, config)


def train_with(path: Path, data: Data, at_step: Callable[[int], None], config: TrainConfig = CONFIG) -> TrainState:
    """Trains, and calls `at_step` before the metrics of each step are written, when step 10 is saved from 12 on."""
    run = open_(path, data, config)
    log = run.log

    def log_after(step: int, **values: float) -> None:
        while step == 12 and 10 not in saved_steps(path / "checkpoints"):
            time.sleep(0.01)
        at_step(step)
        log(step, **values)

    run.log = log_after  # type: ignore[method-assign]
    return train(run, data[0], data[1], MODEL, config)


def goes_on_to_the_same_bits(path: Path, straight: Path, data: Data) -> None:
    """Every line of the metrics is whole, and the run ends as one to which nothing happened."""
    lines = (path / METRICS_FILE).read_bytes().split(b"\n")
    assert lines[-1] == b""
    assert all(json.loads(line)["step"] for line in lines[:-1])
    ends = [train(open_(folder, data), data[0], data[1], MODEL, CONFIG) for folder in (path, straight)]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    losses = [[line.get("train/loss") for line in read_metrics(folder)] for folder in (path, straight)]
    assert losses[0] == losses[1]


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can't be mounted by this user")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, room: int) -> None:
    """Leaves so many bytes."""
    free = os.statvfs(folder)
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))


@pytest.mark.parametrize(
    ("room", "words"),
    [(0, r"metrics\.jsonl can't|tensorboard can't|checkpoints"), (12_000, "A checkpoint couldn't be written")],
)
def test_a_full_disk_stops_the_run_with_a_sentence_and_leaves_all_that_was_saved(
    room: int, words: str, small_disk: Path, tmp_path: Path, data: Data, capfd: pytest.CaptureFixture[str]
) -> None:
    def at_step(step: int) -> None:
        if step == 12:
            fill(small_disk, room)

    with pytest.raises(RunFailed, match=rf"{words}.* No space left on device.* The checkpoint of step 10 is kept"):
        train_with(small_disk / "run", data, at_step)
    output = "".join(capfd.readouterr())
    assert "Traceback" not in output and "Exception" not in output, output
    assert saved_steps(small_disk / "run" / "checkpoints") == {5, 10}
    (small_disk / "ballast").unlink()
    goes_on_to_the_same_bits(small_disk / "run", tmp_path / "straight", data)


def test_a_disk_that_is_full_at_the_start_gets_a_sentence(small_disk: Path, data: Data) -> None:
    fill(small_disk, 0)
    with pytest.raises((RunFailed, OSError), match="No space left on device"):
        train_with(small_disk / "run", data, lambda _: None)
    (small_disk / "ballast").unlink()
    assert int(train_with(small_disk / "run", data, lambda _: None).step) == 20


# ---- permission lost while running


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As a user for whom permissions count, which they don't for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """A folder that any user reaches and may write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize(
    ("place", "mode", "words"),
    [
        ("checkpoints", 0o555, r"A checkpoint couldn't be written to .*checkpoints: Permission denied"),
        (METRICS_FILE, 0o444, r".*metrics\.jsonl can't be written or read: Permission denied"),
    ],
)
def test_permission_that_is_lost_stops_the_run_with_a_sentence(
    place: str, mode: int, words: str, own_folder: Path, tmp_path: Path, data: Data, capfd: pytest.CaptureFixture[str]
) -> None:
    path = own_folder / "run"
    before: list[int] = []

    def at_step(step: int) -> None:
        if step == 12:
            before.append((path / place).stat().st_mode)
            (path / place).chmod(mode)

    with without_privileges():
        with pytest.raises(RunFailed, match=rf"{words}.* The checkpoint of step 10 is kept"):
            train_with(path, data, at_step)
        assert "Traceback" not in "".join(capfd.readouterr())
        (path / place).chmod(before[0])
    assert saved_steps(path / "checkpoints") == {5, 10}
    goes_on_to_the_same_bits(path, tmp_path / "straight", data)


# ---- a save that fails in the background


def test_a_save_that_fails_in_the_background_is_told_by_the_next_one(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Checkpoints.wait
    broken: list[int] = []

    def failing_wait(self: Checkpoints) -> None:
        with self._saving():
            if broken:
                raise OSError(5, "Input/output error")
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", failing_wait)
    with pytest.raises(RunFailed, match=r"Input/output error\. .* mend that, and run the same command again"):
        train_with(tmp_path / "run", data, lambda step: broken.append(step) if step == 7 else None)
    monkeypatch.undo()
    goes_on_to_the_same_bits(tmp_path / "run", tmp_path / "straight", data)


def test_no_checkpoint_yet_is_said_too(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Run, step: int, **values: float) -> None:
        raise OSError(28, "No space left on device", str(self.path / METRICS_FILE))

    monkeypatch.setattr(Run, "log", failing)
    with pytest.raises(RunFailed, match="No checkpoint had been saved"):
        train_with(tmp_path / "run", data, lambda _: None, replace(CONFIG, steps=2))
