"""A saved BPE tokenizer can be read by a person, and is refused, in one sentence, if it was changed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.tokenizers import END_OF_TEXT, BPETokenizer, InputError, load_tokenizer
from jaxlm.tokenizers.base import content_hash

TOKENIZER = BPETokenizer([(97, 98), (256, 99)], special_tokens=("<|end|>", "<a b>"))


def saved(folder: Path) -> Path:
    TOKENIZER.save(folder)
    return folder / "tokenizer.json"


def change(path: Path, edit: Callable[[dict[str, Any]], None], *, hashed: bool = True) -> None:
    """Edits the content of a file; with a hash that fits, so that what is looked at next is the content."""
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    if hashed:
        content = {key: value for key, value in data.items() if key not in ("version", "hash")}
        data["hash"] = content_hash(content)
    path.write_text(json.dumps(data), "utf-8")


def test_a_file_shows_each_merge_with_the_bytes_that_it_makes(tmp_path: Path) -> None:
    lines = saved(tmp_path).read_text("utf-8").splitlines()
    assert ' "version": 2,' in lines
    assert '  "97 98 6162",' in lines
    assert '  "256 99 616263"' in lines
    assert list(tmp_path.iterdir()) == [tmp_path / "tokenizer.json"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["merges"].reverse(), r"Merge 0 joins the symbols \(256, 99\), which don't both exist"),
        (lambda data: data["merges"].append("97 98 6162"), r"Merge 2 joins the symbols \(97, 98\), as merge 0 does"),
        (lambda data: data.update(merges=["97 98 6163"]), "Merge 0 makes the bytes 6162, and the file says 6163"),
        (lambda data: data.update(merges=["97 97 6161", *(f"{n} {n} 61" for n in range(256, 300))]), "Merge 1 doesn't"),
        (lambda data: data.update(pattern="a{1000000000}|."), "repeats something more than 10,000 times"),
        (lambda data: data.update(pattern="((a{99}){99}){99}|."), "repeats something more than 10,000 times"),
        (lambda data: data.update(pattern="(?R)a|."), "calls itself or a group"),
        (lambda data: data.update(split="x" * 9_000), r"no split 'xxx+\.\.\.x+'"),
        (lambda data: data.update(special_tokens={"<a>": 10**30}), "below 16,777,216, not 1000"),
        (lambda data: data.update(merges=["97 98"]), "damaged"),
        (lambda data: data.update(merges=["97 x 6162"]), "damaged"),
        (lambda data: data.update(merges=None), "damaged"),
        (lambda data: data.pop("whole"), "damaged"),
        (lambda data: data.update(ids="0 1 2"), "one id of its own"),
        (lambda data: data.update(split="gpt9"), "no split 'gpt9'"),
        (lambda data: data.update(split="gpt9", pattern="."), "no split 'gpt9'"),
        (lambda data: data.update(pattern=5), "regular expression as a str, not 5"),
        (lambda data: data.update(pattern="(" * 9_000 + ")" * 9_000), "18,000 characters has too many groups"),
        (lambda data: data.update(whole={"6162": "300"}), "at least one byte and has an id, not b'ab' and '300'"),
        (lambda data: data.update(whole={"6162": 300.0}), "at least one byte and has an id, not b'ab' and 300.0"),
        (lambda data: data.update(special_tokens={"<a>": 97}), "'<a>' has the id 97"),
        (lambda data: data.update(version=3), "format version 3; .* so use a newer jaxlm"),
        (lambda data: data.update(version=1), "format version 1; .* so train the tokenizer again"),
    ],
)
def test_content_that_cannot_be_is_refused(
    edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    change(path, edit)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_changed_or_cut_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    change(path, lambda data: data["merges"].pop(), hashed=False)
    with pytest.raises(InputError, match="doesn't match its hash"):
        load_tokenizer(tmp_path)
    for end in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match="damaged"):
            load_tokenizer(tmp_path)


@st.composite
def tokenizers(draw: st.DrawFn) -> BPETokenizer:
    """Any merges, ids in any order with gaps, whole chunks and special tokens."""
    symbols = [97, 98, 0xC3, 0xA9]
    merges: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 6))):
        pair = (draw(st.sampled_from(symbols)), draw(st.sampled_from(symbols)))
        if pair not in merges:
            merges.append(pair)
            symbols.append(255 + len(merges))
    whole = draw(st.sets(st.sampled_from([b"abba", b" quatre-vingt-dix-neuf", "é".encode() * 30, b"\n\n"])))
    names = draw(st.lists(st.sampled_from(["<|end|>", "<a b>", "\n<é>", '"\\', END_OF_TEXT]), unique=True))
    numbers = list(range(256 + len(merges) + len(whole) + len(names) + draw(st.integers(0, 9))))
    draw(st.randoms(use_true_random=False)).shuffle(numbers)
    ids = [numbers.pop() for _ in range(256 + len(merges))] if draw(st.booleans()) else None
    free = numbers if ids else list(range(400, 420))
    return BPETokenizer(
        merges,
        split=draw(st.sampled_from(["gpt2", "gpt4", "o200k", "none"])),
        special_tokens={name: free.pop() for name in names},
        ids=ids,
        whole={chunk: free.pop() for chunk in sorted(whole)},
    )


@settings(max_examples=60)
@given(tokenizer=tokenizers(), text=st.text(alphabet='abé \n"<>', max_size=80))
def test_ids_whole_chunks_and_special_tokens_come_back(tokenizer: BPETokenizer, text: str) -> None:
    text = f"abba quatre-vingt-dix-neuf\n\n{'é' * 30}" + "".join(tokenizer.special_tokens) + text
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        loaded = load_tokenizer(folder)
    assert isinstance(loaded, BPETokenizer)
    assert loaded.hash == tokenizer.hash
    assert (loaded.merges, loaded.ids, loaded.whole) == (tokenizer.merges, tokenizer.ids, tokenizer.whole)
    assert list(loaded.special_tokens.items()) == list(tokenizer.special_tokens.items())
    assert (loaded.split, loaded.pattern, loaded.vocab_size) == (tokenizer.split, None, tokenizer.vocab_size)
    for allowed in ("all", "none"):
        ids = tokenizer.encode(text, allowed_special=allowed)  # type: ignore[arg-type]
        assert loaded.encode(text, allowed_special=allowed).tolist() == ids.tolist()  # type: ignore[arg-type]
        assert loaded.decode(ids) == text


def test_what_is_refused_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = saved(tmp_path)
    change(path, lambda data: data["merges"].append("97 98 6162"))
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    for _ in range(2):
        with pytest.raises(InputError):
            load_tokenizer(tmp_path)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.update(whole=[]),
        lambda data: data.update(ids=[1]),
        lambda data: data.update(kind=[]),
        lambda data: data.update(version=2.0),
        lambda data: data.update(version="2"),
        lambda data: data.update(special_tokens={"<a>": 300.5}),
    ],
)
def test_content_of_another_type_is_refused(edit: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = saved(tmp_path)
    change(path, edit)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5_000, "{}", "[]"])
def test_other_json_is_refused(text: str, tmp_path: Path) -> None:
    saved(tmp_path).write_text(text, "utf-8")
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
