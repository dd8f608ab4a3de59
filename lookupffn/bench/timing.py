"""Timing of engines against each other: interleaved in one process, warmed, medians with their spread."""

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

WAKE_SECONDS = 0.0005  # in which a core that had slept comes up to speed


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, and 10th and 90th percentile of ``runs`` measurements."""

    median: float
    low: float
    high: float
    runs: int


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, block: float = 1e-3, pause: float = 0.0
) -> dict[str, Timing]:
    """Times every call in turn, round after round, for about ``seconds`` in all.

    A measurement is as many calls as fill about ``block`` seconds. ``pause`` lets the threads of one call's library go
    to sleep before the next one's run. Because the calls alternate, a machine that slows down slows all of them: their
    ratio holds where a single time does not.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):  # warm-up: caches, thread pool, lazy initialisation
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
        repeats[name] = max(1, round(block / once))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[name]) < 5:
        for name, call in calls.items():
            time.sleep(pause)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    quantiles = {name: np.quantile(values, (0.5, 0.1, 0.9)) for name, values in samples.items()}
    return {name: Timing(*map(float, quantiles[name]), runs=len(samples[name])) for name in calls}


def keep_freed_memory() -> None:
    """Has glibc keep freed memory, as a server's allocator does; else page faults of the results would be timed.

    For a process that does nothing but measure: it is a setting of the whole process.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library: its own rules


def some_cores(most: int) -> list[int | None]:
    """Up to ``most`` of the cores that this process may use; ``[None]`` where a thread cannot choose.

    Measuring on one after the other finds one that no other tenant slows down for the moment.
    """
    if not hasattr(os, "sched_setaffinity"):
        return [None]
    cores = sorted(os.sched_getaffinity(0))
    return cores[:: math.ceil(len(cores) / most)]


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """The calling thread on that core, once it is awake."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        awake = time.perf_counter() + WAKE_SECONDS
        while time.perf_counter() < awake:
            pass
        yield
    finally:
        os.sched_setaffinity(0, before)
