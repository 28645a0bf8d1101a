"""A BPE tokenizer built from scratch: how it learns, what it gains, and how it compares with SentencePiece.

python -m experiments.bpe_tokenizer
python -m experiments.bpe_tokenizer --vocab-size 2000 --corpus articles.parquet --corpus-bytes 2000000
python -m experiments.bpe_tokenizer --explain "L'éléphant mange."
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table

from experiments.command_line import program
from jaxlm.data.documents import open_corpus
from jaxlm.data.shards import held_out_documents, survey_corpus, train_documents
from jaxlm.progress import share_progress
from jaxlm.reports.figures import tokenizer_figure
from jaxlm.reports.tables import rows_table, token_text
from jaxlm.runs import check_writable, console
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from jaxlm.tokenizers.base import InputError, check_text, visible
from jaxlm.tokenizers.bpe import check_split, check_vocab_size
from jaxlm.tokenizers.measures import longest_tokens

SENTENCE = "L'été, les hirondelles reviennent nicher sous les toits du village."


@dataclass(frozen=True)
class Config:
    """Trains a BPE tokenizer from scratch, shows its merges, and sets it beside SentencePiece and characters."""

    preset: Literal["quick", "seed"] = "quick"  # the settings that the other flags override
    workdir: str = "runs/bpe_tokenizer"  # where the tokenizer and the figure are written
    corpus: str = "builtin"  # builtin, a file, a folder, a glob, or hf://datasets/wikimedia/wikipedia/20231101.fr
    corpus_bytes: int | None = None  # take the first so many bytes of text
    seed: int = 0  # which held-out sentences are shown
    vocab_size: int = 1_000  # 256 bytes, the merges, and end-of-text
    steps: int | None = None  # learn so many merges instead: the vocabulary is 257 + steps
    split: str = "gpt4"  # how text is cut into chunks before BPE: gpt2, gpt4, o200k or none
    explain: str | None = None  # show how this text is encoded by the tokenizer of the workdir, or by a new one
    sentences: int = 3  # held-out sentences shown in coloured tokens

    def __post_init__(self) -> None:
        if self.seed < 0 or self.sentences < 0:
            raise InputError("The seed and the number of sentences are at least 0.")
        if self.steps is not None and self.steps < 0:
            raise InputError(f"The number of merges is at least 0, not {self.steps}.")
        check_split(self.split, None)
        check_vocab_size(self.vocab_size if self.steps is None else 257 + self.steps)
        if self.explain is not None:
            check_text(self.explain)


PRESETS = {
    "quick": Config(),
    # The notebook's vocabulary.
    "seed": Config(preset="seed", workdir="runs/bpe_tokenizer-seed", vocab_size=500),
}


def main(config: Config) -> None:
    check_writable(config.workdir)
    if (Path(config.workdir) / "config.json").exists():
        raise InputError(f"{config.workdir} holds a training run; choose another --workdir.")
    vocab_size = config.vocab_size if config.steps is None else 257 + config.steps
    stored = load_tokenizer(config.workdir) if (Path(config.workdir) / "tokenizer.json").exists() else None
    as_asked = isinstance(stored, BPETokenizer) and (stored.vocab_size, stored.split) == (vocab_size, config.split)
    another = f"{config.workdir} holds another tokenizer; choose another --workdir or remove it."
    if stored is not None and config.explain is not None:
        if not as_asked:
            asked = f"not one of {vocab_size} ids with the split {config.split}"
            console.print(f"{config.workdir} holds {stored}, {asked}.", style="yellow", markup=False)
        explain(stored, config)
        return
    if stored is not None and not as_asked:
        raise InputError(another)
    corpus = open_corpus(config.corpus, max_bytes=config.corpus_bytes)
    survey = survey_corpus(corpus)
    train_texts = list(train_documents(corpus, survey))
    held_out_texts = list(held_out_documents(corpus, survey))

    bpe = train_bpe(train_texts, vocab_size, config.split)
    if config.explain is not None:
        bpe.save(config.workdir)
        explain(bpe, config)
        return
    if stored is not None and stored.hash != bpe.hash:  # of another corpus
        raise InputError(another)
    tokenizers: dict[str, Tokenizer] = {"characters": CharTokenizer.train(train_texts), f"BPE {config.split}": bpe}
    for model_type in ("bpe", "unigram"):
        try:
            tokenizers[f"SentencePiece {model_type}"] = SentencePieceTokenizer.train(
                train_texts, vocab_size, model_type=model_type
            )
        except InputError as error:  # its smallest and largest vocabularies are its own
            console.print(f"SentencePiece {model_type} is left out: {error}", style="yellow", markup=False)

    bpe.save(config.workdir)
    console.print()
    console.print(compression_table(tokenizers, held_out_texts))
    for sentence in [SENTENCE, *pick_sentences(held_out_texts, config.sentences, config.seed)]:
        show_tokens(tokenizers, sentence)

    figure = Path(config.workdir) / "tokenizers.png"
    curves = {f"BPE {config.split}, from scratch": compression_curve(bpe, held_out_texts)}
    for name, tokenizer in tokenizers.items():
        if tokenizer is not bpe:
            curves[name] = ([tokenizer.vocab_size], [bytes_per_token(tokenizer, held_out_texts)])
    tokenizer_figure(curves, SENTENCE, {name: pieces(t, SENTENCE) for name, t in tokenizers.items()}, figure)
    console.print(f"\ntokenizer: {config.workdir}/tokenizer.json; figure: {figure}", markup=False)


def train_bpe(texts: Sequence[str], vocab_size: int, split: str) -> BPETokenizer:
    """Trains, printing the first merges and then ever fewer of them: 1, 2, ... 10, 20, ... 100, 200, ..."""
    with share_progress("merging", max(1, vocab_size - 257)) as progress:
        progress.console.print(f"[bold]{'merge':>7}  {'count':>9}  token[/]")

        def show(index: int, token: bytes, count: int) -> None:
            number = index + 1
            if number % 10 ** (len(str(number)) - 1) == 0:
                progress.console.print(f"{number:>7,}  {count:>9,}  ", visible(token), sep="", markup=False)
            if number % 100 == 0:
                progress.advance(progress.task_ids[0], 100)

        return BPETokenizer.train(texts, vocab_size, split=split, on_merge=show)


def explain(tokenizer: Tokenizer, config: Config) -> None:
    """The table of how one text is encoded."""
    assert config.explain is not None
    if not isinstance(tokenizer, BPETokenizer):
        raise InputError(f"{config.workdir} holds a {tokenizer.kind} tokenizer; --explain shows the merges of a BPE.")
    console.print(tokenizer.explain(config.explain))
    tokens = pieces(tokenizer, config.explain)
    console.print(f"{len(config.explain.encode())} bytes, {len(tokens)} tokens  ", end="")
    console.print(token_text(tokens, colour=console.is_terminal), soft_wrap=True)


def compression_table(tokenizers: dict[str, Tokenizer], texts: Sequence[str]) -> Table:
    """Vocabulary, bytes per token and the longest tokens of each tokenizer, on held-out text."""
    rows = []
    for name, tokenizer in tokenizers.items():
        rows.append(
            (
                name,
                f"{tokenizer.vocab_size:,}",
                f"{bytes_per_token(tokenizer, texts):.3f}",
                "  ".join(visible(token) for token in longest_tokens(tokenizer, 3)),
            )
        )
    return rows_table(("tokenizer", "vocabulary", "bytes per token", "longest tokens"), rows, "on held-out text")


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """UTF-8 bytes of the texts over their tokens."""
    num_tokens = sum(len(tokenizer.encode(text, allowed_special="none")) for text in texts)
    return sum(len(text.encode()) for text in texts) / num_tokens


def compression_curve(tokenizer: BPETokenizer, texts: Sequence[str]) -> tuple[list[int], list[float]]:
    """Bytes per token as the vocabulary grows: BPE with fewer merges is BPE with the first of them."""
    counts = sorted({round(n) for n in np.geomspace(1, max(1, len(tokenizer.merges)), 16)} | {0})
    sizes, ratios = [], []
    for count in counts:
        part = BPETokenizer(tokenizer.merges[:count], split=tokenizer.split)
        sizes.append(part.vocab_size)
        ratios.append(bytes_per_token(part, texts))
    return sizes, ratios


def pick_sentences(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Held-out sentences of 40 to 110 characters, drawn by the seed."""
    sentences = {
        f"{sentence.strip().removesuffix('.')}."
        for text in texts
        for line in text.splitlines()
        for sentence in line.split(". ")
    }
    shown = sorted(sentence for sentence in sentences if 40 <= len(sentence) <= 110)
    order = np.random.default_rng(seed).permutation(len(shown))
    return [shown[index] for index in order[:count]]


def pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    """The bytes of each token of a text."""
    return [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text, allowed_special="none")]


def show_tokens(tokenizers: dict[str, Tokenizer], sentence: str) -> None:
    """One line of coloured tokens a tokenizer."""
    console.print()
    for name, tokenizer in tokenizers.items():
        tokens = pieces(tokenizer, sentence)
        console.print(
            f"{name:>22} {len(tokens):>4}  ", token_text(tokens, colour=console.is_terminal), sep="", soft_wrap=True
        )


if __name__ == "__main__":
    program("experiments.bpe_tokenizer", PRESETS, main)
