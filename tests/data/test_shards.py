"""Token shards hold what the tokenizer says, are made once, and are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data import shards as shards_module
from jaxlm.data.documents import Corpus, open_corpus
from jaxlm.data.shards import (
    Survey,
    TokenizedCorpus,
    TokenStream,
    held_out_documents,
    survey_corpus,
    token_type,
    tokenize_corpus,
    train_documents,
)
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer
from jaxlm.tokenizers.base import END_OF_TEXT, IdArray, InputError, Tokenizer

DOCUMENTS = [
    *(f"Document {i} : le chêne n° {i * 37} est un arbre à feuilles caduques." for i in range(18)),
    f"Un texte qui cite {END_OF_TEXT} en passant.",
    "Naïve  ▁\x00 👩‍🔬▂",
    "Bref.",
    "Le hêtre, lui aussi, perd ses feuilles.",
]
NUM_TRAIN = 19  # 90 % of 22, rounded down


def chars() -> CharTokenizer:
    return CharTokenizer.train(DOCUMENTS[:3])


def bpe() -> Tokenizer:
    return BPETokenizer.train(DOCUMENTS, 300)


def sentencepiece() -> Tokenizer:
    return SentencePieceTokenizer.train(DOCUMENTS, 320)


KINDS: dict[str, Callable[[], Tokenizer]] = {"chars": chars, "bpe": bpe, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "texts.jsonl")


def write_corpus(path: Path, documents: list[str] = DOCUMENTS) -> Corpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return open_corpus(str(path))


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> TokenizedCorpus:
    return tokenize_corpus(corpus, survey_corpus(corpus), tokenizer)


def everything(stream: TokenStream) -> list[int]:
    return stream.slice(0, len(stream)).tolist()


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Each file below `folder` with what changes when it is written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_files(cache: Path) -> dict[str, tuple[int, int]]:
    return files_below(cache / "shards")


# ---- the survey


def test_a_survey_counts_and_fingerprints(corpus: Corpus) -> None:
    digest = hashlib.sha256()
    for text in DOCUMENTS:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert survey_corpus(corpus) == Survey(22, len("".join(DOCUMENTS).encode()), digest.hexdigest())


def test_the_fingerprint_is_of_the_documents_not_of_their_place(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "folder").mkdir()
    write_corpus(tmp_path / "folder" / "a.jsonl", DOCUMENTS[:5])
    write_corpus(tmp_path / "folder" / "b.jsonl", DOCUMENTS[5:])
    assert survey_corpus(open_corpus(str(tmp_path / "folder"))) == survey_corpus(corpus)
    fingerprints = {
        survey_corpus(write_corpus(tmp_path / f"{i}.jsonl", documents)).fingerprint
        for i, documents in enumerate([["ab", "c"], ["a", "bc"], ["c", "ab"], ["a", "b", "c"], ["ab", "c "]])
    }
    assert len(fingerprints) == 5, "texts that differ in their cuts or their order share a fingerprint"


def test_a_survey_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("un\n\ndeux")
    first = survey_corpus(open_corpus(str(path)))
    status = path.stat()

    path.write_text("un\n\ndix!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert survey_corpus(open_corpus(str(path))) == first, "nothing that the stamp sees has changed"

    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = survey_corpus(open_corpus(str(path)))
    assert second != first
    assert second.fingerprint == survey_corpus(write_corpus(tmp_path / "b.jsonl", ["un", "dix!"])).fingerprint

    path.write_text("un\n\ndix!\n\nonze")
    assert survey_corpus(open_corpus(str(path))).documents == 3


def test_a_survey_cut_short_on_disk_is_made_again(corpus: Corpus, cache: Path) -> None:
    survey = survey_corpus(corpus)
    (remembered,) = (cache / "surveys").iterdir()
    remembered.write_bytes(remembered.read_bytes()[:20])
    assert survey_corpus(corpus) == survey


def test_a_single_document_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="is a single document, and one has to be held out"):
        survey_corpus(write_corpus(tmp_path / "one.jsonl", ["seul"]))
    assert files_below(cache) == {}


@pytest.mark.parametrize(("count", "train"), [(2, 1), (3, 2), (9, 8), (10, 9), (11, 9), (19, 17), (20, 18)])
def test_a_tenth_is_held_out(tmp_path: Path, count: int, train: int) -> None:
    documents = [f"document {i}" for i in range(count)]
    corpus = write_corpus(tmp_path / "texts.jsonl", documents)
    survey = survey_corpus(corpus)
    assert survey.train_documents == train
    assert list(train_documents(corpus, survey)) == documents[:train]
    assert list(held_out_documents(corpus, survey)) == documents[train:]


# ---- what is on disk


def test_tokens_are_those_of_the_documents(corpus: Corpus, tokenizer: Tokenizer) -> None:
    data = tokenize(corpus, tokenizer)
    for stream, documents in ((data.train, DOCUMENTS[:NUM_TRAIN]), (data.held_out, DOCUMENTS[NUM_TRAIN:])):
        encoded = [tokenizer.encode(text, allowed_special="none") for text in documents]
        assert stream.num_documents == len(documents)
        for index, ids in enumerate(encoded):
            document = stream.document(index)
            assert document.dtype == np.int32
            assert document.tolist() == ids.tolist()
        joined = [token for ids in encoded for token in [*ids.tolist(), tokenizer.end_of_text_id]]
        assert everything(stream) == joined
        assert len(stream) == len(joined)
        assert stream.ends.tolist() == np.cumsum([len(ids) + 1 for ids in encoded]).tolist()
        assert stream.document_bytes.tolist() == [len(text.encode()) for text in documents]
        assert stream.bytes_per_token == pytest.approx(len("".join(documents).encode()) / len(joined))
        assert all(isinstance(shard, np.memmap) for shard in stream.shards)
        assert {shard.dtype for shard in stream.shards} == {token_type(tokenizer.vocab_size)}


def test_the_name_of_a_special_token_is_plain_text(corpus: Corpus, tokenizer: Tokenizer) -> None:
    document = tokenize(corpus, tokenizer).train.document(18)
    assert tokenizer.end_of_text_id not in document
    assert tokenizer.decode(document) == DOCUMENTS[18]


def test_the_manifest_says_what_was_made_from_what(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> None:
    data = tokenize(corpus, tokenizer)
    survey = survey_corpus(corpus)
    (path,) = (cache / "shards").glob("*/manifest.json")
    assert json.loads(path.read_bytes()) == data.manifest
    assert data.manifest["tokenizer"] == {
        "kind": tokenizer.kind,
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
    }
    assert data.manifest["corpus"]["fingerprint"] == survey.fingerprint
    assert sum(split["bytes"] for split in data.manifest["splits"].values()) == survey.bytes
    assert data.manifest["splits"]["train"]["tokens"] == len(data.train)


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (200_000, "uint32")],
)
def test_the_type_is_the_smallest_that_holds_all_ids(vocab_size: int, name: str) -> None:
    assert token_type(vocab_size) == np.dtype(name)
    assert np.iinfo(token_type(vocab_size)).max >= vocab_size - 1


@pytest.mark.parametrize(("end_of_text_id", "name"), [(65_535, "uint16"), (65_536, "uint32")])
def test_large_ids_survive(corpus: Corpus, end_of_text_id: int, name: str) -> None:
    data = tokenize(corpus, BPETokenizer([], special_tokens={END_OF_TEXT: end_of_text_id}))
    assert data.train.shards[0].dtype == np.dtype(name)
    assert everything(data.train)[-1] == end_of_text_id


def test_progress_is_told_of_every_document(corpus: Corpus) -> None:
    told: list[int] = []
    tokenize_corpus(corpus, survey_corpus(corpus), chars(), on_document=told.append)
    assert told == [len(text.encode()) for text in DOCUMENTS]


# ---- several shards


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_several_shards_are_the_same_stream_as_one(
    corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    one = tokenize(corpus, tokenizer)
    assert (len(one.train.shards), len(one.held_out.shards)) == (1, 1)
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", size)
    several = tokenize(corpus, tokenizer)
    for whole, parts in ((one.train, several.train), (one.held_out, several.held_out)):
        tokens = everything(whole)
        assert len(parts.shards) == -(-len(tokens) // size)
        assert {len(shard) for shard in parts.shards[:-1]} <= {size}
        assert 0 < len(parts.shards[-1]) <= size
        assert everything(parts) == tokens
        assert parts.ends.tolist() == whole.ends.tolist()
        assert parts.document_bytes.tolist() == whole.document_bytes.tolist()
        for index in range(whole.num_documents):
            assert parts.document(index).tolist() == whole.document(index).tolist()


def test_slices_cross_the_borders_of_shards() -> None:
    tokens = np.arange(23, dtype=np.uint8)
    stream = TokenStream(tuple(np.split(tokens, [5, 10, 15, 20])), np.array([4, 23]), np.array([3, 18]))
    for start in range(23):
        for stop in range(start + 1, 24):
            found = stream.slice(start, stop)
            assert found.dtype == np.int32
            assert found.tolist() == list(range(start, stop))
    assert [stream.document(index).tolist() for index in range(2)] == [[0, 1, 2], list(range(4, 22))]


# ---- made once, and again when something is different


def test_what_was_made_is_used_again(tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> None:
    first = tokenize(corpus, tokenizer)
    before = shard_files(cache)
    assert len(before) == 5  # the manifest, and for each split its tokens and its documents
    again = tokenize(corpus, tokenizer)
    elsewhere = tokenize(write_corpus(tmp_path / "elsewhere.jsonl"), tokenizer)
    assert shard_files(cache) == before
    for data in (again, elsewhere):
        assert everything(data.train) == everything(first.train)
        assert everything(data.held_out) == everything(first.held_out)


def test_another_tokenizer_or_another_text_is_made_anew(tmp_path: Path, corpus: Corpus, cache: Path) -> None:
    tokenize(corpus, chars())
    before = shard_files(cache)
    other = CharTokenizer(chars().characters[::-1])
    assert chars().decode(everything(tokenize(corpus, chars()).train)) == other.decode(
        everything(tokenize(corpus, other).train)
    )
    assert everything(tokenize(corpus, chars()).train) != everything(tokenize(corpus, other).train)
    changed = write_corpus(tmp_path / "texts.jsonl", [*DOCUMENTS[:-1], "Le hêtre, lui aussi, perd ses fleurs."])
    tokens = tokenize(changed, chars()).held_out
    assert chars().decode(tokens.document(2)) == "Le hêtre, lui aussi, perd ses fleurs."
    assert len(shard_files(cache)) == 15
    assert before.items() <= shard_files(cache).items(), "what had been made was touched"


def _delete(path: Path) -> None:
    path.unlink()


def _cut_to(share: float) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return cut


def _lose_the_last_token(path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, np.load(path)[..., :-1])
    else:
        path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    "damage",
    [_delete, _cut_to(0.0), _cut_to(0.5), _cut_to(0.99), _lose_the_last_token],
    ids=["missing", "empty", "half", "cut", "shorter"],
)
def test_what_is_damaged_is_made_again(corpus: Corpus, cache: Path, damage: Callable[[Path], None]) -> None:
    first = tokenize(corpus, chars())
    expected = everything(first.train), everything(first.held_out)
    names = list(shard_files(cache))
    for name in names:
        before = shard_files(cache)
        damage(cache / "shards" / name)
        data = tokenize(corpus, chars())
        assert (everything(data.train), everything(data.held_out)) == expected, name
        assert list(shard_files(cache)) == names
        assert all(shard_files(cache)[other] != before[other] for other in names), f"{name} was damaged"


# ---- whole or absent


class Interrupted(Exception):
    """Stands for whatever may come from outside in the middle."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files have been written by the time something goes wrong."""
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 16)


