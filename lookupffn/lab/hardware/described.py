"""Processors that are not at hand: what their published figures make of them for the model.

Each file in ``cpus/`` describes one, with the source of every figure. :data:`FEATURES` changes a description to what a
coming processor could have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import yaml

from lookupffn.lab.hardware.case import LINE
from lookupffn.lab.hardware.model import EXP_OPERATIONS, Machine
from lookupffn.lab.hardware.work import PATTERNS
from lookupffn.runtime.format import LANES

CPUS = Path(__file__).parent / "cpus"
DIVIDE_RATE = 1 / 8  # divisions for a multiplication, where a description does not say: a handful in each hash
SIZES = [2**k for k in range(13, 33)]


def descriptions() -> dict[str, dict]:
    """The shipped descriptions by file name, without ``.yaml``."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CPUS.glob("*.yaml"))}


def describe(description: dict) -> Machine:
    """The machine that published figures describe (``cpus/*.yaml``); nothing of it was measured here.

    Rates are ports times clock, for instructions of ``vector_bytes``. A working set that is read round after round
    comes from the first cache that holds all of it; by random access with repeats, as much of it comes from each cache
    as fits into it and not into those before. A line from there takes
    ``max(64 bytes / bandwidth, latency / lines in flight)`` at random places and ``64 bytes / bandwidth`` in order.
    """
    d, clock, width = description, description["clock_ghz"], description["vector_bytes"]
    port = {name: per_cycle * clock * width / LINE for name, per_cycle in d["per_cycle"].items()}
    scalar = {name: d["per_cycle"][name] * clock for name in ("load", "issue")}
    rates = {name: port[name] for name in ("add", "multiply", "vector", "shuffle", "load", "store", "dot_int8")}
    rates |= {
        "clear": port["store"],
        "put": port["store"],
        "fma": port["multiply"],
        "convert": port["add"],
        "divide": port["multiply"] * DIVIDE_RATE,
    }
    rates |= {"dot_int16": port["dot_int8"], "word": scalar["load"], "prefetch": scalar["load"]}
    rates |= {"issue": scalar["issue"], "scalar": scalar["issue"]}
    # Four rows of 64 bytes: interleaved by 8 shuffles, or 4 of a wider kind, and 4 dot products; or a line at a time.
    gathers, shuffles = d.get("gathers", False), 4 if d.get("interleaves") else 8
    rows = 4 if gathers else shuffles + 4
    rates["rows"] = 1 / max(0 if gathers else shuffles / port["shuffle"], 4 / port["dot_int8"], rows / port["vector"])
    rates["exp"] = 1 / max(8 / port["multiply"], 8 / port["add"], EXP_OPERATIONS / port["vector"])
    rates["dot_bf16"] = port["dot_bf16"]
    rates["product"] = rates["block_product"] = rates["fma"] * LANES  # multiply-adds, at best
    tiles = d.get("tiles", {})
    rates |= {"product_int8": tiles.get("int8", 0) * clock, "product_bfloat16": tiles.get("bf16", 0) * clock}
    one = _described_memory(d, 1)
    everyone = _described_memory(d, d["cores"])
    return Machine(d["name"], d["cores"], width, rates, one, everyone, rows_operations=rows, gathers=gathers)


# ---- Described memory ------------------------------------------------------------------------------------------------


def _described_memory(d: dict, threads: int) -> dict[str, list[tuple[float, float]]]:
    """``(bytes of each thread, ns a line of all threads)`` by pattern; longer runs and prefetching gain nothing."""
    levels = []  # (bytes that a thread has of it, (ns a line in order, at random places))
    for cache in d["caches"]:
        sharing = min(threads, cache["shared_by"])
        gbs = cache.get("core_gbs") or cache["bytes_per_cycle"] * d["clock_ghz"]
        latency = cache.get("latency_ns") or cache["latency_cycles"] / d["clock_ghz"]
        levels.append((cache["kib"] * 2**10 / sharing, _level(gbs, latency, cache.get("outstanding"), threads, None)))
    m = d["memory"]
    levels.append((float("inf"), _level(m["core_gbs"], m["latency_ns"], m.get("outstanding"), threads, m["gbs"])))
    curves = {pattern: [] for pattern in PATTERNS}
    for size in SIZES:
        shares, inside = [], 0.0
        for capacity, _ in levels:
            share = min(1.0, capacity / size)
            shares.append(max(0.0, share - inside))
            inside = max(inside, share)
        holds = next(number for number, (capacity, _) in enumerate(levels) if size <= capacity)
        for pattern, curve in curves.items():
            times = [stream if pattern == "stream" else line for _, (stream, line) in levels]
            expected = sum(share * ns for share, ns in zip(shares, times, strict=True))
            curve.append((size, expected if pattern.startswith("draws") else times[holds]))
    return curves


def _level(
    gbs: float, latency_ns: float, outstanding: float | None, threads: int, all_gbs: float | None
) -> tuple[float, float]:
    """Nanoseconds a line of all threads, in order and at random places."""
    stream = LINE / gbs
    line = max(stream, latency_ns / outstanding) if outstanding else stream
    floor = LINE / all_gbs if all_gbs else 0.0
    return max(stream / threads, floor), max(line / threads, floor)


# ---- Features --------------------------------------------------------------------------------------------------------


def _with(change: Callable[[dict], object]) -> Callable[[dict], dict]:
    def changed(description: dict) -> dict:
        new = copy.deepcopy(description)
        change(new)
        return new

    return changed


def _scale(entry: dict, factors: dict[str, float]) -> None:
    for name, factor in factors.items():
        if name in entry:
            entry[name] *= factor


def _cache(d: dict, level: int) -> dict:
    return next((cache for cache in d["caches"] if cache["level"] == level), {})


# What a coming processor could have, each a change to a description.
FEATURES: dict[str, Callable[[dict], dict]] = {
    "twice the L2": _with(lambda d: _scale(_cache(d, 2), {"kib": 2})),
    "eight times the L2": _with(lambda d: _scale(_cache(d, 2), {"kib": 8})),
    "twice the L2 bandwidth and lines in flight": _with(
        lambda d: _scale(_cache(d, 2), {"bytes_per_cycle": 2, "core_gbs": 2, "outstanding": 2})
    ),
    "twice the L3 bandwidth and lines in flight": _with(
        lambda d: _scale(_cache(d, 3), {"bytes_per_cycle": 2, "core_gbs": 2, "outstanding": 2})
    ),
    "half the L3 latency": _with(lambda d: _scale(_cache(d, 3), {"latency_ns": 0.5, "latency_cycles": 0.5})),
    "one more load port": _with(lambda d: d["per_cycle"].update(load=d["per_cycle"]["load"] + 1)),
    "twice the shuffles": _with(lambda d: _scale(d["per_cycle"], {"shuffle": 2})),
    "twice the issue width": _with(lambda d: _scale(d["per_cycle"], {"issue": 2})),
    "interleaving four rows in one instruction": _with(lambda d: d.update(interleaves=True)),
    "gather and accumulate in one instruction": _with(lambda d: d.update(gathers=True)),
    "memory beside the cores": _with(
        lambda d: _scale(d["memory"], {"latency_ns": 0.5, "core_gbs": 4, "gbs": 4, "outstanding": 2})
    ),
}
