"""Rounds of a measurement: how much work a nanosecond, in the best of them.

Other tenants and a changing clock only ever make a round slower; how far the median round was from the best is the
spread of a figure.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

from lookupffn.bench.timing import on_core, some_cores

ROUNDS = 4  # in turn on each of the cores that may be used
ROUND_SECONDS = 0.01


def best_round(run: Callable[[], float], name: str, spread: dict, rounds: int = ROUNDS, threads: int = 1) -> float:
    """The most work a nanosecond over ``rounds``; ``run`` does one on ``threads`` threads and says its rate.

    One thread moves to another core from round to round, since other tenants may slow a core down for seconds.
    """
    cores = some_cores(ROUNDS) if threads == 1 else [None]
    found = []
    for core in itertools.islice(itertools.cycle(cores), rounds):
        with on_core(core):
            found.append(run())
    spread[name] = max(found) / statistics.median(found) - 1
    return max(found)


def rounds_of(work: Callable[[int], float], round_seconds: float | None = None) -> Callable[[], float]:
    """A round: ``work(n)`` for an ``n`` that takes ``round_seconds`` or so; its return value a nanosecond."""
    times, seconds, wanted = 1, 0.0, round_seconds or ROUND_SECONDS
    while True:
        start = time.perf_counter()
        work(times)
        seconds = time.perf_counter() - start
        if seconds > wanted / 8:
            break
        times *= 4
    times = max(1, int(times * wanted / seconds))

    def run() -> float:
        start = time.perf_counter()
        done = work(times)
        return done / max(time.perf_counter() - start, 1e-9) / 1e9

    return run
