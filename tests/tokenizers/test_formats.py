"""Vocabularies go to tiktoken and Hugging Face tokenizers and back with the same ids on every text, or are refused."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken._educational import bpe_train
from tiktoken.load import load_tiktoken_bpe

import jaxlm
from jaxlm.tokenizers import END_OF_TEXT, BPETokenizer, InputError, bpe_reference
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS, Pair

BUILTIN = Path(jaxlm.__file__).parent / "data" / "builtin"
CORPUS = [path.read_text(encoding="utf-8") for path in sorted(BUILTIN.glob("*.txt"))]
SPLITS = ["gpt2", "gpt4", "o200k", "none"]
FIRST_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FIRST_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Characters that all the engines class alike, and that the patterns tell apart.
HARD_TEXT = st.text(alphabet="aeltSLVEſ'’ \xa0\r\n\t\0" + "12²éÉǅʰ\u0301中ア👩🏽\u200d!/._", max_size=30)
BYTES = [bytes([byte]) for byte in range(256)]
RANKS_OF_BYTES = {byte: rank for rank, byte in enumerate(BYTES)}
# GPT-2's ids of single bytes: first those that are visible in Latin-1.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
GPT2_BYTES = [*VISIBLE, *(byte for byte in range(256) if byte not in VISIBLE)]
SPELLING = {
    byte: chr(byte if byte in VISIBLE else 0x100 + GPT2_BYTES.index(byte) - len(VISIBLE)) for byte in range(256)
}


def spell(token: bytes) -> str:
    return "".join(SPELLING[byte] for byte in token)


@cache
def trained(split: str) -> BPETokenizer:
    return BPETokenizer.train(CORPUS[:4], 600, split=split)


@cache
def in_tiktoken(split: str) -> tiktoken.Encoding:
    return trained(split).to_tiktoken_encoding()


@cache
def in_hugging_face(split: str) -> tokenizers.Tokenizer:
    return hugging_face(trained(split))


def hugging_face(tokenizer: BPETokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(as_json(tokenizer)))


def as_json(tokenizer: BPETokenizer) -> dict[str, Any]:
    return json.loads(written(tokenizer.to_huggingface))


def written(write: Callable[[str], None]) -> str:
    """What is written into a file; that alone is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "file"
        write(str(path))
        assert list(path.parent.iterdir()) == [path]
        return path.read_text(encoding="utf-8")


def from_json(data: Mapping[str, Any]) -> BPETokenizer:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
        return BPETokenizer.from_huggingface(Path(folder) / "tokenizer.json")


def with_ranks(tokens: list[bytes]) -> dict[bytes, int]:
    return RANKS_OF_BYTES | {token: 256 + index for index, token in enumerate(tokens)}


@cache
def encoding_of(tokens: tuple[bytes, ...]) -> tiktoken.Encoding:
    return encoding(with_ranks(list(tokens)))


def encoding(ranks: dict[bytes, int], pattern: str = SPLIT_PATTERNS["none"], **special: int) -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# ---- what we train goes out and comes back


