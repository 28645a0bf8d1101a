"""The scanners of step 1 of the BPE engine: by hand, what the published patterns say, on UTF-8 bytes.

All of them read a buffer (see `bpe_split`): one text after another, each closed by the byte 0xFF, which UTF-8 never
contains and which belongs to no class of characters, so that every run of characters ends there by itself. Nothing
looks back, so a scanner can begin at any chunk's first byte.

The patterns are those of tiktoken. Classes are of Unicode 16.0.0, from `unicode_classes.txt`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxlm.machine_code import inlined, kernel
from jaxlm.tokenizers.bpe_kernels import TEXT_END, load8

# One bit a class, so that a set of classes is their sum. END, which is in no set, is the class of the byte 0xFF.
UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, NEWLINE, OTHER = (1 << bit for bit in range(8))
END = 0
LETTERS = UPPER | LOWER | LETTER
_UPPERS = UPPER | LETTER | MARK  # [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
_LOWERS = LOWER | LETTER | MARK  # [\p{Ll}\p{Lm}\p{Lo}\p{M}]
_OTHERS = MARK | OTHER  # [^\s\p{L}\p{N}]
_WHITE = SPACE | NEWLINE  # \s
_PREFIX = MARK | SPACE | OTHER  # [^\r\n\p{L}\p{N}]
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


@inlined
def gpt2_end(buffer, classes, i):
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
    if kind & LETTERS:
        return _letters_end(buffer, classes, following)
    if kind & NUMBER:
        return _run_end(buffer, classes, following, NUMBER)
    if kind & _OTHERS:
        return _run_end(buffer, classes, following, _OTHERS)
    return _white_end(buffer, classes, i, False, False)


@inlined
def gpt4_end(buffer, classes, i):
    end = _plain_word_end(buffer, classes, i)
    if end:
        return end
    kind, following = _character(buffer, classes, i)
    if buffer[i] == _APOSTROPHE:
        end = _contraction_end(buffer, i + 1, 0x20)
        if end:
            return end
    if kind & LETTERS:
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


@inlined
def o200k_end(buffer, classes, i):
    kind, following = _character(buffer, classes, i)
    end = 0
    if kind & _PREFIX:
        end = _cased_end(buffer, classes, following)
    if not end and kind & (LETTERS | MARK):
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
            if classes[buffer[i]] & LETTERS:
                continue
            return i
        kind, following = _character(buffer, classes, i)
        if not kind & LETTERS:
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
