"""The byte-level BPE tokenizer, from scratch.

Text is split into chunks by a pattern, and byte-pair encoding runs inside each chunk. `bpe_reference` is the textbook
algorithm, to be read first. What runs is an engine that gives the same merges and the same ids, in four steps:
`bpe_split` cuts text into chunks, `bpe_count` counts them, `bpe_merge` learns merges, `bpe_encode` makes ids.
"""

from __future__ import annotations

import codecs
import itertools
import math
import operator
import os
import re
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from jaxlm.tokenizers.base import (
    END_OF_TEXT,
    AllowedSpecial,
    IdArray,
    InputError,
    Tokenizer,
    blocks_of,
    check_allowed_special,
    check_text,
    each_of,
    each_text,
    encode_utf8,
    list_of_texts,
    one_line,
    shown,
    special_token_ids,
)
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS, Pair
from jaxlm.tokenizers.threads import num_cores, workers

if TYPE_CHECKING:  # the engine is imported where it is used, since numba takes its time
    from rich.table import Table

    from jaxlm.tokenizers.bpe_encode import PairTable, Workspace
    from jaxlm.tokenizers.bpe_split import Splitter

_BLOCK = 1 << 20  # characters that are encoded together
_COUNTED = 1 << 18  # characters, up to twice, that are counted together: their UTF-8 stays in the processor's cache
_PROGRESS_ROUNDS = 200
_MOST_REPEATS = 10_000  # in a pattern of one's own
_MOST_IDS = 1 << 24  # what is looked up by id has a place for each, used or not


