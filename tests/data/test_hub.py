"""The Hugging Face hub, spoken to over HTTP on this machine: streamed, cached, pinned, and what it refuses."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data.cache import cache_directory
from jaxlm.data.documents import open_corpus
from jaxlm.data.hub import PINNED_REVISIONS
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


COMMITS = ["1" * 40, "2" * 40]


class Hub:
    """A server that speaks what of the hub's protocol reading a dataset takes, and counts what it serves."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.branches: dict[str, str] = {}
        self.requests: list[str] = []
        self.file_bytes = 0
        self.before_file: Callable[[], int | None] = lambda: None  # may wait, or return an error status
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        assert " //" not in request.requestline  # `request.path` is cleaned of it already
        url = urlsplit(request.path)
        self.requests.append(f"{request.command} {url.path}")
        length = int(request.headers.get("Content-Length") or 0)
        form = parse_qs(request.rfile.read(length).decode())
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        api = parts[0] == "api"
        owner_name, rest = "/".join(parts[2:4] if api else parts[1:3]), parts[4:] if api else parts[3:]
        if owner_name == "owner/gated":
            return self.refuse(request, 403, "GatedRepo")
        if owner_name not in self.repositories:
            return self.refuse(request, 401, "RepoNotFound")
        commits = self.repositories[owner_name]
        action, revision, path = (rest or ["revision"])[0], (rest[1:] or ["main"])[0], "/".join(rest[2:])
        commit = self.branches.get(revision, revision)
        if commit not in commits:
            return self.refuse(request, 404, "RevisionNotFound")
        files = commits[commit]
        if action == "revision":
            return self.json(request, {"id": owner_name, "sha": commit, "siblings": [{"rfilename": f} for f in files]})
        if action == "tree":
            recursive = parse_qs(url.query).get("recursive", ["False"])[0].lower() == "true"
            below = [e for e in entries(files) if e["path"].startswith(path + "/" if path else "")]
            below = [e for e in below if recursive or "/" not in e["path"][len(path) :].strip("/")]
            return self.json(request, below) if below else self.refuse(request, 404, "EntryNotFound")
        if action == "paths-info":
            return self.json(request, [entry for entry in entries(files) if entry["path"] in form["paths"]])
        assert action == "resolve", request.path
        return self.file(request, files[path], commit) if path in files else self.refuse(request, 404, "EntryNotFound")

    def file(self, request: http.server.BaseHTTPRequestHandler, content: bytes, commit: str) -> None:
        if status := self.before_file():
            return self.refuse(request, status, "")
        headers = {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, size = 200, len(content)
        if wanted := request.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or size - 1), size - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            status, content = 206, content[start : end + 1]
        if request.command != "HEAD":
            self.file_bytes += len(content)
        self.send(request, status, content, headers)

    def json(self, request: http.server.BaseHTTPRequestHandler, value: object) -> None:
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, request: http.server.BaseHTTPRequestHandler, status: int, code: str) -> None:
        self.send(request, status, b"", {"X-Error-Code": code} if code else {})

    def send(
        self, request: http.server.BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """What the hub says about files and the folders above them."""
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    return [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders] + [
        {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)} for path, content in files.items()
    ]


def articles(seed: int, count: int) -> list[str]:
    """Texts of 10 kB that don't compress."""
    return [random.Random(seed * 1000 + i).randbytes(5000).hex() for i in range(count)]


def parquet(texts: list[str]) -> bytes:
    """A parquet file of row groups of 20 texts, 200 kB, beside a column as large that nobody needs."""
    table = pa.table({"url": articles(77, len(texts)), "text": texts})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=20, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


FIRST, SECOND, NEWER = articles(1, 200), articles(2, 20), articles(3, 4)
FIRST_FILE, SECOND_FILE, NEWER_FILE = parquet(FIRST), parquet(SECOND), parquet(NEWER)
FOLDER = "hf://datasets/owner/name/fr"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    files = {"fr/b.parquet": SECOND_FILE, "fr/a.parquet": FIRST_FILE, "fr/README.md": b"-", "README.md": b"-"}
    server.repositories["owner/name"] = {
        COMMITS[0]: {**files, "en/a.parquet": NEWER_FILE, "no-text/a.txt": b"-"},
        COMMITS[1]: {"fr/sub/c.parquet": NEWER_FILE},
    }
    server.branches = {"main": COMMITS[0], "newer": COMMITS[1], "refs/convert/parquet": COMMITS[1]}
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint + "/")
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    yield server
    server.stop()


