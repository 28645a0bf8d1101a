"""The arms of the comparison: which tokenizer, which model, how many updates for the same budget.

An arm is a family of tokenizers at one vocabulary size, under a model of one size. Everything about it is settled here,
before anything is trained.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.language_model import tokenize
from jaxlm.data.batches import make_batches
from jaxlm.data.documents import Corpus
from jaxlm.data.shards import Survey, TokenizedCorpus, train_documents
from jaxlm.model import (
    LARGEST_INT,
    ModelConfig,
    abstract_params,
    count_parameters,
    embedding_parameters,
    flops_per_token,
)
from jaxlm.parallel import batch_sharding, data_mesh, replicated
from jaxlm.runs import read_json, write_json
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from jaxlm.tokenizers.base import InputError, shown
from jaxlm.training import TrainConfig, check_memory, init_state, make_joint_step, make_train_step

Unit = Literal["bytes", "tokens", "flops", "seconds"]

FAMILIES: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {
    "bytes": lambda texts, _: BPETokenizer.train(texts, 257, split="none"),
    "char": CharTokenizer.train,
    "bpe": partial(BPETokenizer.train, split="gpt4"),
    "bpe-gpt2": partial(BPETokenizer.train, split="gpt2"),
    "bpe-none": partial(BPETokenizer.train, split="none"),
    "sentencepiece-bpe": partial(SentencePieceTokenizer.train, model_type="bpe"),
    "sentencepiece-unigram": partial(SentencePieceTokenizer.train, model_type="unigram"),
}


_TOKENIZER_FILE = "tokenizer.json"


class NotToBeHad(InputError):
    """A family has no tokenizer of that size for that text."""


@dataclass(frozen=True)
class Spec:
    """What an arm is asked to be.

    Attributes:
      name: also its directory.
      family: a key of FAMILIES, or the directory of a tokenizer.
      vocab_size: None for a tokenizer that is there already.
      size: layers and width of the model.
    """

    name: str
    family: str
    vocab_size: int | None
    size: tuple[int, int]


def specs(
    tokenizers: Iterable[str], vocab_sizes: Iterable[int], characters: int, sizes: Iterable[tuple[int, int]]
) -> list[Spec]:
    """Every tokenizer at every vocabulary size that it has, under every model size, in that order.

    Raises:
      InputError: a tokenizer that is neither a family nor a directory, a size out of range, or one named twice.
    """
    sizes = list(sizes)
    found: list[Spec] = []
    for family in tokenizers:
        if family not in FAMILIES and not os.path.isdir(family):
            raise InputError(
                f"{shown(family)} is no tokenizer; there are {', '.join(FAMILIES)}, and directories of saved ones."
            )
        own: list[int | None] = [*vocab_sizes]
        if family not in FAMILIES:
            own = [None]
        elif family in ("bytes", "char"):
            own = [257 if family == "bytes" else characters]
        for vocab_size in own:
            kind = family if family in FAMILIES else _name_of(Path(family).resolve())
            base = kind if vocab_size is None or family == "bytes" else f"{kind}-{vocab_size}"
            for layers, width in sizes:
                name = base if len(sizes) == 1 else f"{base}-{layers}x{width}"
                found.append(Spec(name, family, vocab_size, (layers, width)))
    names = [spec.name for spec in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"There would be two arms {min(twice)}; name each tokenizer, vocabulary size and size once.")
    if not names:
        raise InputError("There is no arm; name at least one tokenizer, one vocabulary size and one model size.")
    return found


def _name_of(path: Path) -> str:
    """A directory's name; for the tokenizer of a run, that of the run."""
    return path.parent.name if path.name == "tokenizer" else path.name


