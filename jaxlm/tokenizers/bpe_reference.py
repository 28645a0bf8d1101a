"""The textbook algorithm of byte-pair encoding, in plain Python: to be read, and to test the fast one against.

Byte-pair encoding (Gage 1994; for text models Sennrich et al. 2016, on bytes Radford et al. 2019) starts from single
bytes, ids 0 to 255. *Training* counts every pair of neighbours, gives the most frequent pair the next id, replaces it
everywhere, and repeats. *Encoding* replays those merges, the earliest learned first. Text is first *split* into chunks,
about words, and no merge crosses from one into the next.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import regex

Pair = tuple[int, int]

# The patterns of OpenAI's tokenizers for GPT-2, GPT-4 (cl100k_base) and GPT-4o (o200k_base), as tiktoken states them.
SPLIT_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "none": r"(?s:.)+",
}


def split(text: str, pattern: str) -> list[str]:
    """The chunks of a text: the matches of a pattern (Radford et al. 2019), of which none is empty."""
    return [match.group() for match in regex.finditer(pattern, text) if match.group()]


def train(chunks: Iterable[str], num_merges: int) -> list[Pair]:
    """The merges learned from `chunks`, in order; merge i makes the id 256 + i. Fewer if the text runs out of pairs.

    The best pair is the most frequent one, overlapping occurrences counted ("aaa" has two of "aa"); among equals the
    lowest (left id, right id).
    """
    words = [(list(chunk.encode()), count) for chunk, count in Counter(chunks).items()]
    merges: list[Pair] = []
    while len(merges) < num_merges:
        pair_counts = count_pairs(words)
        if not pair_counts:
            break
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        words = [(merge(ids, best, 256 + len(merges)), count) for ids, count in words]
        merges.append(best)
    return merges


def count_pairs(words: Iterable[tuple[list[int], int]]) -> Counter[Pair]:
    """How often each pair of neighbouring ids occurs in words that are given with their counts."""
    pair_counts: Counter[Pair] = Counter()
    for ids, count in words:
        for pair in itertools.pairwise(ids):
            pair_counts[pair] += count
    return pair_counts


def merge(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """`ids` with every occurrence of `pair`, from left to right, replaced by `new_id`."""
    merged = []
    position = 0
    while position < len(ids):
        if tuple(ids[position : position + 2]) == pair:
            merged.append(new_id)
            position += 2
        else:
            merged.append(ids[position])
            position += 1
    return merged


def encode(chunk: str, merges: list[Pair]) -> list[int]:
    """The ids of one chunk: the pair that was learned first is merged first, until none is left."""
    rank = {pair: index for index, pair in enumerate(merges)}
    ids = list(chunk.encode())
    while len(ids) > 1:
        best = min(itertools.pairwise(ids), key=lambda pair: rank.get(pair, len(merges)))
        if best not in rank:
            break
        ids = merge(ids, best, 256 + rank[best])
    return ids
