"""What the loop costs beside the step: input pipeline, metrics and checkpoints, evaluation and sampling excluded.

    python -m experiments.benchmarks.overhead --corpus articles.parquet

The bare jitted step, on one batch that stays on the device, alternates in blocks with the whole training loop, in one
run, so that both see the same machine. Prints the medians over blocks and the ratio of each pair of neighbours.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax

from experiments.command_line import program
from experiments.language_model import tokenize
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import survey_corpus, train_documents
from jaxlm.loop import train
from jaxlm.model import ModelConfig
from jaxlm.parallel import batch_sharding, data_mesh, one_at_a_time, replicated, use_cores
from jaxlm.runs import console, read_metrics
from jaxlm.tokenizers import CharTokenizer
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, check_memory, init_state, make_train_step, open_run


@dataclass(frozen=True)
class Config:
    """Measures the overhead of the training loop over the bare step of the seed model."""

    corpus: str = "builtin"  # as in the experiments
    corpus_bytes: int | None = None
    blocks: int = 9  # pairs of measurements
    block_steps: int = 20  # steps in each, with a checkpoint in the middle
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=98))
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.block_steps < 1:
            raise InputError("There is at least one block, and a block has at least one step.")
        replace(self.training, steps=self.blocks * self.block_steps)


PRESETS = {"seed": Config()}


def main(config: Config) -> None:
    use_cores(config.training.batch_size)
    check_memory(config.model, config.training)
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    tokenizer = CharTokenizer.train(train_documents(corpus, survey), config.model.vocab_size)
    data = tokenize(corpus, survey, tokenizer)
    # Evaluation and sampling come at the last step alone, where the clock stands still for them.
    training = replace(
        config.training,
        checkpoint_every=max(1, config.block_steps // 2),
        eval_every=10**9,
        sample_every=10**9,
        eval_documents=1,
    )
    batches = make_batches(data.train, context=config.model.context, batch_size=training.batch_size, seed=0)
    mesh = data_mesh(training.batch_size)
    step = jax.jit(make_train_step(config.model, training, mesh), donate_argnums=0)
    state = jax.device_put(init_state(config.model, training), replicated(mesh))
    batch = jax.device_put(batches[0], batch_sharding(mesh))
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)

    console.print(f"{'block':>5}  {'bare step':>10}  {'loop':>10}  overhead")
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"kind": "char", "vocab_size": config.model.vocab_size}
        seconds = 0.0
        for block in range(config.blocks):
            started = time.perf_counter()
            for _ in range(config.block_steps):
                state, metrics = step(state, batch)
                one_at_a_time(mesh, metrics)
            jax.block_until_ready(state)
            bare = (time.perf_counter() - started) / config.block_steps
            # A constant schedule can be prolonged, so the loop goes on where the block before it ended.
            run = open_run(Path(folder) / "run", survey.fingerprint, settings, config.model, training)
            steps = (block + 1) * config.block_steps
            with console.capture():
                train(run, tokenizer, data, config.model, replace(training, steps=steps))
            now = read_metrics(run.path)[-1]["seconds"]
            loop, seconds = (now - seconds) / config.block_steps, now
            pairs.append((bare, loop))
            console.print(f"{block:>5}  {bare * 1e3:>7.1f} ms  {loop * 1e3:>7.1f} ms  {loop / bare - 1:>7.2%}")
    console.print(
        f"median: bare {statistics.median(bare for bare, _ in pairs) * 1e3:.1f} ms, loop "
        f"{statistics.median(loop for _, loop in pairs) * 1e3:.1f} ms, overhead "
        f"{statistics.median(loop / bare for bare, loop in pairs) - 1:.2%}"
    )


if __name__ == "__main__":
    program("experiments.benchmarks.overhead", PRESETS, main)