@dataclass(frozen=True)
class MadeTokenizer:
    """A tokenizer, what identifies it, and how many seconds its training took (NaN for one that was there)."""

    tokenizer: Tokenizer
    settings: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Arm:
    """An arm that can be trained.

    Attributes:
      spec: what it was asked to be.
      made: its tokenizer.
      training: with the updates that its budget allows.
      flops: of a training step, per token.
      parameters, embedding_parameters: of its model; those in embeddings and head grow with the vocabulary.
    """

    spec: Spec
    made: MadeTokenizer
    data: TokenizedCorpus
    model: ModelConfig
    training: TrainConfig
    flops: int
    parameters: int
    embedding_parameters: int

    @property
    def tokenizer(self) -> Tokenizer:
        return self.made.tokenizer

    @property
    def tokens_per_update(self) -> int:
        return self.training.batch_size * self.model.context

    @property
    def bytes_per_update(self) -> float:
        """Source bytes, end-of-text counted as none."""
        return self.tokens_per_update * self.data.train.bytes_per_token

    def per_update(self, unit: Unit, seeds: int = 1) -> float:
        """What an update costs in the unit of a budget; seconds are measured, of so many seeds as one program."""
        if unit == "seconds":
            return seconds_per_update(self, seeds=seeds)
        costs = {
            "bytes": self.bytes_per_update,
            "tokens": self.tokens_per_update,
            "flops": self.flops * self.tokens_per_update,
        }
        return costs[unit]


def make_tokenizer(spec: Spec, corpus: Corpus, survey: Survey, folder: Path) -> MadeTokenizer:
    """The tokenizer of an arm: loaded, found again in the arm's folder, or trained on the training documents.

    Raises:
      NotToBeHad: a size that the family or the text doesn't allow.
      InputError: a tokenizer that can't be read, or a folder that was made for another one.
    """
    if spec.vocab_size is None:
        tokenizer = load_tokenizer(spec.family)
        return MadeTokenizer(tokenizer, {"kind": tokenizer.kind, "hash": tokenizer.hash}, math.nan)
    settings = {"family": spec.family, "vocab_size": spec.vocab_size}
    if (folder / _TOKENIZER_FILE).exists():
        found = read_json(folder / _TOKENIZER_FILE, settings=dict, corpus=str, seconds=float)
        if found["settings"] != settings or found["corpus"] != survey.fingerprint:
            raise InputError(f"{folder} holds an arm for another text or tokenizer; choose another --workdir.")
        return MadeTokenizer(load_tokenizer(folder / "tokenizer"), settings, found["seconds"])
    started = time.perf_counter()
    try:
        tokenizer = FAMILIES[spec.family](train_documents(corpus, survey), spec.vocab_size)
    except InputError as error:
        raise NotToBeHad(str(error)) from None
    return MadeTokenizer(tokenizer, settings, time.perf_counter() - started)


def keep_tokenizer(made: MadeTokenizer, survey: Survey, folder: Path) -> None:
    """Writes a tokenizer to the arm's folder, unless it is there or was made elsewhere."""
    if math.isnan(made.seconds) or (folder / _TOKENIZER_FILE).exists():
        return
    made.tokenizer.save(folder / "tokenizer")
    record = {"settings": made.settings, "corpus": survey.fingerprint, "seconds": made.seconds}
    write_json(folder / _TOKENIZER_FILE, record)


def make_arm(
    spec: Spec,
    made: MadeTokenizer,
    corpus: Corpus,
    survey: Survey,
    model: ModelConfig,
    training: TrainConfig,
    context_unit: Literal["tokens", "bytes"],
) -> Arm:
    """The arm's tokens and model; `training` as it is, without a budget yet.

    The context and the batch are equal in tokens for all arms, or in source bytes: then a window is `context` bytes
    long on average, in however many tokens, and a batch has as many windows in every arm.

    Raises:
      InputError: a tokenizer that loses text, too little text for one window, or too little memory for the model.
    """
    data = tokenize(corpus, survey, made.tokenizer)
    context = model.context
    window = model.window
    if context_unit == "bytes":
        context = max(2, round(context / data.train.bytes_per_token))
        window = None if window is None else max(1, min(context, round(window / data.train.bytes_per_token)))
    inputs = min(model.input_tokens, context)
    model = replace(model, vocab_size=made.tokenizer.vocab_size, context=context, window=window, input_tokens=inputs)
    model = resized(model, *spec.size)
    check_memory(model, training)
    make_batches(data.train, context=context, batch_size=training.batch_size, seed=training.seed)
    arm = Arm(spec, made, data, model, training, flops=0, parameters=0, embedding_parameters=0)
    return _with_model(arm, model)