@pytest.mark.parametrize("split", SPLITS)
def test_what_goes_out_comes_back(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(split)
    assert BPETokenizer.from_tiktoken(in_tiktoken(split)).hash == tokenizer.hash
    assert from_json(as_json(tokenizer)).hash == tokenizer.hash
    tokenizer.to_tiktoken(tmp_path / "ranks.tiktoken")
    loaded = BPETokenizer.from_tiktoken(
        tmp_path / "ranks.tiktoken", split=split, special_tokens=tokenizer.special_tokens
    )
    assert loaded.hash == tokenizer.hash
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken")) == in_tiktoken(split)._mergeable_ranks


@pytest.mark.parametrize("split", SPLITS)
def test_the_corpus_has_the_same_ids_everywhere(split: str) -> None:
    for text in [*CORPUS[:8], "".join(CORPUS[:3]), "", " " * 200, "a" * 300 + "\n" * 150]:
        ids = trained(split).encode(text).tolist()
        assert in_tiktoken(split).encode(text) == ids
        assert in_hugging_face(split).encode(text).ids == ids
        assert in_hugging_face(split).decode(ids) == text


@settings(max_examples=200)
@given(text=HARD_TEXT, split=st.sampled_from(SPLITS))
@example(text="1234567 12²34", split="gpt4")
def test_hard_texts_have_the_same_ids_everywhere(text: str, split: str) -> None:
    ids = trained(split).encode(text).tolist()
    assert in_tiktoken(split).encode(text) == ids
    assert in_hugging_face(split).encode(text).ids == ids
    chunks = [spell(chunk) for chunk in trained(split).chunks(text)]
    assert [chunk for chunk, _ in in_hugging_face(split).pre_tokenizer.pre_tokenize_str(text)] == chunks


# ---- splits


def test_the_first_pattern_of_gpt2_is_the_split_gpt2() -> None:
    for length in range(6):
        for characters in itertools.product("aé' \ns1!", repeat=length):
            text = "".join(characters)
            assert bpe_reference.split(text, FIRST_GPT2) == bpe_reference.split(text, SPLIT_PATTERNS["gpt2"])


@pytest.mark.parametrize("split", SPLITS)
def test_an_encoding_brings_its_split(split: str) -> None:
    tokenizer = BPETokenizer.from_tiktoken(encoding(with_ranks([b"ab"]), SPLIT_PATTERNS[split]))
    assert (tokenizer.split, tokenizer.pattern, tokenizer.special_tokens) == (split, None, {})


def test_an_encoding_brings_its_pattern() -> None:
    assert BPETokenizer.from_tiktoken(encoding(RANKS_OF_BYTES, FIRST_GPT2)).split == "gpt2"
    tokenizer = BPETokenizer.from_tiktoken(encoding(with_ranks([b"\n ", b"\n\n"]), FIRST_GPT4))
    assert tokenizer.pattern == FIRST_GPT4  # which cuts "\n " in two at the end of a text, as gpt4 doesn't
    assert tokenizer.encode("\n ").tolist() == [10, 32]
    assert tokenizer.to_tiktoken_encoding()._pat_str == FIRST_GPT4


def test_what_is_given_wins_over_what_an_encoding_brings() -> None:
    source = encoding(RANKS_OF_BYTES, FIRST_GPT4, **{"<a>": 300})
    assert BPETokenizer.from_tiktoken(source).special_tokens == {"<a>": 300}
    assert BPETokenizer.from_tiktoken(source, special_tokens=["<b>"]).special_tokens == {"<b>": 256}
    assert BPETokenizer.from_tiktoken(source, special_tokens=()).special_tokens == {}
    assert BPETokenizer.from_tiktoken(source, split="none").split == "none"
    assert BPETokenizer.from_tiktoken(source, split="none").pattern is None
    assert BPETokenizer.from_tiktoken(source, pattern=r"(?s:.)").pattern == r"(?s:.)"


def test_ranks_alone_have_the_split_gpt4_and_no_special_tokens() -> None:
    tokenizer = BPETokenizer.from_tiktoken({token: np.int64(rank) for token, rank in with_ranks([b"ab"]).items()})
    assert (tokenizer.split, tokenizer.pattern, tokenizer.special_tokens) == ("gpt4", None, {})
    assert tokenizer.vocab_size == 257


@pytest.mark.parametrize(
    "pattern",
    [
        FIRST_GPT4,
        r"\w+|[^\w\s]|\s+",
        r"[\p{L}$^]+|[^\p{L}$^]+",
        r"\p{N}{1,2}|[^\p{N}]++|\$",
        r"(?i)[]\[$]|[a-zé]+|\x20\u0031*|[^$]",
    ],
)
def test_a_pattern_of_ones_own_has_the_same_ids_everywhere(pattern: str) -> None:
    tokenizer = BPETokenizer.train(CORPUS[:2], 400, pattern=pattern)
    encoded, other = tokenizer.to_tiktoken_encoding(), hugging_face(tokenizer)
    for text in [*CORPUS[:3], "à 12345 $^$\n \n"]:
        ids = tokenizer.encode(text).tolist()
        assert encoded.encode(text) == ids
        assert other.encode(text).ids == ids
    assert from_json(as_json(tokenizer)).hash == tokenizer.hash


READ_OTHERWISE_BY_ALL = [
    (r"a$|\s|\S", "$"),
    (r"\h|\s|\S", r"\h"),
    (r"[\h]|\s|\S", r"[\h"),
    (r"\<a|\s|\S", r"\<"),
    (r"a\Z|\s|\S", r"\Z"),
    (r"\N|\s|\S", r"\N"),
    (r"[a&&b]|\s|\S", "[a&&"),
    (r"[+--]|\s|\S", "[+--"),
    (r"[a~~b]|\s|\S", "[a~~"),
    (r"[a[bc]]|\s|\S", "[a["),
    (r"[[:alpha:]]|\s|\S", "[["),
    (r"(?:fg){e<=1}|\s|\S", "{e"),
    (r"\p{Script=Greek}|\s|\S", r"\p{Script"),
    (r"\pL|\s|\S", r"\pL"),
    (r"(?r)\s|\S", "(?r"),
    (r"(?V1)\s|\S", "(?V1"),
    (r"(?#[)a$|\s|\S", "(?"),
    (r"[]$]$|\s|\S", "$"),
]


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        *READ_OTHERWISE_BY_ALL,
        (r"(?s:.)", "(?s"),
        (r"^a|\s|\S", "^"),
        (r"a(?i)b|\s|\S", "(?i"),
        (r"\p{N}{1,3}+|\P{N}", "{1,3}+"),
        (r"\p{N}{2}?|\s|\S", "{2}?"),
    ],
)
def test_a_pattern_that_hugging_face_reads_otherwise_is_refused(pattern: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Hugging Face tokenizers may read in another way") as error:
        BPETokenizer([], pattern=pattern).to_huggingface(tmp_path / "tokenizer.json")
    assert f" {part!r} " in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="may read in another way"):
        from_json(changed(pre_tokenizer=split_then_bytes(pattern)))


