"""The hand-written scanners cut text where `regex` and tiktoken cut it, by one table of characters."""

from __future__ import annotations

import itertools
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.tokenizers import BPETokenizer, InputError, bpe, bpe_reference
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS
from jaxlm.tokenizers.bpe_scan import (
    LETTER,
    LOWER,
    MARK,
    NEWLINE,
    NUMBER,
    OTHER,
    SPACE,
    UPPER,
    character_classes,
)
from jaxlm.tokenizers.bpe_split import Splitter

SPLITS = ["gpt2", "gpt4", "o200k"]
BYTES = {bytes([byte]): byte for byte in range(256)}
CODE_POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
CLASS_PATTERNS = {
    UPPER: r"[\p{Lu}\p{Lt}]", LOWER: r"\p{Ll}", LETTER: r"[\p{Lm}\p{Lo}]", MARK: r"\p{M}", NUMBER: r"\p{N}",
    SPACE: r"[^\S\r\n]", NEWLINE: r"[\r\n]", OTHER: r"[^\s\p{L}\p{M}\p{N}]",
}  # fmt: skip
# Everything that the patterns ask for by name, and each class of characters in one, two, three and four bytes.
ALPHABET = [
    *"'’sSſtTdDmMlLvVeErR aZé \t\r\n\x0b\x85\xa0\u2028\u3000",
    *"0٣²Ⅷ𝟘!/.…\x00\ufffd😀\u200d\U0010ffff",
    *"\u0301\u0903\u20dd\U0001d165",
    *"ÀǅǆʰªאЖж中𝒜ꟲ",
    *["ll", "LL", "ve", "re", "'s", "'LL", "  ", "\r\n", "\n\n", " \n", "123", "e\u0301", "👩\u200d🔬"],
]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=24).map("".join)


@cache
def members(pattern: str) -> frozenset[str]:
    """The characters that a pattern for one character matches in tiktoken."""
    encoding = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=BYTES, special_tokens={})
    everything = "".join(map(chr, CODE_POINTS))
    return frozenset(encoding.decode(encoding.encode_ordinary(everything)))


@cache
def classed_alike() -> npt.NDArray[np.bool_]:
    """For each code point, whether `regex` knows it as of the class that our table says."""
    classes = character_classes()
    alike = np.zeros(0x110000, bool)
    everything = "".join(map(chr, CODE_POINTS))
    for number, pattern in CLASS_PATTERNS.items():
        points = np.array([ord(character) for character in regex.findall(pattern, everything)])
        alike[points] = classes[points] == number
    return alike


