"""Measures of tokenizers: closed forms on vocabularies made by hand, and a plain reference on texts of all kinds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

import jaxlm
from jaxlm.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, InputError, SentencePieceTokenizer, Tokenizer
from jaxlm.tokenizers import measures as module
from jaxlm.tokenizers.measures import (
    MEASURES,
    SUFFIXES,
    boundaries,
    longest_tokens,
    measure,
    overlap,
    vocabulary,
)

BUILTIN = Path(jaxlm.__file__).parent / "data" / "builtin"
CORPUS = [path.read_text(encoding="utf-8") for path in sorted(BUILTIN.glob("*.txt"))[:6]]
HEXADECIMAL = "0123456789abcdef"
BYTES = BPETokenizer([])

TRAINED: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: BYTES,
    "bytes-with-gaps": lambda: BPETokenizer([], ids=range(3, 515, 2), special_tokens={END_OF_TEXT: 0, "<gap>": 600}),
    "char": lambda: CharTokenizer.train(CORPUS, 45),
    "char-all": lambda: CharTokenizer.train(CORPUS),
    "bpe-gpt2": lambda: BPETokenizer.train(CORPUS, 700, split="gpt2"),
    "bpe-gpt4": lambda: BPETokenizer.train(CORPUS, 400, split="gpt4"),
    "bpe-none": lambda: BPETokenizer.train(CORPUS[:2], 500, split="none"),
    "sentencepiece-bpe": lambda: SentencePieceTokenizer.train(CORPUS, 450, model_type="bpe"),
    "sentencepiece-unigram": lambda: SentencePieceTokenizer.train(CORPUS, 450, model_type="unigram"),
    # A corpus of the characters that SentencePiece keeps for itself, so that its pieces hold them too.
    "sentencepiece-marks": lambda: SentencePieceTokenizer.train(
        ["\u2581\u2582.\u2582\u2582. a\u2581 b\u2582"] * 9, 270
    ),
}

FRAGMENTS = [
    *[
        "la ",
        "nation",
        "l'",
        "observations",
        "RAREMENT",
        "qualité",
        "qualite\u0301",
        "unités",
        "UNITÉS",
        "je chantaient",
    ],
    *["vainqueur", "heureuses", "comment", "visage", "paysagiste", "e\u0301", "été", "ſ", "İ", "ß", "ﬁ", "ноч", "日本"],
    *[" ", "  ", "\n", "\r\n", ".", ",", "'", "’", "7", "1900", "«", "-", "👩‍🔬", "🇫🇷", "\u0301", "\x00", "\U0010fffd"],
    *["\u2581", "\u2582", "\u2582.", ".\u2581", "a\u2581b", "\u2582a", END_OF_TEXT, "<unk>", "a", "é", "z"],
]
# Characters that Python's Unicode leaves open may be letters in a later version, as the `regex` library has it.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.one_of(st.text(CHARACTERS), st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join))


@pytest.fixture(scope="module", params=TRAINED)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TRAINED[request.param]()


# ---- the plain reference


def spans_of_tokens(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """Where in the bytes of a text each token's bytes are; for the parts of an escape, those that it stands for."""
    ids = tokenizer.encode(text, allowed_special="none")
    spans: list[tuple[int, int]] = []
    place = 0
    for length in tokenizer.byte_lengths(ids).tolist():
        spans.append((place, place + length))
        place += length
    order = range(len(spans))
    if isinstance(tokenizer, CharTokenizer):  # its bytes count on the closing escape
        for index in reversed(order):
            if spans[index][0] == spans[index][1]:
                spans[index] = spans[index + 1]
    else:  # SentencePiece takes what an escape has more from its end
        for index in order:
            if spans[index][0] == spans[index][1]:
                spans[index] = spans[index - 1]
    return spans


def suffix_of(word: str) -> str:
    plurals = [suffix + "s" for suffix in SUFFIXES if suffix != "aient"]
    fitting = [
        suffix
        for suffix in [*SUFFIXES, *plurals]
        if len(word) >= len(suffix) + 3 and word[-len(suffix) :].lower() == suffix
    ]
    return max(fitting, key=len, default="")