@pytest.mark.parametrize(("pattern", "part"), READ_OTHERWISE_BY_ALL)
def test_a_pattern_that_tiktoken_reads_otherwise_is_refused(pattern: str, part: str) -> None:
    with pytest.raises(InputError, match="tiktoken may read in another way") as error:
        BPETokenizer([], pattern=pattern).to_tiktoken_encoding()
    assert f" {part!r} " in str(error.value)
    with pytest.raises(InputError, match="may read in another way"):
        BPETokenizer.from_tiktoken(RANKS_OF_BYTES, pattern=pattern)
    with contextlib.suppress(ValueError):  # what tiktoken can't read either
        source = encoding(RANKS_OF_BYTES, pattern)
        with pytest.raises(InputError, match="may read in another way"):
            BPETokenizer.from_tiktoken(source)


def test_a_pattern_that_can_match_nothing_is_refused_where_tiktoken_loses_text() -> None:
    pattern = r"\w*|\W"
    assert bpe_reference.split("a b", pattern) == ["a", " ", "b"]
    assert encoding(RANKS_OF_BYTES, pattern).encode("a b") == [97, 98]
    for make in (
        lambda: BPETokenizer.from_tiktoken(encoding(RANKS_OF_BYTES, pattern)),
        lambda: BPETokenizer([], pattern=pattern).to_tiktoken_encoding(),
    ):
        with pytest.raises(InputError, match="can match nothing"):
            make()


def test_a_pattern_of_ones_own_does_not_keep_ranks_from_being_written(tmp_path: Path) -> None:
    BPETokenizer([(97, 98)], pattern=r"a$|\s|\S").to_tiktoken(tmp_path / "ranks")
    assert BPETokenizer.from_tiktoken(tmp_path / "ranks").merges == [(97, 98)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_published_pattern_that_is_given_is_its_split(split: str) -> None:
    pattern = SPLIT_PATTERNS[split]
    assert BPETokenizer.from_tiktoken(RANKS_OF_BYTES, pattern=pattern).split == split
    assert BPETokenizer([], pattern=pattern).to_tiktoken_encoding()._pat_str == pattern


def split_then_bytes(pattern: str, kind: str = "Regex", behavior: str = "Isolated", invert: bool = False) -> Any:
    cut = {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level(use_regex=False)]}


def byte_level(**options: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **options}


@pytest.mark.parametrize(
    ("pre_tokenizer", "split", "pattern"),
    [
        (byte_level(use_regex=True), "gpt2", None),
        (byte_level(), "gpt2", None),
        (byte_level(use_regex=False), "none", None),
        ({"type": "Sequence", "pretokenizers": [byte_level()]}, "gpt2", None),
        (split_then_bytes(FIRST_GPT2), "gpt2", None),
        (split_then_bytes(FIRST_GPT2, behavior="Removed", invert=True), "gpt2", None),
        (split_then_bytes(SPLIT_PATTERNS["o200k"]), "o200k", None),
        (split_then_bytes(FIRST_GPT4), "gpt4", FIRST_GPT4),
        (split_then_bytes(FIRST_GPT4, invert=True), "gpt4", FIRST_GPT4),
        (split_then_bytes(". ", "String"), "gpt4", r"\.\ |(?:(?!\.\ )[\s\S])+"),
    ],
)
def test_pre_tokenizers_become_splits(pre_tokenizer: Any, split: str, pattern: str | None) -> None:
    data = {**as_json(trained("none")), "pre_tokenizer": pre_tokenizer}
    tokenizer = from_json(data)
    assert (tokenizer.split, tokenizer.pattern) == (split, pattern)
    other = tokenizers.Tokenizer.from_str(json.dumps(data))
    for text in [*CORPUS[:4], "a. b.. c'S\n \n"]:
        assert tokenizer.encode(text).tolist() == other.encode(text).ids


