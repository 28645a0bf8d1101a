"""How the cost of our BPE grows with the size of a text, what threads make of it, and the memory of a long stream."""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from jaxlm.data.documents import open_corpus
from jaxlm.runs import console
from jaxlm.tokenizers import BPETokenizer
from jaxlm.tokenizers.base import replacing

VOCAB_SIZE = 1_024


def shapes(documents: list[str]) -> dict[str, tuple[str, int, str]]:
    """By name: the split, the largest size in bytes, and a text that is repeated to the size wanted."""
    letters = np.random.default_rng(0)
    noise = letters.integers(0, 256, 10_000_000, np.uint8).tobytes().decode("utf-8", errors="replace")
    word = "".join(character for text in documents for character in text if character.isalpha())
    return {
        "running text": ("gpt4", 1_000_000_000, "\n\n".join(documents)),
        "one letter": ("gpt4", 100_000_000, "a" * 1_000_000),
        "random bytes": ("gpt4", 100_000_000, noise),
        "spaces": ("gpt4", 100_000_000, " " * 1_000_000),
        "one emoji": ("gpt4", 100_000_000, "🙂" * 250_000),
        "ab": ("gpt4", 100_000_000, "ab" * 500_000),
        "one word, no split": ("none", 100_000_000, word),
    }


def text_of_size(unit: str, size: int) -> str:
    """About `size` UTF-8 bytes of a repeated text."""
    per_character = len(unit.encode()) / len(unit)
    length = round(size / per_character)
    return (unit * (length // len(unit) + 1))[:length]


def measure_scaling(corpus: str, figure: Path, repeats: int = 3) -> None:
    """The cost of training, and of encoding with nothing cached, at 1, 10, 100 MB and 1 GB; a table and a figure."""
    documents = list(open_corpus(corpus).documents())
    table = Table(title="one thread: ns a byte (the least of several), and what 10 MB cost a byte beside 1 MB")
    for name in ("text", "work", "1 MB", "10 MB", "100 MB", "1 GB", "10 MB : 1 MB"):
        table.add_column(name, justify="left" if name in ("text", "work") else "right")
    drawn = Figure(figsize=(10, 4), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    for name, (split, largest, unit) in shapes(documents).items():
        sizes = [size for size in (10**6, 10**7, 10**8, 10**9) if size <= largest]
        nanoseconds: dict[str, list[float]] = {"training": [], "encoding": []}
        for size in sizes:
            text = text_of_size(unit, size)
            seconds: dict[str, list[float]] = {"training": [], "encoding": []}
            again = 1 if size >= 10**8 else repeats if size == 10**7 else 3 * repeats
            for _ in range(again):
                started = time.perf_counter()
                tokenizer = trained(text, split)
                seconds["training"].append(time.perf_counter() - started)
                tokenizer.encode("")  # builds its tables; no chunk of the text has been seen yet
                started = time.perf_counter()
                tokenizer.encode(text, allowed_special="none")
                seconds["encoding"].append(time.perf_counter() - started)
            for work, several in seconds.items():
                nanoseconds[work].append(min(several) / len(text.encode()) * 1e9)
        for panel, (work, costs) in zip(panels, nanoseconds.items(), strict=True):
            table.add_row(
                name, work, *[f"{cost:.1f}" for cost in costs], *[""] * (4 - len(costs)), f"{costs[1] / costs[0]:.2f}"
            )
            panel.loglog(sizes, [cost * size / 1e9 for cost, size in zip(costs, sizes, strict=True)], "o-", label=name)
            panel.set_title(work)
            panel.set_xlabel("bytes of text")
            panel.grid(alpha=0.3)
    panels[0].plot([1e6, 1e9], [1e-2, 10], "k:", linewidth=1, label="linear")
    panels[1].plot([1e6, 1e9], [1e-2, 10], "k:", linewidth=1)
    panels[0].set_ylabel("seconds, one thread")
    panels[0].legend(fontsize="small")
    console.print(table)
    with replacing(figure) as temporary:
        drawn.savefig(temporary, dpi=150)
    console.print(f"figure: {figure}", markup=False)


def trained(text: str, split: str) -> BPETokenizer:
    """A tokenizer of 1,024 ids, or of as many as the text gives."""
    try:
        return BPETokenizer.train([text], VOCAB_SIZE, split=split, num_threads=1)
    except ValueError as error:
        reachable = int(str(error).split("at most ")[1].split(" ")[0])
        return BPETokenizer.train([text], reachable, split=split, num_threads=1)


def measure_threads(corpus: str, vocab_sizes: Sequence[int], threads: Sequence[int], repeats: int) -> None:
    """Seconds of training by the number of threads, in turn, once more than is counted; a table of medians."""
    documents = list(open_corpus(corpus).documents())
    table = Table(title=f"training, median seconds of {repeats}")
    for name in ("vocabulary", *(f"{number} thread{'s' * (number > 1)}" for number in threads), "ratio"):
        table.add_column(name, justify="right")
    for vocab_size in vocab_sizes:
        seconds: dict[int, list[float]] = {number: [] for number in threads}
        for _ in range(repeats + 1):
            for number, several in seconds.items():
                started = time.perf_counter()
                BPETokenizer.train(documents, vocab_size, special_tokens=(), num_threads=number)
                several.append(time.perf_counter() - started)
        medians = [statistics.median(several[1:]) for several in seconds.values()]
        table.add_row(f"{vocab_size:,}", *[f"{median:.3f}" for median in medians], f"{medians[0] / medians[-1]:.2f}")
    console.print(table)


def measure_stream(corpus: str, gigabytes: float) -> None:
    """Peak memory of training on a stream made on the fly: of the same words again and again, then of ever new ones."""
    documents = [text.encode() for text in open_corpus(corpus).documents()]
    for new_words in (False, True):
        before = _resident_mb()
        started = time.perf_counter()
        tokenizer = BPETokenizer.train(_stream(documents, gigabytes * 1e9, new_words), 4_096)
        console.print(
            f"{'with new words' if new_words else 'the same words'}: {gigabytes:.1f} GB in "
            f"{time.perf_counter() - started:,.0f} s, peak {_resident_mb():,.0f} MB resident "
            f"({before:,.0f} MB before), {tokenizer.vocab_size:,} ids"
        )


def _stream(documents: list[bytes], size: float, new_words: bool) -> Iterator[str]:
    """The documents over and over. With new words, every second has other letters each time."""
    letters = b"abcdefghijklmnopqrstuvwxyz"
    sent = 0
    for round_number in itertools.count():
        shuffled = bytes(np.random.default_rng(round_number).permutation(list(letters)).astype(np.uint8))
        permutation = bytes.maketrans(letters, shuffled)
        for index, document in enumerate(documents):
            sent += len(document)
            if sent > size:
                return
            changed = new_words and round_number and (index + round_number) % 2 == 0
            yield (document.translate(permutation) if changed else document).decode()


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
