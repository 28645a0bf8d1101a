"""Documents come out as they were put in, from every kind of source; whatever is wrong is said in one sentence."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.cache import cache_directory
from jaxlm.data.documents import BUILTIN, open_corpus
from jaxlm.tokenizers.base import InputError

ROOT = Path(__file__).parents[2]
TEXTS = ["Le chêne.\n\nUn arbre.", "La pluie\r\ntombe.", "naïve  \u2581\x00 👩‍🔬", "fin"]


def read(spec: object, max_bytes: int | None = None) -> list[str]:
    return list(open_corpus(str(spec), max_bytes=max_bytes).documents())


def refusal(spec: object, *words: str, max_bytes: int | None = None) -> str:
    """The sentence with which a corpus is refused, which holds `words`."""
    with pytest.raises(InputError) as caught:
        read(spec, max_bytes)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    for word in words:
        assert word in sentence, f"{word!r} is missing in: {sentence}"
    return sentence


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, texts: Sequence[str | None], **options: object) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())}), path, **options)
    return path


def articles(seed: int, count: int) -> list[str]:
    """Texts of 10 kB that don't compress."""
    return [random.Random(seed * 1000 + i).randbytes(5000).hex() for i in range(count)]


# ---- what each kind gives


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "A.PARQUET"])
def test_texts_come_back_exactly_and_again(tmp_path: Path, name: str) -> None:
    write = write_parquet if name.lower().endswith("parquet") else write_jsonl
    corpus = open_corpus(str(write(tmp_path / name, TEXTS)))
    assert list(corpus.documents()) == TEXTS
    first = corpus.documents()
    next(first)
    assert list(corpus.documents()) == TEXTS, "a second pass must not depend on where the first one is"
    assert list(first) == TEXTS[1:]


def test_builtin_is_one_document_an_article() -> None:
    articles = sorted(BUILTIN.glob("*.txt"))
    assert read("builtin") == [article.read_bytes().decode().strip("\r\n") for article in articles]
    assert len(articles) >= 2
    assert open_corpus("builtin").stamp() != open_corpus(str(BUILTIN)).stamp(), "a folder is cut at blank lines"


def test_parquet_skips_nulls_and_reads_every_string_type(tmp_path: Path) -> None:
    texts = [None, "un", "", None, "deux", " \n", "un"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ["un", "deux", "un"]


def test_parquet_is_not_read_whole(tmp_path: Path) -> None:
    texts = articles(5, 800)
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 10, "data_page_size": 100_000}
    path = write_parquet(tmp_path / "a.parquet", texts, **options)
    assert path.stat().st_size > 8_000_000 and pq.ParquetFile(path).num_row_groups == 1
    tracemalloc.start()
    try:
        documents = open_corpus(str(path)).documents()
        assert next(documents) == texts[0]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert list(documents) == texts[1:]