@pytest.mark.usefixtures("small_shards")
def test_an_error_in_the_middle_of_the_text_leaves_nothing(corpus: Corpus, cache: Path) -> None:
    survey = survey_corpus(corpus)
    path = Path(corpus.spec)
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    lines[15] = lines[15].replace(b"arbre", b"arb\xff\xfe")
    path.write_bytes(b"".join(lines))
    told: list[int] = []
    with pytest.raises(InputError, match="is not UTF-8"):
        tokenize_corpus(corpus, survey, chars(), on_document=told.append)
    assert len(told) == 15, "the error was meant to come in the middle"
    assert shard_files(cache) == {}
    path.write_bytes(good)
    assert len(tokenize(corpus, chars()).train.shards) > 10


def test_a_text_that_changes_after_the_survey_is_refused(corpus: Corpus, cache: Path) -> None:
    """Its tokens would be found again as those of the text that was surveyed."""
    survey = survey_corpus(corpus)
    for changed in ([*DOCUMENTS[:-1], "Autre."], DOCUMENTS[:-1], [*DOCUMENTS, "Autre."], DOCUMENTS[::-1]):
        with pytest.raises(InputError, match="changed while it was read"):
            tokenize_corpus(write_corpus(Path(corpus.spec), changed), survey, chars())
        assert shard_files(cache) == {}
    assert tokenize_corpus(write_corpus(Path(corpus.spec)), survey, chars()).held_out.num_documents == 3


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("after", [1, 10, NUM_TRAIN + 1])
def test_an_interruption_leaves_nothing_and_touches_nothing(corpus: Corpus, cache: Path, after: int) -> None:
    tokenize(corpus, bpe())
    before = shard_files(cache)
    told = iter(range(after))

    def interrupt(num_bytes: int) -> None:
        if next(told, None) is None:
            raise Interrupted

    with pytest.raises(Interrupted):
        tokenize_corpus(corpus, survey_corpus(corpus), chars(), on_document=interrupt)
    assert shard_files(cache) == before
    assert [path.name[0] for path in (cache / "shards").iterdir()] != ["."]
    assert len(list((cache / "shards").iterdir())) == 1


