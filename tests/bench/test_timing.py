"""Timing: in turns, by a clock of the test's own; which cores a thread is measured on, and what it gets back."""

import itertools
import os
import time

import pytest

from lookupffn.bench import timing

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of cores on this system")


@needs_affinity
def test_a_thread_is_on_its_core_and_back_where_it_was_after_an_error_too():
    before, seen = os.sched_getaffinity(0), []

    def fail():
        with timing.on_core(min(before)):
            seen.append(os.sched_getaffinity(0))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [{min(before)}]
    assert os.sched_getaffinity(0) == before


def test_some_cores_are_spread_over_those_allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", None, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3, 13)), raising=False)
    assert timing.some_cores(4) == [3, 6, 9, 12]
    assert timing.some_cores(3) == [3, 7, 11]
    assert timing.some_cores(20) == list(range(3, 13))


def test_without_a_choice_of_cores_there_is_one_that_is_none(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert timing.some_cores(4) == [None]
    with timing.on_core(None):
        pass


# ---- In turns --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what calls and pauses put it forward; ``clock(seconds)`` does."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_calls_take_turns_and_each_fills_a_block(clock):
    seen, slow = [], itertools.cycle([3e-3, 4e-3, 5e-3, 6e-3])
    calls = {
        "fast": lambda: (seen.append("fast"), clock(0.25e-3)),
        "slow": lambda: (seen.append("slow"), clock(next(slow))),
    }
    timings = timing.time_interleaved(calls, 0.1, block=1e-3, pause=0.5e-3)
    warm_up, measured = seen[:6], seen[6:]
    assert warm_up == ["fast"] * 3 + ["slow"] * 3
    rounds = timings["slow"].runs
    assert measured == (["fast"] * 4 + ["slow"]) * rounds  # a block has four of the fast ones
    assert rounds == 16  # of 1 + 4.5 + 2 x 0.5 ms on average
    assert timings["fast"].runs == 16
    fast = timings["fast"]
    assert (fast.median, fast.low, fast.high) == pytest.approx((0.25e-3,) * 3)
    assert (timings["slow"].median, timings["slow"].low, timings["slow"].high) == pytest.approx((4.5e-3, 3e-3, 6e-3))


def test_calls_that_take_long_are_measured_five_times_all_the_same(clock):
    calls = {"long": lambda: clock(2.0), "longer": lambda: clock(3.0)}
    timings = timing.time_interleaved(calls, 1.0)
    assert {name: (t.median, t.runs) for name, t in timings.items()} == {"long": (2.0, 5), "longer": (3.0, 5)}
