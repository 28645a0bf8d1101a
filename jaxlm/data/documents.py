"""Documents: text files, tables, the Hugging Face hub and the built-in articles as one iterator of `str`.

Nothing is read whole except a single document, or a single row group of a file on the hub. Row groups that were read
from the hub stay on disk, so a second pass, in this process or in another, asks the hub for no text again.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import os
import re
import stat
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

from jaxlm.tokenizers.base import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import HfApi

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
BUILTIN = Path(__file__).parent / "builtin"

# Repositories that are read at one commit unless the spec names another, so that published figures stay comparable.
PINNED_REVISIONS = {"wikimedia/wikipedia": "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"}

# Branch names hold no slash here, apart from the hub's own `refs/convert/parquet` and `refs/pr/1`.
_HUB_SPEC = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/@]+|[^/@]+))?(?:/(.*))?")
_HUB_TIMEOUT = 10.0  # seconds; the hub's client would wait for ever
_ALTERNATIVE = "give a local .parquet, .jsonl or .txt file, or `builtin`"
_BATCH_ROWS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Where documents come from. Nothing has been read yet except names.

    Attributes:
      spec: what `open_corpus` was given.
      files: the sources, sorted by path: local files, or files of the hub at one commit.
      max_bytes: UTF-8 bytes of text after which the corpus ends, with the document that reaches them; None for no end.
    """

    spec: str
    files: tuple[LocalFile | HubFile, ...]
    max_bytes: int | None = None

    def documents(self) -> Iterator[str]:
        """The documents in order, those of only whitespace left out. Each call starts again.

        Raises:
          InputError: a file that cannot be read as what its name says, the hub out of reach, or no text at all.
        """
        total_bytes = 0
        for file in self.files:
            for text in file.texts():
                if not text or text.isspace():
                    continue
                yield text
                total_bytes += len(text.encode())
                if self.max_bytes is not None and total_bytes >= self.max_bytes:
                    return
        if total_bytes == 0:
            raise InputError(f"The corpus {self.spec!r} holds no text; give one that does.")

    def stamp(self) -> dict[str, Any]:
        """A cheap identity, JSON-able, of names, sizes (bytes) and times (ns): equal stamps mean the same documents.

        Raises:
          InputError: a local file is gone.
        """
        return {"max_bytes": self.max_bytes, "files": [file.identity() for file in self.files]}


def open_corpus(spec: str, *, max_bytes: int | None = None) -> Corpus:
    """The corpus that `spec` names.

    Args:
      spec: `builtin`; a .txt file, cut into documents at blank lines; a .jsonl, .jsonl.gz or .parquet file with a field
        `text`; a folder of these, with all below it but hidden files; a glob, `**` included; or
        `hf://datasets/OWNER/NAME[@REVISION][/FOLDER_OR_FILE]` for the parquet files of a dataset on the hub.
      max_bytes: ends the corpus after the document with which its UTF-8 text reaches this many bytes.

    Raises:
      InputError: nothing is there, nothing of a supported kind, the hub out of reach, or `max_bytes` below 1.
    """
    if max_bytes is not None and max_bytes < 1:
        raise InputError(f"max_bytes is {max_bytes}; give at least 1, or leave it out to read everything.")
    if spec.startswith("hf://"):
        return Corpus(spec, _hub_files(spec), max_bytes)
    whole = spec == "builtin"
    paths = _local_paths(str(BUILTIN) if whole else spec)
    # Strings, not paths, are sorted: how `Path` orders "a-b" and "a/b" is not the same in all Python versions.
    return Corpus(spec, tuple(LocalFile(Path(path), whole) for path in sorted(paths)), max_bytes)