def cut(text: str) -> list[str]:
    """Documents of a .txt, by the definition: runs of lines that aren't only whitespace."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            documents[-1].append(line)
        else:
            documents.append([])
    return ["\n".join(lines).strip("\r\n") for lines in documents if lines]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aé \t\r\n\n\n\x0b\x85\u2028\ufeff") | st.text())
def test_txt_is_cut_at_blank_lines(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(text.encode())
    expected = cut(text.removeprefix("\ufeff"))
    if expected:
        assert read(path) == expected
    else:
        refusal(path, "holds no text")


def test_txt_keeps_what_is_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n \t\r\n  un\r\ndeux\t\n\xe2\x80\xa8\n\x0c\ntrois\rtrois\n\n\nquatre\r\n")
    assert read(path) == ["  un\r\ndeux\t", "trois\rtrois", "quatre"]


def test_jsonl_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n  \n{"text": "c\x85d"}'.encode())
    assert read(path) == ["a\u2028b", "c\x85d"]


# ---- folders, globs, order


def test_folder_and_glob_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a-a.txt", "a/z/0.txt", "c.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("a.md", ".hidden.txt", "b/.git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff")
    write_jsonl(tmp_path / "a.jsonl", ["jsonl"])
    everything = ["a-a.txt", "jsonl", "a/z/0.txt", "b/10.txt", "b/2.txt", "c.TXT"]
    assert read(tmp_path) == everything
    assert read(f"{tmp_path}/**") == everything
    assert read(f"{tmp_path}/**/*.txt") == ["a-a.txt", "a/z/0.txt", "b/10.txt", "b/2.txt"]
    assert read(f"{tmp_path}/b/[0-9].txt") == ["b/2.txt"]


def test_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("itself")
    (tmp_path / "a1.txt").write_text("what the glob would find")
    assert read(tmp_path / "a[1].txt") == ["itself"]


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("un")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.txt") == ["un"]
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("a.txt")
    monkeypatch.chdir("/")
    assert list(corpus.documents()) == ["un"]


# ---- max_bytes and stamp


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(alphabet="aé\n ", max_size=6), max_size=8), max_bytes=st.integers(1, 30))
def test_max_bytes_ends_with_the_document_that_reaches_it(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_bytes: int
) -> None:
    path = write_jsonl(tmp_path_factory.getbasetemp() / "limit.jsonl", texts)
    texts = [text for text in texts if text.strip()]
    if not texts:
        refusal(path, "holds no text", max_bytes=max_bytes)
        return
    documents = read(path, max_bytes)
    sizes = [len(text.encode()) for text in documents]
    assert documents == texts[: len(documents)]
    assert sum(sizes[:-1]) < max_bytes
    assert sum(sizes) >= max_bytes or documents == texts


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_max_bytes_must_be_positive(max_bytes: int) -> None:
    refusal("builtin", "max_bytes", str(max_bytes), max_bytes=max_bytes)


def test_stamp_changes_with_whatever_changes_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("un")
    (tmp_path / "b.txt").write_text("deux")
    corpus = open_corpus(str(tmp_path))
    stamps = [corpus.stamp(), open_corpus(str(tmp_path), max_bytes=3).stamp(), open_corpus(f"{tmp_path}/a*").stamp()]
    assert json.loads(json.dumps(stamps)) == stamps
    assert open_corpus(str(tmp_path)).stamp() == stamps[0]
    (tmp_path / "a.txt").write_text("une")
    stamps.append(corpus.stamp())
    status = (tmp_path / "b.txt").stat()
    (tmp_path / "b.txt").write_text("DEUX")
    os.utime(tmp_path / "b.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    stamps.append(corpus.stamp())
    (tmp_path / "c.txt").write_text("trois")
    stamps.append(open_corpus(str(tmp_path)).stamp())
    assert all(a != b for i, a in enumerate(stamps) for b in stamps[:i]), stamps
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"no file .*a\.txt"):
        corpus.stamp()


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXLM_CACHE", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "jaxlm"
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"


# ---- bad input


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("un")
    (tmp_path / "a.csv").write_text("un")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "b.txt", "b.txt", "no file")
    refusal(tmp_path / "a.txt" / "b.txt", "b.txt", "no file")
    refusal("a\0.txt", "no file")
    refusal("", "empty name")
    refusal(" ", "empty name")
    refusal(tmp_path / "a.csv", "a.csv", ".jsonl.gz")
    refusal(tmp_path / "empty", "empty", ".txt", ".jsonl", ".jsonl.gz", ".parquet")
    refusal(tmp_path / "*.parquet", "*.parquet", ".jsonl.gz")
    refusal(tmp_path / ("x" * 300 + ".txt"), "cannot be read")
    gone = open_corpus(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"no file .*a\.txt"):
        list(gone.documents())


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Permissions don't hold root back, so root becomes nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_permission_denied(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    file.write_text("un")
    (folder / "closed").mkdir(parents=True)
    (folder / "b.txt").write_text("deux")
    closed = (file, folder / "closed")
    parents = [parent for parent in tmp_path.parents if parent.stat().st_mode & 0o005 != 0o005]
    modes = {path: path.stat().st_mode for path in (*parents, tmp_path, *closed)}
    try:
        for path in (*parents, tmp_path):
            path.chmod(0o755)
        for path in closed:
            path.chmod(0)
        with as_ordinary_user():
            refusal(file, "a.txt", "Permission denied")
            refusal(folder, "closed", "Permission denied")
            refusal(folder / "closed" / "c.txt", "c.txt", "Permission denied")
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.sampled_from(["un", "é", "", "👩"]), max_size=4), tail=st.binary(min_size=1, max_size=6))
def test_offset_of_the_first_byte_that_is_no_utf8(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], tail: bytes
) -> None:
    content = "".join(line + "\n" for line in lines).encode() + tail
    try:
        content.decode()
        return
    except UnicodeDecodeError as error:
        offset = error.start
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    path.write_bytes(content)
    refusal(path, "bad.txt", f"offset {offset} ", f"0x{content[offset]:02x}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_that_is_no_utf8_names_the_offset_in_the_text(tmp_path: Path, name: str) -> None:
    content = b'{"text": "un"}\n{"text": "d\xe9ux"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    refusal(tmp_path / name, name, f"offset {content.index(0xE9)} ", "0xe9")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "b"', ["not JSON"]),
        ("un", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('{"texte": "b"}', ["no field `text`"]),
        ('["text"]', ["no field `text`"]),
        ('{"text": null}', ["no string"]),
        ('{"text": 3}', ["no string"]),
        ('{"text": "b\\ud83d."}', ["lone surrogate", "U+D83D"]),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_jsonl_names_the_line(tmp_path: Path, name: str, line: str, words: list[str]) -> None:
    content = f'{{"text": "a"}}\n\n{line}\n{{"text": "c"}}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    refusal(tmp_path / name, f"{name}, line 3", *words)


def test_surrogate_pairs_in_jsonl_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl") == ["😀"]


def test_bad_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = write_jsonl(path, [random.Random(i).randbytes(300).hex() for i in range(40)]).read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 255  # in the checksum
    for content in (whole[:-1], whole[: len(whole) // 2], bytes(flipped), b'{"text": "a"}\n', whole + b"x"):
        path.write_bytes(content)
        refusal(path, "a.jsonl.gz", "not a whole gzip file")
    for i in range(10, len(whole), 97):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :])
        refusal(path, "a.jsonl.gz")


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"titre": ["a"], "texte": ["b"]}), path)
    refusal(path, "a.parquet", "no column `text`", "titre, texte")
    for value, kind in ((1, "int64"), (b"a", "binary"), (["a"], "list<"), ({"a": "b"}, "struct<")):
        pq.write_table(pa.table({"text": [value]}), path)
        refusal(path, "a.parquet", "`text`", kind)
    whole = write_parquet(path, ["un", "deux"]).read_bytes()
    for content in (b"", b"text", whole[:-20], b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        refusal(path, "a.parquet", "not a whole parquet file")
    unchecked = pa.StringArray.from_buffers(1, pa.array([b"\xed\xa0\x80"]).buffers()[1], pa.py_buffer(b"\xed\xa0\x80"))
    pq.write_table(pa.table({"text": unchecked}), path)
    refusal(path, "a.parquet", "not UTF-8")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.txt":
        path.write_text(" \n\n\t\n")
    elif name == "a.parquet":
        write_parquet(path, [None, "", " \n"])
    else:
        write_jsonl(path, ["", "  "])
    refusal(path, str(path), "holds no text")
