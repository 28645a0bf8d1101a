"""Threads beside the calling one."""

from __future__ import annotations

import os
import threading

import pytest

from jaxlm.tokenizers import threads
from jaxlm.tokenizers.threads import in_shares, num_cores, workers


def test_shares_are_done_in_order_by_the_caller_and_by_others() -> None:
    with workers(3) as pool:
        found = in_shares(pool, lambda index: (index, threading.get_ident() == threading.main_thread().ident), 5)
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]
    assert [by_caller for _, by_caller in found] == [True, False, False, False, False]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_a_share_is_raised(failing: int) -> None:
    with workers(2) as pool, pytest.raises(ZeroDivisionError):
        in_shares(pool, lambda index: 1 // (index - failing), 2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can be kept off a core on Linux alone")
def test_workers_leave_the_caller_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.sched_getaffinity(0)
    assert len(cores) == num_cores()
    for core in cores:
        monkeypatch.setattr(threads, "_own_core", lambda core=core: core)
        with workers(2) as pool:
            assert pool.submit(os.sched_getaffinity, 0).result() == (cores - {core} or cores)
    assert os.sched_getaffinity(0) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can be kept off a core on Linux alone")
def test_workers_work_where_they_may_not_choose_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with workers(2) as pool:
        assert in_shares(pool, lambda index: index, 2) == [0, 1]
