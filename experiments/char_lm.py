"""A character-level language model on French text: from raw documents to a sampled model.

    python -m experiments.char_lm
    python -m experiments.char_lm --preset seed --corpus articles.parquet
    python -m experiments.char_lm --sample "La ville de"

Rerunning the same command continues an interrupted run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from experiments.command_line import program
from experiments.language_model import MODERN_MODEL, MODERN_OPTIMIZER, QUICK_OPTIMIZER, LanguageModelConfig, run
from jaxlm.model import ModelConfig
from jaxlm.tokenizers import CharTokenizer
from jaxlm.training import TrainConfig


@dataclass(frozen=True)
class Config(LanguageModelConfig):
    """Trains a character-level language model, or samples from one."""

    preset: Literal["quick", "seed", "modern"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/char_lm"  # the run directory; the same command continues the run in it
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=98))


PRESETS = {
    "quick": Config(
        model=ModelConfig(vocab_size=98, context=128, dropout=0.0),
        training=TrainConfig(
            steps=450,
            batch_size=32,
            optimizer=QUICK_OPTIMIZER,
            eval_every=100, sample_every=250, checkpoint_every=100,
        ),
    ),
    # 453,986 parameters. On 10 MB of French Wikipedia 2.678 bits per byte after 1,000 steps, 1.904 after all 73,000.
    "seed": Config(preset="seed", workdir="runs/char_lm-seed", training=TrainConfig(steps=73_000)),
    # An earlier recipe of the speedrun, in larger batches and without its short first windows. Not run to its end yet.
    "modern": Config(
        preset="modern",
        workdir="runs/char_lm-modern",
        model=MODERN_MODEL,
        training=TrainConfig(steps=5_000, batch_size=16, optimizer=MODERN_OPTIMIZER),
    ),
}  # fmt: skip


def main(config: Config) -> None:
    vocab_size = config.model.vocab_size
    settings = {"kind": "char", "vocab_size": vocab_size}
    run(config, settings, lambda documents: CharTokenizer.train(documents, vocab_size))


if __name__ == "__main__":
    program("experiments.char_lm", PRESETS, main)