def slow_measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    counts: Counter[int] = Counter()
    num_bytes = num_words = num_touching = num_whole = num_single = num_suffix = 0
    before_suffix: list[bool] = []
    by_chance: list[float] = []
    for text in texts:
        ids = tokenizer.encode(text, allowed_special="none")
        counts.update(ids.tolist())
        num_bytes += len(text.encode())
        num_single += sum(length == 1 for length in tokenizer.byte_lengths(ids))
        spans = spans_of_tokens(tokenizer, text)
        ends = {end for _, end in spans}

        words = [
            (match.group(), len(text[: match.start()].encode()), len(text[: match.end()].encode()))
            for match in regex.finditer(r"[\p{L}\p{M}]+", text)
        ]
        for word, start, end in words:
            touching = [span for span in spans if span[0] < end and span[1] > start]
            others = [other for other in words if other != (word, start, end)]
            shared = any(a < other_end and b > other_start for a, b in touching for _, other_start, other_end in others)
            whole = len(touching) == 1 and not shared
            num_words += 1
            num_touching += len(touching)
            num_whole += whole
            suffix = suffix_of(word)
            num_suffix += suffix != ""
            if suffix and not whole:
                places = [start + len(word[:index].encode()) for index in range(1, len(word))]
                before_suffix.append(end - len(suffix.encode()) in ends)
                by_chance.append(sum(place in ends for place in places) / len(places))

    def mean(total: float, number: int) -> float:
        return total / number if number else math.nan

    specials = set(tokenizer.special_tokens.values())
    size = 0
    for token_id in set(range(tokenizer.vocab_size)) - specials:
        try:
            tokenizer.token_bytes(token_id)
            size += 1
        except InputError:
            pass
    tokens = counts.total()
    entropy = sum(count / tokens * math.log2(tokens / count) for count in counts.values())
    power = sum((count / tokens) ** 2.5 for count in counts.values())
    return {
        "bytes_per_token": num_bytes / tokens,
        "fertility": mean(num_touching, num_words),
        "words_kept_whole": mean(num_whole, num_words),
        "suffix_boundaries": mean(sum(before_suffix), len(before_suffix)),
        "suffix_boundaries_by_chance": mean(sum(by_chance), len(by_chance)),
        "suffix_words_kept_whole": mean(num_suffix - len(before_suffix), num_suffix),
        "vocabulary_used": len(counts) / size,
        "single_byte_tokens": num_single / tokens,
        "entropy": entropy,
        "renyi_efficiency": math.log2(power) / -1.5 / math.log2(size),
        "unigram_bits_per_byte": entropy / (num_bytes / tokens),
    }


@given(texts=st.lists(TEXTS, min_size=1, max_size=4).filter(any))
@example(texts=["\u2581ab \u2582ab \u2582.ab a\u2581", "b", "\u2581", "\u2582b"])
@example(texts=["", "e", "\u0301e", "", "ab\U0010fffd", "\U0010fffd\U0010fffdab"])
@example(texts=FRAGMENTS)
@example(texts=["".join(FRAGMENTS)])
@example(texts=[" ".join(FRAGMENTS)])
@example(texts=[CORPUS[0][:3000]])
def test_all_values_are_those_of_the_plain_reference(tokenizer: Tokenizer, texts: list[str]) -> None:
    found = measure(tokenizer, texts)
    assert list(found) == [each.key for each in MEASURES]
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(slow_measure(tokenizer, texts), rel=1e-9, abs=1e-12, nan_ok=True)


def test_a_real_text_has_something_to_measure_everywhere(tokenizer: Tokenizer) -> None:
    values = measure(tokenizer, CORPUS)
    assert not any(map(math.isnan, values.values()))
    assert 0 < values["words_kept_whole"] < 1
    assert 0 < values["suffix_boundaries"] <= 1 and 0 < values["suffix_boundaries_by_chance"] <= 1


def test_byte_pairs_learn_suffixes() -> None:
    values = measure(BPETokenizer.train(CORPUS, 2000), CORPUS)
    assert 0 < values["suffix_boundaries_by_chance"] < values["suffix_boundaries"] < 1
    assert 0 < values["suffix_words_kept_whole"] < 1


# ---- closed forms


