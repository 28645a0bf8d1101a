"""The naive character tokenizer, made lossless by one escape token.

A vocabulary of V ids is the V - 2 most frequent characters (the sixteen hexadecimal digits always among them), then the
escape, then end-of-text. A character outside the vocabulary is written as

    escape, its code point in lower-case hexadecimal without leading zeros, escape

so that any text round-trips, and rare characters cost what they cost. All of it is array lookups in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from jaxlm.tokenizers.base import (
    END_OF_TEXT,
    IdArray,
    InputError,
    Tokenizer,
    blocks_of,
    check_text,
    check_texts,
    special_token_ids,
)

HEXADECIMAL_DIGITS = "0123456789abcdef"
REPLACEMENT = "\ufffd"
_CODE_POINTS = 0x110000
_ESCAPE = "\udc00"  # a lone surrogate, which no text that is encoded contains
_BLOCK = 1 << 15


class CharTokenizer(Tokenizer):
    """Characters <-> ids.

    Args:
      characters: the ordinary vocabulary in the order of its ids, the hexadecimal digits included.
    """

    kind: ClassVar[str] = "char"

    def __init__(self, characters: Sequence[str]) -> None:
        if len(set(characters)) != len(characters) or any(len(character) != 1 for character in characters):
            raise InputError("The characters of a CharTokenizer are single characters, each given once.")
        missing = set(HEXADECIMAL_DIGITS) - set(characters)
        if missing:
            raise InputError(f"A CharTokenizer needs the hexadecimal digits; {''.join(sorted(missing))} are missing.")
        self.characters = "".join(characters)
        check_text(self.characters)
        self.escape_id = len(self.characters)
        self.special_tokens = special_token_ids((END_OF_TEXT,), self.escape_id + 1)
        code_points = _code_points(self.characters)
        self._id_of = np.full(_CODE_POINTS, -1, np.int32)
        self._id_of[code_points] = np.arange(len(code_points), dtype=np.int32)
        self._id_of[ord(_ESCAPE)] = self.escape_id
        self._code_point_of = np.append(code_points, ord(REPLACEMENT)).astype(np.uint32)
        self._bytes_of = np.append(_utf8_lengths(code_points), [0, 0]).astype(np.int32)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int | None = None) -> CharTokenizer:
        """The hexadecimal digits and the most frequent other characters of `texts`, `vocab_size - 2` in all.

        Of two that are as frequent, the lower code point comes first. None takes all characters.

        Raises:
          InputError: fewer ids than the hexadecimal digits and the two marks need, or more than the text can fill.
        """
        counts = np.zeros(_CODE_POINTS, np.int64)
        for block in blocks_of(check_texts(texts), _BLOCK):
            numbers = np.bincount(_code_points("".join(block)))
            counts[: len(numbers)] += numbers
        found = np.union1d(np.flatnonzero(counts), _code_points(HEXADECIMAL_DIGITS))
        ranked = [chr(point) for point in found[np.argsort(-counts[found], kind="stable")]]
        smallest, largest = len(HEXADECIMAL_DIGITS) + 2, len(ranked) + 2
        if vocab_size is None:
            vocab_size = largest
        if vocab_size < smallest:
            raise InputError(f"A character vocabulary has at least {smallest} ids, and {vocab_size} were asked for.")
        if vocab_size > largest:
            raise InputError(
                f"The text has characters for a vocabulary of at most {largest} ids, and {vocab_size} were asked for."
            )
        others = [character for character in ranked if character not in HEXADECIMAL_DIGITS]
        kept = {*HEXADECIMAL_DIGITS, *others[: vocab_size - smallest]}
        return cls([character for character in ranked if character in kept])

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 2

    def _encode_ordinary(self, text: str) -> IdArray:
        # Blocks whose arrays stay in the processor's cache; a long text at once would run at half the speed.
        starts = range(0, max(1, len(text)), _BLOCK)
        return np.concatenate([self._encode_block(text[start : start + _BLOCK]) for start in starts])

    def _encode_block(self, text: str) -> IdArray:
        ids = self._id_of[_code_points(text)]
        unknown = np.flatnonzero(ids < 0).tolist()
        if not unknown:
            return ids
        pieces, start = [], 0
        for position in unknown:
            pieces += [text[start:position], f"{_ESCAPE}{ord(text[position]):x}{_ESCAPE}"]
            start = position + 1
        return self._id_of[_code_points("".join([*pieces, text[start:]]))]

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        array = self._check_ids(ids)
        escapes, characters = self._escape_sequences(array)
        pieces = []
        start = 0
        for (begin, end), character in zip(escapes, characters, strict=True):
            pieces += [self._decode_plain(array[start:begin]), character.encode()]
            start = end
        return b"".join([*pieces, self._decode_plain(array[start:])])

    def byte_lengths(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> IdArray:
        array = self._check_ids(ids)
        lengths = self._bytes_of[array]
        for (begin, end), character in zip(*self._escape_sequences(array), strict=True):
            lengths[begin:end] = 0
            lengths[end - 1] = len(character.encode())
        return lengths

    def token_bytes(self, token_id: int) -> bytes:
        (token_id,) = self._check_ids([token_id])
        if token_id == self.escape_id:
            return b""
        return END_OF_TEXT.encode() if token_id == self.end_of_text_id else self.characters[token_id].encode()

    def _decode_plain(self, ids: npt.NDArray[np.int64]) -> bytes:
        """Bytes of ids among which there is no escape."""
        pieces = np.split(ids, np.flatnonzero(ids == self.end_of_text_id))
        texts = [pieces[0], *(piece[1:] for piece in pieces[1:])]
        return END_OF_TEXT.join(self._code_point_of[t].tobytes().decode("utf-32-le") for t in texts).encode()

    def _escape_sequences(self, ids: npt.NDArray[np.int64]) -> tuple[list[tuple[int, int]], list[str]]:
        """Where escape sequences begin and end, and what each stands for (U+FFFD if it is malformed).

        A sequence is an escape, hexadecimal digits, and the closing escape. One whose closing escape is missing ends
        after its digits.
        """
        spans, characters = [], []
        end = 0
        for begin in np.flatnonzero(ids == self.escape_id).tolist():
            if begin < end:
                continue  # the closing escape of the sequence before
            end = begin + 1
            digits = ""
            while end < len(ids) and ids[end] < self.escape_id and self.characters[ids[end]] in HEXADECIMAL_DIGITS:
                digits += self.characters[ids[end]]
                end += 1
            closed = end < len(ids) and ids[end] == self.escape_id
            end += closed
            spans.append((begin, end))
            characters.append(_character_of(digits) if closed else REPLACEMENT)
        return spans, characters

    def _content(self) -> dict[str, Any]:
        return {"characters": self.characters}

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> CharTokenizer:
        return cls(content["characters"])


def _code_points(text: str) -> npt.NDArray[np.unsignedinteger]:
    # Python writes UTF-16 eight times as fast as UTF-32; it has one unit a character up to U+FFFF.
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    return units if len(units) == len(text) else np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _utf8_lengths(code_points: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.int64]:
    return 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000).astype(np.int64)


def _character_of(digits: str) -> str:
    """The character of a code point written in hexadecimal; U+FFFD if none is written so."""
    if not digits or len(digits) > 6 or (digits[0] == "0" and digits != "0"):
        return REPLACEMENT
    code_point = int(digits, 16)
    if code_point >= _CODE_POINTS or 0xD800 <= code_point < 0xE000:
        return REPLACEMENT
    return chr(code_point)
