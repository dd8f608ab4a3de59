"""Latency and bandwidth of every level of memory, for streams and for random lines, on one thread and on all."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lookupffn import machine
from lookupffn.lab.hardware.case import LINE
from lookupffn.lab.hardware.library import operators
from lookupffn.lab.hardware.rounds import best_round, rounds_of
from lookupffn.lab.hardware.work import RUNS
from lookupffn.memory import HUGE_PAGE, aligned_bytes

ROUND_SECONDS = 0.002  # there are many sizes
PREFETCH_DISTANCE = 128  # lines
PIECE = 2**19  # lines that are read in one go: a round goes on where the last one ended
MOST_PLACES = 2**20  # of random access with repeats


def memory_sizes(caches: list[dict]) -> list[int]:
    """Working sets in bytes: powers of two from 16 KiB to 8 times the largest cache."""
    largest = max((cache["bytes"] for cache in caches), default=32 * 2**20)
    available = machine.describe()["memory_bytes"] // 8
    top = min(8 * largest, available, 2**28)
    sizes = [2**14]
    while sizes[-1] * 2 <= top:
        sizes.append(sizes[-1] * 2)
    return sizes


def probe_memory(size: int, threads: int, spread: dict) -> dict:
    """What memory of ``size`` bytes a thread gives, on huge pages where the system has them.

    ``latency_ns`` of a load whose address is the result of the one before it; ``runs_of_1_ns`` a line of 64 bytes by
    random access to places that are known beforehand, each once before any comes again, ``runs_of_2_ns``, ``4``, ``8``
    where so many neighbours are read in a row, as the slices of rows are (a prefetcher of the processor's may fetch
    beyond their end); ``draws_of_1_ns`` and so on by random access with repeats, each place chosen without regard to
    the others. All these whichever is faster, demand loads or prefetched ``PREFETCH_DISTANCE`` lines before, as the
    engine may; ``runs_of_1_read_ns`` and so on are demand loads. ``stream_ns`` a line in order. With several threads a
    line of all of them together, and each reads ``size`` bytes of its own.
    """
    memory = _lines_in_a_ring(size, 0) if threads == 1 else aligned_bytes(size * threads).fill_(1)
    orders = {f"runs_of_{run}": _runs(shuffled(size // LINE // run), run) for run in RUNS}
    orders |= {f"draws_of_{run}": _runs(_with_repeats(size // LINE // run), run) for run in RUNS}
    lab = operators()

    def read(order, distance):
        pieces = order.split(PIECE)
        turns = itertools.cycle(pieces)

        def work(times):
            if len(pieces) == 1:
                lab.read_lines(memory, order, times, threads, distance)
                return len(order) * times * threads
            done = 0
            for piece in itertools.islice(turns, times):
                lab.read_lines(memory, piece, 1, threads, distance)
                done += len(piece) * threads
            return done

        return rounds_of(work, ROUND_SECONDS)

    def stream(times):
        lab.read_stream(memory, times, threads)
        return size // LINE * times * threads

    label = f"{size:,} bytes, {threads} thread(s)"

    def best(run, name):
        return 1 / best_round(run, f"{name} of {label}", spread, threads=threads)

    record = {"bytes": size, "stream_ns": best(rounds_of(stream, ROUND_SECONDS), "stream")}
    for pattern, order in orders.items():
        demand_ns, prefetched_ns = (
            best(read(order, distance), f"{pattern}, {distance} ahead") for distance in (0, PREFETCH_DISTANCE)
        )
        record |= {f"{pattern}_ns": min(demand_ns, prefetched_ns), f"{pattern}_read_ns": demand_ns}
    if threads == 1:
        record["latency_ns"] = best(_chasing(memory, orders["runs_of_1"]), "latency")
    return record


def _runs(places: np.ndarray, run: int) -> Tensor:
    """The lines of ``run`` neighbours at each of some places, which count in runs."""
    return torch.from_numpy((run * places[:, None] + np.arange(run, dtype=np.int32)).reshape(-1))


def _with_repeats(count: int) -> np.ndarray:
    """Random numbers of 0 to ``count - 1``, so many that nearly all of them come."""
    places = min(4 * count, max(count, MOST_PLACES))
    return np.random.default_rng(0).integers(count, size=places, dtype=np.int32)


def shuffled(count: int) -> np.ndarray:
    """0 to ``count - 1``, a power of two, mixed: odd factors and shifts, each one to one; faster than a shuffle."""
    bits = count.bit_length() - 1
    x = np.arange(count, dtype=np.uint32)
    for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):
        x = (x * np.uint32(factor)) & np.uint32(count - 1)
        x ^= x >> np.uint32(bits // 2 + 1)
    return x.astype(np.int32)


def _chasing(memory: Tensor, lines: Tensor) -> Callable[[], float]:
    """Rounds of dependent loads, each piece right after all lines were read.

    A cache that is shared with others forgets within milliseconds what is not read again, and dependent loads take that
    long to come around: without the reading the latency would be that of the next level.
    """
    place, steps, lab = 0, 2**13, operators()

    def run() -> float:
        nonlocal place
        seconds = 0.0
        for _ in range(4):
            lab.read_lines(memory, lines, 1)
            start = time.perf_counter()
            place = lab.chase(memory, place, steps)
            seconds += time.perf_counter() - start
        return 4 * steps / seconds / 1e9

    return run


def _lines_in_a_ring(size: int, seed: int, page: int | None = None) -> Tensor:
    """Memory whose lines (or pages) form one ring in random order: each starts with the byte where the next stands."""
    memory = aligned_bytes(size) if page is None else _on_small_pages(size)
    step = page or LINE
    order = np.random.default_rng(seed).permutation(size // step).astype(np.int64)
    places = order * step
    if page:  # not all in the same cache set
        places += order % (page // LINE) * LINE
    memory.zero_()
    start = int(np.flatnonzero(order == 0)[0])  # the ring is entered at byte 0
    places = np.roll(places, -start)
    words = memory.numpy().view(np.int32)
    words[places // 4] = np.roll(places, -1).astype(np.int32)
    return memory


def _on_small_pages(size: int) -> Tensor:
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def probe_pages(spread: dict) -> list[dict]:
    """Latency of a load a page, by the number of pages: 4 KiB ones, which the TLB must hold, and on huge ones."""
    found = []
    page = mmap.PAGESIZE
    for count in (16, 64, 256, 1024, 2048, 4096, 16384):
        size = count * page
        small, large = _lines_in_a_ring(size, 0, page), _huge_copy(_lines_in_a_ring(size, 0, page))
        row = {"pages": count, "page_bytes": page}
        for name, memory in (("small_ns", small), ("huge_ns", large)):
            lines = (torch.arange(count) * (page // LINE) + torch.arange(count) % (page // LINE)).int()
            row[name] = 1 / best_round(_chasing(memory, lines), f"{name} of {count} pages", spread)
        found.append(row)
    return found


def _huge_copy(memory: Tensor) -> Tensor:
    return aligned_bytes(max(len(memory), HUGE_PAGE))[: len(memory)].copy_(memory)
