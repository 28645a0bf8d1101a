"""Threads that work beside the calling one, each on a core of its own where the system lets it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers(num_threads: int) -> ThreadPoolExecutor:
    """A pool of one thread less than that, for work that the calling thread does, too.

    They stay off the core that the calling thread is on now, if there is another one. Linux may else give a thread that
    was just made the core of a busy one, and takes milliseconds to notice.
    """
    return ThreadPoolExecutor(max(1, num_threads - 1), initializer=_leave_core, initargs=(_own_core(),))


def in_shares(pool: ThreadPoolExecutor, function: Callable[[int], _Result], number: int) -> list[_Result]:
    """The function's results for 0 to `number` - 1, the first from the calling thread and the others from the pool."""
    calls = [pool.submit(function, index) for index in range(1, number)]
    return [function(0), *(call.result() for call in calls)]


def _own_core() -> int | None:
    return ctypes.CDLL(None).sched_getcpu() if hasattr(os, "sched_setaffinity") else None


def _leave_core(core: int | None) -> None:
    if core is not None and (others := os.sched_getaffinity(0) - {core}):
        with contextlib.suppress(OSError):  # not allowed
            os.sched_setaffinity(0, others)
