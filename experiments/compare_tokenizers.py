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

from experiments.command_line import program
from experiments.language_model import QUICK_OPTIMIZER, parameters_of, tokenize, train_run
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import TokenizedCorpus, survey_corpus, train_documents
from jaxlm.model import ModelConfig
from jaxlm.parallel import data_mesh, use_cores
from jaxlm.reports.figures import comparison_figure
from jaxlm.reports.tables import comparison_table
from jaxlm.runs import Run, check_writable, console, read_metrics, recorded_devices, stored_tokenizer
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from jaxlm.training import TrainConfig, run_identity


@dataclass(frozen=True)
class Config:
    """Trains the same model under characters, BPE and SentencePiece, for the same number of source bytes."""

    preset: Literal["quick", "seed"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/compare_tokenizers"  # one run directory an arm, and the figure
    corpus: str = "builtin"  # builtin, a file, a folder, a glob, or hf://datasets/wikimedia/wikipedia/20231101.fr
    corpus_bytes: int | None = None  # take the first so many bytes of text
    characters: int = 98  # ids of the character tokenizer
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=500))
    # An update is `batch_size` windows of `context` source bytes in every arm, as nearly as whole windows allow.
    training: TrainConfig = field(default_factory=TrainConfig)


PRESETS = {
    # The built-in corpus, 127 s on 2 cores: 2.583 (char), 2.510 (bpe-500) and 2.532 (sentencepiece-500) bits per byte.
    "quick": Config(
        model=ModelConfig(vocab_size=500, context=128, dropout=0.0),
        training=TrainConfig(
            steps=450,
            batch_size=32,
            optimizer=QUICK_OPTIMIZER,
            eval_every=100, sample_every=450, checkpoint_every=100,
        ),
    ),
    # The notebooks' model and recipe.
    "seed": Config(preset="seed", workdir="runs/compare_tokenizers-seed"),
}  # fmt: skip


def main(config: Config) -> None:
    check_writable(Path(config.workdir))
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    size = config.model.vocab_size
    makers: dict[str, tuple[dict[str, object], Callable[[Iterable[str]], Tokenizer]]] = {
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
    recorded = (recorded_devices(Path(config.workdir) / name) for name in makers)
    use_cores(4, next(filter(None, recorded), None))  # every arm's batch is a multiple of four
    # Every arm is prepared before the first is trained, so that bad input is said at once.
    arms = []
    for name, (settings, make) in makers.items():
        path = Path(config.workdir) / name
        tokenizer = stored_tokenizer(path) or make(train_documents(corpus, survey))
        data = tokenize(corpus, survey, tokenizer)
        model = replace(config.model, vocab_size=tokenizer.vocab_size)
        training = equal_bytes(config, data)
        data_mesh(training.batch_size)
        make_batches(data.train, context=model.context, batch_size=training.batch_size, seed=training.seed)
        arms.append(
            (Run(path, run_identity(survey.fingerprint, settings, model, training)), tokenizer, data, model, training)
        )

    for run, tokenizer, data, model, training in arms:
        console.rule(f"[bold]{run.path.name}[/]")
        console.print(parameters_of(model))
        console.print(
            f"{tokenizer.vocab_size:,} ids, {data.train.bytes_per_token:.3f} bytes per token: {training.steps:,} "
            f"updates of {training.batch_size} windows of {model.context} tokens"
        )
        train_run(run, tokenizer, data, model, training)

    metrics = {run.path.name: read_metrics(run.path) for run, *_ in arms}
    figure = Path(config.workdir) / "comparison.png"
    comparison_figure(metrics, figure)
    console.print()
    console.print(comparison_table({name: lines[-1] for name, lines in metrics.items()}))
    console.print(
        "Loss per token can't be compared: the tokens of different vocabularies hold different amounts of text.\n"
        f"Bits per byte can. ± is the standard error over held-out documents. Figure: {figure}",
        markup=False,
    )


def equal_bytes(config: Config, data: TokenizedCorpus) -> TrainConfig:
    """The training of one arm: as many source bytes an update, and in all, as every other arm.

    Tokens of a larger vocabulary hold more bytes, so that arm takes fewer windows an update: the nearest multiple of
    four, so that a few devices can share them. What that rounding leaves over goes into the number of updates.
    """
    window_bytes = config.model.context * data.train.bytes_per_token
    update_bytes = config.model.context * config.training.batch_size
    batch_size = 4 * max(1, round(update_bytes / window_bytes / 4))
    steps = max(1, round(config.training.steps * update_bytes / (batch_size * window_bytes)))
    return replace(config.training, batch_size=batch_size, steps=steps)


if __name__ == "__main__":
    program("experiments.compare_tokenizers", PRESETS, main)
