"""The character tokenizer does what its definition says, letter for letter, against a slow encoder and decoder."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.tokenizers import END_OF_TEXT, CharTokenizer, InputError, chars

DIGITS = "0123456789abcdef"
NOTEPAD = CharTokenizer("zyé\n E👩" + DIGITS)  # a vocabulary in which any notation of the tests can be written
ALPHABETS = st.sampled_from(["abz", "09af zé", "zyxwvutsr", "☃é👩\n0", "a", "\x00\u2581\U0010ffff"])
RANDOM = st.one_of(st.text(), ALPHABETS.flatmap(lambda alphabet: st.text(alphabet=alphabet)))


def characters_by_definition(texts: list[str], vocab_size: int) -> str:
    """The hexadecimal digits and the most frequent others, all by frequency, ties to the lower code point."""
    counts = Counter("".join(texts))
    others = sorted(set(counts) - set(DIGITS), key=lambda c: (-counts[c], ord(c)))
    return "".join(sorted([*DIGITS, *others[: vocab_size - 18]], key=lambda c: (-counts[c], ord(c))))


def encode_slowly(characters: str, text: str) -> list[tuple[int, int]]:
    """Each id with the source bytes that it counts for."""
    escape = len(characters)
    found: list[tuple[int, int]] = []
    for character in text:
        size = len(character.encode())
        if character in characters:
            found.append((characters.index(character), size))
        else:
            digits = [(characters.index(digit), 0) for digit in format(ord(character), "x")]
            found += [(escape, 0), *digits, (escape, size)]
    return found


def decode_slowly(characters: str, ids: list[int]) -> str:
    """By a regular expression over private marks for the escape and end-of-text."""
    written = "".join([*characters, "\udc00", "\udc01"][token_id] for token_id in ids)
    return re.sub("\udc00([0-9a-f]*)(\udc00?)", meaning, written).replace("\udc01", END_OF_TEXT)


def meaning(sequence: re.Match[str]) -> str:
    digits, closing = sequence.groups()
    well_formed = closing and re.fullmatch("0|[1-9a-f][0-9a-f]{0,5}", digits)
    if not well_formed or int(digits, 16) > 0x10FFFF or 0xD800 <= int(digits, 16) <= 0xDFFF:
        return "\ufffd"
    return chr(int(digits, 16))


def ids_of(notation: str) -> list[int]:
    """Ids of the notepad's vocabulary, "|" for the escape and "$" for end-of-text."""
    marks = {"|": NOTEPAD.escape_id, "$": NOTEPAD.vocab_size - 1}
    return [marks[c] if c in marks else NOTEPAD.characters.index(c) for c in notation]


# ---- the vocabulary


@given(texts=st.lists(RANDOM, max_size=4), data=st.data())
def test_the_vocabulary_is_the_one_of_the_definition(texts: list[str], data: st.DataObject) -> None:
    reachable = len(set(DIGITS + "".join(texts))) + 2
    vocab_size = data.draw(st.integers(18, reachable))
    tokenizer = CharTokenizer.train(texts, vocab_size)
    assert tokenizer.characters == characters_by_definition(texts, vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.escape_id == vocab_size - 2
    assert tokenizer.end_of_text_id == vocab_size - 1
    assert CharTokenizer.train(iter(texts)).characters == characters_by_definition(texts, reachable)


def test_characters_are_counted_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chars, "_BLOCK", 4)
    texts = ["zzz", "", "éé€", "z😀", "ééé"]
    assert CharTokenizer.train(texts).characters == characters_by_definition(texts, 22)


def test_the_order_by_hand() -> None:
    assert CharTokenizer.train(["zzz", "yyx"], 20).characters == "zy0123456789abcdef"
    assert CharTokenizer.train(["fffzz0"], 19).characters == "fz0123456789abcde"
    assert CharTokenizer.train(["yz", "fzy"], 20).characters == "yzf0123456789abcde"  # a tie of y and z
    assert CharTokenizer.train(["zy"], 19).characters == "y0123456789abcdef"
    assert CharTokenizer.train(["feza"], 18).characters == "aef0123456789bcd"


def test_rare_digits_take_the_places_of_the_least_frequent_others() -> None:
    text = "".join(letter * count for count, letter in enumerate("utsrqponmlkjihg", start=2))  # g is the most frequent
    tokenizer = CharTokenizer.train([text + "a"], 21)
    assert tokenizer.characters == "ghia" + "0123456789bcdef"


def test_what_an_id_stands_for() -> None:
    assert [NOTEPAD.token_bytes(i) for i in (0, 2, 3, 6, 7)] == [b"z", "é".encode(), b"\n", "👩".encode(), b"0"]
    assert NOTEPAD.token_bytes(NOTEPAD.escape_id) == b""
    assert NOTEPAD.token_bytes(NOTEPAD.escape_id + 1) == END_OF_TEXT.encode()


def test_a_vocabulary_below_the_digits_is_refused() -> None:
    for vocab_size in (17, 2, 0, -1):
        with pytest.raises(InputError, match=f"at least 18 ids, and {vocab_size} were"):
            CharTokenizer.train(["un chêne"], vocab_size)
    tokenizer = CharTokenizer.train(["un chêne"], 18)
    assert sorted(tokenizer.characters) == list(DIGITS)
    assert tokenizer.decode(tokenizer.encode("un chêne")) == "un chêne"


