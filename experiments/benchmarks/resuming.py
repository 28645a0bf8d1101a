"""What saving costs, and how soon a run that is taken up again logs its first step.

    python -m experiments.benchmarks.resuming --corpus articles.parquet

Blocks of steps alternate, one with a save at its beginning, whose background part is waited for, and one without; what
a save costs is set against as many steps as there are between two by default. Then real processes alternate: one begins
a run, the next takes one up that has a checkpoint; each is timed from its start to its first line of metrics, and
killed.
"""

from __future__ import annotations

import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.command_line import program
from experiments.language_model import tokenize
from jaxlm.checkpoints import Checkpoints
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import survey_corpus, train_documents
from jaxlm.model import ModelConfig
from jaxlm.parallel import batch_sharding, data_mesh, one_at_a_time, replicated, use_cores
from jaxlm.reports.tables import rows_table
from jaxlm.runs import RunFailed, console, read_metrics
from jaxlm.tokenizers import CharTokenizer
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, init_state, make_train_step


@dataclass(frozen=True)
class Config:
    """Measures saves and starts of the seed model."""

    corpus: str = "builtin"  # as in the experiments
    blocks: int = 7  # pairs of measurements
    block_steps: int = 10  # steps in each
    starts: int = 5  # pairs of processes

    def __post_init__(self) -> None:
        if min(self.blocks, self.block_steps, self.starts) < 1:
            raise InputError("There is at least one block, one step in it, and one start.")


PRESETS = {"seed": Config()}


def main(config: Config) -> None:
    rows = [*saves(config), *starts(config)]  # whatever is wrong with the settings is said by the first
    console.print(rows_table(("", ""), rows, "the seed model"))


def saves(config: Config) -> list[tuple[str, str]]:
    """Seconds of a step and of a save, from the differences of neighbouring blocks."""
    model, training = ModelConfig(vocab_size=98), TrainConfig()
    use_cores(training.batch_size)
    corpus = open_corpus(config.corpus)
    survey = survey_corpus(corpus)
    data = tokenize(corpus, survey, CharTokenizer.train(train_documents(corpus, survey), model.vocab_size))
    mesh = data_mesh(training.batch_size)
    batches = make_batches(data.train, context=model.context, batch_size=training.batch_size, seed=0)
    batch = jax.device_put(batches[0], batch_sharding(mesh))
    step = jax.jit(make_train_step(model, training, mesh), donate_argnums=0)
    state, _ = step(jax.device_put(init_state(model, training), replicated(mesh)), batch)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        for block in range(2 * config.blocks + 1):
            saving = block % 2 == 0
            started = time.perf_counter()
            if saving:
                checkpoints.save(block, state, {})
            for _ in range(config.block_steps):
                state, metrics = step(state, batch)
                one_at_a_time(mesh, metrics)
            jax.block_until_ready(state)
            checkpoints.wait()
            if block:  # the first one sets orbax up
                seconds[saving].append(time.perf_counter() - started)
        checkpoints.close()
    bare = statistics.median(seconds[False]) / config.block_steps
    cost = statistics.median(b - a for a, b in zip(seconds[False], seconds[True], strict=True))
    return [
        ("a step", f"{bare:.3f} s"),
        ("a save, in the background", f"{cost:.3f} s"),
        (f"one every {training.checkpoint_every} steps", f"{cost / bare / training.checkpoint_every:.3%} of training"),
    ]


def starts(config: Config) -> list[tuple[str, str]]:
    """Seconds from the start of a process to the first step, of new runs and of one that is taken up again."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "begun"
        command = f"-m experiments.char_lm --preset seed --log-every 1 --corpus {shlex.quote(config.corpus)}"
        arguments = [sys.executable, *shlex.split(command)]
        done = subprocess.run([*arguments, "--workdir", run, "--steps", "2"], capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"The training ended with status {done.returncode}: {done.stderr.strip()}")
        pairs = []
        for index in range(config.starts):
            new, resumed = Path(folder) / f"new-{index}", Path(folder) / f"resumed-{index}"
            shutil.copytree(run, resumed)
            pairs.append(
                [
                    first_step([*arguments, "--workdir", str(path)], path, after)
                    for path, after in ((new, 0), (resumed, 2))
                ]
            )
            console.print(f"start {index + 1}: new {pairs[-1][0]:.2f} s, resumed {pairs[-1][1]:.2f} s", style="dim")
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(b / a for a, b in pairs)
    return [
        ("first step of a new run", f"{medians[0]:.2f} s"),
        ("first step of a resumed run", f"{medians[1]:.2f} s"),
        ("resumed / new", f"{ratio:.2f}"),
    ]


def first_step(command: list[str], path: Path, after: int) -> float:
    """Seconds until the metrics have a step after this one."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any(line["step"] > after for line in read_metrics(path)):
            if process.poll() is not None:
                raise RunFailed(f"The training ended with status {process.returncode} before its first step.")
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    program("experiments.benchmarks.resuming", PRESETS, main)