@pytest.mark.usefixtures("small_shards")
def test_shards_appear_all_at_once(corpus: Corpus, cache: Path) -> None:
    """While they are written, there is no folder that could be taken for a finished one."""
    seen: list[list[str]] = []

    def look(num_bytes: int) -> None:
        seen.append([path.name for path in (cache / "shards").iterdir()])

    tokenize_corpus(corpus, survey_corpus(corpus), chars(), on_document=look)
    assert all(len(names) == 1 and names[0].startswith(".") for names in seen)
    (finished,) = (cache / "shards").iterdir()
    assert not finished.name.startswith(".")


# ---- what is refused


class LowerCase(CharTokenizer):
    """Cheats: capitals come back small."""

    def _encode_ordinary(self, text: str) -> IdArray:
        return super()._encode_ordinary(text.lower())


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, corpus: Corpus, cache: Path) -> None:
    with pytest.raises(InputError, match="The char tokenizer isn't lossless: held-out document 0 comes back changed"):
        tokenize(corpus, LowerCase(chars().characters))
    assert shard_files(cache) == {}
    # Only what is held out has to come back: that is what is scored.
    small = write_corpus(tmp_path / "small.jsonl", ["Grand", "petit"])
    tokenize(small, LowerCase(chars().characters))


def test_a_tokenizer_without_end_of_text_is_refused(corpus: Corpus, cache: Path) -> None:
    with pytest.raises(InputError, match="has no end-of-text token"):
        tokenize(corpus, BPETokenizer([], special_tokens=()))
    assert shard_files(cache) == {}