def bpe(*tokens: str, split: str = "gpt4") -> BPETokenizer:
    """A vocabulary of the bytes, and of tokens of ASCII letters, each made from the left."""
    symbols = {chr(byte): byte for byte in range(256)}
    merges = []
    for token in tokens:
        for end in range(2, len(token) + 1):
            if token[:end] not in symbols:
                merges.append((symbols[token[: end - 1]], symbols[token[end - 1]]))
                symbols[token[:end]] = 255 + len(merges)
    return BPETokenizer(merges, split=split)


def test_a_text_that_can_be_counted_by_hand() -> None:
    tokenizer = bpe("la", "tion")  # la| |s|t|a|tion, with the tokens la, ti, tio, tion
    assert measure(tokenizer, ["la station"]) == pytest.approx(
        {
            "bytes_per_token": 10 / 6,
            "fertility": (1 + 4) / 2,
            "words_kept_whole": 1 / 2,
            "suffix_boundaries": 1.0,
            "suffix_boundaries_by_chance": 3 / 6,
            "suffix_words_kept_whole": 0.0,
            "vocabulary_used": 6 / 260,
            "single_byte_tokens": 4 / 6,
            "entropy": math.log2(6),
            "renyi_efficiency": math.log2(6) / math.log2(260),
            "unigram_bits_per_byte": 6 * math.log2(6) / 10,
        },
        rel=1e-12,
    )


def test_a_token_across_the_suffix_is_no_boundary() -> None:
    values = measure(bpe("ati"), ["station"])  # s|t|ati|o|n
    assert values["suffix_boundaries"] == 0
    assert values["suffix_boundaries_by_chance"] == pytest.approx(4 / 6)


def test_a_suffix_in_a_word_kept_whole_is_counted_apart() -> None:
    values = measure(bpe(" station", "station"), ["station, station rarement"])
    assert values["words_kept_whole"] == values["suffix_words_kept_whole"] == pytest.approx(2 / 3)
    assert values["suffix_boundaries"] == values["suffix_boundaries_by_chance"] == 1


@pytest.mark.parametrize(
    ("word", "counts"),
    [
        *[("nation", False), ("station", True), ("image", False), ("visage", True), ("ité", False), ("qualité", True)],
        *[
            ("STATIONS", True),
            ("Vérités", True),
            ("unités", False),
            ("stationner", False),
            ("comment7", True),
            ("qualite\u0301", False),
        ],
        *[
            ("chantaients", False),
            ("chantaient", True),
            ("l'action", False),
            ("actrice", False),
            ("sta\u0301tion", True),
        ],
    ],
)
def test_which_words_have_a_suffix(word: str, counts: bool) -> None:
    assert math.isnan(measure(BYTES, [word])["suffix_words_kept_whole"]) != counts


def test_the_longest_suffix_that_fits_counts() -> None:
    assert {"ation", "tion", "ité", "aient"} <= set(SUFFIXES)
    assert measure(bpe("form", "ation"), ["formation"])["suffix_boundaries"] == 1
    assert measure(bpe("forma", "tion"), ["formation"])["suffix_boundaries"] == 0
    assert measure(bpe("sta", "tions"), ["stations"])["suffix_boundaries"] == 1  # -ations would leave two characters
    assert measure(bpe("st", "ations"), ["stations"])["suffix_boundaries"] == 0
    assert measure(bpe("chan", "aient"), ["chantaient"])["suffix_boundaries"] == 1


@pytest.mark.parametrize(
    ("tokenizer", "text", "fertility", "kept"),
    [
        (bpe(" la", ",la", split="gpt2"), " la", 1, 1),  # with the space before
        (bpe("la,", split="none"), "la,la,", 1, 1),  # with the comma behind
        (bpe("a b", split="none"), "a b", 1, 0),  # one token for two words keeps neither
        (bpe("a b", split="none"), "a bc", 1.5, 0),
        (bpe("b c", split="none"), "ab c d", (2 + 1 + 1) / 3, 1 / 3),
        (BYTES, "e\u0301te\u0301", 7, 0),  # a combining mark belongs to its word
        (BYTES, "a1b 22", 1, 1),  # digits part words, and are none
    ],
)
def test_what_is_kept_whole(tokenizer: Tokenizer, text: str, fertility: float, kept: float) -> None:
    values = measure(tokenizer, [text])
    assert values["fertility"] == pytest.approx(fertility)
    assert values["words_kept_whole"] == pytest.approx(kept)


