"""Runs that go on elsewhere: in a later version, on more or fewer devices, in another layout, with another type.

    python tests/test_moved_runs.py keep

makes the small run in `kept_run`, which every later version has to open and to go on with. It is made once for a format
of checkpoints, and not again: that it is old is what it is for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.checkpoints import Checkpoints, abstract
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import TokenizedCorpus, survey_corpus, tokenize_corpus
from jaxlm.loop import train
from jaxlm.model import ModelConfig, Params
from jaxlm.optimizers import OptimizerConfig
from jaxlm.parallel import data_mesh, replicated
from jaxlm.runs import Run, read_config, read_metrics
from jaxlm.tokenizers import CharTokenizer, Tokenizer
from jaxlm.training import TrainConfig, TrainState, abstract_state, load_trained, make_train_step, open_run

KEPT = Path(__file__).parent / "kept_run"
MODEL = ModelConfig(vocab_size=27, context=16, width=8, num_layers=1, num_heads=2, feed_forward_width=16, dropout=0.1)
CONFIG = TrainConfig(
    steps=20,
    batch_size=8,
    optimizer=OptimizerConfig(learning_rate=0.005),
    log_every=1,
    eval_every=10,
    eval_documents=2,
    sample_every=10,
    checkpoint_every=5,
    keep_checkpoints=1,
)


def prepare(folder: Path, config: TrainConfig = CONFIG) -> tuple[Run, Tokenizer, TokenizedCorpus]:
    """The run in a folder, and the text beside it."""
    corpus = open_corpus(str(folder / "corpus.txt"))
    survey = survey_corpus(corpus)
    run = open_run(folder / "run", survey.fingerprint, {"kind": "char", "vocab_size": 27}, MODEL, config)
    tokenizer = run.tokenizer() or CharTokenizer.train(corpus.documents(), 27)
    return run, tokenizer, tokenize_corpus(corpus, survey, tokenizer)


def train_until(folder: Path, config: TrainConfig) -> TrainState:
    """Begins or goes on."""
    run, tokenizer, data = prepare(folder, config)
    return train(run, tokenizer, data, MODEL, config)


def new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "corpus.txt").write_text("\n\n".join(f"un chat dort sur un toit {i * i}" for i in range(40)))
    return folder


def losses(folder: Path) -> dict[str, float]:
    """The training loss of each step."""
    return {str(line["step"]): line["train/loss"] for line in read_metrics(folder / "run") if "train/loss" in line}


def fingerprint(params: Params) -> str:
    """A hash of the bits of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


# ---- in a later version


def keep() -> None:
    """Makes the run that is kept, and what it has to come to when it goes on."""
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["JAXLM_CACHE"] = str(Path(temporary) / "cache")
        folder = new_folder(Path(temporary) / "kept_run")
        train_until(folder, replace(CONFIG, steps=10))
        expected: dict[str, Any] = {"parameters": fingerprint(load_trained(folder / "run")[2])}
        shutil.copytree(folder / "run", Path(temporary) / "saved")
        train_until(folder, CONFIG)
        expected["losses"] = losses(folder)
        shutil.rmtree(folder / "run")
        shutil.move(Path(temporary) / "saved", folder / "run")
        shutil.rmtree(folder / "run" / "tensorboard")
        (folder / "run" / "lock").unlink()
        for note in folder.rglob("commit_success.txt"):
            note.write_text(note.read_text().replace(f"{temporary}/", ""))
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        shutil.rmtree(KEPT, ignore_errors=True)
        shutil.move(folder, KEPT)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "kept_run"))


def test_the_kept_run_is_small() -> None:
    assert sum(file.stat().st_size for file in KEPT.rglob("*") if file.is_file()) < 100_000


def test_a_run_of_an_earlier_version_has_its_parameters_still_and_goes_on(kept: Path) -> None:
    expected = json.loads((kept / "expected.json").read_bytes())
    tokenizer, model, params = load_trained(kept / "run")
    assert model == MODEL
    assert tokenizer.decode(tokenizer.encode("un chat")) == "un chat"
    assert fingerprint(params) == expected["parameters"]
    assert int(train_until(kept, CONFIG).step) == 20
    # Other versions of XLA may add in another order.
    assert losses(kept) == pytest.approx(expected["losses"], rel=1e-3)