# ---- what others train


def test_bytes_in_any_order() -> None:
    ranks = {bytes([byte]): rank for rank, byte in enumerate(GPT2_BYTES)}
    ranks |= {trained("gpt2").token_bytes(token_id): token_id for token_id in range(256, 599)}
    tokenizer = BPETokenizer.from_tiktoken(ranks, split="gpt2")
    assert tokenizer.whole == {}
    assert tokenizer.merges == trained("gpt2").merges
    source, other = encoding(ranks, SPLIT_PATTERNS["gpt2"]), hugging_face(tokenizer)
    for text in CORPUS[:4]:
        ids = tokenizer.encode(text).tolist()
        assert ids == source.encode(text) == other.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.to_tiktoken_encoding()._mergeable_ranks == ranks
    assert from_json(as_json(tokenizer)).hash == tokenizer.hash


@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
def test_a_vocabulary_from_the_trainer_of_tiktoken(split: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        ranks = bpe_train(CORPUS[0], 400, SPLIT_PATTERNS[split], visualise=None)
    tokenizer = BPETokenizer.from_tiktoken(ranks, split=split)
    assert tokenizer.whole == {}
    source = encoding(ranks, SPLIT_PATTERNS[split])
    for text in CORPUS[:4]:
        assert tokenizer.encode(text).tolist() == source.encode(text)


@pytest.mark.parametrize("first_special", [True, False])
def test_a_vocabulary_from_the_trainer_of_hugging_face(first_special: bool, tmp_path: Path) -> None:
    source = tokenizers.Tokenizer(tokenizers.models.BPE())
    source.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT] if first_special else [],
        show_progress=False,
    )
    source.train_from_iterator(CORPUS[:4], trainer)
    source.add_special_tokens(["<fin>"])
    source.add_tokens(["<mot>"])
    source.save(str(tmp_path / "tokenizer.json"))
    tokenizer = BPETokenizer.from_huggingface(tmp_path / "tokenizer.json")
    assert tokenizer.special_tokens == ({END_OF_TEXT: 0} if first_special else {}) | {"<fin>": 600, "<mot>": 601}
    assert tokenizer.vocab_size == source.get_vocab_size()
    for text in [*CORPUS[:4], "un<fin> deux<mot>\n"]:
        ids = tokenizer.encode(text, allowed_special="all").tolist()
        assert ids == source.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert from_json(as_json(tokenizer)).hash == tokenizer.hash
    assert BPETokenizer.from_tiktoken(tokenizer.to_tiktoken_encoding()).hash == tokenizer.hash


# ---- merges that have to be found


@st.composite
def rank_tables(draw: st.DrawFn) -> dict[bytes, int]:
    """Tokens in any order: made by no merge, or before their parts, or in several ways."""
    token = st.lists(st.sampled_from(draw(st.sampled_from([b"ab", b"abc"]))), min_size=2, max_size=5).map(bytes)
    return with_ranks(draw(st.lists(token, unique=True, max_size=8)))


def every_way(ranks: dict[bytes, int]) -> list[list[str]]:
    """Merges as they are listed in files that were made from ranks: each way to cut a token into two, by rank."""
    return [
        [spell(token[:place]), spell(token[place:])]
        for token in sorted(ranks, key=ranks.__getitem__)
        for place in range(1, len(token))
        if token[:place] in ranks and token[place:] in ranks
    ]


@settings(max_examples=150)
@given(
    ranks=rank_tables(), texts=st.lists(st.text(alphabet="abc", max_size=25), min_size=4, max_size=8), data=st.data()
)
def test_any_ranks_and_any_merges_have_the_same_ids_everywhere(
    ranks: dict[bytes, int], texts: list[str], data: st.DataObject
) -> None:
    source = encoding(ranks)
    texts += [token.decode() for token in ranks if len(token) > 1]
    tokenizer = unless_early(lambda: BPETokenizer.from_tiktoken(source))
    if tokenizer is None:
        return
    file = as_json(tokenizer)
    other = tokenizers.Tokenizer.from_str(json.dumps(file))
    for text in texts:
        assert tokenizer.encode(text).tolist() == source.encode(text) == other.encode(text).ids
    assert from_json(file).hash == tokenizer.hash

    file["model"]["merges"] = every_way(ranks)
    assert from_json(file).hash == tokenizer.hash
    file["model"] |= {
        "merges": data.draw(st.permutations(every_way(ranks))),
        "ignore_merges": data.draw(st.booleans()),
    }
    other = tokenizers.Tokenizer.from_str(json.dumps(file))
    tokenizer = unless_early(lambda: from_json(file))
    if tokenizer is not None:
        assert [tokenizer.encode(text).tolist() for text in texts] == [other.encode(text).ids for text in texts]


