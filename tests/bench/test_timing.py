"""Timing: which cores a thread is measured on, and that it gets back what it was allowed before."""

import os

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