class BPETokenizer(Tokenizer):
    """Byte-level BPE: ids 0 to 255 are the bytes, then merges in the order learned, then special tokens.

    (An imported vocabulary keeps its own ids.)

    Args:
      merges: pairs of symbols; symbols 0 to 255 are the bytes, and merge i makes the symbol 256 + i.
      split: the name of a split pattern: "gpt2", "gpt4", "o200k" or "none".
      special_tokens: names, which get the next ids, or a mapping from names to ids.
      pattern: a regular expression (of the `regex` library, slower than a named split) instead.
      ids: the id of each symbol, for an imported vocabulary; None: symbols are their own ids.
      whole: chunks with an id of their own to which no merges lead, for an imported vocabulary.
    """

    kind: ClassVar[str] = "bpe"
    format_version: ClassVar[int] = 2

    def __init__(
        self,
        merges: Sequence[Pair],
        *,
        split: str = "gpt4",
        special_tokens: Sequence[str] | Mapping[str, int] = (END_OF_TEXT,),
        pattern: str | None = None,
        ids: Sequence[int] | None = None,
        whole: Mapping[bytes, int] | None = None,
    ) -> None:
        check_split(split, pattern)
        self.split = split
        self.pattern = pattern
        self.merges = pairs_of_symbols(merges)
        self._tokens = merged_tokens(self.merges)
        if not isinstance(whole, Mapping | None):
            raise InputError(f"Whole chunks are a mapping from bytes to ids, not {type(whole).__name__}.")
        self.whole: dict[bytes, int] = {}
        for chunk, token_id in (whole or {}).items():
            if not isinstance(chunk, bytes) or not chunk or not isinstance(token_id, Integral):
                raise InputError(
                    f"A whole chunk is at least one byte and has an id, not {shown(chunk)} and {shown(token_id)}."
                )
            self.whole[chunk] = int(token_id)
        self._merges = np.array(self.merges, np.int32).reshape(-1, 2)
        try:
            self._ids = None if ids is None else list(map(operator.index, ids))
        except TypeError:
            raise InputError("The ids of the symbols are a sequence of whole numbers, one for each.") from None
        ordinary = [*self.ids, *self.whole.values()]
        taken = set(ordinary)
        if len(self.ids) != len(self._tokens) or len(taken) != len(ordinary) or min(taken) < 0:
            raise InputError("Each byte, merge and whole chunk of a BPE vocabulary has one id of its own, at least 0.")
        self._set_special_tokens(special_tokens, max(taken), taken)
        self._workspaces: list[Workspace] = []

    def _set_special_tokens(
        self, special_tokens: Sequence[str] | Mapping[str, int], highest: int, taken: Container[int]
    ) -> None:
        self.special_tokens = special_token_ids(special_tokens, 1 + highest, taken)
        self._vocab_size = 1 + max([highest, *self.special_tokens.values()])
        check_highest_id(self._vocab_size - 1)

    # What follows is made when it is first asked for, see `train`.

    @cached_property
    def merges(self) -> list[Pair]:
        return list(zip(self._merges[:, 0].tolist(), self._merges[:, 1].tolist(), strict=True))

    @cached_property
    def ids(self) -> list[int]:
        return list(range(256 + len(self._merges))) if self._ids is None else self._ids

    @cached_property
    def _tokens(self) -> list[bytes]:
        """The bytes of each symbol."""
        return merged_tokens(self.merges)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        """The bytes of each id."""
        ordinary = zip([*self.ids, *self.whole.values()], [*self._tokens, *self.whole], strict=True)
        return dict(ordinary) | {token_id: name.encode() for name, token_id in self.special_tokens.items()}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        split: str = "gpt4",
        special_tokens: Sequence[str] | Mapping[str, int] = (END_OF_TEXT,),
        pattern: str | None = None,
        num_threads: int | None = None,
        on_merge: Callable[[int, bytes, int], None] | None = None,
    ) -> BPETokenizer:
        """Learns `vocab_size - 256 - len(special_tokens)` merges from `texts`.

        The best pair is the most frequent one, overlapping occurrences counted; among equals the lowest (left, right).
        The result doesn't depend on the number of threads.

        Args:
          texts: an iterable of str, read once; memory grows with their different chunks, not with the text.
          vocab_size: ids in all, special tokens included; at most 2^24.
          num_threads: None uses all cores.
          on_merge: called with each merge's index, the bytes of its token, and its count, some merges at a time.

        Raises:
          InputError: a vocabulary below 256 + special tokens, or above what the text can give (the message names the
            reachable size); a special token in a mapping whose id a merge needs; an unknown split.
        """
        if isinstance(special_tokens, Iterator):
            special_tokens = list(special_tokens)  # they are looked at now, and again when the merges are learned
        num_specials = len(special_token_ids(special_tokens, 256))
        check_vocab_size(vocab_size, num_specials)
        num_merges = vocab_size - 256 - num_specials
        special_ids = special_token_ids(special_tokens, 256 + num_merges)  # before the work, not after it
        check_highest_id(max(special_ids.values(), default=0))
        from jaxlm.tokenizers.bpe_merge import learn

        tokenizer = cls((), split=split, special_tokens=(), pattern=pattern)
        num_threads = _threads(num_threads)
        counts = _count_chunks(texts, split, pattern, num_threads)
        tokens = merged_tokens([])
        rounds = _PROGRESS_ROUNDS if on_merge else 1
        for merges, merge_counts in learn(counts, num_merges, rounds=rounds, num_threads=num_threads):
            done = len(tokens) - 256
            if on_merge:
                for (left, right), count in zip(merges[done:].tolist(), merge_counts[done:].tolist(), strict=True):
                    tokens.append(tokens[left] + tokens[right])
                    on_merge(len(tokens) - 257, tokens[-1], count)
        if len(merges) < num_merges:
            raise InputError(
                f"The text gives a vocabulary of at most {256 + len(merges) + num_specials} ids, and {vocab_size} were "
                "asked for; use more text or a smaller vocabulary."
            )
        # The merges as they are: to check and to list them would take longer than learning the last of them.
        del tokenizer.merges, tokenizer._tokens, tokenizer.ids
        tokenizer._merges = merges
        tokenizer._set_special_tokens(special_tokens, 255 + num_merges, range(256 + num_merges))
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def __repr__(self) -> str:
        split = f"split {self.split}" if self.pattern is None else f"pattern {self.pattern!r}"
        specials = f"{len(self.special_tokens)} special token{'s' * (len(self.special_tokens) != 1)}"
        return f"{type(self).__name__}({self.vocab_size} ids, {split}, {specials})"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the megabytes that are made again where they are needed."""
        made_again = {name for name, value in vars(type(self)).items() if isinstance(value, cached_property)}
        kept = {name: value for name, value in self.__dict__.items() if name not in made_again}
        return kept | {"_workspaces": []}

    # ---- encoding

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        allowed_special: AllowedSpecial = (),
        flat: bool = False,
        num_threads: int | None = None,
    ) -> list[IdArray] | tuple[IdArray, npt.NDArray[np.int64]]:
        """As for any tokenizer, on `num_threads` threads (None uses all cores), without the interpreter's lock.

        The arrays of a list are views of one that holds the ids of all texts; copy what is to outlive the others.
        """
        check_allowed_special(allowed_special)
        texts = list_of_texts(texts)
        num_threads = _threads(num_threads)
        if allowed_special == "none" or not self._may_hold_special(texts):
            ids, offsets = self._encode_all(texts, num_threads)
        else:
            pieces, after, ends = [], [], [0]
            for text in texts:
                for piece, token_id in self._cut(text, allowed_special):
                    pieces.append(piece)
                    after.append(token_id)
                ends.append(len(pieces))
            ids, offsets = self._encode_all(pieces, num_threads)
            specials = np.array(after, np.int32)
            marked = specials >= 0
            ids = np.insert(ids, offsets[1:][marked], specials[marked])
            offsets = (offsets + np.append(0, np.cumsum(marked)))[ends]
        if flat:
            return ids, offsets
        return [ids[start:end] for start, end in itertools.pairwise(offsets.tolist())]

    def _encode_all(self, texts: Sequence[str], num_threads: int) -> tuple[IdArray, npt.NDArray[np.int64]]:
        """`_encode_texts` for any number of texts."""
        parts = _map(self._encode_texts, blocks_of(texts, _BLOCK), num_threads)
        ids = np.concatenate([np.zeros(0, np.int32), *(part for part, _ in parts)]) if len(parts) != 1 else parts[0][0]
        sizes = [np.diff(offsets) for _, offsets in parts]
        return ids, np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]))

    def encode_iter(
        self, pieces: Iterable[str], *, allowed_special: AllowedSpecial = (), num_threads: int | None = None
    ) -> Iterator[IdArray]:
        """The ids of one text that comes in pieces, cut anywhere, and that may be larger than memory.

        Joined, the arrays are `encode("".join(pieces))`. A text whose chunks have no end (the split "none", a pattern
        of one's own, megabytes without a letter) is held until it ends.
        """
        check_allowed_special(allowed_special)
        blocks = self._splitter.cut(each_text(pieces), _BLOCK, tuple(self.special_tokens))
        return self._encode_parts(blocks, allowed_special, _threads(num_threads))

    def _encode_parts(
        self, parts: Iterable[str], allowed_special: AllowedSpecial, num_threads: int
    ) -> Iterator[IdArray]:
        """`encode_iter` for parts that no chunk and no special token lies across."""
        done = 0  # characters
        for blocks in _groups(parts, num_threads):
            try:
                batch = self.encode_batch(blocks, allowed_special=allowed_special, num_threads=num_threads)
            except InputError:
                for block in blocks:  # of the first that is refused, and its place in the whole text
                    check_text(block, done)
                    self.encode(block, allowed_special=allowed_special)
                    done += len(block)
                raise
            done += sum(map(len, blocks))
            yield from cast("list[IdArray]", batch)

    def _encode_ordinary(self, text: str) -> IdArray:
        return self._encode_texts([text])[0]

    def _encode_texts(self, texts: Sequence[str]) -> tuple[IdArray, npt.NDArray[np.int64]]:
        """The ids of texts without special tokens, and where those of each begin and end: offsets, one more."""
        from jaxlm.tokenizers.bpe_encode import encode_chunks
        from jaxlm.tokenizers.bpe_split import make_buffer

        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = self._pairs.workspace()
        buffer = make_buffer([encode_utf8(text) for text in texts])
        chunks = self._splitter.begin(buffer, texts)
        ids, offsets = encode_chunks(chunks, len(texts), self._pairs, workspace)
        self._workspaces.append(workspace)
        return ids, offsets

    @cached_property
    def _splitter(self) -> Splitter:
        from jaxlm.tokenizers.bpe_split import Splitter

        return Splitter(self.split, self.pattern)

    @cached_property
    def _pairs(self) -> PairTable:
        from jaxlm.tokenizers.bpe_encode import PairTable

        return PairTable(self._merges, np.array(self.ids, np.int32), self.whole)

    # ---- decoding

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        return self._decode([self._as_ids(ids)])[0].tobytes()

    def decode_batch(self, batch: Iterable[Iterable[int] | npt.NDArray[np.integer]]) -> list[str]:
        data, ends = self._decode([self._as_ids(ids) for ids in each_of(batch, "sequences of ids")])
        view = data.data
        return [str(view[start:end], "utf-8", "replace") for start, end in itertools.pairwise([0, *ends.tolist()])]

    def _decode(self, arrays: Sequence[npt.NDArray[np.integer]]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The bytes of all arrays, and where those of each end."""
        from jaxlm.tokenizers.bpe_decode import decode_ids

        joined = np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32, copy=False)
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        found = decode_ids(joined, ends, self._token_starts, self._token_arena)
        if isinstance(found, int):
            self._check_ids(joined)
            raise InputError(f"The id {joined[found]} stands for nothing: it lies in a gap of the vocabulary.")
        return found

    def decode_iter(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in each_of(ids, "ids"):
            if piece := decoder.decode(self.token_bytes(token_id)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _as_ids(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """A 1-D array of integers, in the vocabulary if they aren't int32, for which the kernel looks."""
        if isinstance(ids, np.ndarray) and ids.dtype == np.int32 and ids.ndim == 1:
            return ids
        return self._check_ids(ids)

    def token_bytes(self, token_id: int) -> bytes:
        (token_id,) = self._check_ids([token_id])
        try:
            return self._bytes_of[int(token_id)]
        except KeyError:
            raise InputError(f"The id {token_id} stands for nothing: it lies in a gap of the vocabulary.") from None

    def byte_lengths(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> IdArray:
        return self._lengths[self._check_ids(ids)]

    @cached_property
    def _lengths(self) -> IdArray:
        lengths = self._token_sizes.copy()
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    @cached_property
    def _token_sizes(self) -> IdArray:
        sizes = np.zeros(self.vocab_size, np.int32)
        sizes[list(self._bytes_of)] = [len(token) for token in self._bytes_of.values()]
        return sizes

    @cached_property
    def _token_starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self._token_sizes, dtype=np.int64)])

    @cached_property
    def _token_arena(self) -> npt.NDArray[np.uint8]:
        tokens = [self._bytes_of[token_id] for token_id in sorted(self._bytes_of)]
        return np.frombuffer(b"".join([*tokens, bytes(8)]), np.uint8)

    # ---- showing, saving, other formats

    def explain(self, text: str) -> Table:
        """How a text is encoded, as a rich table: its chunks, each merge in order, and the tokens with their ids.

        A special token in it is taken for text.
        """
        from jaxlm.tokenizers.bpe_explain import explanation

        return explanation(self, text)

    def chunks(self, text: str) -> list[bytes]:
        """The chunks of a text, as UTF-8. Joined, they are the text."""
        from jaxlm.tokenizers.bpe_split import DONE, KNOWN, START, make_buffer, next_chunks

        buffer = make_buffer([encode_utf8(text)])
        chunks = self._splitter.begin(buffer, [text])
        *_, block, where = chunks
        ends: list[int] = []
        while next_chunks(*chunks):
            ends += block[: where[KNOWN]].tolist()
            where[DONE], where[START] = where[KNOWN], ends[-1]
        return [buffer[start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]

    @classmethod
    def from_tiktoken(
        cls,
        mergeable_ranks: Any,
        *,
        split: str | None = None,
        special_tokens: Sequence[str] | Mapping[str, int] | None = None,
        pattern: str | None = None,
    ) -> BPETokenizer:
        """A tokenizer of tiktoken's: a mapping from bytes to ranks, the path of a rank file, or a `tiktoken.Encoding`.

        An Encoding brings its own split and special tokens; else they are "gpt4" and none, unless given. Ids are kept.

        Raises:
          InputError: a byte that has no rank, a rank that two tokens have, a file that isn't one, or a pattern that
            tiktoken may read otherwise.
        """
        from jaxlm.tokenizers.formats import read_tiktoken

        return read_tiktoken(cls, mergeable_ranks, split, special_tokens, pattern)

    def to_tiktoken(self, path: str | os.PathLike[str]) -> None:
        """Writes a rank file of tiktoken's (special tokens and the split aren't part of one).

        Raises:
          InputError: a vocabulary with which tiktoken might give other ids, or a path that can't be written.
        """
        from jaxlm.tokenizers.formats import write_tiktoken

        write_tiktoken(self, path)

    def to_tiktoken_encoding(self, name: str = "jaxlm") -> Any:
        """The same tokenizer as a `tiktoken.Encoding`. Needs the package tiktoken.

        Raises:
          InputError: a vocabulary or a pattern with which tiktoken might give other ids.
        """
        from jaxlm.tokenizers.formats import tiktoken_encoding

        return tiktoken_encoding(self, name)

    @classmethod
    def from_huggingface(cls, path: str | os.PathLike[str]) -> BPETokenizer:
        """A byte-level BPE from a `tokenizer.json` of Hugging Face tokenizers. Ids are kept.

        Raises:
          InputError: a file that isn't one, or one that does something else (another model, a normaliser, ...).
        """
        from jaxlm.tokenizers.formats import read_huggingface

        return read_huggingface(cls, path)

    def to_huggingface(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json` of Hugging Face tokenizers.

        Raises:
          InputError: a vocabulary, a pattern or the name of a special token with which that library might give other
            ids, or a path that can't be written.
        """
        from jaxlm.tokenizers.formats import write_huggingface

        write_huggingface(self, path)

    def _content(self) -> dict[str, Any]:
        tokens = self._tokens[256:]
        return {
            "split": self.split,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "ids": None if self.ids == list(range(len(self.ids))) else " ".join(map(str, self.ids)),
            "whole": {chunk.hex(): token_id for chunk, token_id in self.whole.items()},
            # One merge a line: the two symbols, and the bytes that they make.
            "merges": [
                f"{left} {right} {token.hex()}" for (left, right), token in zip(self.merges, tokens, strict=True)
            ],
        }

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> BPETokenizer:
        lines = [line.split(" ") for line in content["merges"]]
        merges = [(int(left), int(right)) for left, right, _ in lines]
        # Before the tokens are made: forty merges, each of a token with itself, would make one of a terabyte.
        sizes = [1] * 256
        for index, ((left, right), line) in enumerate(zip(merges, lines, strict=True)):
            if 0 <= left < len(sizes) and 0 <= right < len(sizes) and 2 * (sizes[left] + sizes[right]) != len(line[2]):
                raise InputError(f"Merge {index} doesn't make the bytes that the file says, {line[2][:60]!r}.")
            sizes.append(len(line[2]) // 2)
        ids = content["ids"]
        tokenizer = cls(
            merges,
            split=content["split"],
            pattern=content["pattern"],
            special_tokens=content["special_tokens"],
            ids=None if ids is None else [int(token_id) for token_id in ids.split(" ")],
            whole={bytes.fromhex(chunk): token_id for chunk, token_id in content["whole"].items()},
        )
        for index, (token, line) in enumerate(zip(tokenizer._tokens[256:], lines, strict=True)):
            if token.hex() != line[2]:
                raise InputError(f"Merge {index} makes the bytes {token.hex()[:60]}, and the file says {line[2][:60]}.")
        return tokenizer


def check_vocab_size(vocab_size: int, num_specials: int = 1) -> None:
    """Raises InputError for a size that no byte-level BPE vocabulary with so many special tokens has."""
    if not isinstance(vocab_size, Integral):
        raise InputError(f"The size of a vocabulary is a whole number, not {vocab_size!r}.")
    if vocab_size < 256 + num_specials:
        raise InputError(
            f"A byte-level BPE vocabulary has at least {256 + num_specials} ids (256 bytes and {num_specials} "
            f"special token{'s' * (num_specials != 1)}), and {vocab_size} were asked for; use a larger one."
        )
    check_highest_id(vocab_size - 1)


def check_highest_id(token_id: int) -> None:
    """Raises InputError for an id beyond what a vocabulary has places for."""
    if token_id >= _MOST_IDS:
        raise InputError(
            f"The highest id of a BPE vocabulary is below {_MOST_IDS:,}, not {shown(token_id)}; use fewer or lower ids."
        )


def check_split(split: str, pattern: str | None) -> None:
    """Raises InputError for an unknown split, or a pattern that is no regular expression."""
    import regex

    if not isinstance(split, str) or split not in SPLIT_PATTERNS:
        raise InputError(f"There is no split {shown(split)}; known are {', '.join(SPLIT_PATTERNS)}.")
    if pattern is None:
        return
    if not isinstance(pattern, str):
        raise InputError(f"A pattern is a regular expression as a str, not {shown(pattern)}.")
    check_text(pattern)
    # `regex` writes out what is repeated, so that "(?:a{9999}){9999}" would take gigabytes; recursion may have no end.
    repeats = [max(1, int(digits[:9])) for digits in re.findall(r"\{\s*(\d+)", pattern)]
    if math.prod(repeats) > _MOST_REPEATS:
        raise InputError(f"The pattern {shown(pattern)} repeats something more than {_MOST_REPEATS:,} times.")
    if re.search(r"\(\?(?:R|&|P>|[+-]?\d)", pattern):
        raise InputError(f"The pattern {shown(pattern)} calls itself or a group; write it without.")
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise InputError(f"The pattern {shown(pattern)} is no regular expression: {one_line(str(error))}.") from None
    except RecursionError:
        raise InputError(f"The pattern of {len(pattern):,} characters has too many groups inside each other.") from None


def pairs_of_symbols(merges: Iterable[Iterable[int]]) -> list[Pair]:
    """Merges as tuples of two ints. Raises InputError for one that isn't a pair of whole numbers."""
    pairs = []
    for index, merge in enumerate(each_of(merges, "pairs of symbols")):
        try:
            left, right = map(operator.index, merge)
        except (TypeError, ValueError):
            raise InputError(
                f"Merge {index} is {shown(merge)}, not a pair of symbols, which are whole numbers."
            ) from None
        pairs.append((left, right))
    return pairs


def merged_tokens(merges: Sequence[Pair]) -> list[bytes]:
    """The bytes of each symbol: the 256 bytes, then what each merge makes.

    Raises:
      InputError: a merge of symbols that don't exist yet, or one that was there before.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    index_of: dict[Pair, int] = {}
    for index, pair in enumerate(merges):
        if not (0 <= pair[0] < len(tokens) and 0 <= pair[1] < len(tokens)):
            raise InputError(f"Merge {index} joins the symbols {shown(pair)}, which don't both exist before it.")
        if index_of.setdefault(pair, index) != index:
            raise InputError(f"Merge {index} joins the symbols {pair}, as merge {index_of[pair]} does already.")
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


# ---- work divided among threads


def _count_chunks(texts: Iterable[str], split: str, pattern: str | None, num_threads: int) -> Any:
    """The unique chunks of texts with their counts. Each thread counts for itself; counts are added up at the end."""
    from jaxlm.tokenizers.bpe_count import ChunkCounts
    from jaxlm.tokenizers.bpe_split import Splitter, make_buffer

    splitter = Splitter(split, pattern)
    idle: list[ChunkCounts] = []
    begins: dict[int, int] = {}  # by identity, where in its text a piece begins that isn't the first

    def count(block: list[str]) -> None:
        try:
            counts = idle.pop()
        except IndexError:
            counts = ChunkCounts()
        buffer = make_buffer([encode_utf8(piece, begins.pop(id(piece), 0)) for piece in block])
        counts.add(splitter.begin(buffer, block))
        idle.append(counts)

    def pieces() -> Iterator[str]:
        for text in each_text(texts):
            begin = 0
            for piece in splitter.cut([text], _COUNTED):
                if begin:
                    begins[id(piece)] = begin
                begin += len(piece)
                yield piece

    _map(count, blocks_of(pieces(), _COUNTED), num_threads)
    total = max(idle, key=lambda counts: counts.size[0], default=ChunkCounts())
    for counts in idle:
        if counts is not total:
            total.update(counts)
            counts.clear()
    return total


def _map(function: Callable[[list[str]], Any], blocks: Iterable[list[str]], num_threads: int) -> list[Any]:
    """The results of a function for each block, in order; of the function's errors, the first block's.

    The thread that calls makes the blocks. While two for each other thread wait or are under way, it takes one itself;
    and in the end those that no other thread has begun.
    """
    if num_threads == 1:
        return [function(block) for block in blocks]
    results = []
    pending: deque[Future[Any]] = deque()
    for_others: dict[Future[Any], list[str]] = {}
    with workers(num_threads) as pool:
        try:
            for block in blocks:
                while pending and pending[0].done():
                    results.append(pending.popleft().result())
                for_others = {call: block for call, block in for_others.items() if not call.done()}
                if len(for_others) < 2 * (num_threads - 1):
                    pending.append(pool.submit(function, block))
                    for_others[pending[-1]] = block
                else:
                    pending.append(_called(function, block))
            own = {call: _called(function, block) for call, block in reversed(for_others.items()) if call.cancel()}
            return results + [own.get(call, call).result() for call in pending]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _called(function: Callable[[list[str]], Any], block: list[str]) -> Future[Any]:
    """As `submit`, at once and in this thread."""
    call: Future[Any] = Future()
    try:
        call.set_result(function(block))
    except Exception as error:
        call.set_exception(error)
    return call


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _threads(asked: int | None) -> int:
    """So many threads as were asked for, or one a core."""
    if asked is None:
        return num_cores()
    if not isinstance(asked, Integral) or asked < 1:
        raise InputError(f"num_threads is a whole number of at least 1, or None for all cores, not {asked!r}.")
    return asked