def unless_early(read: Callable[[], BPETokenizer]) -> BPETokenizer | None:
    """What is read, or None if it is refused for the only reason there may be."""
    with contextlib.suppress(InputError):
        return read()
    with pytest.raises(InputError, match="merged before its parts"):
        read()
    return None


@st.composite
def merge_tables(draw: st.DrawFn) -> list[Pair]:
    """Merges that no text need have taught; some are never made, and some make the same bytes."""
    ids = [*b"abc"]
    merges: list[Pair] = []
    for _ in range(draw(st.integers(0, 8))):
        pair = (draw(st.sampled_from(ids)), draw(st.sampled_from(ids)))
        if pair not in merges:
            merges.append(pair)
            ids.append(255 + len(merges))
    return merges


@settings(max_examples=120)
@given(merges=merge_tables(), texts=st.lists(st.text(alphabet="abc", max_size=25), min_size=4, max_size=8))
def test_any_vocabulary_of_ours_has_the_same_ids_or_is_refused(merges: list[Pair], texts: list[str]) -> None:
    tokenizer = BPETokenizer(merges, split="none")
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(256 + len(merges))]
    texts += [token.decode() for token in tokens[256:]]
    if len(set(tokens)) < len(tokens):
        for write in (tokenizer.to_tiktoken_encoding, lambda: as_json(tokenizer)):
            with pytest.raises(InputError, match="both stand for"):
                write()
        return
    file = as_json(tokenizer)
    other = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert from_json(file).hash == tokenizer.hash
    assert [other.encode(text).ids for text in texts] == [tokenizer.encode(text).tolist() for text in texts]
    try:
        source = tokenizer.to_tiktoken_encoding()
    except InputError:  # only where there is a text, namely a token, with other ids
        source = encoding({token: token_id for token_id, token in enumerate(tokens)})
        assert any(source.encode(text) != tokenizer.encode(text).tolist() for text in texts)
        return
    assert [source.encode(text) for text in texts] == [tokenizer.encode(text).tolist() for text in texts]


def test_a_token_that_no_merge_makes_is_a_whole_chunk_or_nothing() -> None:
    ranks = with_ranks([b"ab", b"abba", b"cde"])
    tokenizer = BPETokenizer.from_tiktoken(ranks, split="gpt4")
    assert tokenizer.merges == [(97, 98)]
    assert tokenizer.whole == {b"abba": 257, b"cde": 258}
    assert tokenizer.encode("abba\nabbab").tolist() == [257, 10, 256, 98, 256]
    file = as_json(tokenizer)
    assert file["model"]["ignore_merges"]
    assert from_json(file).hash == tokenizer.hash
    assert BPETokenizer.from_tiktoken(tokenizer.to_tiktoken_encoding()).hash == tokenizer.hash

    file["model"]["ignore_merges"] = False  # then they are never produced
    without = from_json(file)
    assert without.whole == {}
    other = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert without.encode("abba\ncde").tolist() == other.encode("abba\ncde").ids == [256, 98, 97, 10, 99, 100, 101]
    with pytest.raises(InputError, match=r"258 (stands for nothing|is outside)"):
        without.decode([258])


@pytest.mark.parametrize(
    ("tokens", "order"),
    [
        ([b"abc", b"ab"], [257, 256]),
        ([b"abcd", b"abc", b"ab"], [258, 257, 256]),
        ([b"dab", b"zz", b"abc", b"ab"], [257, 259, 256, 258]),
        ([b"abc", b"dabc", b"ab"], [258, 256, 257]),
    ],
)
def test_a_token_before_its_parts(tokens: list[bytes], order: list[int]) -> None:
    tokenizer = BPETokenizer.from_tiktoken(with_ranks(tokens), split="none")
    assert tokenizer.ids[256:] == order
    assert BPETokenizer.from_tiktoken(tokenizer.to_tiktoken_encoding()).ids == tokenizer.ids
    for length in range(6):
        for parts in itertools.product(["a", "b", "c", "d", "ab", "z"], repeat=length):
            text = "".join(parts)
            assert tokenizer.encode(text).tolist() == encoding_of(tuple(tokens)).encode(text)


