"""Step 1 of the BPE engine: text is split into chunks, about words, which no merge crosses.

The scanners do by hand what the published patterns say, on UTF-8 bytes. All of them read a *buffer*: one text after
another, each closed by the byte 0xFF, which UTF-8 never contains and which belongs to no class of characters, so that
every run of characters ends there by itself. Nothing looks back, so a scanner can begin at any chunk's first byte.

The patterns are those of tiktoken. Classes are of Unicode 16.0.0, from `unicode_classes.txt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxlm.tokenizers import bpe_reference
from jaxlm.tokenizers.base import InputError, check_text, shown
from jaxlm.tokenizers.bpe_kernels import TEXT_END, kernel, load8
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS

# The schemes, which are `bpe_reference.SPLIT_PATTERNS` in their order.
GPT2, GPT4, O200K, NONE, GIVEN = range(5)

# One bit a class, so that a set of classes is their sum. END, which is in no set, is the class of the byte 0xFF.
UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, NEWLINE, OTHER = (1 << bit for bit in range(8))
END = 0
_LETTERS = UPPER | LOWER | LETTER
_UPPERS = UPPER | LETTER | MARK  # [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
_LOWERS = LOWER | LETTER | MARK  # [\p{Ll}\p{Lm}\p{Lo}\p{M}]
_OTHERS = MARK | OTHER  # [^\s\p{L}\p{N}]
_WHITE = SPACE | NEWLINE  # \s
_PREFIX = MARK | SPACE | OTHER  # [^\r\n\p{L}\p{N}]

_ENDS = 8192  # chunks whose ends are written at once, which stay in the processor's cache
_CUT_SEARCH = 1000
PADDING = 24  # bytes 0xFF after the last text, since eight bytes are looked at together
_APOSTROPHE, _SLASH, _BLANK = ord("'"), ord("/"), ord(" ")


@cache
def character_classes() -> npt.NDArray[np.uint8]:
    """The class of each code point: uint8, shape (0x110000,)."""
    names = {"U": UPPER, "L": LOWER, "O": LETTER, "M": MARK, "N": NUMBER, "S": SPACE}
    classes = np.full(0x110000, OTHER, np.uint8)
    for line in (Path(__file__).parent / "unicode_classes.txt").read_text("ascii").splitlines():
        if not line.startswith("#"):
            span, kinds = line.split(" ")
            first, _, last = span.partition("-")
            for index, kind in enumerate(kinds):  # two kinds alternate
                classes[int(first, 16) + index : int(last or first, 16) + 1 : len(kinds)] = names[kind]
    classes[[ord("\r"), ord("\n")]] = NEWLINE
    return classes


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
                self._classes[ord(text[place - 1])] & _LETTERS
                and not self._classes[ord(text[place])] & (_LETTERS | MARK)
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
            i = _gpt4_end(buffer, classes, i)
        elif scheme == GPT2:
            i = _gpt2_end(buffer, classes, i)
        elif scheme == O200K:
            i = _o200k_end(buffer, classes, i)
        else:
            while buffer[i] != TEXT_END:
                i += 1
        ends[count] = i
        count += 1
    return count


# ---- the three patterns: where the chunk that begins at byte i ends


@kernel
def _plain_word_end(buffer, classes, i):
    """The end of ` ?[A-Za-z]\\p{L}*`, which most chunks are, or 0."""
    start = i + (buffer[i] == _BLANK)
    letters = _ascii_letters(load8(buffer, start))
    if letters == 0:
        return 0
    end = start + letters
    return _letters_end(buffer, classes, end) if letters == 8 or buffer[end] >= 0x80 else end


@kernel
def _gpt2_end(buffer, classes, i):
    end = _plain_word_end(buffer, classes, i)
    if end:
        return end
    kind, following = _character(buffer, classes, i)
    if buffer[i] == _APOSTROPHE:
        end = _contraction_end(buffer, i + 1, 0)
        if end:
            return end
    start = i
    if buffer[i] == _BLANK:
        start = following
        kind, following = _character(buffer, classes, start)
    if kind & _LETTERS:
        return _letters_end(buffer, classes, following)
    if kind & NUMBER:
        return _run_end(buffer, classes, following, NUMBER)
    if kind & _OTHERS:
        return _run_end(buffer, classes, following, _OTHERS)
    return _white_end(buffer, classes, i, False, False)


@kernel
def _gpt4_end(buffer, classes, i):
    end = _plain_word_end(buffer, classes, i)
    if end:
        return end
    kind, following = _character(buffer, classes, i)
    if buffer[i] == _APOSTROPHE:
        end = _contraction_end(buffer, i + 1, 0x20)
        if end:
            return end
    if kind & _LETTERS:
        return _letters_end(buffer, classes, following)
    if kind & _PREFIX:
        end = _letters_end(buffer, classes, following)
        if end > following:
            return end
    elif kind & NUMBER:
        return _number_end(buffer, classes, following)
    end = _others_end(buffer, classes, i)
    if end:
        return _run_end(buffer, classes, end, NEWLINE)
    return _white_end(buffer, classes, i, True, False)


@kernel
def _o200k_end(buffer, classes, i):
    kind, following = _character(buffer, classes, i)
    end = 0
    if kind & _PREFIX:
        end = _cased_end(buffer, classes, following)
    if not end and kind & (_LETTERS | MARK):
        end = _cased_end(buffer, classes, i)
    if not end and kind & (_PREFIX | UPPER):
        # The second alternative, which is left with upper-case letters alone.
        start = following if kind & _PREFIX else i
        end = _run_end(buffer, classes, start, UPPER)
        if end == start:
            end = 0
    if end:
        if buffer[end] == _APOSTROPHE:
            contraction = _contraction_end(buffer, end + 1, 0x20)
            if contraction:
                return contraction
        return end
    if kind & NUMBER:
        return _number_end(buffer, classes, following)
    end = _others_end(buffer, classes, i)
    if end:
        while buffer[end] == _SLASH or classes[buffer[end]] == NEWLINE:
            end += 1
        return end
    return _white_end(buffer, classes, i, True, True)


# ---- what the patterns are made of


@kernel
def _character(buffer, classes, i):
    """The class of the character that begins at byte i, and where the next one begins."""
    byte = np.int64(buffer[i])
    if byte < 0x80:
        return classes[byte], i + 1
    if byte < 0xE0:
        return classes[(byte & 0x1F) << 6 | (buffer[i + 1] & 0x3F)], i + 2
    if byte < 0xF0:
        return classes[(byte & 0x0F) << 12 | np.int64(buffer[i + 1] & 0x3F) << 6 | (buffer[i + 2] & 0x3F)], i + 3
    if byte < TEXT_END:
        high = (byte & 0x07) << 18 | np.int64(buffer[i + 1] & 0x3F) << 12
        return classes[high | np.int64(buffer[i + 2] & 0x3F) << 6 | (buffer[i + 3] & 0x3F)], i + 4
    return np.uint8(END), i


@kernel
def _run_end(buffer, classes, i, members):
    """Where the run of characters of the given classes that begins at byte i ends."""
    while True:
        kind, following = _character(buffer, classes, i)
        if not kind & members:
            return i
        i = following


@kernel
def _letters_end(buffer, classes, i):
    """`_run_end` for letters, eight bytes at a time as long as they are ASCII."""
    while True:
        i += _ascii_letters(load8(buffer, i))
        if buffer[i] < 0x80:
            if classes[buffer[i]] & _LETTERS:
                continue
            return i
        kind, following = _character(buffer, classes, i)
        if not kind & _LETTERS:
            return i
        i = following


@kernel
def _others_end(buffer, classes, i):
    """The end of ` ?[^\\s\\p{L}\\p{N}]+`, or 0."""
    start = i + 1 if buffer[i] == _BLANK else i
    end = _run_end(buffer, classes, start, _OTHERS)
    return end if end > start else 0


@kernel
def _number_end(buffer, classes, i):
    """The end of up to two more characters of class NUMBER."""
    for _ in range(2):
        kind, following = _character(buffer, classes, i)
        if kind != NUMBER:
            break
        i = following
    return i


@kernel
def _contraction_end(buffer, i, fold):
    """The end of one of s d m t ll ve re, or 0; `fold` is 0x20 to let upper case pass, and U+017F, which folds to s."""
    first, second = buffer[i] | fold, buffer[i + 1] | fold
    if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
        return i + 1
    if (first == ord("l") and second == ord("l")) or ((first == ord("v") or first == ord("r")) and second == ord("e")):
        return i + 2
    if fold and buffer[i] == 0xC5 and buffer[i + 1] == 0xBF:
        return i + 2
    return 0


@kernel
def _cased_end(buffer, classes, i):
    """The end of [upper]*[lower]+, where marks and letters without case are both; or 0.

    The first part takes all it can. If nothing is left for the second, it gives back as much as the second needs: all
    after the last character that is both.
    """
    last_of_both = 0
    while True:
        kind, following = _character(buffer, classes, i)
        if not kind & _UPPERS:
            break
        i = following
        if kind & _LOWERS:
            last_of_both = following
    if kind & _LOWERS:
        return _run_end(buffer, classes, following, _LOWERS)
    return last_of_both


@kernel
def _white_end(buffer, classes, i, newline_ends, newline_first):
    """The end of a chunk of white space: `\\s++$|\\s*[\\r\\n]|\\s+(?!\\S)|\\s`, of which gpt2 has no second part.

    So: the whole run at the end of a text; else up to its last newline; else all but its last character, which goes
    with what follows, unless it is the only one. In o200k the newline comes before the end of the text.
    """
    start = i
    last_newline = last_start = 0
    while True:
        kind, following = _character(buffer, classes, i)
        if not kind & _WHITE:
            break
        last_start = i
        i = following
        if kind == NEWLINE:
            last_newline = following
    at_end = buffer[i] == TEXT_END
    if newline_ends and last_newline and (newline_first or not at_end):
        return last_newline
    if at_end or last_start == start:
        return i
    return last_start


# ---- eight bytes at once

_U = np.uint64
_HIGH = _U(0x8080808080808080)
_LOW7 = _U(0x7F7F7F7F7F7F7F7F)
_CASE = _U(0x2020202020202020)
_BELOW_A = _U(0x1F1F1F1F1F1F1F1F)  # 0x80 - "a": the sum has its high bit from "a" on
_ABOVE_Z = _U(0x0505050505050505)  # 0x7F - "z": the sum has its high bit after "z"
_ONES = _U(0x0101010101010101)


@kernel
def _ascii_letters(word):
    """How many of eight bytes are ASCII letters before the first that isn't: 0 to 8."""
    lower = (word | _CASE) & _LOW7
    other = ~((lower + _BELOW_A) & ~(lower + _ABOVE_Z) & ~word) & _HIGH
    # The bits below the lowest one that is set fill the bytes before it; one is counted for each by the product.
    below = (other - _U(1)) & ~other
    return np.int64(((below & _HIGH) >> _U(7)) * _ONES >> _U(56)) if other else np.int64(8)
