"""How good a small model of French becomes in how little time, on two cores.

    python -m experiments.speedrun --corpus articles.parquet
    python -m experiments.speedrun --corpus articles.parquet --preset bpe-short
    python -m experiments.speedrun --corpus articles.parquet --validation --seeds 1

The rules. At most 453,986 parameters under the 98 character ids, at most 557,300 under BPE with 500; context 256. The
text is the training documents of the corpus, the first 90 %. All settings, the number of steps too, are fixed
beforehand with `--validation`, which trains on the first 95 % of those documents and scores on the rest. The held-out
documents are looked at once, at the end. The score is bits per byte of the held-out documents as one text, in windows
of 256 tokens without overlap, as the first baselines were scored; "each alone" is the measure of all other experiments.
Time is that of the steps, the making of batches included, with compilation told apart. Factors of products are rounded
to bfloat16 on a CPU with an instruction for that, but not with `--compute-type float32`; elsewhere all is float32.

Records, and ideas that did not work: SPEEDRUN.md.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import numpy as np
import numpy.typing as npt
from rich.table import Table

from experiments.command_line import check_seeds, program
from experiments.language_model import MODERN_BPE_MODEL, MODERN_MODEL, MODERN_OPTIMIZER, tokenize
from jaxlm.attention import rounds
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import TokenStream, survey_corpus, train_documents
from jaxlm.evaluation import evaluate, token_nats
from jaxlm.model import ModelConfig, Params, count_parameters, forward
from jaxlm.parallel import batch_sharding, compiler_options, data_mesh, replicated, stacked, use_cores
from jaxlm.runs import console
from jaxlm.tokenizers import BPETokenizer, CharTokenizer
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, check_memory, init_state, make_train_step, several_steps

OPTIMIZER = replace(MODERN_OPTIMIZER, muon_learning_rate=0.01, muon_iterations=3)
SHORT = TrainConfig(steps=600, batch_size=8, optimizer=OPTIMIZER, compute_type="bfloat16")
MIDDLE = replace(SHORT, steps=1_500)
LONG = replace(SHORT, steps=10_000)
LONG_MODEL = replace(MODERN_MODEL, num_layers=3, width=112, feed_forward_width=256)
LONG_BPE_MODEL = replace(MODERN_BPE_MODEL, num_layers=3, width=112, feed_forward_width=288)
STEPS_AT_ONCE = 10  # in one program, since to start a program takes as long as a tenth of such a step


@dataclass(frozen=True)
class Config:
    """Trains a small model as fast as it can be, several times, and scores it once each."""

    # The settings that the other flags override.
    preset: Literal["short", "middle", "long", "bpe-short", "bpe-middle", "bpe-long"] = "short"
    tokenizer: Literal["char", "bpe"] = "char"
    corpus: str = "builtin"  # as in the experiments
    seeds: int = 5  # runs, with the seeds from --seed on
    validation: bool = False  # train and score on parts of the training documents, to choose settings
    first_context: int = 128  # tokens of the windows in the first part of the run, as many of them a step as ever
    first_share: float = 0.5  # how long that is
    model: ModelConfig = MODERN_MODEL
    training: TrainConfig = SHORT

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if not 0.0 <= self.first_share <= 1.0:
            raise InputError(f"The first share is from 0 to 1, not {self.first_share}.")
        if not 2 <= self.first_context <= self.model.context or self.model.context % self.first_context:
            raise InputError(f"The first context divides {self.model.context}; {self.first_context} does not.")


PRESETS = {
    "short": Config(),
    "middle": Config(preset="middle", training=MIDDLE),
    "long": Config(preset="long", model=LONG_MODEL, training=LONG),
    "bpe-short": Config(preset="bpe-short", tokenizer="bpe", model=MODERN_BPE_MODEL),
    "bpe-middle": Config(preset="bpe-middle", tokenizer="bpe", model=MODERN_BPE_MODEL, training=MIDDLE),
    "bpe-long": Config(preset="bpe-long", tokenizer="bpe", model=LONG_BPE_MODEL, training=LONG),
}


@dataclass(frozen=True)
class Result:
    """One seed."""

    bits_per_byte: float  # windows without overlap
    each_alone: float  # each document alone, as elsewhere
    seconds: float
    compilation: float
    tokens: int


def main(config: Config) -> None:
    use_cores(config.training.batch_size)
    if config.training.compute_type == "bfloat16" and not rounds("bfloat16"):
        console.print("Factors of products can't be rounded to bfloat16 here, so that all is float32.")
        config = replace(config, training=replace(config.training, compute_type="float32"))
    first_seed = config.training.seed
    trainings = [replace(config.training, seed=seed) for seed in range(first_seed, first_seed + config.seeds)]
    check_memory(config.model, config.training)
    corpus = open_corpus(config.corpus)
    survey = survey_corpus(corpus)
    make = CharTokenizer.train if config.tokenizer == "char" else BPETokenizer.train
    tokenizer = make(train_documents(corpus, survey), config.model.vocab_size)
    data = tokenize(corpus, survey, tokenizer)
    data = data.for_validation() if config.validation else data
    train, scored = data.train, data.held_out
    check_windows(len(scored), config.model)
    assert tokenizer.end_of_text_id is not None
    table = Table(
        title=f"{config.preset}, {tokenizer.kind}, {config.training.compute_type}"
        + (", validation" if config.validation else "")
    )
    for column in ("seed", "bits per byte", "each alone", "tokens", "bytes", "seconds", "compilation", "parameters"):
        table.add_column(column, justify="right")
    results = []
    for training in trainings:
        params, seconds, compilation, tokens = run(replace(config, training=training), train)
        params = jax.device_put(params, jax.devices()[0])
        result = Result(
            in_windows(params, config.model, scored.slice(0, len(scored)))
            / math.log(2)
            / float(scored.document_bytes.sum()),
            evaluate(params, config.model, scored, tokenizer.end_of_text_id).bits_per_byte,
            seconds,
            compilation,
            tokens,
        )
        results.append(result)
        table.add_row(
            str(training.seed),
            f"{result.bits_per_byte:.4f}",
            f"{result.each_alone:.4f}",
            f"{tokens / 1e6:.2f} M",
            f"{tokens * train.bytes_per_token / 1e6:.2f} M",
            f"{seconds:.1f}",
            f"{compilation:.1f}",
            f"{count_parameters(params):,}",
        )
        console.print(f"seed {training.seed}: {result.bits_per_byte:.4f} bits per byte after {seconds:.1f} s")
    scores = [result.bits_per_byte for result in results]
    if len(scores) > 1:
        table.add_section()
        table.add_row(
            "mean",
            f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}",
            f"{statistics.mean(result.each_alone for result in results):.4f}",
            "",
            "",
            f"{statistics.mean(result.seconds for result in results):.1f}",
            "",
            "",
        )
    console.print(table)


def run(config: Config, train: TokenStream) -> tuple[Params, float, float, int]:
    """Trains once: the parameters, the seconds of the steps and those of compilation, and the tokens seen."""
    training = config.training
    batch_tokens = training.batch_size * config.model.context
    mesh = data_mesh(training.batch_size)
    state = jax.jit(partial(init_state, config.model, training), out_shardings=replicated(mesh))()
    steps_at_once = several_steps(make_train_step(config.model, training, mesh))
    several = jax.jit(lambda state, batches: steps_at_once(state, batches)[0])
    divided = stacked(batch_sharding(mesh))
    options = compiler_options(batch_tokens * config.model.width // mesh.size)
    seconds = compilation = 0.0
    first_steps = round(config.first_share * training.steps)
    for context, steps in ((config.first_context, first_steps), (config.model.context, training.steps - first_steps)):
        if not steps:
            continue
        at_once = max(number for number in range(1, STEPS_AT_ONCE + 1) if steps % number == 0)
        order = training.seed * 1_000 + context
        batches = make_batches(train, context=context, batch_size=batch_tokens // context, seed=order)
        windows = [batches[index] for index in range(at_once)]
        started = time.perf_counter()
        compiled = several.lower(state, jax.device_put(np.stack(windows), divided)).compile(options)
        compilation += time.perf_counter() - started
        started = time.perf_counter()
        for done in range(at_once, steps + at_once, at_once):
            updated = compiled(state, jax.device_put(np.stack(windows), divided))
            windows = [batches[index] for index in range(done, done + at_once)]  # the next ones, meanwhile
            state = jax.block_until_ready(updated)
        seconds += time.perf_counter() - started
    return state.params, seconds, compilation, training.steps * batch_tokens


def check_windows(num_tokens: int, model: ModelConfig) -> None:
    """Raises InputError for a held-out text that has no window."""
    if num_tokens <= model.context:
        raise InputError(
            f"The held-out text has {num_tokens} tokens, and one window of context {model.context} needs "
            f"{model.context + 1}; use more text or a smaller context."
        )


def in_windows(params: Params, model: ModelConfig, ids: npt.NDArray[np.int32], batch: int = 64) -> float:
    """Nats of a text in one piece: windows of `context` tokens without overlap, the rest at their mean."""
    score = jax.jit(partial(_nats, model=model))
    count = (len(ids) - 1) // model.context
    size = count * model.context
    inputs, targets = (ids[start : start + size].reshape(count, model.context) for start in (0, 1))
    nats = sum(float(score(params, inputs[i : i + batch], targets[i : i + batch])) for i in range(0, count, batch))
    return nats / size * len(ids)


def _nats(params: Params, inputs_BT: jax.Array, targets_BT: jax.Array, model: ModelConfig) -> jax.Array:
    return token_nats(forward(params, inputs_BT, model), targets_BT).sum()


if __name__ == "__main__":
    program("experiments.speedrun", PRESETS, main)
