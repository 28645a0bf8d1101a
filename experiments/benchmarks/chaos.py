"""Kills a training again and again, and looks whether it ends as if nothing had happened.

    python -m experiments.benchmarks.chaos
    python -m experiments.benchmarks.chaos --kills 5 --steps 40

A character model is trained by real processes, which get SIGKILL after a random time, or as soon as they are seen to
tokenize, to save, to score or to draw. The same command is run again until it ends well; then the parameters, the
optimizer's state, the logged losses and the samples are compared, bit for bit, with those of a run that nobody
interrupted, and the next round begins with an empty directory and cache, until there were enough kills.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments.command_line import program
from jaxlm.checkpoints import Checkpoints, abstract, saved_steps
from jaxlm.reports.tables import rows_table
from jaxlm.runs import METRICS_FILE, SAMPLES_FILE, RunFailed, console, read_config, read_metrics
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, abstract_state, stored_settings


@dataclass(frozen=True)
class Config:
    """Kills training processes at random moments, and compares what they end with."""

    kills: int = 100
    steps: int = 60  # of the training
    seed: int = 0  # of the moments

    def __post_init__(self) -> None:
        if self.kills < 1 or self.steps < 1:
            raise InputError("There has to be at least one kill, and a training of at least one step.")
        TrainConfig(steps=self.steps)


PRESETS = {"all": Config()}


@dataclass(frozen=True)
class Result:
    """What the kills did: how many there were by where they came, in how many rounds, steps and seconds repeated."""

    kills: Counter[str]
    rounds: int
    steps_repeated: int
    seconds_lost: float
    equal: bool


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder))
    kills = result.kills.total()
    rows = [
        ("kills survived", f"{kills}"),
        *((f"  {name}", f"{count}") for name, count in result.kills.most_common()),
        ("runs brought to their end", f"{result.rounds}"),
        ("steps taken again", f"{result.steps_repeated} ({result.steps_repeated / kills:.1f} a kill)"),
        ("seconds of training lost", f"{result.seconds_lost:.1f} ({result.seconds_lost / kills:.2f} a kill)"),
        ("equal to the uninterrupted run, bit for bit", "all" if result.equal else "NO"),
    ]
    console.print(rows_table(("", ""), rows, "SIGKILL at random moments"))
    if not result.equal:
        raise RunFailed("A run that was killed ended otherwise than one that was not.")


def run(config: Config, folder: Path) -> Result:
    """Trains once straight, then under fire until there were enough kills and the run under way has ended well."""
    moments = random.Random(config.seed)
    started = time.monotonic()
    if (status := start(config, folder / "straight", folder / "cache").wait()) != 0:
        raise failed(folder / "straight", status, 0)
    whole = time.monotonic() - started
    expected = fingerprint(folder / "straight")
    kills: Counter[str] = Counter()
    rounds = repeated = 0
    lost, equal = 0.0, True
    while kills.total() < config.kills:
        workdir, cache = folder / f"round-{rounds}", folder / f"cache-{rounds}"
        while True:
            state = partial(doing, config, workdir, cache, time.time())
            process = start(config, workdir, cache)
            if kills.total() < config.kills:
                await_moment(process, state, moments, whole)
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    kills[found := state()] += 1
                    if found != "starting":  # it has taken no step then: the log is that of the process before it
                        steps, seconds = behind(workdir)
                        repeated, lost = repeated + steps, lost + seconds
                    console.print(f"kill {kills.total()} at step {reached(workdir)}", style="dim")
                    continue
            if (status := process.wait()) != 0:
                raise failed(workdir, status, kills.total())
            break
        rounds += 1
        equal = equal and fingerprint(workdir) == expected
        shutil.rmtree(workdir)
        shutil.rmtree(cache, ignore_errors=True)
    return Result(kills, rounds, repeated, lost, equal)


def failed(workdir: Path, status: int, kills: int) -> RunFailed:
    told = workdir.with_suffix(".err").read_text(errors="replace").strip().splitlines()[-1:]
    return RunFailed(f"After {kills} kills the training ended with status {status}: {' '.join(told)}")


def await_moment(
    process: subprocess.Popen[bytes], doing: Callable[[], str], moments: random.Random, whole: float
) -> None:
    """Returns at a random time, or as soon as the process does something that was drawn, or when it has ended."""
    awaited = moments.choice(["any", "any", "tokenizing", "saving", "scoring", "drawing"])
    until = time.monotonic() + (moments.uniform(0.0, whole) if awaited == "any" else whole)
    while process.poll() is None and time.monotonic() < until and doing() != awaited:
        time.sleep(0.001)
    if awaited != "any":
        time.sleep(moments.uniform(0.0, 0.02))


def doing(config: Config, workdir: Path, cache: Path, since: float) -> str:
    """What a training that was started then is doing, or was when it was killed, from what it has left."""

    def some(folder: Path, pattern: str) -> bool:
        with contextlib.suppress(FileNotFoundError):  # it was there a moment ago
            return any(path.stat().st_mtime > since for path in folder.glob(pattern))
        return False

    if some(cache / "shards", ".*.tmp"):
        return "tokenizing"
    if some(workdir / "checkpoints", "*.orbax-checkpoint-tmp"):
        return "saving"
    if not some(workdir, METRICS_FILE):
        return "starting"
    last = {"step": 0, **(read_metrics(workdir) or [{}])[-1]}
    if "final/loss" in last:
        return "drawing"
    return "scoring" if last["step"] == config.steps else "training"


def start(config: Config, workdir: Path, cache: Path) -> subprocess.Popen[bytes]:
    """A training process, in which something is due every few steps."""
    flags = (
        f"--steps {config.steps} --vocab-size 80 --width 16 --num-heads 2 --num-layers 1 "
        "--context 32 --batch-size 4 --corpus-bytes 60000 --eval-every 10 --eval-documents 2 --sample-every 20 "
        "--checkpoint-every 5 --log-every 1 --dropout 0.1"
    )
    xla = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(workdir.parent / "xla"))
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.char_lm", "--workdir", str(workdir), *flags.split()],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAXLM_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": xla},
        stdout=subprocess.DEVNULL,
        stderr=workdir.with_suffix(".err").open("wb"),
    )


def reached(workdir: Path) -> int:
    """The last step in the metrics; a killed process may have taken one more."""
    return max((line["step"] for line in read_metrics(workdir)), default=0)


def behind(workdir: Path) -> tuple[int, float]:
    """Steps, and seconds of training, since the last checkpoint."""
    saved = max(saved_steps(workdir / "checkpoints"), default=0)
    seconds = {line["step"]: line["seconds"] for line in read_metrics(workdir)}
    return max(0, reached(workdir) - saved), max(0.0, max(seconds.values(), default=0.0) - seconds.get(saved, 0.0))


def fingerprint(workdir: Path) -> str:
    """A hash of all that a run leaves: parameters, optimizer state, losses and scores, samples."""
    model, training = stored_settings(read_config(workdir)["identity"])
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    shapes = abstract_state(model, training)
    state = checkpoints.restore(abstract(shapes, SingleDeviceSharding(jax.devices()[0])), max(checkpoints.steps))
    checkpoints.close()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    timed = ("seconds", "tokens_per_second", "mfu")
    for line in read_metrics(workdir):
        digest.update(repr({name: value for name, value in line.items() if name not in timed}).encode())
    digest.update((workdir / SAMPLES_FILE).read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    program("experiments.benchmarks.chaos", PRESETS, main)
