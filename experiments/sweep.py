"""Trains the arms of a comparison, one after the other, whatever of them is done already.

An arm's directory holds `grid/FACTOR`, short runs of one seed that choose the factor of its learning rate on a part of
the training documents, and `rate-FACTOR/seed-N`, the runs that are compared. Each is a run directory as any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from experiments.arms import Arm, with_updates
from jaxlm.checkpoints import saved_steps
from jaxlm.data.batches import make_batches
from jaxlm.data.shards import TokenizedCorpus
from jaxlm.final_score import evaluate_run, is_finished
from jaxlm.loop import train_together
from jaxlm.progress import LiveTable, Reporter
from jaxlm.runs import Run, RunFailed, read_metrics
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, open_run


@dataclass(frozen=True)
class Rate:
    """What a learning rate of the grid gave: bits per byte of the validation part, NaN if the run diverged."""

    factor: float
    learning_rate: float
    bits_per_byte: float


@dataclass(frozen=True)
class Outcome:
    """How an arm ended.

    Attributes:
      training: what it was trained with, the chosen learning rate included; None if none could be chosen.
      rates: the grid; empty if there was but one rate.
      runs: the finished run of each seed.
      failure: why the arm has no result; None if it has.
    """

    training: TrainConfig | None
    rates: list[Rate]
    runs: list[Path]
    failure: str | None


def train_arm(
    arm: Arm,
    folder: Path,
    fingerprint: str,
    *,
    seeds: Sequence[int],
    factors: Sequence[float],
    rate_share: float,
    most_together: int | None,
    table: LiveTable,
) -> Outcome:
    """Chooses the arm's learning rate, if there is a choice, and trains it with every seed."""
    rates: list[Rate] = []
    factor = factors[0]
    try:
        if len(factors) > 1:
            table.stage(arm.spec.name, f"{len(factors)} learning rates")
            rates = _try_rates(arm, folder / "grid", fingerprint, factors, rate_share, most_together, table)
            best = min(rates, key=lambda rate: math.inf if math.isnan(rate.bits_per_byte) else rate.bits_per_byte)
            if math.isnan(best.bits_per_byte):
                return Outcome(None, rates, [], "Every learning rate of the grid diverged; choose lower ones.")
            factor = best.factor
        table.stage(arm.spec.name, f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed")
        training = at_rate(arm.training, factor)
        configs = [replace(training, seed=seed) for seed in seeds]
        runs = [
            open_run(seed_folder(folder, factor, config.seed), fingerprint, arm.made.settings, arm.model, config)
            for config in configs
        ]
        failures = train_runs(arm, arm.data, runs, configs, most_together, table.reporter(arm.spec.name))
    except jax.errors.JaxRuntimeError as error:
        return Outcome(None, rates, [], f"The device failed: {str(error).splitlines()[0][:200]}")
    for config, failure in zip(configs, failures, strict=True):
        if failure is not None:
            return Outcome(training, rates, [], f"Seed {config.seed}: {failure}")
    return Outcome(training, rates, [run.path for run in runs], None)


def seed_folder(folder: Path, factor: float, seed: int) -> Path:
    """Where the run of a seed is. Another learning rate is another run."""
    return folder / f"rate-{factor:g}" / f"seed-{seed}"


def at_rate(training: TrainConfig, factor: float) -> TrainConfig:
    """The training with all its learning rates times a factor."""
    optimizer = training.optimizer
    return replace(
        training,
        optimizer=replace(
            optimizer,
            learning_rate=factor * optimizer.learning_rate,
            muon_learning_rate=factor * optimizer.muon_learning_rate,
        ),
    )


def _try_rates(
    arm: Arm,
    folder: Path,
    fingerprint: str,
    factors: Sequence[float],
    share: float,
    most_together: int | None,
    table: LiveTable,
) -> list[Rate]:
    runs, configs = grid_runs(arm, folder, fingerprint, factors, share)
    data = arm.data.for_validation()
    failures = train_runs(arm, data, runs, configs, most_together, table.reporter(arm.spec.name))
    return [
        Rate(
            factor,
            config.optimizer.learning_rate,
            math.nan if failure is not None else read_metrics(run.path)[-1]["final/bits_per_byte"],
        )
        for factor, config, run, failure in zip(factors, configs, runs, failures, strict=True)
    ]


def grid_runs(
    arm: Arm, folder: Path, fingerprint: str, factors: Sequence[float], share: float
) -> tuple[list[Run], list[TrainConfig]]:
    """The short runs of an arm's grid, and their settings. Nothing is written.

    Raises:
      InputError: too few training documents, or other runs in the folder.
    """
    short = with_updates(arm, max(1, round(share * arm.training.steps))).training
    short = replace(short, eval_every=short.steps, sample_every=short.steps, checkpoint_every=short.steps)
    configs = [at_rate(short, factor) for factor in factors]
    settings = {**arm.made.settings, "part": "validation"}
    runs = [
        open_run(folder / f"{factor:g}", fingerprint, settings, arm.model, config)
        for factor, config in zip(factors, configs, strict=True)
    ]
    tokens = arm.data.for_validation().train
    # Refuses too short a text.
    make_batches(tokens, context=arm.model.context, batch_size=short.batch_size, seed=short.seed)
    return runs, configs


def train_runs(
    arm: Arm,
    data: TokenizedCorpus,
    runs: Sequence[Run],
    configs: Sequence[TrainConfig],
    most_together: int | None,
    reporter: Reporter,
) -> list[str | None]:
    """Trains and scores runs of one arm, as many together as the devices allow: for each, why it failed, or None.

    A run that failed once fails again, and is not tried again unless it is under another policy for faults.
    """
    failures = [run.failure(config.fault_policy) for run, config in zip(runs, configs, strict=True)]
    left = [
        index
        for index, (run, config) in enumerate(zip(runs, configs, strict=True))
        if failures[index] is None and not is_finished(run, config)
    ]
    groups = [
        group
        for same in by_progress(left, [saved_steps(run.path / "checkpoints") for run in runs])
        for group in in_groups(same, jax.device_count(), most_together)
    ]
    while groups:
        group = groups.pop(0)
        chosen = [runs[index] for index in group]
        own = [configs[index] for index in group]
        try:
            results = train_together(chosen, arm.tokenizer, data, arm.model, own, reporter)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or len(group) == 1:
                raise
            # Too much for the memory at once: half as many, twice.
            groups = in_groups(group, jax.device_count(), len(group) // 2) + groups
            continue
        except RunFailed as failure:  # nothing was trained
            for index in group:
                failures[index] = str(failure)
            continue
        for index, run, config, result in zip(group, chosen, own, results, strict=True):
            try:
                if isinstance(result, RunFailed):
                    raise result
                evaluate_run(run, arm.tokenizer, data, arm.model, config, result)
            except RunFailed as failure:
                failures[index] = str(failure)
    return failures


def by_progress(items: Sequence[int], steps: Sequence[set[int]]) -> list[list[int]]:
    """Items that can go on together without repeating more than what came after a save that was cut off.

    Those belong together that have the newest checkpoint of the one that is furthest behind.
    """
    groups: list[list[int]] = []
    left = sorted(items, key=lambda item: (max(steps[item], default=0), item))
    while left:
        newest = max(steps[left[0]], default=0)
        same = [item for item in left if newest in steps[item] or (newest == 0 and not steps[item])]
        groups.append(sorted(same))
        left = [item for item in left if item not in same]
    return groups


def in_groups(items: Sequence[int], devices: int, most: int | None) -> list[list[int]]:
    """Cut into groups of at most `most` (None: any number), each a multiple of the devices, or of a single item.

    A single one has all devices for itself, so that none is idle.
    """
    groups, start = [], 0
    while start < len(items):
        size = min(len(items) - start, most or len(items))
        size = max(1, size - size % devices)
        groups.append(list(items[start : start + size]))
        start += size
    return groups


def check_factors(training: TrainConfig, factors: Sequence[float]) -> None:
    """Raises InputError unless they are positive, each is there once, and learning rates remain what they can be."""
    if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise InputError("The factors of the learning rate are positive numbers, at least one.")
    if len({f"{factor:g}" for factor in factors}) < len(factors):
        raise InputError("A factor of the learning rate stands twice; name each once.")
    for factor in factors:
        at_rate(training, factor)