def cache_directory() -> Path:
    """Where downloads are kept: the environment variable JAXLM_CACHE, or `~/.cache/jaxlm`."""
    return Path(os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm").expanduser()


# ---- local files


@dataclass(frozen=True)
class LocalFile:
    """A file of a supported kind. `whole` makes a .txt one document, whatever blank lines it has."""

    path: Path
    whole: bool = False

    def texts(self) -> Iterator[str]:
        """Its documents in order, streamed. Raises InputError if it cannot be read as what its name says."""
        name = self.path.name.lower()
        with _reading(self.path), self.path.open("rb") as handle:
            if name.endswith(".parquet"):
                # With a buffer a row group is read by the page, so a file that is one huge row group is no trouble.
                file = _open_parquet(handle, str(self.path), buffer_size=1 << 20)
                with _parquet_errors(str(self.path)):
                    yield from _texts(file.iter_batches(_BATCH_ROWS, columns=["text"]), str(self.path))
            elif name.endswith(".jsonl.gz"):
                with gzip.open(handle) as unpacked:
                    yield from _jsonl_texts(_lines(unpacked, self.path), self.path)
            elif name.endswith(".jsonl"):
                yield from _jsonl_texts(_lines(handle, self.path), self.path)
            else:
                lines = _lines(handle, self.path)
                for document in [lines] if self.whole else _cut(lines):
                    yield "".join(document).strip("\r\n")

    def identity(self) -> dict[str, Any]:
        """Path, size (bytes), time of the last change (ns), way of cutting. Raises InputError if the file is gone."""
        with _reading(self.path):
            status = self.path.stat()
        return {"path": str(self.path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "whole": self.whole}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"There is no file {path}; check the path.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}); download or compress it again.") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions, or give another file."
        ) from None


def _local_paths(spec: str) -> set[str]:
    """Absolute paths of the supported files that a path or a glob names."""
    kinds = f"the supported kinds are {', '.join(SUFFIXES)}"
    if not spec.strip():
        raise InputError(f"The corpus is an empty name; {_ALTERNATIVE}.")
    name = os.path.abspath(os.path.expanduser(spec))
    found: Iterable[str]
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # A name that exists is taken as it is, so that brackets in it need no escape.
        if not any(character in name for character in "*?["):
            raise InputError(f"There is no file or folder {spec!r}; check the path, or use `builtin`.") from None
        found = filter(os.path.isfile, glob.iglob(name, recursive=True))
    except OSError as error:
        raise InputError(f"{spec!r} cannot be read ({error.strerror}); check its permissions.") from None
    else:
        if stat.S_ISDIR(mode):
            found = _walk(name)
        elif name.lower().endswith(SUFFIXES):
            found = [name]
        else:
            raise InputError(f"{spec!r} is of an unsupported kind; {kinds}.")
    paths = {path for path in found if path.lower().endswith(SUFFIXES)}
    if not paths:
        raise InputError(f"{spec!r} names no file of documents; {kinds}.")
    return paths


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); check its permissions.") from None

    # A subfolder that cannot be listed must not just go missing, as it would with `Path.rglob`.
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _lines(handle: Iterable[bytes], path: Path) -> Iterator[str]:
    """Lines with their ends, `\\n` alone ending a line; a byte order mark is no text."""
    offset = 0
    for line in handle:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8: the byte at offset {offset + error.start} is 0x{line[error.start]:02x}; "
                "convert the file to UTF-8."
            ) from None
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(line)


def _cut(lines: Iterable[str]) -> Iterator[Iterable[str]]:
    return (document for blank, document in groupby(lines, str.isspace) if not blank)


