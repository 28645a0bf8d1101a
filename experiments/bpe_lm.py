"""The same language model on the from-scratch BPE tokenizer.

    python -m experiments.bpe_lm
    python -m experiments.bpe_lm --preset seed --corpus articles.parquet
    python -m experiments.bpe_lm --sample "La ville de"

Rerunning the same command continues an interrupted run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from experiments.command_line import program
from experiments.language_model import (
    MODERN_BPE_MODEL,
    MODERN_OPTIMIZER,
    QUICK_OPTIMIZER,
    Sampling,
    sample_run,
    train_and_show,
)
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import survey_corpus, train_documents
from jaxlm.model import ModelConfig
from jaxlm.parallel import use_cores
from jaxlm.runs import Run, recorded_devices
from jaxlm.tokenizers import BPETokenizer
from jaxlm.training import TrainConfig, check_memory, run_identity


@dataclass(frozen=True)
class Config:
    """Trains a BPE tokenizer from scratch and a language model on it, or samples from one."""

    preset: Literal["quick", "seed", "modern"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/bpe_lm"  # the run directory; the same command continues the run in it
    corpus: str = "builtin"  # builtin, a file, a folder, a glob, or hf://datasets/wikimedia/wikipedia/20231101.fr
    corpus_bytes: int | None = None  # take the first so many bytes of text
    split: str = "gpt4"  # how text is cut into chunks before BPE: gpt2, gpt4 or none
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=500))
    training: TrainConfig = field(default_factory=TrainConfig)
    sampling: Sampling = field(default_factory=Sampling)


PRESETS = {
    "quick": Config(
        model=ModelConfig(vocab_size=500, context=128, dropout=0.0),
        training=TrainConfig(
            steps=400,
            batch_size=32,
            optimizer=QUICK_OPTIMIZER,
            eval_every=100, sample_every=200, checkpoint_every=100,
        ),
    ),
    # 557,300 parameters. 1,000 steps on 10 MB of French Wikipedia: 2.306 bits per byte, 15,500 tokens/s (2 cores).
    "seed": Config(preset="seed", workdir="runs/bpe_lm-seed", training=TrainConfig(steps=72_000)),
    # The recipe of the speedrun's long track, whose windows are shorter at first. Not run to its end yet as it is here.
    "modern": Config(
        preset="modern",
        workdir="runs/bpe_lm-modern",
        model=MODERN_BPE_MODEL,
        training=TrainConfig(steps=5_000, batch_size=16, optimizer=MODERN_OPTIMIZER),
    ),
}  # fmt: skip


def main(config: Config) -> None:
    if config.sampling.sample is not None:
        sample_run(config.workdir, config.sampling, config.training.seed)
        return
    use_cores(config.training.batch_size, recorded_devices(config.workdir))
    check_memory(config.model, config.training)
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    settings = {"kind": "bpe", "vocab_size": config.model.vocab_size, "split": config.split}
    run = Run(config.workdir, run_identity(survey.fingerprint, settings, config.model, config.training))
    tokenizer = run.tokenizer() or BPETokenizer.train(
        train_documents(corpus, survey), config.model.vocab_size, split=config.split
    )
    train_and_show(run, corpus, survey, tokenizer, config.model, config.training)


if __name__ == "__main__":
    program("experiments.bpe_lm", PRESETS, main)