def test_a_checkpoint_that_was_written_on_a_gpu_opens_on_a_cpu(kept: Path) -> None:
    (file,) = (kept / "run" / "checkpoints").rglob("_sharding")
    layout = json.loads(file.read_bytes())
    for name, text in layout.items():
        written = json.loads(text)
        written["device_mesh"]["mesh"] = [{"id": 0, "device_kind": "NVIDIA H100", "platform": "cuda"}]
        layout[name] = json.dumps(
            written if len(name) % 2 else {"sharding_type": "SingleDeviceSharding", "device_str": "cuda:0"}
        )
    file.write_text(json.dumps(layout))
    expected = json.loads((kept / "expected.json").read_bytes())
    assert fingerprint(load_trained(kept / "run")[2]) == expected["parameters"]
    train_until(kept, CONFIG)
    assert losses(kept) == pytest.approx(expected["losses"], rel=1e-3)


# ---- on other devices


def on_all_devices(folder: Path) -> None:
    """In a process with eight devices: five steps more, and then two in which each holds a part of the parameters."""
    assert jax.device_count() == 8
    train_until(folder, replace(CONFIG, steps=10))
    mesh = data_mesh(8)

    def divided(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = next((axis for axis, size in enumerate(leaf.shape) if size % 8 == 0), None)
        spec = PartitionSpec(*(("data" if i == axis else None) for i in range(len(leaf.shape))))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.tree.map(divided, abstract_state(MODEL, CONFIG))
    checkpoints = Checkpoints(folder / "run" / "checkpoints", read_only=True)
    state = checkpoints.restore(shapes, 10)
    record = checkpoints.record(10)
    checkpoints.close()
    parts = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state.params)}
    assert min(parts) == 1 / 8, "parameters are divided"
    _, _, data = prepare(folder)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(MODEL, CONFIG), out_shardings=(layouts, None))
    batches = make_batches(data.train, context=MODEL.context, batch_size=CONFIG.batch_size, seed=CONFIG.seed)
    found = []
    for index in (10, 11):
        state, metrics = step(state, jax.device_put(batches[index], replicated(mesh)))
        found.append(float(metrics["train/loss"]))
    saved = Checkpoints(folder / "divided")
    saved.save(12, state, record)
    saved.close()
    (folder / "divided.json").write_text(json.dumps(found))


def call(command: str, folder: Path, devices: int) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root}
    process = subprocess.run(
        [sys.executable, __file__, command, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr


def test_a_run_goes_on_with_more_devices_and_with_divided_parameters_and_back(tmp_path: Path) -> None:
    straight, moved = new_folder(tmp_path / "straight"), new_folder(tmp_path / "moved")
    train_until(straight, CONFIG)
    expected = losses(straight)
    assert np.abs(np.diff(list(expected.values()))).mean() > 0.02, "other batches would show"

    train_until(moved, replace(CONFIG, steps=5))
    call("resume", moved, devices=8)
    assert len(read_config(moved / "run")["environment"]["devices"]) == 1, "where it was begun"
    saved = Checkpoints(moved / "divided", read_only=True)
    place = SingleDeviceSharding(jax.devices()[0])
    whole = saved.restore(abstract(abstract_state(MODEL, CONFIG), place), 12)
    saved.close()
    train_until(moved, CONFIG)
    assert losses(moved) == pytest.approx(expected, rel=5e-4)
    assert json.loads((moved / "divided.json").read_bytes()) == pytest.approx(
        [expected["11"], expected["12"]], rel=5e-4
    )

    _, _, data = prepare(straight)
    batches = make_batches(data.train, context=MODEL.context, batch_size=CONFIG.batch_size, seed=CONFIG.seed)
    step = jax.jit(make_train_step(MODEL, CONFIG))
    for index in range(12, 20):
        whole, metrics = step(whole, batches[index])
        assert float(metrics["train/loss"]) == pytest.approx(expected[str(index + 1)], rel=5e-4)


def test_a_run_goes_on_in_bfloat16_and_back(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "moved")
    train_until(new_folder(tmp_path / "straight"), CONFIG)
    train_until(folder, replace(CONFIG, steps=5))
    state = train_until(folder, replace(CONFIG, steps=15, compute_type="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    train_until(folder, CONFIG)
    expected, found = losses(tmp_path / "straight"), losses(folder)
    assert found == pytest.approx(expected, rel=0.02)
    assert {step: found[step] == expected[step] for step in ("5", "6")} == {"5": True, "6": False}


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep()
    else:
        on_all_devices(Path(sys.argv[2]))