@pytest.mark.parametrize("blocked", ["", "surveys", "shards"])
def test_a_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """A file stands where a folder has to be."""
    path = tmp_path / "blocked" / blocked
    path.parent.mkdir(exist_ok=True)
    if not blocked:
        path = tmp_path / "file"
    path.write_text("")
    monkeypatch.setenv("JAXLM_CACHE", str(path.parent if blocked else path))
    with pytest.raises(InputError, match=r"can't be written.*set the environment variable JAXLM_CACHE") as caught:
        tokenize(corpus, chars())
    assert "\n" not in str(caught.value)
    assert path.read_text() == ""


def test_a_cache_lost_after_the_survey_is_refused(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = survey_corpus(corpus)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="JAXLM_CACHE"):
        tokenize_corpus(corpus, survey, chars())


def test_the_validation_part_is_the_last_documents_and_nothing_is_in_both() -> None:
    lengths = [5 + index % 7 for index in range(40)]
    tokens = np.random.default_rng(0).integers(11, size=sum(lengths)).astype(np.uint16)
    shards = tuple(tokens[start : start + 100] for start in range(0, len(tokens), 100))
    whole = TokenStream(shards, np.cumsum(lengths), np.array(lengths))
    parts = TokenizedCorpus(whole, whole, {}).for_validation()
    train, validation = parts.train, parts.held_out
    assert (train.num_documents, validation.num_documents) == (38, 2)
    joined = np.concatenate([part.slice(0, len(part)) for part in (train, validation)])
    np.testing.assert_array_equal(joined, tokens)
    np.testing.assert_array_equal(validation.document(1), whole.document(39))
    np.testing.assert_array_equal(validation.documents(1, 2).document(0), whole.document(39))
    assert train.document_bytes.sum() + validation.document_bytes.sum() == whole.document_bytes.sum()
    with pytest.raises(InputError, match="only one"):
        TokenizedCorpus(whole.documents(0, 1), whole, {}).for_validation()
