"""SentencePiece loses nothing here, escapes its own mark, and says in one sentence what it cannot do."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlm
from jaxlm.tokenizers import END_OF_TEXT, InputError, SentencePieceTokenizer

BUILTIN = Path(jaxlm.__file__).parent / "data" / "builtin"
CORPUS = [path.read_text(encoding="utf-8") for path in sorted(BUILTIN.glob("*.txt"))[:6]]
MODEL_TYPES: list[Any] = ["bpe", "unigram"]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def tokenizer(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(CORPUS, 420, model_type=request.param)


def refusal(texts: list[str], vocab_size: int, model_type: Any) -> str:
    with pytest.raises(InputError) as caught:
        SentencePieceTokenizer.train(texts, vocab_size, model_type=model_type)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- ids


def test_ids_are_unknown_then_end_of_text_then_the_bytes_then_pieces(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == 420
    assert tokenizer.end_of_text_id == 1
    assert [tokenizer.token_bytes(2 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    pieces = [tokenizer.token_bytes(i) for i in range(258, 420)]
    assert len(set(pieces)) == len(pieces)
    assert all(piece.decode() in "\n".join(CORPUS) + "\n" for piece in pieces)
    assert any(b" " in piece and len(piece) > 1 for piece in pieces)


def test_learned_pieces_are_used(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode(CORPUS[0])
    assert len(ids) < 0.75 * len(CORPUS[0])
    assert (ids >= 258).mean() > 0.9


@given(text=st.text())
def test_unknown_and_end_of_text_are_never_produced(tokenizer: SentencePieceTokenizer, text: str) -> None:
    for plain in (text, f"{text}<unk>{END_OF_TEXT}</s>{text}"):
        ids = tokenizer.encode(plain, allowed_special="none")
        assert ids.size == 0 or ids.min() >= 2
        assert tokenizer.decode(ids) == plain


def test_a_space_is_only_where_a_space_was(tokenizer: SentencePieceTokenizer) -> None:
    for text in ("un", " un", "un ", "  un  deux  ", "\tun", "un\n", "\nun", "ﬁ Å ①"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- the escape


@given(text=st.text(alphabet="\u2581\u2582. a", max_size=30), other=st.text(alphabet="\u2581\u2582. a", max_size=30))
def test_the_mark_and_its_escape_come_back_in_any_company(
    tokenizer: SentencePieceTokenizer, text: str, other: str
) -> None:
    ids, others = tokenizer.encode(text).tolist(), tokenizer.encode(other).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids + others) == text + other
    assert tokenizer.byte_lengths(ids + others).sum() == len((text + other).encode())


def test_the_bytes_of_an_escape_sequence_by_hand(tokenizer: SentencePieceTokenizer) -> None:
    """Neither mark is in the vocabulary here: U+2582 is the three bytes E2 96 82."""
    escape = [2 + byte for byte in "\u2582".encode()]
    dot = tokenizer.encode(".").tolist()
    assert tokenizer.encode("\u2581").tolist() == escape + dot
    assert tokenizer.byte_lengths(escape + dot).tolist() == [1, 1, 1, 0]
    assert tokenizer.encode("\u2582").tolist() == escape + escape
    assert tokenizer.byte_lengths(escape + escape).tolist() == [1, 1, 1, 0, 0, 0]
    assert tokenizer.decode(escape) == "\u2582"  # half a sequence stands for itself
    assert tokenizer.byte_lengths(escape).tolist() == [1, 1, 1]
    assert tokenizer.decode(escape + escape + dot) == "\u2582."
    assert tokenizer.byte_lengths(escape + escape + dot).tolist() == [1, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pieces_that_were_learned_with_the_marks(model_type: Any) -> None:
    text = "a\u2581b \u2582. \u2582\u2582\n"
    learned = SentencePieceTokenizer.train([text * 20], 267, model_type=model_type)
    ids = learned.encode(text)
    assert any("\u2582".encode() in learned.token_bytes(i) for i in ids), "the marks are in no piece: nothing is tested"
    assert learned.decode(ids) == text
    lengths = learned.byte_lengths(ids)
    assert (lengths >= 0).all()
    assert lengths.sum() == len(text.encode())


# ---- training


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_is_deterministic(model_type: Any) -> None:
    first, second, another = (
        SentencePieceTokenizer.train(iter(texts), 400, model_type=model_type) for texts in (CORPUS, CORPUS, CORPUS[1:])
    )
    assert first.hash == second.hash
    assert first.hash != another.hash
    assert first.encode(CORPUS[0]).tolist() == second.encode(CORPUS[0]).tolist()


def test_the_model_types_differ() -> None:
    assert (
        SentencePieceTokenizer.train(CORPUS, 400).hash
        == SentencePieceTokenizer.train(CORPUS, 400, model_type="bpe").hash
    )
    assert (
        SentencePieceTokenizer.train(CORPUS, 400).hash
        != SentencePieceTokenizer.train(CORPUS, 400, model_type="unigram").hash
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("letters", ["abc ", "àé☃👩 "])
def test_a_line_of_any_length_is_learned_from(letters: str, model_type: Any) -> None:
    """SentencePiece skips long lines without a word; here it gets them in parts."""
    learned = SentencePieceTokenizer.train([letters * 5000], 258 + len(letters), model_type=model_type)
    assert (learned.encode(letters) >= 258).all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_line_of_the_longest_characters_is_learned_from_its_start(model_type: Any) -> None:
    """The limit is in bytes: a part that is too long for it would be skipped, and U+1F469 is in the first part only."""
    learned = SentencePieceTokenizer.train(["👩" * 700 + "🔥" * 697], 260, model_type=model_type)
    assert (learned.encode("👩🔥") >= 258).all()


def test_runs_of_spaces_are_learned() -> None:
    learned = SentencePieceTokenizer.train(["a        b        c\n" * 50], 266)
    assert len(learned.encode(" " * 8)) < 8


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_line_ends_are_learned_as_any_character_is(model_type: Any) -> None:
    learned = SentencePieceTokenizer.train(["un\ndeux\n\ntrois\n" * 50], 269, model_type=model_type)
    assert (learned.encode("un\ndeux") >= 258).all()
    assert learned.decode(learned.encode("\n\n\n")) == "\n\n\n"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("texts", [CORPUS, ["aaaa"], ["un deux un deux\ntrois"], ["\u2581\u2582 é👩"]])
def test_the_smallest_vocabulary_is_named_and_works(texts: list[str], model_type: Any) -> None:
    for vocab_size in (258, 100, 2, 1, 0, -5):
        message = refusal(texts, vocab_size, model_type)
        found = re.search(r"at least (\d+) ids .*and (-?\d+) were asked for", message)
        assert found, message
        smallest = int(found.group(1))
        assert int(found.group(2)) == vocab_size
        refusal(texts, smallest - 1, model_type)
    learned = SentencePieceTokenizer.train(texts, smallest, model_type=model_type)
    assert learned.vocab_size == smallest
    assert learned.decode(learned.encode(texts[0])) == texts[0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("texts", [CORPUS[:2], ["aaaa"], ["un deux un deux\ntrois"], ["\u2581\u2582 é👩"]])
def test_the_largest_vocabulary_is_named_and_works(texts: list[str], model_type: Any) -> None:
    message = refusal(texts, 10**6, model_type)
    found = re.search(r"at most (\d+) ids, and 1000000 were asked for", message)
    assert found, message
    largest = int(found.group(1))
    refusal(texts, largest + 1, model_type)
    learned = SentencePieceTokenizer.train(texts, largest, model_type=model_type)
    assert learned.vocab_size == largest
    assert learned.decode(learned.encode(texts[0])) == texts[0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("texts", [[], [""], ["", "\n"]])
def test_no_text_is_refused(texts: list[str], model_type: Any) -> None:
    for vocab_size in (0, 300):
        assert "found no text" in refusal(texts, vocab_size, model_type)


def test_an_unknown_model_type_is_refused() -> None:
    assert "no SentencePiece model type 'word'; known are bpe, unigram" in refusal(CORPUS, 400, "word")


def test_a_damaged_model_is_refused() -> None:
    for model in (b"", b"nothing", b"\xff" * 100):
        with pytest.raises(InputError, match="can't be read"):
            SentencePieceTokenizer(model)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_space_comes_back_from_a_model_that_has_learned_none(model_type: Any) -> None:
    learned = SentencePieceTokenizer.train(["un\ndeux\n\ntrois\n" * 50], 269, model_type=model_type)
    for text in (" ", "un deux", "  \u2581 \u2582. \u2582\u2582 "):
        ids = learned.encode(text)
        assert learned.decode(ids) == text
        assert learned.byte_lengths(ids).sum() == len(text.encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", b""), "other pieces"),
        ((b"<|endoftext|>", b"<|endoftexT|>"), "other pieces"),
        ((b"identity\x12\x00\x18\x00", b"identity\x12\x00\x18\x01"), "loses text"),  # a space in front
        ((b"\x18\x00 \x00", b"\x18\x00 \x01"), "loses text"),  # no spaces beside spaces,
    ],
)
def test_a_model_with_other_pieces_or_settings_is_refused(change: tuple[bytes, bytes], message: str) -> None:
    model = base64.b64decode(SentencePieceTokenizer.train(["un deux trois\n"] * 20, 272)._content()["model"])
    assert change[0] in model
    with pytest.raises(InputError, match=message):
        SentencePieceTokenizer(model.replace(*change))
