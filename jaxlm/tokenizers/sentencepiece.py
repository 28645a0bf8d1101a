"""SentencePiece (Kudo and Richardson 2018) BPE and unigram behind the same protocol, configured to lose nothing.

By default SentencePiece normalises text (NFKC, runs of spaces, a space in front), and it writes a space as U+2581, so
that a literal U+2581 comes back as a space. Here normalisation is off, unknown characters fall back to bytes, and a
literal U+2581 is escaped before SentencePiece sees it: U+2582 is the escape, "U+2582 ." stands for U+2581, and a
doubled U+2582 for itself.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece

from jaxlm.tokenizers.base import END_OF_TEXT, IdArray, InputError, Tokenizer, check_texts

SPACE, ESCAPE = "\u2581", "\u2582"
_ESCAPED = re.compile(f"[{SPACE}{ESCAPE}]")
_STANDS_FOR = {f"{ESCAPE}.".encode(): SPACE.encode(), (2 * ESCAPE).encode(): ESCAPE.encode(), SPACE.encode(): b" "}
_SEQUENCE = re.compile(b"|".join(map(re.escape, _STANDS_FOR)))
_SENTENCE_BYTES = 4192
_MOST_IDS = 1 << 24  # the trainer takes longer with each that is asked for, be there a piece for it or not
_UNKNOWN_ID, _END_OF_TEXT_ID, _FIRST_BYTE_ID = 0, 1, 2
_PROBE = " a  b\t\n \u2581\u2582\ufb01e\u0301\u0130\r\n\u3000\x00  "  # what other settings would change


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model: id 0 is its unknown piece (never produced), id 1 end-of-text, then 256 bytes.

    Args:
      model: the serialised model, as SentencePiece's trainer writes it.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            if not model:
                raise RuntimeError  # an empty model passes for no model at all
        except RuntimeError:
            raise InputError("The SentencePiece model can't be read; it is damaged or of another format.") from None
        self._check_pieces()
        self._tokens = [self._piece_bytes(token_id) for token_id in range(self._processor.vocab_size())]
        self.special_tokens = {END_OF_TEXT: _END_OF_TEXT_ID}
        self._lengths = np.array([len(token) for token in self._tokens], np.int32)
        self._lengths[_END_OF_TEXT_ID] = 0
        if self.decode(self._encode_ordinary(_PROBE)) != _PROBE:
            raise InputError("The SentencePiece model loses text; train one here, whose settings keep all of it.")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, model_type: Literal["bpe", "unigram"] = "bpe"
    ) -> SentencePieceTokenizer:
        """Trains a model on one thread, so that the same texts give the same model.

        Raises:
          InputError: an unknown model type, no text, or a vocabulary that is too small or too large for the text (the
            message names the bound).
        """
        if model_type not in ("bpe", "unigram"):
            raise InputError(f"There is no SentencePiece model type {model_type!r}; known are bpe, unigram.")
        if vocab_size > _MOST_IDS:
            raise InputError(
                f"A SentencePiece vocabulary has at most {_MOST_IDS:,} ids, and {vocab_size} were asked for; use a "
                "smaller one."
            )
        model = io.BytesIO()
        failures: list[BaseException] = []

        def sentences() -> Iterator[str]:
            try:
                yield from _sentences(check_texts(texts))
            except (Exception, KeyboardInterrupt) as error:
                failures.append(error)  # the trainer would keep its text alone
                raise

        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(),
                model_writer=model,
                model_type=model_type,
                vocab_size=max(vocab_size, 2),  # below, the trainer stops before it has counted what it needs
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                byte_fallback=True,
                allow_whitespace_only_pieces=True,
                max_sentence_length=_SENTENCE_BYTES,
                unk_id=_UNKNOWN_ID,
                eos_id=_END_OF_TEXT_ID,
                eos_piece=END_OF_TEXT,
                bos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise InputError(_explain(str(error), vocab_size)) from None
        trained = cls(model.getvalue())
        if trained.vocab_size != vocab_size:
            raise InputError(
                f"The text gives SentencePiece a vocabulary of {trained.vocab_size} ids, and {vocab_size} were asked "
                "for; use more text or that size."
            )
        return trained

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def _encode_ordinary(self, text: str) -> IdArray:
        return np.array(self._processor.encode(_escape(text)), np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        (token_id,) = self._check_ids([token_id])
        return self._tokens[token_id]

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        return _unescape(b"".join([self._tokens[token_id] for token_id in self._check_ids(ids).tolist()]))

    def byte_lengths(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> IdArray:
        array = self._check_ids(ids)
        lengths = self._lengths[array]
        data = b"".join([self._tokens[token_id] for token_id in array.tolist()])
        # A sequence may have more bytes than what it stands for; these are taken from its end.
        owner = np.repeat(np.arange(len(array)), [len(self._tokens[token_id]) for token_id in array.tolist()])
        for match in _SEQUENCE.finditer(data):
            np.subtract.at(lengths, owner[match.start() + len(_STANDS_FOR[match.group()]) : match.end()], 1)
        return lengths

    def _check_pieces(self) -> None:
        """Raises InputError unless the marks and the bytes are where `train` has them."""
        processor = self._processor
        special = [i for i in range(processor.vocab_size()) if processor.is_control(i) or processor.is_unknown(i)]
        bytes_ = [i for i in range(processor.vocab_size()) if processor.is_byte(i)]
        if (
            special != [_UNKNOWN_ID, _END_OF_TEXT_ID]
            or processor.unk_id() != _UNKNOWN_ID
            or processor.id_to_piece(_END_OF_TEXT_ID) != END_OF_TEXT
            or bytes_ != list(range(_FIRST_BYTE_ID, _FIRST_BYTE_ID + 256))
            or [processor.id_to_piece(i) for i in bytes_] != [f"<0x{byte:02X}>" for byte in range(256)]
        ):
            raise InputError("The SentencePiece model has other pieces than one that was trained here; train it here.")

    def _piece_bytes(self, token_id: int) -> bytes:
        if self._processor.is_byte(token_id):
            return bytes([token_id - _FIRST_BYTE_ID])
        if token_id == _UNKNOWN_ID:
            return "\ufffd".encode()
        piece: str = self._processor.id_to_piece(token_id)
        return (piece if token_id == _END_OF_TEXT_ID else piece.replace(SPACE, " ")).encode()

    def _content(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self._model).decode()}

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> SentencePieceTokenizer:
        return cls(base64.b64decode(content["model"]))


def _escape(text: str) -> str:
    return _ESCAPED.sub(lambda match: ESCAPE + ("." if match.group() == SPACE else ESCAPE), text)


def _unescape(data: bytes) -> bytes:
    """The bytes of pieces put together. A space that no piece has comes as the three bytes of U+2581."""
    return _SEQUENCE.sub(lambda match: _STANDS_FOR[match.group()], data)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, each with the line end before it (SentencePiece drops one at the end), none longer than it will read."""
    for text in texts:
        for line in re.findall(r"\n?[^\n]*", _escape(text)):
            for start in range(0, len(line), _SENTENCE_BYTES // 4):
                yield line[start : start + _SENTENCE_BYTES // 4]


def _explain(error: str, vocab_size: int) -> str:
    """One sentence for what SentencePiece's trainer says in its own way."""
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"A SentencePiece vocabulary on this text has at least {match.group(1)} ids (its frequent characters, 256 "
            f"bytes and two marks), and {vocab_size} were asked for."
        )
    if match := re.search(r"Vocabulary size too high.*<= (\d+)", error):
        return (
            f"The text gives SentencePiece a vocabulary of at most {match.group(1)} ids, and {vocab_size} were asked "
            "for; use more text or a smaller vocabulary."
        )
    if "sentences_.empty()" in error:
        return "SentencePiece found no text to learn from; give it at least one sentence."
    return f"SentencePiece could not be trained: {' '.join(error.split())}"
