"""Parquet files, on disk or on the Hugging Face hub, row group by row group.

Row groups that were read from the hub stay on disk, so a second pass, in this process or in another, asks the hub for
no text again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

from jaxlm.data.cache import cache_directory, caching, load_json, save_json
from jaxlm.tokenizers.base import InputError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import HfApi

# Repositories that are read at one commit unless the spec names another, so that published figures stay comparable.
PINNED_REVISIONS = {"wikimedia/wikipedia": "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"}

# Branch names hold no slash here, apart from the hub's own `refs/convert/parquet` and `refs/pr/1`.
_HUB_SPEC = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/@]+|[^/@]+))?(?:/(.*))?")
_HUB_TIMEOUT = 10.0  # seconds; the hub's client would wait for ever
ALTERNATIVE = "give a local .parquet, .jsonl or .txt file, or `builtin`"
BATCH_ROWS = 64

logger = logging.getLogger(__name__)


# ---- parquet, wherever it lies


@contextmanager
def parquet_errors(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow says with a plain OSError that it cannot decode; the subclasses come from the disk or the network. A
        # UnicodeDecodeError is about the name of a column.
        if isinstance(error, OSError) and type(error) is not OSError:
            raise
        raise InputError(
            f"{name} is not a whole parquet file ({_reason(error)}); download or write it again."
        ) from None


def open_parquet(handle: IO[bytes], name: str, buffer_size: int = 0) -> pq.ParquetFile:
    """A parquet file with a column `text` of strings. Raises InputError if it is none or has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with parquet_errors(name):
        file = pq.ParquetFile(handle, buffer_size=buffer_size, pre_buffer=False)
        schema = file.schema_arrow
    if "text" not in schema.names:
        names = one_line(", ".join(schema.names))
        raise InputError(f"{name} has no column `text`, only {names}; rename the one that holds it.")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{name} has a column `text` of type {one_line(str(kind))}; it must hold strings.")
    return file


def parquet_texts(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[str]:
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


class _HubUnreachableError(InputError):
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
                return open_parquet(stack.enter_context(hub.open(name, cache_type="none", size=self.size)), name)

            def row_group(index: int) -> pa.Table:
                path = cached / f"{index:05d}.parquet"
                try:
                    with pq.ParquetFile(path) as file:
                        return file.read()
                except (OSError, pa.ArrowException):  # not there yet, or cut short when the machine went down
                    pass
                with _hub_errors(self.repository, self.revision), parquet_errors(name):
                    table = remote().read_row_group(index, columns=["text"])
                with caching(path) as temporary:
                    pq.write_table(table, temporary, compression="zstd")
                return table

            count = load_json(cached / "count.json")
            if type(count) is not int:
                with _hub_errors(self.repository, self.revision):
                    count = remote().num_row_groups
                save_json(cached / "count.json", count)
            for index in range(count):
                yield from parquet_texts(row_group(index).to_batches(BATCH_ROWS), f"{name}, row group {index}")

    def identity(self) -> dict[str, Any]:
        """What the file is on the hub, at its commit."""
        return asdict(self)


def hub_files(spec: str) -> tuple[HubFile, ...]:
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
            save_json(known, commit)
        except _HubUnreachableError:
            commit = load_json(known)
            if commit is None:
                raise
            logger.warning("The hub is out of reach; %s of %s is taken to be %s still.", revision, repository, commit)
    listing = _cache_path("listings", repository, commit, folder).with_suffix(".json")
    entries = load_json(listing)
    if entries is None:
        entries = _list_parquet(api, repository, commit, folder)
        save_json(listing, entries)
    if not entries:
        raise InputError(f"{spec} holds no .parquet file; name a folder that does, or {ALTERNATIVE}.")
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
        raise _HubUnreachableError(
            f"The Hugging Face hub did not deliver the dataset {repository} ({_reason(error)}); check the network, or "
            f"{ALTERNATIVE}."
        ) from None
    else:
        return
    raise InputError(f"{problem}, or {ALTERNATIVE}.") from None


def _reason(error: Exception) -> str:
    """The first sentence of what an error says, without its full stop."""
    return one_line(re.split(r"\.?\n|\. ", str(error).strip())[0].rstrip(".")) or type(error).__name__


def _cache_path(kind: str, *key: str) -> Path:
    # A digest, because names on the hub can be longer than a file name may be, and need not be harmless ones.
    return cache_directory() / "hub" / kind / hashlib.sha256("\n".join(key).encode()).hexdigest()
