"""A saved BPE tokenizer can be read by a person, and is refused, in one sentence, if it was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm.tokenizers import BPETokenizer, InputError, load_tokenizer
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
        (lambda data: data["merges"].reverse(), r"Merge 0 joins the ids \(256, 99\), which don't both exist"),
        (lambda data: data["merges"].append("97 98 6162"), r"Merge 2 joins the ids \(97, 98\), as merge 0 does"),
        (lambda data: data.update(merges=["97 98 6163"]), "Merge 0 makes the bytes 6162, and the file says 6163"),
        (lambda data: data.update(merges=["97 98"]), "damaged"),
        (lambda data: data.update(merges=["97 x 6162"]), "damaged"),
        (lambda data: data.update(merges=None), "damaged"),
        (lambda data: data.pop("whole"), "damaged"),
        (lambda data: data.update(ids="0 1 2"), "one id of its own"),
        (lambda data: data.update(split="gpt9"), "no split 'gpt9'"),
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