@pytest.mark.parametrize(
    ("tokens", "text", "ids"),
    [
        ([b"aba", b"ab"], "abab", [256, 98]),  # "ab" twice
        ([b"cab", b"abc", b"ab"], "abcab", [257, 258]),  # "ab" and "cab"
        ([b"ababab", b"abab", b"ab"], "abababab", [256, 258]),  # "abab" twice
        ([b"wab", b"aby", b"wabab", b"ab"], "wababy", [256, 257]),  # "wabab" and "y"
    ],
)
def test_a_token_before_its_parts_is_refused_where_order_alone_gives_other_ids(
    tokens: list[bytes], text: str, ids: list[int]
) -> None:
    assert encoding(with_ranks(tokens)).encode(text) == ids
    with pytest.raises(InputError, match="is merged before its parts are"):
        BPETokenizer.from_tiktoken(with_ranks(tokens))


def test_long_tokens_of_one_character_take_no_time() -> None:
    ranks = with_ranks([b" " * length for length in range(2, 400)])
    tokenizer = BPETokenizer.from_tiktoken(ranks, split="none")
    source = encoding(ranks)
    for length in range(1200):
        assert tokenizer.encode(" " * length).tolist() == source.encode(" " * length)


# ---- special tokens


@pytest.mark.parametrize(
    "special_tokens",
    [
        ("<a>", "<a>b", "<\n>", "<début>"),
        {"<a>": 5000, "<a>b": 400, "<\n>": 300, "<début>": 299},
    ],
)
def test_special_tokens_keep_their_ids(special_tokens: Any) -> None:
    tokenizer = BPETokenizer([(97, 98), (256, 99)], split="gpt2", special_tokens=special_tokens)
    file = as_json(tokenizer)
    other = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert from_json(file).hash == tokenizer.hash
    source = tokenizer.to_tiktoken_encoding()
    back = BPETokenizer.from_tiktoken(source)
    assert back.hash == tokenizer.hash
    text = "<début>abc<\n><a>abc <a>bc\n<a>b<a><a"
    ids = tokenizer.encode(text, allowed_special="all").tolist()
    assert other.encode(text).ids == ids
    assert set(tokenizer.special_tokens.values()) <= set(ids)
    text = "<début>abc<\n>abc"
    assert source.encode(text, allowed_special="all") == tokenizer.encode(text, allowed_special="all").tolist()


def test_special_tokens_between_ids_of_merges() -> None:
    ids = [*range(100, 356), 1, 7]
    tokenizer = BPETokenizer([(97, 98), (256, 99)], ids=ids, special_tokens={"<a>": 0, "<b>": 3, "<c>": 6})
    other = hugging_face(tokenizer)
    for text in ("<a>abc<b>ab<c>", "abcab"):
        assert other.encode(text).ids == tokenizer.encode(text, allowed_special="all").tolist()
    assert from_json(as_json(tokenizer)).hash == tokenizer.hash


@pytest.mark.parametrize(
    ("name", "whole"), [("a", {}), ("é", {}), ("ab", {}), ("Ġz", {b"xyz": 400}), ("Ã©", {b"xyz": 400})]
)
def test_a_special_token_that_reads_as_an_ordinary_one_is_refused(
    name: str, whole: dict[bytes, int], tmp_path: Path
) -> None:
    tokenizer = BPETokenizer([(97, 98)], special_tokens=(name,), whole=whole)
    with pytest.raises(InputError, match="is spelt there as ordinary text"):
        tokenizer.to_huggingface(tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, r"byte b'\\x00' has no id"),
        ({token: rank for token, rank in RANKS_OF_BYTES.items() if token != b"A"}, "byte b'A' has no id"),
        (RANKS_OF_BYTES | {b"ab": 97}, "b'a' and b'ab' both have the rank 97"),
        (RANKS_OF_BYTES | {b"ab": -1}, "b'ab' has the rank -1"),
        (RANKS_OF_BYTES | {b"": 256}, "token of rank 256 is empty"),
        (RANKS_OF_BYTES | {"ab": 256}, "map bytes to integers, and these map 'ab'"),
        (RANKS_OF_BYTES | {b"ab": 256.0}, "map bytes to integers, and these map b'ab' to 256.0"),
        (RANKS_OF_BYTES | {b"ab": None}, "map bytes to integers"),
        ([(b"a", 1)], "not list"),
        (None, "not NoneType"),
    ],
)
def test_ranks_that_are_none_are_refused(ranks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BPETokenizer.from_tiktoken(ranks)


def test_a_special_token_with_the_rank_of_another_is_refused() -> None:
    with pytest.raises(InputError, match="'<a>' has the id 97"):
        BPETokenizer.from_tiktoken(RANKS_OF_BYTES, special_tokens={"<a>": 97})


RANK_LINES = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS_OF_BYTES.items()]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["YWI", *RANK_LINES], "Line 1 of .* isn't a token"),
        ([*RANK_LINES, "YWI= 256 257"], "Line 257 of .* isn't a token"),
        ([*RANK_LINES, "", "YW!= 256"], "Line 258 of .* isn't a token"),
        ([*RANK_LINES, "YWI= zwei"], "Line 257 of .* isn't a token"),
        ([*RANK_LINES, "YWI= 2.5"], "Line 257 of .* isn't a token"),
        ([*RANK_LINES, "YQ== 256"], "b'a' is there twice, with the ranks 97 and 256"),
        ([*RANK_LINES, "YWI= 97"], "both have the rank 97"),
        ([*RANK_LINES, "YWI= -256"], "has the rank -256"),
        (['{"a": 1}'], "Line 1 of .* isn't a token"),
        ([], "has no id"),
    ],
)
def test_a_file_that_holds_no_ranks_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        BPETokenizer.from_tiktoken(tmp_path / "ranks")


