"""What does the tokenizer change? The same model under each tokenizer, at an equal budget, in bits per byte.

    python -m experiments.compare_tokenizers
    python -m experiments.compare_tokenizers --preset seed --corpus articles.parquet
    python -m experiments.compare_tokenizers --tokenizers bpe sentencepiece-unigram --vocab-sizes 500 2000 --dry-run

Each arm chooses its learning rate from the same grid, on a part of the training documents, and is then trained with
several seeds and scored on the same held-out documents. Rerunning the same command continues where it stopped. The
workdir holds a directory for each arm, and at the end report.html, results.json and the figures.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
from rich import box
from rich.table import Table
from rich.text import Text

from experiments.arms import (
    FAMILIES,
    Arm,
    NotToBeHad,
    Spec,
    Unit,
    keep_tokenizer,
    keep_updates,
    kept_updates,
    make_arm,
    make_tokenizer,
    seconds_per_update,
    specs,
    with_budget,
    with_parameters,
    with_updates,
)
from experiments.command_line import check_seeds, program
from experiments.language_model import MODERN_MODEL, MODERN_OPTIMIZER
from experiments.sweep import Outcome, check_factors, grid_runs, train_arm
from jaxlm.data.documents import Corpus, open_corpus
from jaxlm.data.shards import Survey, held_out_documents, survey_corpus
from jaxlm.model import ModelConfig
from jaxlm.parallel import data_mesh, use_cores
from jaxlm.progress import LiveTable
from jaxlm.reports.charts import write_figures
from jaxlm.reports.comparison import ArmRecord, HeldOut, collect
from jaxlm.reports.page import write_page
from jaxlm.reports.tables import arms_table
from jaxlm.runs import RunFailed, check_writable, console, environment, recorded_devices, write_json
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig

_SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class Config:
    """Trains the same model under each tokenizer, at an equal budget, and reports what the tokenizer changed."""

    preset: Literal["quick", "seed", "full"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/compare_tokenizers"  # a directory for each arm, and the report
    corpus: str = "builtin"  # builtin, a file, a folder, a glob, or hf://datasets/wikimedia/wikipedia/20231101.fr
    corpus_bytes: int | None = None  # take the first so many bytes of text
    # bytes, char, bpe, bpe-gpt2, bpe-none, sentencepiece-bpe, sentencepiece-unigram, or directories of saved ones.
    tokenizers: tuple[str, ...] = ("char", "bpe", "sentencepiece-bpe")
    vocab_sizes: tuple[int, ...] = ()  # of all but bytes and char; none: the model's vocab_size
    characters: int = 98  # ids of the character tokenizer
    sizes: tuple[str, ...] = ()  # layers x width, as 2x128 4x256; none: the model's
    seeds: int = 4  # runs of each arm, from `seed` on
    budget: Unit = "bytes"  # what is equal: source bytes or tokens seen, training FLOPs, or seconds of training
    budget_size: float | None = None  # how much; None: what `steps` updates of the first arm use
    context_unit: Literal["tokens", "bytes"] = "tokens"  # what context and batch are equal in
    match_parameters: bool = False  # give every arm the parameters of the first of its size, by its width
    rate_factors: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)  # times the learning rate: the grid of every arm
    rate_share: float = 0.25  # of the budget, for each rate of the grid
    together: int | None = None  # most runs as one program; None: as many as there are
    dry_run: bool = False  # show what would be trained and how long it would take, and train nothing
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=500))
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1_000, eval_every=100))

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if self.budget not in ("bytes", "tokens", "flops", "seconds"):
            raise InputError(f"The budget is in bytes, tokens, flops or seconds, not {self.budget!r}.")
        if self.budget_size is not None and not (math.isfinite(self.budget_size) and self.budget_size > 0):
            raise InputError(f"The size of the budget is a positive number, not {self.budget_size}.")
        if self.budget == "seconds" and self.budget_size is None:
            raise InputError("A budget in seconds needs its size: add --budget-size.")
        if not 0.0 < self.rate_share <= 1.0:
            raise InputError(
                f"The share of the budget for a learning rate is above 0 and at most 1, not {self.rate_share}."
            )
        if self.together is not None and self.together < 1:
            raise InputError(f"At least one run at a time has to be trained, not {self.together}.")
        if any(size < 1 for size in (*self.vocab_sizes, self.characters)):
            raise InputError("A vocabulary has at least one id; make every vocabulary size positive.")
        for size in self.sizes:
            if not _SIZE.fullmatch(size):
                raise InputError(f"A model size is layers x width, as 2x128, not {size!r}.")
        check_factors(self.training, self.rate_factors)
        replace(self.training, seed=self.training.seed + self.seeds - 1)  # the last seed is in range, too

    def specs(self) -> list[Spec]:
        """The arms that the settings name."""
        sizes = [_SIZE.fullmatch(size) for size in self.sizes]
        pairs = [(int(match[1]), int(match[2])) for match in sizes if match] or [
            (self.model.num_layers, self.model.width)
        ]
        return specs(self.tokenizers, self.vocab_sizes or (self.model.vocab_size,), self.characters, pairs)


# The speedrun's recipe without its sums over several tokens, which are another stretch of text in each arm.
_MODEL = replace(MODERN_MODEL, vocab_size=500, input_tokens=1)
_OPTIMIZER = replace(MODERN_OPTIMIZER, muon_learning_rate=0.01)

PRESETS = {
    # The built-in corpus.
    "quick": Config(
        context_unit="bytes",
        rate_factors=(0.5, 1.0, 2.0, 4.0),
        model=replace(_MODEL, context=128),
        training=TrainConfig(
            steps=300,
            batch_size=16,
            optimizer=_OPTIMIZER,
            eval_every=100, sample_every=300, checkpoint_every=100, eval_documents=10,
        ),
    ),
    # The notebooks' own two arms, with their model and recipe but for the learning rate, which the grid chooses.
    "seed": Config(
        preset="seed",
        workdir="runs/compare_tokenizers-seed",
        tokenizers=("char", "bpe"),
        training=TrainConfig(steps=1_000, eval_every=100, sample_every=1_000, checkpoint_every=100, eval_documents=10),
    ),
    # Every family at every size, a night on 2 cores; sizes that a family doesn't have are left out and named.
    "full": Config(
        preset="full",
        workdir="runs/compare_tokenizers-full",
        tokenizers=tuple(FAMILIES),
        vocab_sizes=(300, 500, 1_000, 2_000, 4_000, 8_192),
        seeds=5,
        context_unit="bytes",
        rate_factors=(0.5, 1.0, 2.0, 4.0),
        model=_MODEL,
        training=TrainConfig(
            steps=1_500,
            batch_size=16,
            optimizer=_OPTIMIZER,
            eval_every=250, sample_every=1_500, checkpoint_every=250, eval_documents=10,
        ),
    ),
}  # fmt: skip


def main(config: Config) -> None:
    check_writable(config.workdir)
    workdir = Path(config.workdir)
    wanted = config.specs()
    recorded = (recorded_devices(path) for path in sorted(workdir.glob("arms/*/rate-*/seed-*")))
    use_cores(config.training.batch_size, next(filter(None, recorded), None))
    data_mesh(config.training.batch_size)  # refuses a batch that doesn't divide among the devices
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    # Every arm is prepared before the first is trained, so that bad input is said at once.
    arms, left_out, budget = prepare(config, wanted, corpus, survey)
    for name, reason in left_out:
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    if config.dry_run:
        console.print(plan_table(config, arms, budget))
        return

    for arm in arms:
        keep_tokenizer(arm.made, survey, arm_folder(config, arm.spec))
        if config.budget == "seconds":
            keep_updates(arm_folder(config, arm.spec), budget, arm.training.steps)
        if arm.spec.vocab_size is None:
            console.print(f"{arm.spec.name} was there already: it may have seen the held-out text.", markup=False)
    console.print(
        f"{len(arms)} arms, seeds of each: {config.seeds}; {survey.documents:,} documents, {survey.bytes:,} bytes, the "
        "last 10 % held out"
    )
    outcomes = []
    with LiveTable([arm.spec.name for arm in arms]) as table:
        for arm in arms:
            outcome = train_arm(
                arm,
                arm_folder(config, arm.spec),
                survey.fingerprint,
                seeds=range(config.training.seed, config.training.seed + config.seeds),
                factors=config.rate_factors,
                rate_share=config.rate_share,
                most_together=config.together,
                table=table,
            )
            outcomes.append(outcome)
            table.stage(arm.spec.name, "failed" if outcome.failure else "done")

    held_out = HeldOut(list(held_out_documents(corpus, survey)))
    records = [record(arm, outcome) for arm, outcome in zip(arms, outcomes, strict=True)]
    results = collect(records, held_out, about(config, corpus, survey, held_out, budget), left_out)
    write_json(workdir / "results.json", results)
    write_page(results, workdir / "report.html")
    figures = write_figures(results, workdir / "figures")
    console.print(arms_table(results))
    console.print(f"\n{results['answer']}\n", style="bold", markup=False)
    console.print(
        f"Report: {workdir / 'report.html'}; {len(figures)} figures and results.json are beside it.", markup=False
    )
    if failed := [f"{entry.name} ({entry.reason})" for entry in records if entry.reason]:
        raise RunFailed(f"{len(failed)} of {len(records)} arms failed: {'; '.join(failed)}")


def prepare(
    config: Config, wanted: Sequence[Spec], corpus: Corpus, survey: Survey
) -> tuple[list[Arm], list[tuple[str, str]], float]:
    """The arms with their budget, those that can't be made and why, and the size of the budget. Nothing is written."""
    arms: list[Arm] = []
    left_out: list[tuple[str, str]] = []
    for spec in wanted:
        try:
            made = make_tokenizer(spec, corpus, survey, arm_folder(config, spec))
        except NotToBeHad as error:
            # One size that a family doesn't have is no reason to do without the others.
            left_out.append((spec.name, str(error)))
            continue
        arms.append(make_arm(spec, made, corpus, survey, config.model, config.training, config.context_unit))
    if not arms:
        raise InputError(left_out[0][1])
    if config.match_parameters:
        first = {arm.spec.size: arm for arm in reversed(arms)}  # of each model size
        arms = [
            arm if arm is first[arm.spec.size] else with_parameters(arm, first[arm.spec.size].parameters)
            for arm in arms
        ]
    size = config.budget_size
    if size is None:
        size = config.training.steps * arms[0].per_update(config.budget)
    arms = [planned(arm, config, size) for arm in arms]
    if len(config.rate_factors) > 1:
        for arm in arms:  # whatever is wrong with the grid is said now
            grid_runs(
                arm, arm_folder(config, arm.spec) / "grid", survey.fingerprint, config.rate_factors, config.rate_share
            )
    return arms, left_out, size