@given(texts=st.lists(RANDOM, max_size=3), more=st.integers(1, 1000))
def test_a_vocabulary_above_the_text_is_refused_and_the_size_it_names_works(texts: list[str], more: int) -> None:
    reachable = len(set(DIGITS + "".join(texts))) + 2
    with pytest.raises(InputError, match=f"at most {reachable} ids, and {reachable + more} were"):
        CharTokenizer.train(texts, reachable + more)
    assert CharTokenizer.train(texts, reachable).hash == CharTokenizer.train(texts).hash


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        (DIGITS + "zz", "each given once"),
        ([*DIGITS, "zy"], "single characters"),
        ([*DIGITS, ""], "single characters"),
        ("012345689abcde", "7f are missing"),
        (DIGITS + "\ud800", r"lone surrogate U\+D800"),
        (DIGITS + "\udc00", r"lone surrogate U\+DC00"),
    ],
)
def test_characters_that_cannot_be_are_refused(characters: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CharTokenizer(characters)


# ---- encoding


@settings(max_examples=200)
@given(text=RANDOM, known=st.text(max_size=20))
def test_encoding_agrees_with_the_slow_one(text: str, known: str) -> None:
    tokenizer = CharTokenizer("".join(dict.fromkeys(known + text[::2] + DIGITS)))
    expected = encode_slowly(tokenizer.characters, text)
    ids = tokenizer.encode(text, allowed_special="none")
    assert ids.tolist() == [token_id for token_id, _ in expected]
    assert tokenizer.byte_lengths(ids).tolist() == [size for _, size in expected]


def test_encoding_by_hand() -> None:
    assert NOTEPAD.encode("zé☃0").tolist() == ids_of("zé|2603|0")
    assert NOTEPAD.encode("\x00\U0010ffffA").tolist() == ids_of("|0||10ffff||41|")
    assert NOTEPAD.byte_lengths(ids_of("zé|2603|0👩$")).tolist() == [1, 2, 0, 0, 0, 0, 0, 3, 1, 4, 0]


def test_bytes_of_characters_where_utf8_grows() -> None:
    edges = "\x00\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff"
    for tokenizer in (CharTokenizer(DIGITS + edges), NOTEPAD):
        lengths = tokenizer.byte_lengths(tokenizer.encode(edges))
        assert lengths[lengths > 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("unknown", ["☃", "\U0001f525", "\x00"])
def test_long_texts_agree_with_the_slow_encoder(unknown: str) -> None:
    """An unknown character at every place around powers of two, where a text may be cut into blocks."""
    for length in (1 << 12, 1 << 14, 1 << 15, 1 << 16):
        text = "zé" * (length // 2 - 2) + unknown * 7 + "👩y" + unknown
        expected = encode_slowly(NOTEPAD.characters, text)
        ids = NOTEPAD.encode(text)
        assert ids.tolist() == [token_id for token_id, _ in expected]
        assert NOTEPAD.byte_lengths(ids).tolist() == [size for _, size in expected]
        assert NOTEPAD.decode(ids) == text


# ---- decoding


@settings(max_examples=200)
@given(ids=st.lists(st.one_of(st.just("|"), st.sampled_from("|$0d8f1az👩")), max_size=25).map("".join).map(ids_of))
def test_decoding_any_ids_agrees_with_the_slow_one(ids: list[int]) -> None:
    expected = decode_slowly(NOTEPAD.characters, ids)
    assert NOTEPAD.decode(ids) == expected
    assert NOTEPAD.byte_lengths(ids).sum() == len(expected.replace(END_OF_TEXT, "").encode())


@settings(max_examples=150)
@given(digits=st.text(alphabet=DIGITS, max_size=8))
def test_decoding_any_digits_agrees_with_the_slow_one(digits: str) -> None:
    ids = ids_of(f"z|{digits}|y")
    assert NOTEPAD.decode(ids) == decode_slowly(NOTEPAD.characters, ids)


@pytest.mark.parametrize(
    ("notation", "text"),
    [
        ("|e9|", "é"),
        ("|0|", "\x00"),
        ("|d7ff|", "\ud7ff"),
        ("|e000|", "\ue000"),
        ("|10ffff|", "\U0010ffff"),
        ("|61|61|62|", "a61b"),  # a character that is known may be escaped too
        ("|", "\ufffd"),
        ("||", "\ufffd"),
        ("|||", "\ufffd\ufffd"),
        ("||||", "\ufffd\ufffd"),
        ("|e9", "\ufffd"),
        ("z|e9z", "z\ufffdz"),
        ("|e9$", "\ufffd" + END_OF_TEXT),
        ("|$|", "\ufffd" + END_OF_TEXT + "\ufffd"),
        ("|E9|", "\ufffdE9\ufffd"),
        ("|e9 |", "\ufffd \ufffd"),
        ("|00|", "\ufffd"),
        ("|0e9|", "\ufffd"),
        ("|000e9|", "\ufffd"),
        ("|d800|", "\ufffd"),
        ("|dfff|", "\ufffd"),
        ("|110000|", "\ufffd"),
        ("|ffffff|", "\ufffd"),
        ("|1000000|", "\ufffd"),
        ("|" + "1" * 5000 + "|", "\ufffd"),
        ("|0e9|z|e9|", "\ufffdzé"),
    ],
)
def test_a_malformed_escape_sequence_shows_as_a_replacement(notation: str, text: str) -> None:
    ids = ids_of(notation)
    assert NOTEPAD.decode(ids) == text
    assert NOTEPAD.decode_bytes(np.array(ids)) == text.encode()
    lengths = NOTEPAD.byte_lengths(ids)
    assert lengths.sum() == len(text.replace(END_OF_TEXT, "").encode())