@pytest.mark.parametrize("read", [BPETokenizer.from_tiktoken, BPETokenizer.from_huggingface])
def test_a_file_that_is_missing_is_refused(read: Callable[[Any], BPETokenizer], tmp_path: Path) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none"), tmp_path):
        with pytest.raises(InputError, match="can't be read: "):
            read(path)


def changed(**changes: Any) -> dict[str, Any]:
    """A good tokenizer.json with changes, those of `model` inside it."""
    data = as_json(BPETokenizer([(97, 98), (256, 99)]))
    assert from_json(data).merges == [(97, 98), (256, 99)]
    data["model"] |= changes.pop("model", {})
    return data | changes


VOCABULARY = {spell(byte): rank for byte, rank in RANKS_OF_BYTES.items()} | {"ab": 256, "abc": 257}
ADDED = {"id": 300, "content": "<a>", "single_word": False, "lstrip": False, "rstrip": False, "special": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "model is WordPiece"),
        ({"model": {"dropout": 0.1}}, "dropout 0.1"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix '##'"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix '</w>'"),
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": None}, "isn't ByteLevel"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "isn't ByteLevel"),
        ({"pre_tokenizer": split_then_bytes("a")["pretokenizers"][0]}, "isn't ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "isn't ByteLevel"),
        ({"pre_tokenizer": byte_level() | {"add_prefix_space": True}}, "adds a space"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "adds a space"),
        ({"pre_tokenizer": split_then_bytes("a", behavior="Removed")}, "doesn't just cut"),
        ({"pre_tokenizer": split_then_bytes("a", behavior="MergedWithNext")}, "doesn't just cut"),
        ({"pre_tokenizer": split_then_bytes("(")}, "no regular expression"),
        ({"added_tokens": [ADDED | {"lstrip": True}]}, "'<a>' has lstrip"),
        ({"added_tokens": [ADDED | {"single_word": True}]}, "'<a>' has single_word"),
        ({"added_tokens": [ADDED | {"id": 97}]}, "'<a>' has the id 97"),
        ({"added_tokens": [ADDED, ADDED | {"content": "<b>"}]}, "id 300 is given twice"),
        ({"added_tokens": [ADDED | {"content": ""}]}, "empty"),
        ({"added_tokens": [ADDED | {"content": "ab"}]}, "'a' and 'b' needs 'ab'"),
        ({"model": {"merges": ["a b", "b c"]}}, "'b' and 'c' needs 'bc'"),
        ({"model": {"merges": [["a", "b"], ["ab", "cd"]]}}, "'ab' and 'cd' needs 'cd'"),
        ({"model": {"vocab": {name: i for name, i in VOCABULARY.items() if name != "Ġ"}}}, "byte b' ' has no id"),
        ({"model": {"vocab": VOCABULARY | {"ab": 97}}}, "one id of its own"),
        ({"model": {"vocab": VOCABULARY | {"ab": -1}}}, "one id of its own"),
        ({"model": {"merges": ["a b c"]}}, "is no tokenizer.json"),
        ({"model": {"merges": 5}}, "is no tokenizer.json"),
        ({"model": {"vocab": ["a"]}}, "is no tokenizer.json"),
        ({"added_tokens": ["<a>"]}, "is no tokenizer.json"),
        ({"pre_tokenizer": {"pretokenizers": []}}, "is no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_does_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json(changed(**change))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"{}", b'{"model": null}', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_holds_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="json of Hugging Face tokenizers, or it is damaged"):
        BPETokenizer.from_huggingface(tmp_path / "tokenizer.json")


def test_what_changes_no_ids_is_passed_over() -> None:
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    unused = {"dropout": 0.0, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "end_of_word_suffix": ""}
    data = changed(
        model={**unused, "vocab": VOCABULARY | {"<|endoftext|>": 258, "▁no bytes": 259, "never": 260}},
        normalizer={"type": "Sequence", "normalizers": []},
        post_processor=template,
        padding={"strategy": "BatchLongest"},
    )
    assert from_json(data).hash == BPETokenizer([(97, 98), (256, 99)], special_tokens={END_OF_TEXT: 258}).hash


def test_an_added_token_has_the_id_that_it_has_in_the_vocabulary() -> None:
    data = changed(model={"vocab": VOCABULARY | {"<a>": 300}}, added_tokens=[ADDED | {"id": 500, "normalized": False}])
    assert from_json(data).special_tokens == {"<a>": 300}
    assert tokenizers.Tokenizer.from_str(json.dumps(data)).encode("<a>").ids == [300]


def test_ids_that_do_not_rise_with_the_merges_are_no_ranks(tmp_path: Path) -> None:
    ids = [*range(256), 257, 256]
    for tokenizer in (
        BPETokenizer([(97, 98), (99, 100)], ids=ids),
        BPETokenizer([(98, 99), (97, 256)], whole={b"ab": 400}),  # a merge to tiktoken
        BPETokenizer([(97, 98), (98, 99), (97, 257)]),  # "abc" is made of "a" and "bc" here, and of "ab" and "c" there
    ):
        for write in (lambda: tokenizer.to_tiktoken(tmp_path / "ranks"), tokenizer.to_tiktoken_encoding):  # noqa: B023
            with pytest.raises(InputError, match="only one whose ids rise with its merges"):
                write()
    assert list(tmp_path.iterdir()) == []


def test_two_tokens_of_the_same_bytes_cannot_be_written(tmp_path: Path) -> None:
    tokenizer = BPETokenizer([(97, 98), (98, 99), (256, 99), (97, 257)])
    for write in (tokenizer.to_tiktoken, tokenizer.to_huggingface):
        with pytest.raises(InputError, match="258 and 259 both stand for b'abc'"):
            write(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_never_made_beside_whole_chunks_is_refused(tmp_path: Path) -> None:
    merges = [(97, 98), (98, 99), (97, 257)]  # "ab" always comes before "bc", so that "abc" never is "a" and "bc"
    assert hugging_face(BPETokenizer(merges)).encode("abc").ids == BPETokenizer(merges).encode("abc").tolist()
    with pytest.raises(InputError, match="would make the token b'abc', which is never made here"):
        BPETokenizer(merges, whole={b"xyz": 400}).to_huggingface(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for write in (trained("gpt4").to_tiktoken, trained("gpt4").to_huggingface):
        for path in (tmp_path, ".", "file/below"):
            with pytest.raises(InputError, match=r"can't be written: .*; choose another place\.$"):
                write(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_pattern_that_tiktoken_cannot_read_is_refused() -> None:
    tokenizer = BPETokenizer([], pattern=r"[\w-.]|\s|\S")
    with pytest.raises(InputError, match="tiktoken can't read the pattern"):
        tokenizer.to_tiktoken_encoding()


def test_an_encoding_without_tiktoken_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_tiktoken("gpt4")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InputError, match="pip install tiktoken"):
        trained("gpt4").to_tiktoken_encoding()
    assert BPETokenizer.from_tiktoken(source).hash == trained("gpt4").hash


def test_random_tokens_of_a_vocabulary_meet_every_merge() -> None:
    tokens = [trained("gpt4").token_bytes(token_id).decode(errors="ignore") for token_id in range(599)]
    for seed in range(200):
        text = "".join(random.Random(seed).choices(tokens, k=30))
        ids = trained("gpt4").encode(text).tolist()
        assert in_tiktoken("gpt4").encode(text) == in_hugging_face("gpt4").encode(text).ids == ids


def test_a_token_of_a_hundred_thousand_bytes_is_read_in_seconds() -> None:
    sizes = [2**power for power in range(1, 17)]
    started = time.perf_counter()
    tokenizer = BPETokenizer.from_tiktoken(with_ranks([b"a" * size for size in (*sizes, sum(sizes[:-1]) + 1, 100_000)]))
    assert time.perf_counter() - started < 20
    assert tokenizer.encode("a" * 65_536).tolist() == [256 + 15]
