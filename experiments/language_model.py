"""What every experiment does with a corpus, a tokenizer and a model: train, evaluate, show, sample."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.markup import escape

from jaxlm.checkpoints import saved_steps
from jaxlm.data.documents import Corpus, open_corpus
from jaxlm.data.shards import Survey, TokenizedCorpus, survey_corpus, tokenize_corpus, train_documents
from jaxlm.final_score import evaluate_run
from jaxlm.loop import train
from jaxlm.model import ModelConfig, abstract_params
from jaxlm.optimizers import OptimizerConfig
from jaxlm.parallel import use_cores
from jaxlm.progress import share_progress
from jaxlm.reports.tables import deviation, parameter_table
from jaxlm.runs import Acceptable, console, read_metrics, recorded_devices
from jaxlm.sampling import check_sampling, sample_text
from jaxlm.tokenizers.base import InputError, Tokenizer
from jaxlm.training import TrainConfig, check_memory, load_trained, load_warm_start, open_run

# For runs of minutes: between two rates, 2e-3 and 4e-3, that scored alike. The seed recipe is the default.
QUICK_OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=None,
    beta2=0.95,
    weight_decay=0.1,
    decay="matrices",
    clip_norm=1.0,
)

# What the speedrun found to learn most from each second, see SPEEDRUN.md.
MODERN_MODEL = ModelConfig(
    vocab_size=98,
    feed_forward_width=352,
    dropout=0.0,
    norm="rms",
    positions="rope",
    qk_norm=True,
    activation="swiglu",
    biases=False,
    zero_outputs=True,
    input_tokens=3,
)
MODERN_BPE_MODEL = replace(MODERN_MODEL, vocab_size=500, feed_forward_width=384, input_tokens=1)
MODERN_OPTIMIZER = OptimizerConfig(
    name="muon",
    learning_rate=0.02,
    muon_learning_rate=0.014,
    schedule="wsd",
    decay_share=0.6,
    warmup_steps=10,
    beta2=0.95,
    weight_decay=0.0,
)


@dataclass(frozen=True)
class Sampling:
    """Text from a run that is there already."""

    sample: str | None = None  # print how this text goes on, instead of training
    num_tokens: int = 300  # tokens to sample
    temperature: float = 0.8  # below 1 more probable text, 0 the most probable token each time
    top_k: int | None = None  # draw from the most probable tokens alone

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise InputError(f"num_tokens is at least 1, not {self.num_tokens}.")
        check_sampling(self.temperature, self.top_k)


@dataclass(frozen=True)
class LanguageModelConfig:
    """What a run is: a text, a model, its training, and where all of it is kept."""

    model: ModelConfig
    workdir: str  # the run directory; the same command continues the run in it
    corpus: str = "builtin"  # builtin, a file, a folder, a glob, or hf://datasets/wikimedia/wikipedia/20231101.fr
    corpus_bytes: int | None = None  # take the first so many bytes of text
    training: TrainConfig = field(default_factory=TrainConfig)
    warm_start: str | None = None  # begin with the tokenizer and the parameters of the run in this directory
    accept: tuple[Acceptable, ...] = ()  # let a run go on with another corpus, or another tokenizer, than it began with
    sampling: Sampling = field(default_factory=Sampling)


def run(
    config: LanguageModelConfig, settings: dict[str, Any], train_tokenizer: Callable[[Iterator[str]], Tokenizer]
) -> None:
    """Trains to the end (or on, if the run is there), scores all held-out text, and draws; or only samples.

    Args:
      settings: what the tokenizer is determined by, beside the training documents.
      train_tokenizer: makes it from them, for a new run.
    """
    if config.sampling.sample is not None:
        sample_run(config.workdir, config.sampling, config.training.seed)
        return
    use_cores(config.training.batch_size, recorded_devices(config.workdir))
    check_memory(config.model, config.training)
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    run = open_run(
        config.workdir, survey.fingerprint, settings, config.model, config.training,
        warm_start=config.warm_start, accept=config.accept,
    )  # fmt: skip
    tokenizer, params = run.tokenizer(), None
    if config.warm_start is not None and not saved_steps(run.path / "checkpoints"):
        tokenizer, params = load_warm_start(config.warm_start, settings, config.model)
        console.print(f"Beginning with the tokenizer and the weights of {config.warm_start}.", markup=False)
    tokenizer = tokenizer or train_tokenizer(train_documents(corpus, survey))
    console.print(f"{survey.documents:,} documents, {survey.bytes:,} bytes, the last 10 % held out")
    data = tokenize(corpus, survey, tokenizer)
    console.print(
        f"{tokenizer.kind} tokenizer: {tokenizer.vocab_size:,} ids, {data.train.bytes_per_token:.3f} bytes per token, "
        f"{len(data.train):,} training tokens"
    )
    console.print(parameter_table(abstract_params(config.model)))
    state = train(run, tokenizer, data, config.model, config.training, params)
    evaluate_run(run, tokenizer, data, config.model, config.training, state)
    from jaxlm.reports.figures import learning_curve  # half a second, which the first step needn't wait for

    figure = run.path / "learning_curve.png"
    metrics = read_metrics(run.path)
    learning_curve(metrics, figure, title=f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids")
    final = metrics[-1]
    console.print(
        f"\n{final['final/documents']} held-out documents: [bold]{final['final/bits_per_byte']:.4f}[/] "
        f"± {deviation(final)} bits per byte, {final['final/loss']:.4f} nats per token\n"
        f"{final['tokens'] / final['seconds']:,.0f} tokens/s, {final['seconds']:,.0f} s of training; "
        f"figure: {escape(str(figure))}"
    )


def tokenize(corpus: Corpus, survey: Survey, tokenizer: Tokenizer) -> TokenizedCorpus:
    """Token shards of the corpus, with a progress bar while they are made."""
    with share_progress("tokenizing", survey.bytes) as progress:
        advance = partial(progress.advance, progress.task_ids[0])
        return tokenize_corpus(corpus, survey, tokenizer, on_document=advance)


def sample_run(workdir: str, sampling: Sampling, seed: int) -> None:
    """Streams text from the run in `workdir` to the terminal."""
    assert sampling.sample is not None
    tokenizer, model, params = load_trained(Path(workdir))
    pieces = sample_text(
        params, model, tokenizer, sampling.sample, key=jax.random.key(seed), num_tokens=sampling.num_tokens,
        temperature=sampling.temperature, top_k=sampling.top_k,
    )  # fmt: skip
    first = next(pieces, "")  # whatever is wrong with the settings is said before anything is printed
    console.print(sampling.sample, style="bold", end="", markup=False, soft_wrap=True)
    for piece in itertools.chain([first], pieces):
        console.print(piece, end="", markup=False, soft_wrap=True)
        sys.stdout.flush()
    console.print()
