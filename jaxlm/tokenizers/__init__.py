"""Tokenizers: text <-> ids. No JAX in here."""

from jaxlm.tokenizers.base import END_OF_TEXT, InputError, Tokenizer, load_tokenizer
from jaxlm.tokenizers.bpe import BPETokenizer
from jaxlm.tokenizers.chars import CharTokenizer
from jaxlm.tokenizers.sentencepiece import SentencePieceTokenizer

TOKENIZER_KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (CharTokenizer, BPETokenizer, SentencePieceTokenizer)
}

__all__ = [
    "END_OF_TEXT",
    "TOKENIZER_KINDS",
    "BPETokenizer",
    "CharTokenizer",
    "InputError",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
]
