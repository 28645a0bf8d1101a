"""Steps at fault: what counts as one, and what each policy makes of it."""

from __future__ import annotations

import math

import pytest

from jaxlm.faults import Faults, Rewind


def test_a_loss_far_over_the_mean_of_those_known_in_time_is_over_the_limit() -> None:
    faults = Faults("skip", spike_factor=1.5)
    assert faults.limit(1) == math.inf
    for step in range(1, 20):
        faults.good(step, 2.0)
    assert faults.limit(21) == math.inf, "too few to tell"
    faults.good(20, 4.0)
    assert faults.limit(21) == math.inf, "the loss of step 20 isn't known yet when step 21 begins"
    assert faults.limit(22) == pytest.approx(1.5 * (19 * 2.0 + 4.0) / 20)
    for step in range(21, 130):
        faults.good(step, 1.0)
    assert faults.limit(131) == pytest.approx(1.5), "only the last hundred count"
    assert Faults("skip", spike_factor=None).limit(10**6) == math.inf


def test_the_limit_after_a_resume_is_the_limit_without_one() -> None:
    straight, resumed = Faults("skip", 1.5), Faults("skip", 1.5)
    for step in range(1, 151):
        straight.good(step, math.sin(step) + 2)
    resumed.restore(straight.record())
    for step in (151, 152):
        assert straight.limit(step) == resumed.limit(step)


def test_stop_goes_on_after_no_fault() -> None:
    assert not Faults("stop", None).skip(7)


def test_skip_goes_on_until_there_are_ten_in_a_row() -> None:
    faults = Faults("skip", None)
    assert all(faults.skip(step) for step in (3, *range(11, 20)))
    assert faults.skip(30)
    assert not all(faults.skip(step) for step in range(31, 41))
    assert faults.skipped[:3] == [3, 11, 12]


def test_rewind_goes_back_once_for_each_step() -> None:
    faults = Faults("rewind", None)
    with pytest.raises(Rewind):
        faults.skip(7)
    faults.restore({})
    assert faults.skipped == []
    assert (faults.limit(6), faults.limit(7)) == (math.inf, -math.inf)
    assert faults.skip(7)
    assert faults.skipped == [7]
    again = Faults("stop", None)
    again.restore(faults.record())
    assert again.limit(7) == -math.inf
    assert again.skip(7), "a step that was passed over before is no new fault, whatever the policy now"


def test_rewind_gives_up_after_ten_in_a_row() -> None:
    faults = Faults("rewind", None)
    for step in range(1, 10):
        with pytest.raises(Rewind):
            faults.skip(step)
        faults.restore({})
    assert not faults.skip(10)


def test_a_record_stays_as_it_was_while_it_is_written() -> None:
    faults = Faults("skip", 1.5)
    faults.skip(3)
    record = faults.record()
    faults.skip(4)
    faults.good(5, 1.0)
    assert record == {"skipped": [3], "passed_over": [], "losses": []}
