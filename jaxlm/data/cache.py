"""What is kept on disk between runs: token shards, surveys, and what was read from the hub."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.tokenizers.base import InputError, replacing


def cache_directory() -> Path:
    """The folder for all of it: the environment variable JAXLM_CACHE, or `~/.cache/jaxlm`."""
    return Path(os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm").expanduser()


def load_json(path: Path) -> Any:
    """The content of a JSON file, or None if it isn't there or was cut short."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def save_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all. Raises InputError if the cache can't be written."""
    with caching(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def caching(path: Path) -> Iterator[Path]:
    """`replacing`, for a file of the cache. Raises InputError if the cache can't be written."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise_not_writable(error)


def raise_not_writable(error: OSError) -> NoReturn:
    """Raises InputError for a place that can't be written; a full disk is no fault of it, and is raised as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    raise InputError(
        f"The cache {cache_directory()} can't be written ({error.strerror or error}); set the environment variable "
        "JAXLM_CACHE to a folder that can."
    ) from None
