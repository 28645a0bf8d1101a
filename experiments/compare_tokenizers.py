"""What does the tokenizer change? The same model under each tokenizer, on the same text, in bits per byte.

    python -m experiments.compare_tokenizers
    python -m experiments.compare_tokenizers --preset seed --corpus articles.parquet

Each arm is a run directory of its own; rerunning the same command continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax

from experiments.command_line import program
from experiments.language_model import tokenize, train_run
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import TokenizedCorpus, survey_corpus, train_documents
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.reports.figures import comparison_figure
from jaxlm.reports.tables import comparison_table
from jaxlm.runs import Run, check_writable, console, read_metrics
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from jaxlm.tokenizers.base import InputError
from jaxlm.training import TrainConfig, run_identity


@dataclass(frozen=True)
class Config:
    """Trains the same model under characters, BPE and SentencePiece, for the same number of source bytes."""

    preset: Literal["quick", "seed"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/compare_tokenizers"  # one run directory an arm, and the figure
    corpus: str = "builtin"  # builtin, a file, a folder, a glob, or hf://datasets/wikimedia/wikipedia/20231101.fr
    corpus_bytes: int | None = None  # take the first so many bytes of text
    characters: int = 98  # ids of the character tokenizer
    batch_bytes: int = 4_096  # source bytes in an update, for every arm as nearly as whole windows allow
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=500))
    training: TrainConfig = field(default_factory=TrainConfig)  # batch_size and steps follow from batch_bytes

    def __post_init__(self) -> None:
        if self.batch_bytes < 1:
            raise InputError(f"batch_bytes is at least 1, not {self.batch_bytes}.")


PRESETS = {
    "quick": Config(
        model=ModelConfig(vocab_size=500, context=128, dropout=0.0),
        training=TrainConfig(
            steps=450,
            optimizer=OptimizerConfig(
                learning_rate=3e-3, schedule="cosine", warmup_steps=45, beta2=0.95, weight_decay=0.1, decay="matrices",
                clip_norm=1.0,
            ),
            eval_every=100, sample_every=450, checkpoint_every=100,
        ),
    ),
    # The notebooks' model and recipe.
    "seed": Config(preset="seed", workdir="runs/compare_tokenizers-seed", batch_bytes=17_000),
}  # fmt: skip


def main(config: Config) -> None:
    check_writable(Path(config.workdir))
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    size = config.model.vocab_size
    arms: dict[str, tuple[dict[str, object], Callable[[Iterable[str]], Tokenizer]]] = {
        "char": (
            {"kind": "char", "vocab_size": config.characters},
            partial(CharTokenizer.train, vocab_size=config.characters),
        ),
        f"bpe-{size}": (
            {"kind": "bpe", "vocab_size": size, "split": "gpt4"},
            partial(BPETokenizer.train, vocab_size=size),
        ),
        f"sentencepiece-{size}": (
            {"kind": "sentencepiece", "vocab_size": size, "model_type": "bpe"},
            partial(SentencePieceTokenizer.train, vocab_size=size),
        ),
    }
    # Every tokenizer is made before the first model is trained, so that bad input is said at once.
    tokenizers = {name: make(train_documents(corpus, survey)) for name, (_, make) in arms.items()}
    for name, (settings, _) in arms.items():
        tokenizer = tokenizers[name]
        console.rule(f"[bold]{name}[/]")
        data = tokenize(corpus, survey, tokenizer)
        model = replace(config.model, vocab_size=tokenizer.vocab_size)
        training = equal_bytes(config, data)
        run = Run(Path(config.workdir) / name, run_identity(survey.fingerprint, settings, model, training))
        console.print(
            f"{tokenizer.vocab_size:,} ids, {data.train.bytes_per_token:.3f} bytes per token: {training.steps:,} "
            f"updates of {training.batch_size} windows of {model.context} tokens"
        )
        train_run(run, tokenizer, data, model, training)

    metrics = {name: read_metrics(Path(config.workdir) / name) for name in arms}
    figure = Path(config.workdir) / "comparison.png"
    comparison_figure(metrics, figure)
    console.print()
    console.print(comparison_table({name: lines[-1] for name, lines in metrics.items()}))
    console.print(
        "Loss per token can't be compared: the tokens of different vocabularies hold different amounts of text.\n"
        f"Bits per byte can. ± is the standard error over held-out documents. Figure: {figure}"
    )


def equal_bytes(config: Config, data: TokenizedCorpus) -> TrainConfig:
    """The training of one arm: as many source bytes an update, and in all, as every other arm.

    Tokens of a larger vocabulary hold more bytes, so that arm takes fewer windows an update. What rounding the windows
    leaves over goes into the number of updates.
    """
    window_bytes = config.model.context * data.train.bytes_per_token
    devices = jax.device_count()
    batch_size = devices * max(1, round(config.batch_bytes / window_bytes / devices))
    steps = max(1, round(config.training.steps * config.batch_bytes / (batch_size * window_bytes)))
    return replace(config.training, batch_size=batch_size, steps=steps)


if __name__ == "__main__":
    program("experiments.compare_tokenizers", PRESETS, main)
