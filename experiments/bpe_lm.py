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
from experiments.language_model import MODERN_BPE_MODEL, MODERN_OPTIMIZER, QUICK_OPTIMIZER, LanguageModelConfig, run
from jaxlm.model import ModelConfig
from jaxlm.tokenizers import BPETokenizer
from jaxlm.tokenizers.bpe import check_split
from jaxlm.training import TrainConfig


@dataclass(frozen=True)
class Config(LanguageModelConfig):
    """Trains a BPE tokenizer from scratch and a language model on it, or samples from one."""

    preset: Literal["quick", "seed", "modern"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/bpe_lm"  # the run directory; the same command continues the run in it
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=500))
    split: str = "gpt4"  # how text is cut into chunks before BPE: gpt2, gpt4, o200k or none

    def __post_init__(self) -> None:
        check_split(self.split, None)


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
    # 557,300 parameters. On 10 MB of French Wikipedia 2.306 bits per byte after 1,000 steps.
    "seed": Config(preset="seed", workdir="runs/bpe_lm-seed", training=TrainConfig(steps=72_000)),
    # An earlier recipe of the speedrun, in larger batches and without its short first windows. Not run to its end yet.
    "modern": Config(
        preset="modern",
        workdir="runs/bpe_lm-modern",
        model=MODERN_BPE_MODEL,
        training=TrainConfig(steps=5_000, batch_size=16, optimizer=MODERN_OPTIMIZER),
    ),
}  # fmt: skip


def main(config: Config) -> None:
    vocab_size, split = config.model.vocab_size, config.split
    settings = {"kind": "bpe", "vocab_size": vocab_size, "split": split}
    run(config, settings, lambda documents: BPETokenizer.train(documents, vocab_size, split=split))


if __name__ == "__main__":
    program("experiments.bpe_lm", PRESETS, main)