def _with_model(arm: Arm, model: ModelConfig) -> Arm:
    params = abstract_params(model)
    # A row of an embedding is copied, not multiplied: it takes D additions forward and D backward.
    lookups = 2 * model.width * model.input_tokens
    return replace(
        arm,
        model=model,
        flops=flops_per_token(params, model) + lookups,
        parameters=count_parameters(params),
        embedding_parameters=embedding_parameters(params),
    )


def resized(model: ModelConfig, layers: int, width: int) -> ModelConfig:
    """The model with other layers and another width, whose MLP keeps its share."""
    feed_forward_width = max(1, round(model.feed_forward_width * width / model.width))
    return replace(model, num_layers=layers, width=width, feed_forward_width=feed_forward_width)


def with_parameters(arm: Arm, parameters: int) -> Arm:
    """The arm with the width at which it has as nearly that many parameters as its heads allow."""
    unit = arm.model.num_heads * (2 if arm.model.positions == "rope" else 1)

    def size(width: int) -> int:
        model = resized(arm.model, arm.model.num_layers, width)
        return count_parameters(abstract_params(model))

    first = next(width for width in itertools.count(unit, unit) if size(width) >= parameters)
    width = min(max(unit, first - unit), first, key=lambda width: abs(size(width) - parameters))
    return _with_model(arm, resized(arm.model, arm.model.num_layers, width))


def with_budget(arm: Arm, unit: Unit, size: float, seeds: int = 1) -> Arm:
    """The arm with as many updates as come nearest to a budget, one at least."""
    steps = size / arm.per_update(unit, seeds)
    if steps > LARGEST_INT:
        raise InputError(f"A budget of {size:g} {unit} is {steps:.3g} updates of {arm.spec.name}; make it smaller.")
    return with_updates(arm, max(1, round(steps)))


def with_updates(arm: Arm, steps: int) -> Arm:
    """The arm with so many updates, which its warm-up is shorter than."""
    optimizer = arm.training.optimizer
    if optimizer.warmup_steps is not None and optimizer.warmup_steps >= steps:
        optimizer = replace(optimizer, warmup_steps=max(0, steps - 1))
    return replace(arm, training=replace(arm.training, steps=steps, optimizer=optimizer))


def kept_updates(folder: Path, seconds: float) -> int | None:
    """The updates that a budget in seconds came to when an arm was begun with it, since measurements vary; or None."""
    path = folder / f"updates-in-{seconds:g}-seconds.json"
    return read_json(path, updates=int)["updates"] if path.exists() else None


def keep_updates(folder: Path, seconds: float, updates: int) -> None:
    """Writes them down, unless they are there."""
    if kept_updates(folder, seconds) is None:
        write_json(folder / f"updates-in-{seconds:g}-seconds.json", {"updates": updates})


def seconds_per_update(arm: Arm, *, seeds: int = 1, updates: int = 4) -> float:
    """Measured, of one seed: the median of a few updates on random tokens, after one that warms up.

    Args:
      seeds: that are trained as one program, if the devices divide their number.
    """
    seeds = seeds if seeds % jax.device_count() == 0 else 1
    configs = [replace(arm.training, seed=seed) for seed in range(seeds)]
    mesh = data_mesh(seeds if seeds > 1 else arm.training.batch_size)
    states = [init_state(arm.model, config) for config in configs]
    tokens = np.random.default_rng(0).integers(
        arm.tokenizer.vocab_size, size=(seeds, arm.training.batch_size, arm.model.context + 1), dtype=np.int32
    )
    if seeds > 1:
        state = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *states), batch_sharding(mesh))
        step = jax.jit(make_joint_step(arm.model, configs, mesh), donate_argnums=0)
    else:
        state = jax.device_put(states[0], replicated(mesh))
        step = jax.jit(make_train_step(arm.model, arm.training, mesh), donate_argnums=0)
    batch = jax.device_put(tokens if seeds > 1 else tokens[0], batch_sharding(mesh))
    seconds = []
    for _ in range(1 + updates):
        started = time.perf_counter()
        state, _ = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:])) / seeds