def test_all_of_an_escape_touches_the_word_of_its_character_and_no_other() -> None:
    tokenizer = CharTokenizer(HEXADECIMAL + "xy")
    inside = measure(tokenizer, ["xéy"])  # x, escape, e, 9, escape, y
    assert inside["fertility"] == 6 and inside["words_kept_whole"] == 0
    assert inside["bytes_per_token"] == 4 / 6 and inside["single_byte_tokens"] == 2 / 6
    assert measure(tokenizer, ["é"])["words_kept_whole"] == 0
    beside = measure(tokenizer, ["x☃y"])
    assert beside["fertility"] == 1 and beside["words_kept_whole"] == 1
    assert boundaries(tokenizer, "xéy").tolist() == [1, 1, 1, 1, 3, 4]


@given(texts=st.lists(TEXTS, min_size=1, max_size=3).filter(any))
def test_of_bytes_alone_all_is_known(texts: list[str]) -> None:
    values = measure(BYTES, texts)
    words = [word for text in texts for word in regex.findall(r"[\p{L}\p{M}]+", text)]
    assert values["bytes_per_token"] == values["single_byte_tokens"] == 1
    assert values["entropy"] == pytest.approx(values["unigram_bits_per_byte"], rel=1e-12)
    assert values["vocabulary_used"] == len(set("".join(texts).encode())) / 256
    if words:
        assert values["fertility"] == pytest.approx(np.mean([len(word.encode()) for word in words]))


def test_a_uniform_use_of_the_vocabulary_has_efficiency_one() -> None:
    tokenizer = CharTokenizer(HEXADECIMAL)
    # U+0001 is escape, 1, escape: with it, each of the 17 ids occurs twice.
    values = measure(tokenizer, [HEXADECIMAL, HEXADECIMAL.replace("1", "\x01")])
    assert values["vocabulary_used"] == 1
    assert values["entropy"] == pytest.approx(math.log2(17))
    assert values["renyi_efficiency"] == pytest.approx(1)


@given(texts=st.lists(TEXTS, min_size=1, max_size=3).filter(any))
def test_renyi_efficiency_is_at_most_that_of_shannon(tokenizer: Tokenizer, texts: list[str]) -> None:
    values = measure(tokenizer, texts)
    size = tokenizer.vocab_size - len(tokenizer.special_tokens)
    if isinstance(tokenizer, BPETokenizer):
        size = len(tokenizer.ids)
    shannon = values["entropy"] / math.log2(size)
    ids = np.concatenate([tokenizer.encode(text, allowed_special="none") for text in texts])
    uniform = len(set(np.unique(ids, return_counts=True)[1].tolist())) == 1
    assert 0 <= values["renyi_efficiency"] <= shannon + 1e-12
    assert (values["renyi_efficiency"] == pytest.approx(shannon, rel=1e-9)) == uniform


# ---- texts


def test_texts_are_measured_one_by_one() -> None:
    tokenizer = bpe("ab")
    assert measure(tokenizer, ["a", "b"])["bytes_per_token"] == 1
    assert measure(tokenizer, ["ab"])["bytes_per_token"] == 2
    apart = measure(BYTES, ["sta", "tion", "", "e", "\u0301"])
    assert apart["fertility"] == (3 + 4 + 1 + 2) / 4
    assert math.isnan(apart["suffix_boundaries"])