def arm_folder(config: Config, spec: Spec) -> Path:
    return Path(config.workdir) / "arms" / spec.name


def planned(arm: Arm, config: Config, size: float) -> Arm:
    """The arm with the updates of its budget, those that it was begun with if that is measured."""
    updates = kept_updates(arm_folder(config, arm.spec), size) if config.budget == "seconds" else None
    return with_budget(arm, config.budget, size, config.seeds) if updates is None else with_updates(arm, updates)


def record(arm: Arm, outcome: Outcome) -> ArmRecord:
    """What the report is told of an arm."""
    training = outcome.training or arm.training
    return ArmRecord(
        name=arm.spec.name,
        family=arm.spec.family,
        size="x".join(map(str, (arm.model.num_layers, arm.model.width))),
        tokenizer=arm.tokenizer,
        seconds_to_train=arm.made.seconds,
        parameters=arm.parameters,
        embedding_parameters=arm.embedding_parameters,
        context=arm.model.context,
        batch_size=training.batch_size,
        updates=training.steps,
        flops_per_token=arm.flops,
        bytes_per_token=arm.data.train.bytes_per_token,
        learning_rate=training.optimizer.learning_rate,
        muon_learning_rate=training.optimizer.muon_learning_rate if training.optimizer.name == "muon" else None,
        grid=[(rate.factor, rate.learning_rate, rate.bits_per_byte) for rate in outcome.rates],
        runs={int(path.name.removeprefix("seed-")): path for path in outcome.runs},
        reason=outcome.failure,
    )


