"""What every tokenizer promises: text comes back, bytes add up, bad input is refused, files come back as they were."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.tokenizers import (
    END_OF_TEXT,
    TOKENIZER_KINDS,
    BPETokenizer,
    CharTokenizer,
    InputError,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from jaxlm.tokenizers.base import content_hash

PACKAGE = Path(jaxlm.__file__).parent
CORPUS = [path.read_text(encoding="utf-8") for path in sorted((PACKAGE / "data" / "builtin").glob("*.txt"))[:8]]

TRAINED: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: CharTokenizer.train(CORPUS, 60),
    "bpe-gpt2": lambda: BPETokenizer.train(CORPUS, 400, split="gpt2"),
    "bpe-gpt4": lambda: BPETokenizer.train(CORPUS, 400, split="gpt4"),
    "bpe-none": lambda: BPETokenizer.train(CORPUS[:2], 320, split="none"),
    "bpe-pattern": lambda: BPETokenizer.train(CORPUS, 400, pattern=r"\w+|(?s:\W)"),
    "sentencepiece-bpe": lambda: SentencePieceTokenizer.train(CORPUS, 450, model_type="bpe"),
    "sentencepiece-unigram": lambda: SentencePieceTokenizer.train(CORPUS, 450, model_type="unigram"),
    # A corpus of the characters that SentencePiece keeps for itself, so that its pieces hold them too.
    "sentencepiece-marks": lambda: SentencePieceTokenizer.train(
        ["\u2581\u2582.\u2582\u2582. a\u2581 b\u2582"] * 9, 270
    ),
}

FRAGMENTS = [
    *"\x00\x01\x1b\x1c\x7f\x85\xa0.,'aàZ7",
    *"\u2581\u2582\u2585\u2047\ufffd\ufeff\u200d\ufe0f\u2028\u0301\uffff",
    *"\U00010000\U0010ffff𝒜ﬁİ",
    *["\r\n", "\r", "\n", "\n\n", "\t", " ", "  ", "       ", "e\u0301", "👩‍🔬", "🇫🇷", "1234", "'s", "\u2582."],
    *["<0x41>", "<unk>", "<s>", "</s>", "<|", "|>", END_OF_TEXT],
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
EXAMPLES = [
    "",
    " ",
    "\n",
    "<0x41>",
    END_OF_TEXT,
    "\u2581\u2582.\u2582\u2582",
    "\u2582",
    "\u2582.",
    "\u2581",
    "\x00",
    CORPUS[-1],
]


@pytest.fixture(scope="module", params=list(TRAINED))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TRAINED[request.param]()


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allowed_special="none")
    data = text.encode()
    assert isinstance(ids, np.ndarray)
    assert (ids.dtype, ids.ndim) == (np.int32, 1)
    assert set(ids.tolist()) <= set(ordinary_ids(tokenizer))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == data
    lengths = tokenizer.byte_lengths(ids)
    assert (lengths.dtype, lengths.shape) == (np.int32, ids.shape)
    assert (lengths >= 0).all()
    assert lengths.sum() == len(data)


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]


# ---- lossless


@settings(max_examples=150)
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


def test_chosen_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in EXAMPLES:
        check_round_trip(tokenizer, text)


@pytest.mark.parametrize("character", ["a", " ", "0", "é", "\u2582"])
def test_a_long_run_of_one_character_comes_back(tokenizer: Tokenizer, character: str) -> None:
    check_round_trip(tokenizer, character * (100_000 // len(character.encode())))


def test_the_alphabet_of_unicode_comes_back(tokenizer: Tokenizer) -> None:
    """Every code point outside the surrogates, each beside another one."""
    points = [*range(0, 0xD800, 7), *range(0xE000, 0x10000, 7), *range(0x10000, 0x110000, 257)]
    check_round_trip(tokenizer, "".join(map(chr, points)))


@given(numbers=st.lists(st.integers(0, 2**16), max_size=60))
def test_any_ids_decode_and_their_bytes_add_up(tokenizer: Tokenizer, numbers: list[int]) -> None:
    # Half of the ids are those that escapes and incomplete characters are made of; few others would ever hit one.
    special = tokenizer.encode("\u2581\u2582.\u2582\u2582☃é0d8." + END_OF_TEXT, allowed_special="all").tolist()
    every = range(tokenizer.vocab_size)
    ids = [special[n // 2 % len(special)] if n % 2 else every[n // 2 % len(every)] for n in numbers]
    data = tokenizer.decode_bytes(ids)
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    assert "".join(tokenizer.decode_iter(iter(ids))) == tokenizer.decode(ids)
    lengths = tokenizer.byte_lengths(ids)
    names = {token_id: len(name.encode()) for name, token_id in tokenizer.special_tokens.items()}
    assert all(length == 0 for token_id, length in zip(ids, lengths, strict=True) if token_id in names)
    assert lengths.sum() + sum(names.get(token_id, 0) for token_id in ids) == len(data)


def test_a_long_stream_of_ids_is_not_decoded_from_its_beginning_for_each(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Un très long texte, ☃ compris. " * 20
    decoded, decode = [0], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    assert "".join(tokenizer.decode_iter(tokenizer.encode(text))) == text
    assert max(decoded) < 20


@given(text=TEXTS)
def test_token_bytes_put_together_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    """For text without the characters that are written as an escape sequence."""
    if isinstance(tokenizer, CharTokenizer):
        text = "".join(character for character in text if character in tokenizer.characters)
    text = text.replace("\u2581", "").replace("\u2582", "")
    ids = tokenizer.encode(text, allowed_special="none")
    tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
    assert b"".join(tokens) == text.encode()
    assert tokenizer.byte_lengths(ids).tolist() == [len(token) for token in tokens]


def test_ids_come_in_any_sequence(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("un chêne ☃").tolist()
    for same in (ids, tuple(ids), np.array(ids, np.int64), np.array(ids, np.uint16), iter(ids)):
        assert tokenizer.decode(same) == "un chêne ☃"
    for empty in ([], (), np.zeros(0, np.int32), iter(())):
        assert tokenizer.decode(empty) == ""
        assert tokenizer.decode_bytes([]) == b""
        assert tokenizer.byte_lengths([]).dtype == np.int32


# ---- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800c", r"lone surrogate U\+D800 at character 2"),
        ("\udfff", r"lone surrogate U\+DFFF at character 0"),
        ("👩\ude00", r"lone surrogate U\+DE00 at character 1"),
        (b"ab", "encodes str, not bytes"),
        (None, "encodes str, not NoneType"),
        (["a"], "encodes str, not list"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, text: Any, message: str) -> None:
    for allowed in ((), "all", "none"):
        with pytest.raises(InputError, match=message):
            tokenizer.encode(text, allowed_special=allowed)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "iterable of texts is needed, not NoneType"),
        (5, "iterable of texts is needed, not int"),
        ("bonjour", "iterable of texts"),
        (b"bonjour", "iterable of texts"),
        ([b"bonjour"], "encodes str, not bytes"),
        (["bonjour", b"bonjour"], "encodes str, not bytes"),
        (["bonjour", "a\ud812"], r"lone surrogate U\+D812 at character 1"),
    ],
)
@pytest.mark.parametrize("cls", [CharTokenizer, BPETokenizer, SentencePieceTokenizer])
def test_training_refuses_what_is_no_text(cls: Any, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        cls.train(texts, 300)
    assert not str(caught.value).startswith("SentencePiece could not"), "the reason is hidden in another message"


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("cls", [CharTokenizer, BPETokenizer, SentencePieceTokenizer])
def test_an_error_of_the_texts_comes_through_as_it_is(cls: Any, error: BaseException) -> None:
    def texts() -> Iterable[str]:
        yield "bonjour"
        raise error

    with pytest.raises(type(error)) as caught:
        cls.train(texts(), 300)
    assert caught.value is error


@pytest.mark.parametrize("ids", [[-1], [0, 10**6], [2**40], [2**70], [1.0], np.array([1.5]), [True], ["a"], [[1, 2]]])
def test_ids_that_are_none_are_refused(tokenizer: Tokenizer, ids: Any) -> None:
    for method in (tokenizer.decode, tokenizer.decode_bytes, tokenizer.byte_lengths):
        with pytest.raises(InputError):
            method(ids)
    with pytest.raises(InputError):
        tokenizer.token_bytes(ids[-1])


@pytest.mark.parametrize("ids", [5, None, 1.5, np.int32(5)])
def test_what_holds_no_ids_is_refused(tokenizer: Tokenizer, ids: Any) -> None:
    for method in (tokenizer.decode, tokenizer.decode_bytes, tokenizer.byte_lengths):
        with pytest.raises(InputError, match="1-D sequence of integers"):
            method(ids)
    for batch in ([ids], [[1], ids]):
        with pytest.raises(InputError, match="1-D sequence of integers"):
            tokenizer.decode_batch(batch)
    with pytest.raises(InputError, match="iterable of sequences of ids is needed, not"):
        tokenizer.decode_batch(ids)
    with pytest.raises(InputError, match="iterable of ids is needed, not"):
        list(tokenizer.decode_iter(ids))


@pytest.mark.parametrize("ids", [[[]], [[1]], [[1], [2]], [1.0], [True], ["1"], [None], np.zeros((2, 0))])
def test_ids_have_one_dimension_and_are_integers(tokenizer: Tokenizer, ids: Any) -> None:
    for method in (tokenizer.decode, tokenizer.decode_bytes, tokenizer.byte_lengths):
        with pytest.raises(InputError, match="1-D sequence of integers"):
            method(ids)
    for token_id in list(ids):
        with pytest.raises(InputError, match="1-D sequence of integers"):
            tokenizer.token_bytes(token_id)


def test_the_first_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    tokenizer.decode([size - 1])
    with pytest.raises(InputError, match=f"The id {size} is outside the vocabulary of {size} ids"):
        tokenizer.decode([0, size])
    with pytest.raises(InputError, match=f"The id -1 is outside the vocabulary of {size} ids"):
        tokenizer.decode([0, -1])
    with pytest.raises(InputError, match=f"The id {10**30} is outside the vocabulary of {size} ids"):
        tokenizer.decode([0, 10**30])


def test_a_tokenizer_shows_its_size(tokenizer: Tokenizer) -> None:
    assert repr(tokenizer).startswith(f"{type(tokenizer).__name__}({tokenizer.vocab_size} ids")


# ---- special tokens

SPECIALS = ("<a>", END_OF_TEXT, "<a>b", "<é \n☃>", "<")


@pytest.fixture(scope="module")
def with_specials() -> BPETokenizer:
    return BPETokenizer.train(CORPUS[:1], 300, special_tokens=SPECIALS)


def encode_slowly(tokenizer: Tokenizer, text: str) -> list[int]:
    """All special tokens allowed: from the left, the longest that matches here, else one more plain character."""
    ids: list[int] = []
    plain, position = "", 0
    while position < len(text):
        matching = [name for name in tokenizer.special_tokens if text.startswith(name, position)]
        if matching:
            name = max(matching, key=len)
            ids += [*tokenizer.encode(plain, allowed_special="none"), tokenizer.special_tokens[name]]
            plain = ""
            position += len(name)
        else:
            plain += text[position]
            position += 1
    return [*ids, *tokenizer.encode(plain, allowed_special="none")]


def test_end_of_text_is_one_id_that_shows_as_its_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == {END_OF_TEXT: tokenizer.end_of_text_id}
    end = tokenizer.end_of_text_id
    assert end is not None
    ids = tokenizer.encode(f"un{END_OF_TEXT}{END_OF_TEXT}deux ☃", allowed_special="all")
    assert np.count_nonzero(ids == end) == 2
    position = int(np.flatnonzero(ids == end)[0])
    assert tokenizer.decode(ids[:position]) == "un"
    assert ids[position + 1] == end
    assert tokenizer.decode(ids) == f"un{END_OF_TEXT}{END_OF_TEXT}deux ☃"
    lengths = tokenizer.byte_lengths(ids)
    assert not lengths[ids == end].any()
    assert lengths.sum() == len("undeux ☃".encode())
    assert tokenizer.token_bytes(end) == END_OF_TEXT.encode()


def test_a_special_token_in_the_text_is_refused_and_named(tokenizer: Tokenizer) -> None:
    for allowed in ((), [], {"<another>"}):
        with pytest.raises(InputError, match=r"special token '<\|endoftext\|>'.*allowed_special="):
            tokenizer.encode(f"un{END_OF_TEXT}", allowed_special=allowed)
    assert tokenizer.decode(tokenizer.encode(f"un{END_OF_TEXT[:-1]}")) == f"un{END_OF_TEXT[:-1]}"


@pytest.mark.parametrize("allowed", [END_OF_TEXT, None, 5, iter([END_OF_TEXT])])
def test_what_is_no_collection_of_special_tokens_is_refused(tokenizer: Tokenizer, allowed: Any) -> None:
    for text in ("un", f"un{END_OF_TEXT}"):
        for encode in (tokenizer.encode, lambda text, **rest: tokenizer.encode_batch([text], **rest)):
            with pytest.raises(InputError, match='"all", "none" or a set of names, not'):
                encode(text, allowed_special=allowed)


@given(text=st.lists(st.sampled_from([*SPECIALS, *"ab> \n<☃é", "<a", "<|end"]), max_size=15).map("".join))
def test_all_special_tokens_are_found_the_longest_first(with_specials: BPETokenizer, text: str) -> None:
    ids = with_specials.encode(text, allowed_special="all")
    assert ids.dtype == np.int32
    assert ids.tolist() == encode_slowly(with_specials, text)
    assert with_specials.decode(ids) == text
    special = np.isin(ids, list(with_specials.special_tokens.values()))
    assert not with_specials.byte_lengths(ids)[special].any()
    assert with_specials.byte_lengths(ids).sum() == len(with_specials.decode_bytes(ids[~special]))
    check_round_trip(with_specials, text)  # "none"


def test_the_longest_special_token_wins_even_where_only_the_shorter_is_allowed(with_specials: BPETokenizer) -> None:
    ids = with_specials.special_tokens
    assert with_specials.encode("<a>b", allowed_special="all").tolist() == [ids["<a>b"]]
    assert with_specials.encode("<a>c", allowed_special={"<a>"}).tolist() == [ids["<a>"], ord("c")]
    with pytest.raises(InputError, match="special token '<a>b'"):
        with_specials.encode("<a>b", allowed_special={"<a>"})
    with pytest.raises(InputError, match="special token '<'"):
        with_specials.encode("<a> <", allowed_special={"<a>"})


def test_special_tokens_of_a_sequence_get_the_last_ids(with_specials: BPETokenizer) -> None:
    assert list(with_specials.special_tokens.items()) == list(zip(SPECIALS, range(295, 300), strict=True))
    assert with_specials.vocab_size == 300
    assert with_specials.end_of_text_id == 296
    assert BPETokenizer([], special_tokens=()).end_of_text_id is None
    assert BPETokenizer([], special_tokens=()).vocab_size == 256


def test_special_tokens_may_leave_gaps() -> None:
    tokenizer = BPETokenizer([(97, 98)], special_tokens={"<b>": 300, "<a>": 260})
    assert tokenizer.vocab_size == 301
    assert tokenizer.encode("ab<a><b>", allowed_special="all").tolist() == [256, 260, 300]
    assert tokenizer.decode([256, 260, 300]) == "ab<a><b>"
    assert tokenizer.byte_lengths([256, 260, 300]).tolist() == [2, 0, 0]
    for gap in (257, 259, 261, 299):
        for method in (tokenizer.decode, tokenizer.decode_bytes):
            with pytest.raises(InputError, match=f"The id {gap} stands for nothing"):
                method([97, gap])
        with pytest.raises(InputError, match=f"The id {gap} stands for nothing"):
            tokenizer.token_bytes(gap)


@pytest.mark.parametrize(
    ("special_tokens", "message"),
    [
        (("<a>", "<b>", "<a>"), "name '<a>' is given twice"),
        ({"<a>": 300, "<b>": 300}, "id 300 is given twice"),
        (("<a>", ""), "empty"),
        ({"": 300}, "empty"),
        ({"<a>": 256}, "'<a>' has the id 256, which an ordinary token has"),
        ({"<a>": -1}, "'<a>' has the id -1; ids are at least 0"),
        ("<a>", "sequence of names, such as .*, not '<a>'"),
        (None, "sequence of names, such as .*, not None"),
        (5, "sequence of names, such as .*, not 5"),
        ({"<a>"}, "sequence of names, such as .*, not {'<a>'}"),
        (frozenset(["<a>"]), "sequence of names, such as .*, not frozenset"),
        (("<\ud800>",), "lone surrogate"),
        ((b"<a>",), "The name of a special token is a str, not b'<a>'"),
        (("<a>", None), "The name of a special token is a str, not None"),
        ({5: 300}, "The name of a special token is a str, not 5"),
    ],
)
def test_special_tokens_that_cannot_be_are_refused(special_tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BPETokenizer([(97, 98)], special_tokens=special_tokens)
    with pytest.raises(InputError, match=message):
        BPETokenizer.train(CORPUS[:1], 290, special_tokens=special_tokens)


# ---- save, load, hash


def test_a_saved_tokenizer_comes_back_as_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "down"
    tokenizer.save(directory)
    assert os.listdir(directory) == ["tokenizer.json"]
    CharTokenizer.train(["autre"]).save(directory)
    tokenizer.save(str(directory))  # over another one
    assert os.listdir(directory) == ["tokenizer.json"]
    assert json.loads((directory / "tokenizer.json").read_bytes())["hash"] == tokenizer.hash
    loaded = load_tokenizer(str(directory))
    assert type(loaded) is type(tokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special_tokens == tokenizer.special_tokens
    for text in (*CORPUS[-2:], "".join(FRAGMENTS)):
        ids = tokenizer.encode(text, allowed_special="all")
        assert np.array_equal(loaded.encode(text, allowed_special="all"), ids)
        assert np.array_equal(loaded.byte_lengths(ids), tokenizer.byte_lengths(ids))
        assert loaded.decode(ids) == text


def test_a_place_where_nothing_can_be_saved_is_refused_and_left_as_it_was(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    for directory in ("file", "file/below", "folder"):
        with pytest.raises(InputError, match=r"tokenizer\.json can't be written: .*; choose another place\.$"):
            tokenizer.save(tmp_path / directory)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails_with(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(InputError, match="can't be written: Permission denied"):
            tokenizer.save(tmp_path / "new")
        patch.setattr(Path, "replace", fails_with(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            tokenizer.save(tmp_path / "new")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file", "folder", "folder/tokenizer.json", "new"
    ]  # fmt: skip
    assert (tmp_path / "file").read_text() == "mine"


def fails_with(error: OSError) -> Callable[..., Any]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_special_tokens_come_back_with_their_ids_and_order(tmp_path: Path) -> None:
    tokenizer = BPETokenizer([(97, 98)], special_tokens={"<b\n☃>": 300, '"a"': 260})
    tokenizer.save(tmp_path)
    assert list(load_tokenizer(tmp_path).special_tokens.items()) == [("<b\n☃>", 300), ('"a"', 260)]


def test_any_changed_byte_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    positions = {*range(150), *range(0, len(data) - 1, max(1, len(data) // 200)), len(data) - 2}
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)
    path.write_bytes(data)
    assert load_tokenizer(tmp_path).hash == tokenizer.hash


def test_a_file_that_is_cut_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = path.read_bytes()
    for length in (0, 1, 20, 100, len(data) // 2, len(data) - 3, len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="no tokenizer file, or it is damaged"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", '{"version": 1}', '{"version": 1, "hash": ""}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="no tokenizer file"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    CharTokenizer.train(["un"]).save(tmp_path / "saved")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"no tokenizer at .*; give the directory that `save` wrote"):
            load_tokenizer(path)
    with pytest.raises(
        InputError, match=r"saved/tokenizer\.json is no directory; give the directory that `save` wrote"
    ):
        load_tokenizer(tmp_path / "saved" / "tokenizer.json")
    for nothing in (None, 5):
        with pytest.raises(InputError, match=f"from the directory that `save` wrote, not from {nothing}"):
            load_tokenizer(nothing)  # type: ignore[arg-type]


def test_another_version_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    CharTokenizer.train(["un"]).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(InputError, match="version 2"):
        load_tokenizer(tmp_path)
    other = {"kind": "wordpiece", "characters": data["characters"]}
    path.write_text(json.dumps({"version": 1, "hash": content_hash(other), **other}))
    with pytest.raises(InputError, match=r"'wordpiece'; known are bpe, char, sentencepiece\b"):
        load_tokenizer(tmp_path)


def test_every_kind_is_known_by_its_name() -> None:
    assert {"char": CharTokenizer, "bpe": BPETokenizer, "sentencepiece": SentencePieceTokenizer} == TOKENIZER_KINDS


def test_different_tokenizers_have_different_hashes() -> None:
    different = [
        *(train() for train in TRAINED.values()),
        CharTokenizer.train(CORPUS, 61),
        CharTokenizer("0123456789abcdef"),
        CharTokenizer("1023456789abcdef"),
        BPETokenizer([]),
        BPETokenizer([], split="gpt2"),
        BPETokenizer([], pattern="(?s:.)+"),
        BPETokenizer([], special_tokens=()),
        BPETokenizer([], special_tokens=("<a>",)),
        BPETokenizer([], special_tokens={END_OF_TEXT: 257}),
        BPETokenizer([(97, 98)]),
        BPETokenizer([(98, 97)]),
        BPETokenizer([(97, 98), (98, 99)]),
        BPETokenizer([(98, 99), (97, 98)]),
    ]
    hashes = [tokenizer.hash for tokenizer in different]
    assert len(set(hashes)) == len(hashes)
    assert all(len(value) == 64 and set(value) <= set("0123456789abcdef") for value in hashes)


def test_the_hash_of_content_knows_no_order_of_keys() -> None:
    assert content_hash({"a": 1, "é": [1, 2]}) == content_hash({"é": [1, 2], "a": 1})
    assert content_hash({"a": 1, "é": [1, 2]}) != content_hash({"a": 1, "é": [2, 1]})


IN_ANOTHER_PROCESS = """
import json, sys
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer, load_tokenizer
texts, text, directories = json.loads(sys.stdin.read())
trained = [
    CharTokenizer.train(texts, 60),
    BPETokenizer.train(texts, 400, split="gpt4"),
    SentencePieceTokenizer.train(texts, 450, model_type="bpe"),
    SentencePieceTokenizer.train(texts, 450, model_type="unigram"),
]
loaded = [load_tokenizer(directory) for directory in directories]
print(json.dumps([[t.hash for t in trained], [t.hash for t in loaded], [t.encode(text).tolist() for t in loaded]]))
"""


def test_another_process_trains_and_loads_the_same(tmp_path: Path) -> None:
    names = ["char", "bpe-gpt4", "sentencepiece-bpe", "sentencepiece-unigram"]
    tokenizers = [TRAINED[name]() for name in names]
    for name, tokenizer in zip(names, tokenizers, strict=True):
        tokenizer.save(tmp_path / name)
    text = CORPUS[-1] + "☃\u2581"
    result = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=json.dumps([CORPUS, text, [str(tmp_path / name) for name in names]]),
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    hashes = [tokenizer.hash for tokenizer in tokenizers]
    assert json.loads(result.stdout) == [hashes, hashes, [t.encode(text).tolist() for t in tokenizers]]