def test_many_texts_are_measured_as_one_block_or_many(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [part for text in CORPUS[:2] for part in text[:8000].split("\n")]
    at_once = measure(tokenizer, texts)
    monkeypatch.setattr(module, "_BLOCK", 500)
    assert measure(tokenizer, iter(texts)) == pytest.approx(at_once, rel=1e-12)
    assert measure(tokenizer, reversed(texts)) == pytest.approx(at_once, rel=1e-12)


def test_special_tokens_in_a_text_are_plain_text() -> None:
    assert measure(BYTES, [END_OF_TEXT])["bytes_per_token"] == 1
    assert boundaries(BYTES, END_OF_TEXT).tolist() == list(range(1, len(END_OF_TEXT) + 1))


def test_what_texts_do_not_show_is_nan() -> None:
    values = measure(BYTES, ["1, 2"])
    assert {key for key, value in values.items() if math.isnan(value)} == {
        *["fertility", "words_kept_whole", "suffix_boundaries"],
        *["suffix_boundaries_by_chance", "suffix_words_kept_whole"],
    }
    values = measure(bpe("station"), ["station"])
    assert values["suffix_words_kept_whole"] == 1
    assert math.isnan(values["suffix_boundaries"]) and math.isnan(values["suffix_boundaries_by_chance"])
    assert str(values["entropy"]) == str(values["renyi_efficiency"]) == "0.0"  # no negative zero


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "no text to measure"),
        (["", ""], "no text to measure"),
        ("bonjour", "put a single text into a list"),
        ([b"bonjour"], "decode bytes first"),
        (["a", 7], "encodes str, not int"),
        (["a", "\ud800"], "lone surrogate"),
    ],
)
def test_what_can_not_be_measured_is_refused(tokenizer: Tokenizer, texts: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        measure(tokenizer, texts)
    assert "\n" not in str(caught.value)


@given(text=TEXTS)
def test_boundaries_are_where_the_tokens_end(tokenizer: Tokenizer, text: str) -> None:
    found = boundaries(tokenizer, text)
    assert found.dtype == np.int64
    assert len(found) == len(tokenizer.encode(text, allowed_special="none"))
    assert (np.diff(found) >= 0).all()
    assert not len(found) or found[-1] == len(text.encode())
    if isinstance(tokenizer, BPETokenizer):
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(text, allowed_special="none")]
        assert found.tolist() == [len(b"".join(pieces[: i + 1])) for i in range(len(pieces))]


# ---- vocabularies


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of ordinary tokens, by what is known of each kind; of characters without the escape."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.ids
    if isinstance(tokenizer, CharTokenizer):
        return list(range(len(tokenizer.characters)))
    return [0, *range(2, tokenizer.vocab_size)]


def test_the_vocabulary_is_without_special_tokens_and_escapes(tokenizer: Tokenizer) -> None:
    tokens = vocabulary(tokenizer)
    assert tokens == {tokenizer.token_bytes(token_id) for token_id in ordinary_ids(tokenizer)}
    assert b"" not in tokens and END_OF_TEXT.encode() not in tokens and b"<gap>" not in tokens


def test_longest_tokens_come_in_order(tokenizer: Tokenizer) -> None:
    found = longest_tokens(tokenizer, 40)
    assert longest_tokens(tokenizer) == found[:12]
    lowest_id = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(ordinary_ids(tokenizer))}
    assert found == sorted(lowest_id, key=lambda token: (-len(token), lowest_id[token]))[:40]


def test_longest_tokens_of_a_vocabulary_made_by_hand() -> None:
    assert longest_tokens(bpe("zut", "abc", "tion"), 4) == [b"tion", b"zut", b"abc", b"tio"]
    assert longest_tokens(BYTES, 2) == [b"\x00", b"\x01"]
    assert longest_tokens(BYTES, 0) == []


def test_overlap_is_the_share_of_the_row_in_the_column() -> None:
    assert overlap({}) == []
    small, large = bpe("la"), bpe("la", "tion")
    found = overlap({"small": small, "large": large, "characters": CharTokenizer(HEXADECIMAL + "é")})
    assert found == [[1, 1, 16 / 257], [257 / 260, 1, 16 / 260], [16 / 17, 16 / 17, 1]]


def test_overlap_with_itself_is_all(tokenizer: Tokenizer) -> None:
    assert overlap({"one": tokenizer, "other": tokenizer}) == [[1, 1], [1, 1]]


# ---- what a report shows


def test_measures_explain_themselves() -> None:
    assert len({each.key for each in MEASURES}) == len({each.label for each in MEASURES}) == len(MEASURES)
    values = measure(BYTES, CORPUS[:1])
    for each in MEASURES:
        assert each.definition.endswith(".") and "\n" not in each.definition and each.source
        assert regex.fullmatch(r"[\d.,]+%?", format(values[each.key], each.format))
        assert each.format.endswith("%") <= (each.unit == "")
    definition = next(each.definition for each in MEASURES if each.key == "suffix_boundaries")
    assert all(f"-{suffix}" in definition for suffix in SUFFIXES)
