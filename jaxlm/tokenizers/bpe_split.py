"""Step 1 of the BPE engine: text is split into chunks, about words, which no merge crosses.

Kernels read a *buffer*: one text after another in UTF-8, each closed by the byte 0xFF. Where a chunk ends, the scanners
of `bpe_scan` say, or the `regex` library for a pattern of one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import kernel
from jaxlm.tokenizers import bpe_reference
from jaxlm.tokenizers.base import InputError, check_text, shown
from jaxlm.tokenizers.bpe_kernels import TEXT_END
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS
from jaxlm.tokenizers.bpe_scan import LETTERS, MARK, character_classes, gpt2_end, gpt4_end, o200k_end

# The schemes, which are `bpe_reference.SPLIT_PATTERNS` in their order.
GPT2, GPT4, O200K, NONE, GIVEN = range(5)

_ENDS = 8192  # chunks whose ends are written at once, which stay in the processor's cache
_CUT_SEARCH = 1000
PADDING = 24  # bytes 0xFF after the last text, since eight bytes are looked at together


def make_buffer(texts: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """The buffer of UTF-8 texts: each closed by 0xFF, and padded."""
    return np.frombuffer(b"\xff".join([*texts, b"\xff" * PADDING]), np.uint8)


# What a kernel needs to go through the chunks of a buffer, and to go on where it stopped: the buffer, the classes of
# characters, the scheme, ends of chunks, and how far it has come: where the next chunk begins (or the 0xFF before it
# stands), how many of the ends are done, and how many there are.
Chunks = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], int, npt.NDArray[np.int64], npt.NDArray[np.int64]]
START, DONE, KNOWN = range(3)


class Splitter:
    """A named split, or a pattern of one's own, as a function from a buffer to the ends of its chunks."""

    def __init__(self, split: str, pattern: str | None) -> None:
        self._scheme = list(SPLIT_PATTERNS).index(split)
        self._pattern = pattern
        self._classes = character_classes()

    def begin(self, buffer: npt.NDArray[np.uint8], texts: Sequence[str]) -> Chunks:
        """The chunks of a buffer of texts, none of which is done.

        Raises:
          InputError: the matches of a pattern of one's own don't add up to the text.
        """
        if self._pattern is None:
            return buffer, self._classes, self._scheme, np.empty(_ENDS, np.int64), np.zeros(3, np.int64)
        return buffer, self._classes, GIVEN, self._pattern_ends(self._pattern, texts), np.zeros(3, np.int64)

    def cut(self, pieces: Iterable[str], size: int, special_tokens: Sequence[str] = ()) -> Iterator[str]:
        """A text that comes in pieces, cut anew: the chunks of the parts are the chunks of the whole.

        Parts have about `size` characters, where the text allows it. No special token is cut into two.
        """
        held = ""
        start = 0  # what comes before it in `held` has been given out
        margin = max(map(len, special_tokens), default=0)
        goal = size
        for piece in pieces:
            if not isinstance(piece, str):
                check_text(piece)
            if start:
                held, goal, start = held[start:], goal - start, 0
            held += piece
            while goal + margin < len(held):
                place = self._cut_place(held, start, goal, special_tokens)
                if place:
                    yield held[start:place]
                    start = place
                    goal = place + size
                else:
                    goal += size
        if start < len(held):
            yield held[start:]

    def _cut_place(self, text: str, start: int, goal: int, special_tokens: Sequence[str]) -> int:
        """A place near `goal`, after `start`, where a chunk ends whatever comes before and after; 0 for none."""
        if self._pattern is not None or self._scheme == NONE:
            return 0
        for place in range(goal, max(start, goal - _CUT_SEARCH), -1):
            # A letter ends its chunk unless a letter follows, or in o200k a mark or an apostrophe.
            if (
                self._classes[ord(text[place - 1])] & LETTERS
                and not self._classes[ord(text[place])] & (LETTERS | MARK)
                and text[place] != "'"
                and not any(
                    name in text[max(0, place - len(name) + 1) : place + len(name) - 1] for name in special_tokens
                )
            ):
                return place
        return 0

    @staticmethod
    def _pattern_ends(pattern: str, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        ends: list[int] = []
        offset = 0
        for text in texts:
            chunks = bpe_reference.split(text, pattern)
            if "".join(chunks) != text:
                raise InputError(f"The pattern {shown(pattern)} loses text: its matches don't add up to the text.")
            for chunk in chunks:
                offset += len(chunk.encode())
                ends.append(offset)
            offset += 1  # the byte after the text
        return np.array(ends, np.int64)


@kernel
def next_chunks(buffer, classes, scheme, ends, where):
    """Sees to it that there are ends which aren't done yet. False at the end of the buffer."""
    if where[DONE] == where[KNOWN]:
        if scheme == GIVEN:
            where[KNOWN] = 0 if where[KNOWN] else len(ends)
        else:
            where[KNOWN] = split(buffer, classes, scheme, where[START], ends)
        where[DONE] = 0
    return where[KNOWN] > 0


@kernel
def split(buffer, classes, scheme, start, ends):
    """Writes where chunks end, from `start` on, until `ends` is full or the buffer is done; returns how many.

    A chunk begins where the one before it ends, or after the 0xFF that follows.
    """
    last = len(buffer) - PADDING
    count = 0
    i = start
    while count < len(ends):
        while i < last and buffer[i] == TEXT_END:
            i += 1
        if i >= last:
            break
        if scheme == GPT4:
            i = gpt4_end(buffer, classes, i)
        elif scheme == GPT2:
            i = gpt2_end(buffer, classes, i)
        elif scheme == O200K:
            i = o200k_end(buffer, classes, i)
        else:
            while buffer[i] != TEXT_END:
                i += 1
        ends[count] = i
        count += 1
    return count
