"""Kernels: Python functions over numpy arrays that numba compiles to machine code.

A kernel allocates nothing and calls no Python, so it runs without the interpreter's lock. Its machine code is kept on
disk, so that it is compiled once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import config, event
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = not config.DISABLE_JIT
_POINTED_TO: list[Any] = []  # by foreign code, so they must stay
_UNUSED_SECONDS = 30 * 24 * 3600.0


def _cache_folder() -> str | None:
    """Where compiled kernels are kept, or None if nothing can be written where they could be.

    Numba looks at the file of a kernel alone; the name of this folder says what is in all files that have some.
    """
    sources = hashlib.sha256(version("jaxlib").encode())  # whose interface is part of the kernels that it calls
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        if b"machine_code" in source:
            sources.update(source)
    for parent in (
        config.CACHE_DIR or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm",
        Path(__file__).parent / "__pycache__",
    ):
        try:
            folder = Path(parent).expanduser() / "kernels" / sources.hexdigest()[:16]
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)  # when it was last used
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, RuntimeError):
            continue
        if is_new:
            _remove_unused(folder.parent)
        return str(folder)
    return None


def _remove_unused(parent: Path) -> None:
    """Removes the kernels of other versions that no process has begun to use for a month."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if re.fullmatch("[0-9a-f]{16}", folder.name) and time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


class _Cache(FunctionCache):
    """Numba's cache of a kernel; what was cut short, by a full disk say, is compiled anew instead of raising."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # what a damaged pickle raises can be anything
            self.flush()
            return None


class _Notice(event.Listener):
    """Says once, on the error stream, that kernels are being compiled: only when they are, not when they are loaded."""

    given = False

    def on_start(self, event: event.Event) -> None:
        module = event.data["dispatcher"].py_func.__module__ or ""  # a function that was made by others may have none
        if module.startswith(f"{__package__}.") and not _Notice.given:
            _Notice.given = True
            print(
                "jaxlm: compiling kernels for this machine, and keeping them (at first some 20 seconds) ...",
                file=sys.stderr,
            )

    def on_end(self, event: event.Event) -> None:
        pass


def kernel(function: Function) -> Function:
    """Compiles a function at its first call, or takes it from the cache on disk; as it is under NUMBA_DISABLE_JIT=1."""
    return _compile(function, nogil=True)


def inlined(function: Function) -> Function:
    """A kernel that becomes part of those that call it, for what is called often.

    A call of one that isn't hands on each array as seven values or more.
    """
    return _compile(function, nogil=True, forceinline=True)


def expanded(function: Function) -> Function:
    """As `inlined`, but before types are found, so that constants stay constants, and that it may return an array."""
    return _compile(function, nogil=True, inline="always")


def _compile(function: Function, **options: Any) -> Function:
    if not COMPILED:
        return np.errstate(over="ignore")(function)  # products are meant to wrap around
    # Without reference counts an array costs nothing to pass on; they would be most of the time of a short loop.
    options["_nrt"] = False
    dispatcher = numba.njit(**options)(function)
    _keep(dispatcher, function)
    return dispatcher


def _keep(compiled: Any, function: Callable[..., Any]) -> None:
    """Gives what numba makes of a function its cache on disk; without a folder, every process compiles for itself."""
    if _CACHE_FOLDER is None:
        return
    before, config.CACHE_DIR = config.CACHE_DIR, _CACHE_FOLDER
    try:
        compiled._cache = _Cache(function)
    finally:
        config.CACHE_DIR = before


if COMPILED:
    _CACHE_FOLDER = _cache_folder()
    event.register("numba:compile", _Notice())


def function_pointer(function: Callable[..., Any], signature: Any) -> int:
    """The address of a kernel that foreign code calls, compiled right away or taken from the cache on disk."""
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, {"nopython": True, "_nrt": False})
    _keep(compiled, function)
    compiled.compile()
    _POINTED_TO.append(compiled)
    return int(compiled.address)
