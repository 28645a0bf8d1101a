"""Documents: text files, tables, the Hugging Face hub and the built-in articles as one iterator of `str`.

Nothing is read whole except a single document, or a single row group of a file on the hub.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from jaxlm.data.hub import ALTERNATIVE, BATCH_ROWS, HubFile, hub_files, open_parquet, parquet_errors, parquet_texts
from jaxlm.tokenizers.base import InputError, one_line, shown

_MOST_BYTES = 1 << 27  # of a document or a line; a small compressed file can hold one that fills the memory
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
BUILTIN = Path(__file__).parent / "builtin"


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
            raise InputError(f"The corpus {shown(self.spec, 200)} holds no text; give one that does.")

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
        return Corpus(spec, hub_files(spec), max_bytes)
    whole = spec == "builtin"
    paths = _local_paths(str(BUILTIN) if whole else spec)
    # Strings, not paths, are sorted: how `Path` orders "a-b" and "a/b" is not the same in all Python versions.
    return Corpus(spec, tuple(LocalFile(Path(path), whole) for path in sorted(paths)), max_bytes)


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
                file = open_parquet(handle, str(self.path), buffer_size=1 << 20)
                with parquet_errors(str(self.path)):
                    yield from parquet_texts(file.iter_batches(BATCH_ROWS, columns=["text"]), str(self.path))
            elif name.endswith(".jsonl.gz"):
                with gzip.open(handle) as unpacked:
                    yield from _jsonl_texts(_lines(unpacked, self.path), self.path)
            elif name.endswith(".jsonl"):
                yield from _jsonl_texts(_lines(handle, self.path), self.path)
            else:
                lines = _lines(handle, self.path)
                for document in [lines] if self.whole else _cut(lines):
                    yield "".join(_bounded(document, self.path)).strip("\r\n")

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
        raise InputError(
            f"{path} is not a whole gzip file ({one_line(str(error))}); download or compress it again."
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions, or give another file."
        ) from None


def _local_paths(spec: str) -> set[str]:
    """Absolute paths of the supported files that a path or a glob names."""
    kinds = f"the supported kinds are {', '.join(SUFFIXES)}"
    if not spec.strip():
        raise InputError(f"The corpus is an empty name; {ALTERNATIVE}.")
    name = os.path.abspath(os.path.expanduser(spec))
    found: Iterable[str]
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # A name that exists is taken as it is, so that brackets in it need no escape.
        if not any(character in name for character in "*?["):
            raise InputError(
                f"There is no file or folder {shown(spec, 200)}; check the path, or use `builtin`."
            ) from None
        found = filter(os.path.isfile, glob.iglob(name, recursive=True))
    except OSError as error:
        raise InputError(
            f"{shown(spec, 200)} cannot be read ({error.strerror}); check the path and its permissions."
        ) from None
    else:
        if stat.S_ISDIR(mode):
            found = _walk(name)
        elif name.lower().endswith(SUFFIXES):
            found = [name]
        else:
            raise InputError(f"{shown(spec, 200)} is of an unsupported kind; {kinds}.")
    paths = {path for path in found if path.lower().endswith(SUFFIXES)}
    if not paths:
        raise InputError(f"{shown(spec, 200)} names no file of documents; {kinds}.")
    for path in sorted(paths):
        with _reading(Path(path)):
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, and a device may have no end
                raise InputError(f"{path} is no regular file; copy its text into one.")
    return paths


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); check its permissions.") from None

    # A subfolder that cannot be listed must not just go missing, as it would with `Path.rglob`.
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _lines(handle: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[str]:
    """Lines with their ends, `\\n` alone ending a line; a byte order mark is no text."""
    offset = 0
    for line in iter(lambda: handle.readline(_MOST_BYTES + 1), b""):
        if len(line) > _MOST_BYTES:
            raise _too_long(path)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8: the byte at offset {offset + error.start} is 0x{line[error.start]:02x}; "
                "convert the file to UTF-8."
            ) from None
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(line)


def _bounded(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The lines of one document. Raises InputError if it is too long."""
    size = 0
    for line in lines:
        size += len(line)
        if size > _MOST_BYTES:
            raise _too_long(path)
        yield line


def _too_long(path: Path) -> InputError:
    return InputError(
        f"{path} has a document or a line of more than {_MOST_BYTES / 1e6:.0f} MB; cut it into several documents."
    )


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