def check_against_tiktoken(text: str, split: str, chunks: list[bytes]) -> None:
    """Tokens for all chunks and any two in a row: the ids are those of the chunks only if tiktoken cuts as we do."""
    ranks = dict(BYTES)
    for chunk in [*chunks, *(left + right for left, right in itertools.pairwise(chunks))]:
        ranks.setdefault(chunk, len(ranks))
    encoding = tiktoken.Encoding("chunks", pat_str=SPLIT_PATTERNS[split], mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary(text) == [ranks[chunk] for chunk in chunks]


# A character among others: doubled, alone, between letters, after a space, a newline and an apostrophe; and all that
# stands between two such characters.
SURROUNDED = "{0}{0} {0}'{0}a{0}b\n{0}\n\n"
BETWEEN = ["", " ", "'", "a", "b\n", "\n\n"]


def is_looked_at(point: int) -> bool:
    """Whether a character has a use, or is every seventh of the 950,000 that have none and are classed alike."""
    return unicodedata.category(chr(point)) not in ("Cn", "Co") or character_classes()[point] != OTHER or point % 7 == 0


@cache
def ranks_that_show_cuts() -> dict[bytes, int]:
    """Tokens for all that can stand from the last byte of a character to the first byte of the next, and their parts.

    tiktoken merges until no two neighbours make a token. So between two characters of more than one byte, which share
    no byte with what stands there, a token ends only where a chunk does; else tokens end only inside characters.
    """
    lasts = [bytes([byte]) for byte in range(0x80, 0xC0)]
    firsts = [bytes([byte]) for byte in range(0xC2, 0xF5)]
    tokens = set()
    for between in (text.encode() for text in BETWEEN):
        tokens |= {last + between + first for last in lasts for first in firsts}
        for place in range(len(between) + 1):
            tokens |= {last + between[:place] for last in lasts} | {between[place:] + first for first in firsts}
            tokens |= {between[start:place] for start in range(place - 1)}
    longer = sorted((token for token in tokens if len(token) > 1), key=lambda token: (len(token), token))
    return BYTES | {token: 256 + index for index, token in enumerate(longer)}


def ends_in_tiktoken(text: str, split: str) -> npt.NDArray[np.int64]:
    """Where tiktoken's chunks end, in bytes, for `SURROUNDED` characters of more than one byte."""
    ranks = ranks_that_show_cuts()
    encoding = tiktoken.Encoding("cuts", pat_str=SPLIT_PATTERNS[split], mergeable_ranks=ranks, special_tokens={})
    ends = np.cumsum(np.array([len(token) for token in ranks])[encoding.encode_to_numpy(text)])
    following = np.frombuffer(text.encode() + b"\0", np.uint8)[ends]
    return ends[following & 0xC0 != 0x80]


def test_the_table_of_characters_is_tiktokens() -> None:
    classes = character_classes()
    for number, pattern in CLASS_PATTERNS.items():
        ours = {chr(point) for point in CODE_POINTS if classes[point] == number}
        assert ours == members(pattern), pattern


def test_what_regex_classes_otherwise_is_new_to_it_but_for_one_letter() -> None:
    classes = character_classes()
    others = [point for point in CODE_POINTS if not classed_alike()[point]]
    spans = [
        (span[0][1], span[-1][1])
        for _, group in itertools.groupby(enumerate(others), lambda pair: pair[1] - pair[0])
        if (span := list(group))
    ]
    listed = ", ".join(f"{first:X}-{last:X}" for first, last in spans)
    assert all(classes[point] == OTHER for point in others if point != 0x295), listed
    assert classes[0x295] == LOWER  # a letter without case since Unicode 17
    assert len(others) < 20_000, listed


@pytest.mark.parametrize("split", SPLITS)
def test_characters_are_cut_as_tiktoken_cuts_them_and_regex_if_it_classes_them_alike(split: str) -> None:
    tokenizer = BPETokenizer([], split=split)
    pattern = regex.compile(SPLIT_PATTERNS[split])
    blocks = np.array_split(np.array([point for point in CODE_POINTS if point >= 0x80 and is_looked_at(point)]), 16)
    texts = ["".join(map(SURROUNDED.format, map(chr, block.tolist()))) for block in blocks]
    with ThreadPoolExecutor(1) as pool:  # beside the rest, since tiktoken doesn't hold the interpreter's lock
        in_tiktoken = pool.map(ends_in_tiktoken, texts, itertools.repeat(split))
        for block, text, expected in zip(blocks, texts, in_tiktoken, strict=True):
            chunks = tokenizer.chunks(text)
            assert b"".join(chunks) == text.encode()
            assert np.array_equal(np.cumsum([len(chunk) for chunk in chunks]), expected)
            alike = block[classed_alike()[block]]
            if len(alike) < len(block):
                text = "".join(map(SURROUNDED.format, map(chr, alike.tolist())))
                chunks = tokenizer.chunks(text)
            assert b"\xff".join(chunks) == "\udcff".join(pattern.findall(text)).encode(errors="surrogateescape")


@pytest.mark.parametrize("split", SPLITS)
def test_every_ascii_character_is_cut_as_regex_and_tiktoken_cut_it(split: str) -> None:
    tokenizer = BPETokenizer([], split=split)
    for around in ("", "'s", " ", "a", "A", "1", "\n", "/", "é"):
        text = "".join(around + SURROUNDED.format(chr(point)) for point in range(128))
        chunks = tokenizer.chunks(text)
        assert chunks == [chunk.encode() for chunk in bpe_reference.split(text, SPLIT_PATTERNS[split])]
        check_against_tiktoken(text, split, chunks)


@pytest.mark.parametrize("split", SPLITS)
def test_white_space_at_the_end_and_before_text_is_cut_as_regex_and_tiktoken_cut_it(split: str) -> None:
    """All runs of one and two kinds of white space, and those of three that differ in what ends a line."""
    tokenizer = BPETokenizer([], split=split)
    blanks = [chr(point) for point in CODE_POINTS if character_classes()[point] & (SPACE | NEWLINE)]
    assert len(blanks) == 25
    runs = ["".join(run) for length in (1, 2) for run in itertools.product(blanks, repeat=length)]
    runs += ["".join(run) for run in itertools.product(" \t\r\n\xa0", repeat=3)]
    ending = [tokenizer.chunks(start + run) for start in ("", "a", "!", "1") for run in runs]
    texts = [start + run for start in ("", "a", "!", "1") for run in runs]
    for text, chunks in zip(texts, ending, strict=True):
        assert chunks == [chunk.encode() for chunk in bpe_reference.split(text, SPLIT_PATTERNS[split])]
    ranks = dict(BYTES)
    for chunks in ending:
        for chunk in [*chunks, *(left + right for left, right in itertools.pairwise(chunks))]:
            ranks.setdefault(chunk, len(ranks))
    encoding = tiktoken.Encoding("ends", pat_str=SPLIT_PATTERNS[split], mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary_batch(texts) == [[ranks[chunk] for chunk in chunks] for chunks in ending]
    between = "".join(f"a{run}b!{run}1{run}." for run in runs)
    chunks = tokenizer.chunks(between)
    assert chunks == [chunk.encode() for chunk in bpe_reference.split(between, SPLIT_PATTERNS[split])]
    check_against_tiktoken(between, split, chunks)


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=700)
@given(text=TEXTS)
def test_adversarial_text_is_cut_as_regex_and_tiktoken_cut_it(split: str, text: str) -> None:
    chunks = BPETokenizer([], split=split).chunks(text)
    assert chunks == [chunk.encode() for chunk in bpe_reference.split(text, SPLIT_PATTERNS[split])]
    check_against_tiktoken(text, split, chunks)


@settings(max_examples=100)
@given(text=TEXTS)
def test_no_split_gives_one_chunk(text: str) -> None:
    assert BPETokenizer([], split="none").chunks(text) == ([text.encode()] if text else [])


# ---- texts in pieces


@pytest.mark.parametrize("split", [*SPLITS, "none"])
@settings(max_examples=200)
@given(texts=st.lists(TEXTS, max_size=8), size=st.integers(1, 20))
def test_a_text_is_cut_into_parts_only_between_its_chunks(split: str, texts: list[str], size: int) -> None:
    tokenizer = BPETokenizer([], split=split)
    parts = list(Splitter(split, None).cut(texts, size))
    whole = "".join(texts)
    assert "".join(parts) == whole
    assert [chunk for part in parts for chunk in tokenizer.chunks(part)] == tokenizer.chunks(whole)


def test_running_text_is_cut_into_parts_of_about_the_size_asked_for() -> None:
    text = "Il était une fois, dans l'île, une forêt. " * 5_000
    for split in SPLITS:
        parts = list(Splitter(split, None).cut([text], 10_000))
        assert len(parts) == 22  # each ends at the word before its 10,000 characters
        assert max(map(len, parts)) <= 10_000


SPECIAL = ("<|end|>", "<|end|>\n<|end|>", " fin ")


@settings(max_examples=200)
@given(
    parts=st.lists(st.one_of(TEXTS, st.sampled_from([*SPECIAL, "<|en", "d|>", "abc def"])), max_size=10),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    allowed=st.sampled_from(["all", "none"]),
)
def test_a_text_that_comes_in_pieces_has_the_same_ids(parts: list[str], cuts: list[int], allowed: str) -> None:
    tokenizer = BPETokenizer([(97, 98), (256, 99)], special_tokens=SPECIAL)
    text = "".join(parts)
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_BLOCK", 8)
        found = [i for ids in tokenizer.encode_iter(pieces, allowed_special=allowed) for i in ids]  # type: ignore[arg-type]
    expected = tokenizer.encode("".join(pieces), allowed_special=allowed)  # type: ignore[arg-type]
    assert found == expected.tolist()


@pytest.mark.parametrize("size", range(1, 12))
def test_a_special_token_in_pieces_is_refused_as_in_one(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_BLOCK", 8)
    tokenizer = BPETokenizer([(97, 98)], special_tokens=SPECIAL)
    text = "un deux trois <|end|> quatre cinq"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for allowed in ((), {" fin "}):
        with pytest.raises(InputError, match=r"special token '<\|end\|>'"):
            list(tokenizer.encode_iter(pieces, allowed_special=allowed))
    found = [i for ids in tokenizer.encode_iter(pieces, allowed_special={"<|end|>"}) for i in ids]
    assert found == tokenizer.encode(text, allowed_special={"<|end|>"}).tolist()
