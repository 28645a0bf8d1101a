"""The learning curve of the seed recipe without dropout on attention weights, to set beside the same recipe in PyTorch.

    python -m experiments.benchmarks.seed_curve --corpus articles.parquet

A fused attention kernel drops no attention weights, so a PyTorch program that uses one trains another model than the
recipe does. Here that dropout is left out too, and the held-out text is scored twice: as such a program does, in one
piece cut into windows without overlap, and as this project does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from unittest import mock

import jax

import jaxlm.model
from experiments.command_line import program
from experiments.language_model import tokenize
from experiments.speedrun import check_windows, in_windows
from jaxlm.attention import causal_attention
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import held_out_documents, survey_corpus, train_documents
from jaxlm.evaluation import evaluate
from jaxlm.model import ModelConfig
from jaxlm.parallel import batch_sharding, data_mesh, one_at_a_time, replicated, use_cores
from jaxlm.runs import console
from jaxlm.tokenizers import CharTokenizer
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, check_memory, init_state, make_train_step


@dataclass(frozen=True)
class Config:
    """Trains the seed model without dropout on attention weights, and prints its learning curve."""

    corpus: str = "builtin"  # as in the experiments
    corpus_bytes: int | None = None
    score_every: int = 250  # steps
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=98))
    training: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1_000))

    def __post_init__(self) -> None:
        if self.score_every < 1:
            raise InputError(f"score_every is at least 1, not {self.score_every}.")


PRESETS = {"seed": Config()}


@mock.patch.object(jaxlm.model, "causal_attention", lambda q, k, v, **_: causal_attention(q, k, v))
def main(config: Config) -> None:
    model, training = config.model, config.training
    use_cores(training.batch_size)
    check_memory(model, training)
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    tokenizer = CharTokenizer.train(train_documents(corpus, survey), model.vocab_size)
    data = tokenize(corpus, survey, tokenizer)
    held_out = "\n\n".join(held_out_documents(corpus, survey))
    ids, num_bytes = tokenizer.encode(held_out, allowed_special="none"), len(held_out.encode())
    check_windows(len(ids), model)

    mesh = data_mesh(training.batch_size)
    state = jax.device_put(init_state(model, training), replicated(mesh))
    step = jax.jit(make_train_step(model, training, mesh), donate_argnums=0)
    batches = make_batches(data.train, context=model.context, batch_size=training.batch_size, seed=training.seed)
    console.print(f"{'step':>6}  {'windows without overlap':>24}  {'each document alone':>20}   bits per byte")
    for index in range(training.steps):
        state, _ = step(state, jax.device_put(batches[index], batch_sharding(mesh)))
        one_at_a_time(mesh, state)
        if (index + 1) % config.score_every == 0:
            params = jax.device_put(state.params, jax.devices()[0])
            end_of_text_id = tokenizer.end_of_text_id
            assert end_of_text_id is not None
            score = evaluate(params, model, data.held_out, end_of_text_id)
            windows = in_windows(params, model, ids) / math.log(2) / num_bytes
            console.print(
                f"{index + 1:>6,}  {windows:>24.4f}  {score.bits_per_byte:>11.4f} ± {score.standard_error:.4f}"
            )


if __name__ == "__main__":
    program("experiments.benchmarks.seed_curve", PRESETS, main)