def about(config: Config, corpus: Corpus, survey: Survey, held_out: HeldOut, budget: float) -> dict[str, Any]:
    """What the results say of themselves."""
    machine = environment([str(device) for device in jax.devices()])
    return {
        "title": "What does the tokenizer change?",
        "command": shlex.join(["python", "-m", "experiments.compare_tokenizers", *sys.argv[1:]]),
        "git_commit": machine.pop("git_commit"),
        "config": asdict(config),
        "machine": {"devices": machine.pop("devices"), "cores": machine.pop("cores")},
        "versions": machine,
        "corpus": {
            "spec": corpus.spec,
            "fingerprint": survey.fingerprint,
            "documents": survey.documents,
            "bytes": survey.bytes,
            "held_out_documents": len(held_out.texts),
            "held_out_bytes": int(held_out.document_bytes.sum()),
        },
        "imported": [spec.name for spec in config.specs() if spec.vocab_size is None],
        "budget": {"unit": config.budget, "size": budget},
        "context_unit": config.context_unit,
        "seeds": list(range(config.training.seed, config.training.seed + config.seeds)),
    }


def plan_table(config: Config, arms: Sequence[Arm], budget: float) -> Table:
    """What would be trained, and an estimate of how long it would take, from a few updates of each arm."""
    table = Table(title="nothing is trained", box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("arm", footer="all")
    columns = ("ids", "parameters", "in embedding and head", "context", "batch", "updates", "tokens", "bytes", "FLOPs")
    for name in columns:
        table.add_column(name, justify="right")
    rates = 0 if len(config.rate_factors) == 1 else len(config.rate_factors) * config.rate_share
    rows, total = [], 0.0
    with console.status("measuring a few updates of each arm"):
        for arm in arms:
            tokens = arm.training.steps * arm.tokens_per_update
            seconds = seconds_per_update(arm, seeds=config.seeds) * arm.training.steps * (config.seeds + rates)
            total += seconds
            rows.append(
                (
                    Text(arm.spec.name),
                    f"{arm.tokenizer.vocab_size:,}",
                    f"{arm.parameters:,}",
                    f"{arm.embedding_parameters:,}",
                    f"{arm.model.context:,}",
                    f"{arm.training.batch_size:,}",
                    f"{arm.training.steps:,}",
                    f"{tokens:,}",
                    f"{tokens * arm.data.train.bytes_per_token:,.0f}",
                    f"{tokens * arm.flops:.2e}",
                    f"{seconds / 60:,.1f}",
                )
            )
    table.add_column("minutes", justify="right", footer=f"{total / 60:,.1f}")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    program("experiments.compare_tokenizers", PRESETS, main)
