"""The byte-level BPE tokenizer, from scratch.

Text is split into chunks by a pattern, and byte-pair encoding runs inside each chunk. What `bpe_reference` recomputes
at every step is kept up to date here: unique chunks with their counts, pair counts, and which chunks hold which pair.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import regex

from jaxlm.tokenizers.base import (
    END_OF_TEXT,
    IdArray,
    InputError,
    Tokenizer,
    check_texts,
    special_token_ids,
)
from jaxlm.tokenizers.bpe_reference import Pair, merge

# The patterns of OpenAI's GPT-2 and GPT-4 (cl100k_base) tokenizers, in the form in which tiktoken states them.
SPLIT_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "none": r"(?s:.)+",
}
_CACHED_CHUNKS = 1 << 18
_CACHED_CHARACTERS = 64


class BPETokenizer(Tokenizer):
    """Byte-level BPE: ids 0 to 255 are the bytes, then merges in the order learned, then special tokens.

    Args:
      merges: pairs of ids; merge i makes the id 256 + i.
      split: the name of a split pattern, "gpt2", "gpt4" or "none".
      special_tokens: names, which get the next ids, or a mapping from names to ids.
      pattern: a regular expression (of the `regex` library) instead of a named split.
    """

    kind: ClassVar[str] = "bpe"

    def __init__(
        self,
        merges: Sequence[Pair],
        *,
        split: str = "gpt4",
        special_tokens: Sequence[str] | Mapping[str, int] = (END_OF_TEXT,),
        pattern: str | None = None,
    ) -> None:
        self.split = split
        self.pattern = pattern
        self._chunks = chunk_function(split, pattern)
        self.merges = [(int(left), int(right)) for left, right in merges]
        self._tokens = [bytes([byte]) for byte in range(256)]
        self._rank: dict[Pair, int] = {}
        for index, pair in enumerate(self.merges):
            if not (min(pair) >= 0 and max(pair) < 256 + index):
                raise InputError(f"Merge {index} joins the ids {pair}, which don't both exist before it.")
            if pair in self._rank:
                raise InputError(f"Merge {index} joins the ids {pair}, as merge {self._rank[pair]} does already.")
            self._rank[pair] = index
            self._tokens.append(self._tokens[pair[0]] + self._tokens[pair[1]])
        self.special_tokens = special_token_ids(special_tokens, len(self._tokens))
        self._special_names = {token_id: name.encode() for name, token_id in self.special_tokens.items()}
        self._lengths = np.zeros(self.vocab_size, np.int32)
        self._lengths[: len(self._tokens)] = [len(token) for token in self._tokens]
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        split: str = "gpt4",
        special_tokens: Sequence[str] | Mapping[str, int] = (END_OF_TEXT,),
        pattern: str | None = None,
        on_merge: Callable[[int, bytes, int], None] | None = None,
    ) -> BPETokenizer:
        """Learns `vocab_size - 256 - len(special_tokens)` merges from `texts`.

        The best pair is the most frequent one, overlapping occurrences counted; among equals the lowest (left, right).

        Args:
          texts: an iterable of str, read once.
          vocab_size: ids in all, special tokens included.
          on_merge: called after each merge with its index, the bytes of the new token, and the pair's count.

        Raises:
          InputError: a vocabulary below 256 + special tokens, or above what the text can give (the message names the
            reachable size); a special token in a mapping whose id a merge needs; an unknown split.
        """
        num_specials = len(special_token_ids(special_tokens, 256))
        num_merges = vocab_size - 256 - num_specials
        if num_merges < 0:
            raise InputError(
                f"A byte-level BPE vocabulary has at least {256 + num_specials} ids (256 bytes and {num_specials} "
                f"special tokens), and {vocab_size} were asked for."
            )
        chunks = chunk_function(split, pattern)
        counts: Counter[str] = Counter()
        for text in check_texts(texts):
            counts.update(chunks(text))
        merges = learn_merges(counts, num_merges, on_merge)
        if len(merges) < num_merges:
            raise InputError(
                f"The text gives a vocabulary of at most {256 + len(merges) + num_specials} ids, and {vocab_size} were "
                "asked for; use more text or a smaller vocabulary."
            )
        return cls(merges, split=split, special_tokens=special_tokens, pattern=pattern)

    @property
    def vocab_size(self) -> int:
        return 1 + max([len(self._tokens) - 1, *self.special_tokens.values()])

    def _encode_ordinary(self, text: str) -> IdArray:
        ids: list[int] = []
        for chunk in self._chunks(text):
            found = self._cache.get(chunk)
            if found is None:
                found = encode_chunk(chunk.encode(), self._rank)
                if len(chunk) <= _CACHED_CHARACTERS:
                    if len(self._cache) >= _CACHED_CHUNKS:
                        self._cache.clear()
                    self._cache[chunk] = found
            ids += found
        return np.array(ids, np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        (token_id,) = self._check_ids([token_id])
        return self._token_or_special(int(token_id))

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        return b"".join([self._token_or_special(token_id) for token_id in self._check_ids(ids).tolist()])

    def byte_lengths(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> IdArray:
        return self._lengths[self._check_ids(ids)]

    def _token_or_special(self, token_id: int) -> bytes:
        if token_id < len(self._tokens):
            return self._tokens[token_id]
        try:
            return self._special_names[token_id]
        except KeyError:
            raise InputError(f"The id {token_id} stands for nothing: it lies in a gap of the special tokens.") from None

    def _content(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "pattern": self.pattern,
            "merges": [list(pair) for pair in self.merges],
            "special_tokens": self.special_tokens,
        }

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> BPETokenizer:
        return cls(
            content["merges"],
            split=content["split"],
            pattern=content["pattern"],
            special_tokens=content["special_tokens"],
        )


def chunk_function(split: str, pattern: str | None) -> Callable[[str], list[str]]:
    """The function that cuts a text into chunks. A pattern of one's own is checked on every text to lose nothing."""
    if pattern is None:
        if split not in SPLIT_PATTERNS:
            raise InputError(f"There is no split {split!r}; known are {', '.join(SPLIT_PATTERNS)}.")
        return regex.compile(SPLIT_PATTERNS[split]).findall
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise InputError(f"The pattern {pattern!r} is no regular expression: {error}.") from None

    def chunks(text: str) -> list[str]:
        found = [match.group() for match in compiled.finditer(text) if match.group()]
        if "".join(found) != text:
            raise InputError(f"The pattern {pattern!r} loses text: its matches don't add up to the text.")
        return found

    return chunks


