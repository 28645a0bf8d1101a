"""The BPE tokenizer learns and encodes what the textbook algorithm does, and splits text as it says."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.tokenizers import END_OF_TEXT, BPETokenizer, InputError, bpe_reference, load_tokenizer
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS, Pair

BUILTIN = Path(jaxlm.__file__).parent / "data" / "builtin"
CORPUS = [path.read_text(encoding="utf-8") for path in sorted(BUILTIN.glob("*.txt"))[:4]]
SPLITS = ["gpt2", "gpt4", "o200k", "none"]
ALPHABETS = ["a", "ab ", "aàé", "ab\n 12'", "s' S\t\r\n"]
# Texts over one small alphabet: pairs repeat, overlap and tie.
SIMILAR_TEXTS = st.sampled_from(ALPHABETS).flatmap(
    lambda alphabet: st.lists(st.text(alphabet=alphabet, max_size=40), min_size=2, max_size=5)
)


def chunks_of(texts: list[str], split: str, pattern: str | None = None) -> list[str]:
    return [chunk for text in texts for chunk in bpe_reference.split(text, pattern or SPLIT_PATTERNS[split])]


def encode_by_reference(text: str, tokenizer: BPETokenizer) -> list[int]:
    chunks = chunks_of([text], tokenizer.split, tokenizer.pattern)
    return [token_id for chunk in chunks for token_id in bpe_reference.encode(chunk, tokenizer.merges)]


# ---- training and encoding against the reference


@settings(max_examples=150)
@given(texts=SIMILAR_TEXTS, split=st.sampled_from(SPLITS))
def test_training_and_encoding_agree_with_the_reference(texts: list[str], split: str) -> None:
    *training, held_out = texts
    learned = bpe_reference.train(chunks_of(training, split), 10_000)
    for num_merges in {0, 1, 3, len(learned) // 2, len(learned)}:
        if num_merges <= len(learned):
            tokenizer = BPETokenizer.train(training, 256 + num_merges, split=split, special_tokens=())
            assert tokenizer.merges == learned[:num_merges]
            for text in (held_out, *training):
                assert tokenizer.encode(text).tolist() == encode_by_reference(text, tokenizer)


@settings(max_examples=150)
@given(texts=SIMILAR_TEXTS, split=st.sampled_from(SPLITS), more=st.integers(1, 50))
def test_a_vocabulary_above_the_text_is_refused_and_the_size_it_names_works(
    texts: list[str], split: str, more: int
) -> None:
    learned = bpe_reference.train(chunks_of(texts, split), 10_000)
    reachable = 256 + len(learned) + 1
    with pytest.raises(InputError, match=f"at most {reachable} ids, and {reachable + more} were"):
        BPETokenizer.train(texts, reachable + more, split=split)
    tokenizer = BPETokenizer.train(texts, reachable, split=split)
    assert tokenizer.vocab_size == reachable
    assert tokenizer.merges == learned


@pytest.mark.parametrize(("split", "num_texts", "num_merges"), [("gpt2", 3, 250), ("gpt4", 3, 250), ("none", 1, 150)])
def test_the_corpus_agrees_with_the_reference(split: str, num_texts: int, num_merges: int) -> None:
    texts = CORPUS[:num_texts]
    tokenizer = BPETokenizer.train(texts, 256 + num_merges + 1, split=split)
    assert tokenizer.merges == bpe_reference.train(chunks_of(texts, split), num_merges)
    for text in (CORPUS[0][:1000], CORPUS[3][:1000]):
        assert tokenizer.encode(text).tolist() == encode_by_reference(text, tokenizer)


@st.composite
def merge_tables(draw: st.DrawFn) -> list[Pair]:
    """Merges that no text need have taught: in any order that a table can have."""
    ids = [*b"ab\xc3\xa9"]
    merges: list[Pair] = []
    for _ in range(draw(st.integers(0, 12))):
        pair = (draw(st.sampled_from(ids)), draw(st.sampled_from(ids)))
        if pair not in merges:
            merges.append(pair)
            ids.append(255 + len(merges))
    return merges


@settings(max_examples=200)
@given(merges=merge_tables(), text=st.text(alphabet="abé", max_size=60))
def test_encoding_agrees_with_the_reference_for_any_merges(merges: list[Pair], text: str) -> None:
    tokenizer = BPETokenizer(merges, split="none")
    for same in (text, text):  # what was encoded once gives the same again
        assert tokenizer.encode(same).tolist() == encode_by_reference(text, tokenizer)


def test_what_is_returned_can_be_changed_without_harm() -> None:
    tokenizer = BPETokenizer([(97, 98)])
    ids = tokenizer.encode("ab")
    ids[:] = 0
    assert tokenizer.encode("ab").tolist() == [256]
    assert tokenizer.encode("ab ab ab").tolist() == [256, 32, 256, 32, 256]


def test_a_long_chunk_of_random_letters_comes_back() -> None:
    letters = "".join(random.Random(0).choices("abcdefgh", k=200_000))
    tokenizer = BPETokenizer.train([letters[:3000]], 330, split="none")
    ids = tokenizer.encode(letters)
    assert tokenizer.decode(ids) == letters
    assert tokenizer.byte_lengths(ids).sum() == len(letters)
    assert len(ids) < len(letters) / 1.5
    # A merge looks a few ids far only, so that what begins the text begins its ids.
    assert ids[:500].tolist() == bpe_reference.encode(letters[:2000], tokenizer.merges)[:500]


def test_the_texts_are_read_once_and_in_any_iterable() -> None:
    expected = BPETokenizer.train(CORPUS, 300).hash
    assert BPETokenizer.train((text for text in CORPUS), 300).hash == expected
    assert BPETokenizer.train(tuple(CORPUS[::-1]), 300).hash == expected  # counts know no order
    assert BPETokenizer.train(CORPUS * 2, 300).hash == expected


# ---- ids


def test_ids_are_the_bytes_then_merges_then_special_tokens() -> None:
    tokenizer = BPETokenizer.train(["abab abab"], 260, split="gpt2", special_tokens=("<a>", END_OF_TEXT))
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert tokenizer.merges == [(97, 98), (256, 256)]
    assert [tokenizer.token_bytes(i) for i in range(256, 260)] == [b"ab", b"abab", b"<a>", END_OF_TEXT.encode()]
    assert tokenizer.byte_lengths(range(97, 260)).tolist() == [1] * 159 + [2, 4, 0, 0]
    assert tokenizer.encode("ababab a").tolist() == [257, 256, 32, 97]
    assert tokenizer.vocab_size == 260


def test_invalid_utf8_shows_as_a_replacement() -> None:
    tokenizer = BPETokenizer([(0xC3, 0xA9)])
    assert tokenizer.decode([0xFF]) == "\ufffd"
    assert tokenizer.decode([0xC3, 97, 256]) == "\ufffdaé"
    assert tokenizer.decode([0xE2, 0x98, 0x83]) == "☃"
    assert tokenizer.decode_bytes([0xC3, 256]) == b"\xc3\xc3\xa9"


@pytest.mark.parametrize("special_tokens", [(), (END_OF_TEXT,), ("<a>", "<b>", "<c>"), {"<a>": 400, "<b>": 300}])
def test_a_vocabulary_below_bytes_and_special_tokens_is_refused(special_tokens: Any) -> None:
    smallest = 256 + len(special_tokens)
    for vocab_size in (smallest - 1, 0, -5):
        with pytest.raises(InputError, match=f"at least {smallest} ids .*and {vocab_size} were .*use a larger"):
            BPETokenizer.train(CORPUS, vocab_size, special_tokens=special_tokens)
    tokenizer = BPETokenizer.train(CORPUS, smallest, special_tokens=special_tokens)
    assert tokenizer.merges == []
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]


def test_a_special_token_on_the_id_of_a_merge_is_refused() -> None:
    with pytest.raises(InputError, match="'<a>' has the id 256"):
        BPETokenizer.train(CORPUS, 260, special_tokens={"<a>": 256})
    assert BPETokenizer.train(CORPUS, 260, special_tokens={"<a>": 259}).vocab_size == 260


def test_no_text_gives_the_bytes() -> None:
    for texts in ([], [""], ["a", "b"]):
        assert BPETokenizer.train(texts, 257).merges == []
        with pytest.raises(InputError, match="at most 257 ids"):
            BPETokenizer.train(texts, 258)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([(97, 256)], "Merge 0 .* don't both exist"),
        ([(97, 98), (257, 97)], "Merge 1 .* don't both exist"),
        ([(-1, 97)], "Merge 0 .* don't both exist"),
        ([(97, 98), (98, 97), (97, 98)], "Merge 2 .* as merge 0 does"),
    ],
)
def test_merges_that_cannot_be_are_refused(merges: list[Pair], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BPETokenizer(merges)


@pytest.mark.parametrize("merge", [(97, 98, 99), (97,), (97.0, 98.0), ("a", "b"), (97, None), 97, None])
def test_a_merge_that_is_no_pair_of_whole_numbers_is_refused(merge: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"Merge 1 is {merge!r}, not a pair of symbols")):
        BPETokenizer([(97, 98), merge])


@pytest.mark.parametrize("merges", [[[97, 98], [256, 99]], np.array([[97, 98], [256, 99]], np.int32)])
def test_merges_may_be_lists_or_rows(merges: Any) -> None:
    tokenizer = BPETokenizer(merges)
    assert tokenizer.merges == [(97, 98), (256, 99)]
    assert tokenizer.hash == BPETokenizer([(97, 98), (256, 99)]).hash
    assert tokenizer.encode("abcab").tolist() == [257, 256]


def test_a_tokenizer_says_what_it_is() -> None:
    assert repr(BPETokenizer([(97, 98)])) == "BPETokenizer(258 ids, split gpt4, 1 special token)"
    assert (
        repr(BPETokenizer([], split="none", special_tokens=())) == "BPETokenizer(256 ids, split none, 0 special tokens)"
    )
    assert repr(BPETokenizer([], pattern=r"\S|\s")) == r"BPETokenizer(257 ids, pattern '\\S|\\s', 1 special token)"


def test_a_copy_takes_along_nothing_that_can_be_made_again() -> None:
    tokenizer = BPETokenizer.train(CORPUS, 400)
    text = f"{CORPUS[0]}{END_OF_TEXT}"
    ids = tokenizer.encode(text, allowed_special="all")
    assert tokenizer.decode(ids) == text
    data = pickle.dumps(tokenizer)
    assert len(data) < 20_000
    for same in (pickle.loads(data), copy.copy(tokenizer), copy.deepcopy(tokenizer)):
        assert same.hash == tokenizer.hash
        assert same.encode(text, allowed_special="all").tolist() == ids.tolist()
        assert same.decode(ids) == text
        assert same._workspaces is not tokenizer._workspaces


# ---- watching it learn


@pytest.mark.parametrize("split", SPLITS)
def test_every_merge_is_reported_with_its_bytes_and_its_count(split: str) -> None:
    reported: list[tuple[int, bytes, int]] = []
    texts = [CORPUS[0][:1500], "aaaa aaaa"]
    tokenizer = BPETokenizer.train(texts, 320, split=split, on_merge=lambda *merge: reported.append(merge))
    expected = []
    words = [(list(chunk.encode()), count) for chunk, count in Counter(chunks_of(texts, split)).items()]
    for index, pair in enumerate(tokenizer.merges):
        count = bpe_reference.count_pairs(words)[pair]
        expected.append((index, tokenizer.token_bytes(256 + index), count))
        words = [(bpe_reference.merge(ids, pair, 256 + index), number) for ids, number in words]
    assert reported == expected
    assert len(reported) == 320 - 257


# ---- splits


@pytest.mark.parametrize(
    ("text", "gpt2", "gpt4"),
    [
        ("Hello I'll go", ["Hello", " I", "'ll", " go"], ["Hello", " I", "'ll", " go"]),
        ("we'd've", ["we", "'d", "'ve"], ["we", "'d", "'ve"]),
        ("I'LL", ["I", "'", "LL"], ["I", "'LL"]),
        ("I'LLA", ["I", "'", "LLA"], ["I", "'LL", "A"]),
        ("l'été", ["l", "'", "été"], ["l", "'été"]),
        ("qu'il", ["qu", "'", "il"], ["qu", "'il"]),
        ("l'sa", ["l", "'s", "a"], ["l", "'s", "a"]),
        ("1234567 is 12", ["1234567", " is", " 12"], ["123", "456", "7", " is", " ", "12"]),
        ("a1b", ["a", "1", "b"], ["a", "1", "b"]),
        ("a   b", ["a", "  ", " b"], ["a", "  ", " b"]),
        ("fin  ", ["fin", "  "], ["fin", "  "]),
        ("  fin", [" ", " fin"], [" ", " fin"]),
        ("fin \n", ["fin", " \n"], ["fin", " \n"]),
        ("a\nb", ["a", "\n", "b"], ["a", "\n", "b"]),
        ("a\n\n b", ["a", "\n\n", " b"], ["a", "\n\n", " b"]),
        ("a \n b", ["a", " \n", " b"], ["a", " \n", " b"]),
        ("a\r\nb", ["a", "\r", "\n", "b"], ["a", "\r\n", "b"]),
        ("Oui!\n\nNon", ["Oui", "!", "\n", "\n", "Non"], ["Oui", "!\n\n", "Non"]),
        ("(bonjour) ...", ["(", "bonjour", ")", " ..."], ["(bonjour", ")", " ..."]),
        ("\tx", ["\t", "x"], ["\tx"]),
        ("a\xa0b", ["a", "\xa0", "b"], ["a", "\xa0b"]),
        ("²½Ⅷ", ["²½Ⅷ"], ["²½Ⅷ"]),
        ("e\u0301a", ["e", "\u0301", "a"], ["e", "\u0301a"]),
        ("中文です👩", ["中文です", "👩"], ["中文です", "👩"]),
        ("", [], []),
    ],
)
def test_known_splits(text: str, gpt2: list[str], gpt4: list[str]) -> None:
    assert chunks_of([text], "gpt2") == gpt2
    assert chunks_of([text], "gpt4") == gpt4
    assert chunks_of([text], "none") == ([text] if text else [])


def test_a_split_keeps_merges_inside_its_chunks() -> None:
    texts = ["l'été 1234567 fin.\n\n" * 50]
    for split, vocab_size in (("gpt2", 269), ("gpt4", 269), ("none", 279)):
        tokenizer = BPETokenizer.train(texts, vocab_size, split=split)
        inside = {chunk.encode() for chunk in chunks_of(texts, split)}
        learned = [tokenizer.token_bytes(i) for i in range(256, vocab_size - 1)]
        assert all(any(token in chunk for chunk in inside) for token in learned)
        assert any(b"7 f" in token for token in learned) is (split == "none")


def test_an_unknown_split_is_refused() -> None:
    for make in (
        lambda: BPETokenizer([], split="gpt5"),
        lambda: BPETokenizer([], split="gpt5", pattern="."),
        lambda: BPETokenizer.train(CORPUS, 300, split="gpt5"),
    ):
        with pytest.raises(InputError, match="no split 'gpt5'; known are gpt2, gpt4, o200k, none"):
            make()


@pytest.mark.parametrize("pattern", [r"\w+|(?s:\W)", r"((\w)+)|(?s:(.))", r"\w*|(?s:\W)", r"(?s).{1,3}"])
def test_a_pattern_of_ones_own(pattern: str, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(CORPUS[:2], 330, pattern=pattern)
    chunks = chunks_of(CORPUS[:2], "gpt4", pattern)
    assert "".join(chunks) == "".join(CORPUS[:2])
    assert tokenizer.merges == bpe_reference.train(chunks, 330 - 257)
    assert tokenizer.encode(CORPUS[2]).tolist() == encode_by_reference(CORPUS[2], tokenizer)
    assert tokenizer.decode(tokenizer.encode(CORPUS[2])) == CORPUS[2]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(CORPUS[2]).tolist() == tokenizer.encode(CORPUS[2]).tolist()


def test_the_chunks_of_a_pattern_are_its_matches() -> None:
    assert chunks_of(["un, deux"], "gpt4", r"(\w+)|(\W)") == ["un", ",", " ", "deux"]
    assert chunks_of(["abcdefg"], "gpt4", r".{1,3}") == ["abc", "def", "g"]
    assert chunks_of([""], "gpt4", r"\w+") == []


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<n>a)(?P<n"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    for make in (lambda: BPETokenizer([], pattern=pattern), lambda: BPETokenizer.train(CORPUS, 300, pattern=pattern)):
        with pytest.raises(InputError, match="is no regular expression"):
            make()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (b"(?s:.)", r"as a str, not b'\(\?s:\.\)'"),
        (regex.compile("."), "as a str, not regex"),
        (5, "as a str, not 5"),
        ("\ud800|.", "lone surrogate"),
        ("(" * 9_000 + "a" + ")" * 9_000, "18,001 characters has too many groups inside each other"),
    ],
)
def test_a_pattern_of_another_kind_is_refused(pattern: Any, message: str) -> None:
    for make in (lambda: BPETokenizer([], pattern=pattern), lambda: BPETokenizer.train(CORPUS, 300, pattern=pattern)):
        with pytest.raises(InputError, match=message):
            make()


@pytest.mark.parametrize("pattern", [r"\w+", r".+", r"", r"(?<=a)(?s:.)", r"^(?s:.)"])
def test_a_pattern_that_loses_text_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="loses text"):
        BPETokenizer.train(["un\ndeux"], 257, pattern=pattern)
    with pytest.raises(InputError, match="loses text"):
        BPETokenizer([], pattern=pattern).encode("un\ndeux")
