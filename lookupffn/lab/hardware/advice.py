"""Which lookup layer for a model's shape, a memory budget and a machine, and what it takes there beside dense.

A smaller layer is always faster, so time alone does not choose. What is kept is how many times fewer multiply-adds than
dense the layer may have; and among layers of as many multiply-adds, quality followed the number of rows times that of
reads, ``T 2^tau N``, whether they were many tables or large ones (docs/quality.md). So memory buys quality, and of
layers with about as many rows the fastest is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lookupffn import ops
from lookupffn.bench.engines import DENSE_ENGINES, Engine, dense_chain, torch_runner
from lookupffn.bench.timing import time_interleaved
from lookupffn.lab.hardware.case import DTYPES, LINE, Case
from lookupffn.lab.hardware.model import Machine, dense_ns, predict, tuned
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.reference import STAGES, next_power_of_two
from lookupffn.runtime.packed import pack

CODE_BITS = range(6, 13)
READS = (3, 2, 1)  # four were no better than three
FEWEST_TABLES = 1 / 8  # of the width: fewer were not tried
ABOUT = 3 / 4  # of the most rows times reads: differences in quality below this were within those of seeds
BLOCK_SIZE = 8  # of the recipe in docs/quality.md; the engine merges blocks to 16, which costs no time
GROUP = 16  # tables that the engine hashes at once
MOST_TABLES = 4096
SECONDS_AN_ENGINE = 5  # to build and time 12 layers of width 768, on two cores of 2024
DISTINCT_TOKENS = 2048  # of the lookup's inputs, in turn: rows are not those of the call before


@dataclasses.dataclass(frozen=True)
class Option:
    """A layer that keeps to the limits: its packed bytes in all layers, and nanoseconds a token by tokens a call, where
    these were predicted."""

    config: LookupConfig
    dtype: str
    memory_bytes: int
    macs: int
    ns: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Advice:
    """The options, best first, and the least time of dense: ``(dtype, nanoseconds a token)`` by tokens a call."""

    options: list[Option]
    dense_macs: int
    dense: dict[int, tuple[str, float]]


def advise(
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    memory_bytes: float,
    machine: Machine | None,
    *,
    fewer: float = 6.0,
    dtypes: Sequence[str] = ("int8",),
    tokens: Sequence[int] = (1, 64, 4096),
    threads: int = 1,
) -> Advice:
    """The lookup layers for a model of ``layers`` FFNs: for each number of code bits and each type the best that fits.

    Each has at most ``1 / fewer`` of the multiply-adds of the dense FFN, and the packed tables and projections of all
    layers take at most ``memory_bytes``. First comes the fastest, over all of ``tokens``, of those that have about the
    most rows times reads, then the others by these. Without a machine no time is predicted, and the first is the one of
    these that reads the fewest bytes a token.

    Raises:
        ValueError: no layer keeps to both limits; the message says what the smallest would take.
    """
    found, dense_macs = candidates(hidden_size, intermediate_size, layers, memory_bytes, fewer, dtypes)
    options = []
    for config, dtype in found:
        ns = {}
        if machine:
            calls = (tuned(Case(config, dtype, n, threads, layers), machine) for n in tokens)
            ns = {case.tokens: predict(case, machine).ns + machine.module_ns / case.tokens for case in calls}
        options.append(Option(config, dtype, layers * _bytes(Case(config, dtype)), _macs(config), ns))
    options.sort(key=lambda option: -capacity(option.config))
    equals = [option for option in options if capacity(option.config) >= ABOUT * capacity(options[0].config)]
    first = min(equals, key=lambda option: math.prod(option.ns.values()) if machine else row_bytes(option))
    options.insert(0, options.pop(options.index(first)))
    dense = {}
    for n in tokens if machine else ():
        times = {d: dense_ns(hidden_size, intermediate_size, machine, d, n, threads, layers) for d in DTYPES}
        dense[n] = min(times.items(), key=lambda item: item[1])
    return Advice(options, dense_macs, dense)


def candidates(
    hidden_size: int, intermediate_size: int, layers: int, memory_bytes: float, fewer: float, dtypes: Sequence[str]
) -> tuple[list[tuple[LookupConfig, str]], int]:
    """The layers that :func:`advise` chooses from, with their types, and dense's multiply-adds a token: arithmetic
    alone. Raises what it raises."""
    dense_macs = 2 * hidden_size * intermediate_size
    share, found = memory_bytes / layers, []
    for dtype in dtypes:
        for bits in CODE_BITS:
            of_reads = (largest(hidden_size, dense_macs / fewer, share, dtype, bits, reads) for reads in READS)
            if fitting := [config for config in of_reads if config]:
                found.append((max(fitting, key=capacity), dtype))
    if not found:
        config = LookupConfig(
            hidden_size, hidden_size, _fewest(hidden_size), CODE_BITS[0], block_size=_block(hidden_size)
        )
        smallest = f"the smallest has {_macs(config):,} and takes {layers * _bytes(Case(config)) / 2**20:,.1f} MiB"
        raise ValueError(
            f"no lookup layer has {fewer:g} times fewer multiply-adds than dense's {dense_macs:,} and fits "
            f"{memory_bytes / 2**20:,.1f} MiB in {layers} layers: {smallest}"
        )
    return found, dense_macs


def largest(
    width: int, macs: float, memory_bytes: float, dtype: str, code_bits: int, reads: int
) -> LookupConfig | None:
    """The layer with the most tables within both limits, if there is one."""
    best = None
    for tables in range(_fewest(width), MOST_TABLES + 1, GROUP):
        config = LookupConfig(width, width, tables, code_bits, reads=reads, block_size=_block(width))
        if _macs(config) > macs or _bytes(Case(config, dtype)) > memory_bytes:
            break
        best = config
    return best


def capacity(config: LookupConfig) -> int:
    """Rows times reads, ``T 2^tau N``."""
    return config.num_tables * config.num_rows * config.reads


def row_bytes(option: Option) -> int:
    """Bytes of table rows that a token reads in a layer."""
    c = option.config
    return c.num_tables * c.reads * Case(c, option.dtype).row_bytes


def _fewest(width: int) -> int:
    return max(1, math.ceil(width * FEWEST_TABLES / GROUP)) * GROUP


def _block(width: int) -> int:
    return min(BLOCK_SIZE, next_power_of_two(width))


def _macs(config: LookupConfig) -> int:
    c, width = config, config.padded_features
    weight = (-(-c.code_features // width), STAGES, width // c.block_size, c.block_size, c.block_size)
    tables = (c.num_tables, c.num_rows, c.out_features)
    return (ops.bh4_flops(1, weight) + ops.gather_flops(1, tables, c.reads)) // 2


def _bytes(case: Case) -> int:
    return math.ceil((case.table_bytes + case.weight_bytes) / LINE) * LINE


# ---- Measuring -------------------------------------------------------------------------------------------------------


def engines() -> list[Engine]:
    """The dense engines at hand; not the compiled ones, which take a minute a size to build."""
    return [engine for engine in DENSE_ENGINES if engine.available and not engine.compiled]


def measure(
    option: Option,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    *,
    threads: int,
    seconds: float = 0.3,
    progress: Callable[[str], object] = lambda what: None,
) -> dict[int, dict[str, float]]:
    """Nanoseconds a token and layer here of an option and of every dense engine at hand, by tokens a call.

    All in turn, each in a chain of ``layers`` different layers with random weights; the lookup is called "lookup". Each
    is the tenth percentile of its blocks: predictions are of the machine at its best.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            chain = nn.Sequential(*(pack(LookupFFN(option.config), option.dtype) for _ in range(layers))).eval()
            dense = dense_chain(hidden_size, intermediate_size, layers, seed=0)
            found = {}
            for tokens in option.ns:
                inputs = torch.randn(max(1, DISTINCT_TOKENS // tokens), tokens, hidden_size).unbind(0)
                calls = {"lookup": torch_runner(chain, inputs, compiled=False)}
                for engine in engines():
                    progress(f"{tokens:,} token(s), building {engine.label}")
                    with contextlib.suppress(Exception):  # whatever a baseline's library raises: there are others
                        calls[f"{engine.name} {engine.dtype}"] = engine.build(dense, inputs[0], threads)
                progress(f"{tokens:,} token(s), timing {len(calls)} engines in turn")
                times = time_interleaved(calls, seconds * len(calls), block=10e-3, pause=1e-3)
                found[tokens] = {name: time.low / tokens / layers * 1e9 for name, time in times.items()}
            return found
    finally:
        torch.set_num_threads(before)