def process(spec: str, **environment: str) -> subprocess.Popen[str]:
    """A process that prints the digest of a corpus, or the sentence with which it is refused."""
    code = (
        "import hashlib, sys; from jaxlm.data.documents import open_corpus, InputError\n"
        "try: print(hashlib.sha256('|'.join(open_corpus(sys.argv[1]).documents()).encode()).hexdigest())\n"
        "except InputError as error: print(error)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, spec],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def answer_of(spec: str, **environment: str) -> str:
    out, _ = process(spec, **environment).communicate(timeout=60)
    return out.strip()


def digest(texts: list[str]) -> str:
    return hashlib.sha256("|".join(texts).encode()).hexdigest()


def test_hub_gives_the_documents_and_asks_once(hub: Hub) -> None:
    corpus = open_corpus(FOLDER)
    assert [file.path for file in corpus.files] == ["fr/a.parquet", "fr/b.parquet"]
    assert hub.file_bytes == 0, "opening a corpus must download nothing of it"
    assert list(corpus.documents()) == FIRST + SECOND
    text_bytes = sum(map(len, FIRST + SECOND))
    assert hub.file_bytes < 1.2 * text_bytes, "the other column, as large as the text, must stay on the server"
    assert sum("resolve" in request for request in hub.requests) <= 11 + 2 * 2, "a range a row group, and the footers"
    served = hub.file_bytes
    assert list(corpus.documents()) == FIRST + SECOND
    assert read(FOLDER) == FIRST + SECOND
    assert answer_of(FOLDER) == digest(FIRST + SECOND)
    assert hub.file_bytes == served, "a second pass, in a new process too, must download nothing"
    assert not list(cache_directory().rglob("*.tmp*")) and not list(cache_directory().rglob("*.pkl"))


def test_max_bytes_downloads_a_part(hub: Hub) -> None:
    assert read(FOLDER, max_bytes=350_000) == FIRST[:35]
    assert 400_000 <= hub.file_bytes < 700_000, f"two row groups of 200 kB hold it, not {hub.file_bytes} bytes"
    assert len(FIRST_FILE) > 4_000_000
    served = hub.file_bytes
    assert read(FOLDER, max_bytes=300_000) == FIRST[:30]
    assert hub.file_bytes == served
    assert read(FOLDER, max_bytes=500_000) == FIRST[:50]
    assert hub.file_bytes < served + 300_000


def test_revisions(hub: Hub) -> None:
    assert read("hf://datasets/owner/name@newer") == NEWER
    assert read("hf://datasets/owner/name@refs/convert/parquet/fr") == NEWER
    assert read("hf://datasets/owner/name@refs%2Fconvert%2Fparquet/fr/") == NEWER
    assert read(f"hf://datasets/owner/name@{COMMITS[1]}/fr/sub") == NEWER
    assert read("hf://datasets/owner/name@main/en/a.parquet") == NEWER
    before = open_corpus(FOLDER)
    stamp = json.loads(json.dumps(before.stamp()))
    assert stamp["files"][0] == {
        "repository": "owner/name",
        "revision": COMMITS[0],
        "path": "fr/a.parquet",
        "size": len(FIRST_FILE),
        "oid": git_oid(FIRST_FILE),
    }
    hub.branches["main"] = COMMITS[1]
    assert next(before.documents()) == FIRST[0], "an open corpus stays at its commit when the branch moves on"
    assert read(FOLDER) == NEWER
    assert open_corpus(FOLDER).stamp() != stamp == before.stamp()


def test_wikipedia_is_pinned(hub: Hub) -> None:
    pinned = PINNED_REVISIONS["wikimedia/wikipedia"]
    hub.repositories["wikimedia/wikipedia"] = {
        pinned: {"20231101.fr/train-00000-of-00001.parquet": NEWER_FILE},
        COMMITS[0]: {"20231101.fr/train-00000-of-00001.parquet": SECOND_FILE},
    }
    assert read("hf://datasets/wikimedia/wikipedia/20231101.fr") == NEWER
    assert read("hf://datasets/wikimedia/wikipedia@main/20231101.fr") == SECOND


def test_killed_while_downloading(hub: Hub) -> None:
    reached, release = threading.Event(), threading.Event()

    def wait_at_the_fifth() -> None:
        if sum("resolve" in request for request in hub.requests) >= 5:
            reached.set()
            release.wait(20)

    hub.before_file = wait_at_the_fifth
    reader = process(FOLDER)
    assert reached.wait(20)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    release.set()
    served = hub.file_bytes
    assert read(FOLDER) == FIRST + SECOND
    assert hub.file_bytes < served + len(FIRST_FILE) // 2, "what the killed process had read must not be read again"


def test_failure_while_downloading_leaves_no_wrong_text(hub: Hub) -> None:
    hub.before_file = lambda: 403 if sum("resolve" in request for request in hub.requests) >= 5 else None
    refusal(FOLDER, "owner/name", "403", "`builtin`")
    hub.before_file = lambda: None
    assert read(FOLDER) == FIRST + SECOND


def test_cache_cut_short_is_read_again(hub: Hub) -> None:
    assert read("hf://datasets/owner/name/en") == NEWER
    for path in cache_directory().rglob("*.*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert read("hf://datasets/owner/name/en") == NEWER


def test_out_of_reach(hub: Hub) -> None:
    assert read(FOLDER, max_bytes=1) == FIRST[:1]
    hub.stop()
    start = time.monotonic()
    refusal("hf://datasets/owner/name/en", "owner/name", "refused", ".parquet", "`builtin`")
    refusal(f"hf://datasets/owner/name@{COMMITS[1]}", "owner/name", "refused", ".parquet", "`builtin`")
    refusal("hf://datasets/owner/other", "owner/other", "refused", ".parquet", "`builtin`")
    assert read(FOLDER, max_bytes=1) == FIRST[:1], "what is cached needs no hub, though `main` may have moved"
    refusal(FOLDER, "refused", "`builtin`")
    assert time.monotonic() - start < 10
    assert hub.file_bytes < len(FIRST_FILE)


def test_offline_and_unknown_host(hub: Hub) -> None:
    assert read(FOLDER) == FIRST + SECOND
    requests = len(hub.requests)
    assert answer_of(FOLDER, HF_HUB_OFFLINE="1") == digest(FIRST + SECOND)
    sentence = answer_of("hf://datasets/owner/name/en", HF_HUB_OFFLINE="1")
    assert "offline" in sentence and "`builtin`" in sentence and "\n" not in sentence
    assert len(hub.requests) == requests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
        refusal("hf://datasets/owner/name/en", "owner/name", "`builtin`")


def test_server_that_never_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm.data.hub._HUB_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        refusal(FOLDER, "owner/name", "timed out", "`builtin`")


def test_what_the_hub_refuses(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal("hf://datasets/owner/nothing/fr", "owner/nothing", "HF_TOKEN", "`builtin`")
    refusal("hf://datasets/owner/gated", "owner/gated", "gated", "HF_TOKEN", "`builtin`")
    refusal("hf://datasets/owner/name@never/fr", "'never'", "revision", "`builtin`")
    refusal(f"hf://datasets/owner/name@{'3' * 40}/fr", "3333", "revision", "`builtin`")
    refusal("hf://datasets/owner/name/de", "'de'")
    refusal("hf://datasets/owner/name/no-text", "no .parquet file")
    refusal("hf://datasets/owner/name/README.md", "no .parquet file")
    refusal("hf://datasets/owner/na..me", "owner/na..me", "`builtin`")
    for spec in ("hf://datasets/owner", "hf://owner/name", "hf://datasets/", "hf://datasets/owner/name@/fr"):
        refusal(spec, "OWNER/NAME")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"titre": ["a"], "texte": ["b"]}), sink)
    hub.repositories["owner/bad"] = {
        COMMITS[0]: {"a.parquet": b"no table" * 9, "b.parquet": sink.getvalue().to_pybytes()}
    }
    refusal("hf://datasets/owner/bad/a.parquet", "a.parquet", "not a whole parquet file")
    refusal("hf://datasets/owner/bad/b.parquet", "b.parquet", "titre, texte")
    monkeypatch.setenv("JAXLM_CACHE", "/dev/null/cache")
    refusal(FOLDER, "/dev/null/cache", "JAXLM_CACHE")