def _jsonl_texts(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = _jsonl_text(line)
        except ValueError as problem:
            raise InputError(
                f'{path}, line {number} {problem}; write each document as {{"text": "..."}} on its own line.'
            ) from None
        yield text


def _jsonl_text(line: str) -> str:
    """The field `text` of a line of JSON. Raises ValueError with what is wrong with the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError("has no field `text`")
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError("has a field `text` that is no string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds the lone surrogate U+{ord(text[error.start]):04X} in its `text`") from None
    return text


# ---- parquet, wherever it lies


@contextmanager
def _parquet_errors(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Arrow says with a plain OSError that it cannot decode; the subclasses come from the disk or the network.
        if isinstance(error, OSError) and type(error) is not OSError:
            raise
        raise InputError(
            f"{name} is not a whole parquet file ({_reason(error)}); download or write it again."
        ) from None


def _open_parquet(handle: IO[bytes], name: str, buffer_size: int = 0) -> pq.ParquetFile:
    """A parquet file with a column `text` of strings. Raises InputError if it is none or has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _parquet_errors(name):
        file = pq.ParquetFile(handle, buffer_size=buffer_size, pre_buffer=False)
        schema = file.schema_arrow
    if "text" not in schema.names:
        raise InputError(f"{name} has no column `text`, only {', '.join(schema.names)}; rename the one that holds it.")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{name} has a column `text` of type {kind}; it must hold strings.")
    return file


def _texts(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[str]:
    """The strings of the only column of `batches`, nulls left out."""
    row = 0
    for batch in batches:
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            raise InputError(
                f"{name} holds text that is not UTF-8 in rows {row} to {row + len(batch) - 1}; write it again as UTF-8."
            ) from None
        row += len(batch)
        yield from (text for text in texts if text is not None)


# ---- the hub


class _HubUnreachable(InputError):
    """The hub gave no answer, so what is known from earlier may stand in for one."""


@dataclass(frozen=True)
class HubFile:
    """A parquet file of a dataset on the hub: `size` in bytes, `oid` the git object id of its content."""

    repository: str
    revision: str
    path: str
    size: int
    oid: str

    def texts(self) -> Iterator[str]:
        """Its documents in order, by row group: from the cache, or by range requests that fill it.

        Raises:
          InputError: the hub out of reach for what isn't cached, no column `text`, or a cache that cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"hf://datasets/{self.repository}@{self.revision}/{self.path}"
        cached = _cache_path("row_groups", self.repository, self.oid)
        with ExitStack() as stack:

            @cache
            def remote() -> pq.ParquetFile:
                from huggingface_hub import HfFileSystem

                # Read-ahead would fetch row groups and columns that nobody asked for. A file system from fsspec's
                # cache of instances knows the repository already, and first learns from a read, half a minute of
                # retries later, that the hub is out of reach.
                hub = HfFileSystem(endpoint=_endpoint(), skip_instance_cache=True)
                return _open_parquet(stack.enter_context(hub.open(name, cache_type="none", size=self.size)), name)

            def row_group(index: int) -> pa.Table:
                path = cached / f"{index:05d}.parquet"
                try:
                    with pq.ParquetFile(path) as file:
                        return file.read()
                except (OSError, pa.ArrowException):  # not there yet, or cut short when the machine went down
                    pass
                with _hub_errors(self.repository, self.revision), _parquet_errors(name):
                    table = remote().read_row_group(index, columns=["text"])
                with _replacing(path) as temporary:
                    pq.write_table(table, temporary, compression="zstd")
                return table

            count = _load_json(cached / "count.json")
            if count is None:
                with _hub_errors(self.repository, self.revision):
                    count = remote().num_row_groups
                _save_json(cached / "count.json", count)
            for index in range(count):
                yield from _texts(row_group(index).to_batches(_BATCH_ROWS), f"{name}, row group {index}")

    def identity(self) -> dict[str, Any]:
        """What the file is on the hub, at its commit."""
        return asdict(self)


def _hub_files(spec: str) -> tuple[HubFile, ...]:
    """The parquet files that an hf:// spec names, sorted by path, at one commit.

    A listing is kept on disk, since it never changes at one commit; so is the commit of a branch, which is used again
    only when the hub is out of reach.
    """
    from huggingface_hub import HfApi

    match = _HUB_SPEC.fullmatch(spec)
    if not match:
        raise InputError(f"{spec!r} is no dataset of the hub; write hf://datasets/OWNER/NAME[@REVISION][/FOLDER].")
    repository, revision, folder = match[1], match[2], (match[3] or "").strip("/")
    revision = unquote(revision) if revision else PINNED_REVISIONS.get(repository, "main")
    api = HfApi(endpoint=_endpoint())
    commit = revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        known = _cache_path("commits", repository, revision).with_suffix(".json")
        try:
            commit = _commit(api, repository, revision)
            _save_json(known, commit)
        except _HubUnreachable:
            commit = _load_json(known)
            if commit is None:
                raise
            logger.warning("The hub is out of reach; %s of %s is taken to be %s still.", revision, repository, commit)
    listing = _cache_path("listings", repository, commit, folder).with_suffix(".json")
    entries = _load_json(listing)
    if entries is None:
        entries = _list_parquet(api, repository, commit, folder)
        _save_json(listing, entries)
    if not entries:
        raise InputError(f"{spec} holds no .parquet file; name a folder that does, or {_ALTERNATIVE}.")
    return tuple(HubFile(repository, commit, *entry) for entry in sorted(entries))


def _commit(api: HfApi, repository: str, revision: str) -> str:
    with _hub_errors(repository, revision):
        return str(api.dataset_info(repository, revision=revision, timeout=_HUB_TIMEOUT).sha)


def _list_parquet(api: HfApi, repository: str, commit: str, folder: str) -> list[list[Any]]:
    """[path, size, oid] of each parquet file at or below `folder`."""
    from huggingface_hub.hf_api import RepoFile

    # Asked first because it is the one request with a timeout and without half a minute of retries.
    _commit(api, repository, commit)
    with _hub_errors(repository, commit):
        entries = api.get_paths_info(repository, folder, revision=commit, repo_type="dataset") if folder else []
        if folder and not entries:
            raise InputError(f"The dataset {repository} has no {folder!r} at revision {commit}; check its page.")
        if not any(isinstance(entry, RepoFile) for entry in entries):
            entries = list(
                api.list_repo_tree(repository, folder or None, recursive=True, revision=commit, repo_type="dataset")
            )
    files = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path.endswith(".parquet")]
    return [[file.path, file.size, file.blob_id] for file in files]


def _endpoint() -> str | None:
    """The server to ask; None for the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


@contextmanager
def _hub_errors(repository: str, revision: str) -> Iterator[None]:
    # The hub's errors derive from the HTTPError of its HTTP library, whose name differs between versions.
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        problem = f"The dataset {repository} is gated: accept its terms on its page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = f"The hub shows no dataset {repository}: check the name, set HF_TOKEN if it is private"
    except errors.RevisionNotFoundError:
        problem = f"The dataset {repository} has no revision {revision!r}: check the name"
    except (errors.EntryNotFoundError, FileNotFoundError):
        problem = f"The dataset {repository} lacks a file that it listed at revision {revision}: check its page"
    except errors.HFValidationError as error:
        problem = f"The hub has no dataset {repository} ({_reason(error)}): check the name"
    except (errors.HTTPError, OSError, json.JSONDecodeError) as error:
        raise _HubUnreachable(
            f"The Hugging Face hub did not deliver the dataset {repository} ({_reason(error)}); check the network, or "
            f"{_ALTERNATIVE}."
        ) from None
    else:
        return
    raise InputError(f"{problem}, or {_ALTERNATIVE}.") from None


def _reason(error: Exception) -> str:
    """The first sentence of what an error says, without its full stop."""
    return re.split(r"\.?\n|\. ", str(error).strip())[0].rstrip(".") or type(error).__name__


# ---- what is kept of the hub


def _cache_path(kind: str, *key: str) -> Path:
    # A digest, because names on the hub can be longer than a file name may be, and need not be harmless ones.
    return cache_directory() / "hub" / kind / hashlib.sha256("\n".join(key).encode()).hexdigest()


def _load_json(path: Path) -> Any:
    """The content of a JSON file, or None if it isn't there or was cut short."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _save_json(path: Path, value: Any) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(value))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"The cache {cache_directory()} cannot be written ({error.strerror or error}); set the environment "
            "variable JAXLM_CACHE to a folder that can."
        ) from None