def learn_merges(
    chunk_counts: Mapping[str, int], num_merges: int, on_merge: Callable[[int, bytes, int], None] | None = None
) -> list[Pair]:
    """The same merges as `bpe_reference.train`, from unique chunks with their counts.

    Only the words that hold the merged pair are looked at again. The heap of candidates is lazy: an entry whose count
    is no longer true is dropped, and every pair whose count changes is entered anew.
    """
    words = [list(chunk.encode()) for chunk in chunk_counts]
    counts = list(chunk_counts.values())
    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, ids in enumerate(words):
        for pair in itertools.pairwise(ids):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([byte]) for byte in range(256)]
    merges: list[Pair] = []
    while heap and len(merges) < num_merges:
        negative_count, best = heapq.heappop(heap)
        if pair_counts[best] != -negative_count or best not in words_with:
            continue
        new_id = 256 + len(merges)
        merges.append(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        changes: Counter[Pair] = Counter()
        for index in words_with.pop(best):
            before, count = words[index], counts[index]
            after = merge(before, best, new_id)
            words[index] = after
            for pair in itertools.pairwise(before):
                changes[pair] -= count
            for pair in itertools.pairwise(after):
                changes[pair] += count
                words_with[pair].add(index)
        words_with.pop(best, None)
        for pair, change in changes.items():
            if change:
                pair_counts[pair] += change
                if pair_counts[pair] > 0:
                    heapq.heappush(heap, (-pair_counts[pair], pair))
        if on_merge is not None:
            on_merge(len(merges) - 1, tokens[-1], -negative_count)
    return merges


def encode_chunk(data: bytes, rank: Mapping[Pair, int]) -> list[int]:
    """The same ids as `bpe_reference.encode`, in O(n log n): a linked list of symbols and a heap of their pairs."""
    ids: list[int | None] = list(data)
    following = list(range(1, len(ids) + 1))
    preceding = list(range(-1, len(ids) - 1))
    heap = [(rank[pair], position) for position, pair in enumerate(itertools.pairwise(data)) if pair in rank]
    heapq.heapify(heap)

    def enter(left: int, right: int) -> None:
        found = rank.get((ids[left], ids[right]))  # type: ignore[arg-type]
        if found is not None:
            heapq.heappush(heap, (found, left))

    while heap:
        index, left = heapq.heappop(heap)
        right = following[left]
        if ids[left] is None or right == len(ids) or rank.get((ids[left], ids[right])) != index:  # type: ignore[arg-type]
            continue  # the pair was here once; a merge beside it has taken one of the two
        ids[left], ids[right] = 256 + index, None
        following[left] = following[right]
        if following[left] < len(ids):
            preceding[following[left]] = left
            enter(left, following[left])
        if preceding[left] >= 0:
            enter(preceding[left], left)
    return [token_id for token_id in ids if token_id is not None]
