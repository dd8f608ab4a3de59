"""What this machine gives: instructions, caches, memory, each measured alone, in under a minute.

Every figure is the best of some rounds (``rounds.py``), those of memory in ``memory.py``. The instructions are those of
the engine's own kernels, so a rate holds for the implementation that is in use; they run from registers or from 4 KiB.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lookupffn import machine, native
from lookupffn.errors import InputError
from lookupffn.lab.hardware.case import DTYPES, LINE, PROJECTION_DTYPES, REFERENCE, REFERENCE_TOKENS
from lookupffn.lab.hardware.library import operators
from lookupffn.lab.hardware.memory import PREFETCH_DISTANCE, memory_sizes, probe_memory, probe_pages, shuffled
from lookupffn.lab.hardware.rounds import ROUNDS, best_round, rounds_of
from lookupffn.lab.hardware.training_work import REFERENCE_STEP, Step
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.memory import aligned_bytes
from lookupffn.runtime.format import encode
from lookupffn.runtime.packed import pack
from lookupffn.runtime.tuning import Tiling

# In the order of csrc/lab/probe.h. Each is one operation on sixteen float32 or 64 bytes, but for `rows` (four rows of
# 64 bytes interleaved and multiplied), `transpose` (16 x 16), `exp` (the hash's), and the scalar ones behind `store`.
INSTRUCTIONS = (
    *("add", "multiply", "fma", "divide", "convert", "vector", "dot_int8", "dot_int16", "rows", "transpose", "exp"),
    *("load", "store", "prefetch", "word", "scalar", "issue", "cycle", "wide_cycle"),
)
PASSES = 3  # a third of a minute apart: other tenants slow a core down for seconds
MATMUL_SIZE, MATMUL_TRIAL = 1024, 64  # rows
BLOCKS = (8, 512, 64)  # of a projection in training, tokens, edge of a block
CALLS, TRAINING_CALLS = 40, 20  # of the engine and of a stage of training in a round
INPUTS = 8  # of the engine, in turn
BETWEEN_CALLS = (0, *(2**bits for bits in range(16, 23)))  # bytes
SLOW_SECONDS = 0.2  # a product that would take longer is tried once, and with few rows


def probe(progress: Callable[[str], object] = lambda what: None, passes: int = PASSES) -> dict:
    """Measures this machine in some ``passes`` and keeps the best of each figure; ``progress`` is told what comes next.

    Returns a record for JSON: ``rates`` (operations a nanosecond on one core) and ``rates_all`` (of each core, with all
    threads at work), ``clock_ghz`` (scalar, and beside wide vectors), ``memory`` (a list by size, see
    :func:`probe_memory`, on one thread) and ``memory_all`` (each thread in its own memory, on all), ``pages`` (what
    small pages cost), ``engine`` (nanoseconds a token of each stage of ``REFERENCE``, by dtype, and of ``all`` of them
    on all threads), ``training`` (of a training step), ``calls`` (nanoseconds of a call that does nothing, see
    :func:`_calls`), ``module_ns`` (more through a module), ``parallel_ns`` (of a parallel region that does nothing),
    ``matmul_gflops`` (PyTorch's, by dtype, on one thread and on all), ``caches``, ``threads``, ``quota``, ``spread``
    (best over median round, less 1, for each), ``not_measured`` (what and why), ``machine``.

    Raises:
        InputError: the compiled kernels are absent, whose instructions are to be measured, or the lab's library.
    """
    if reason := native.load():
        raise InputError(f"the probe measures the compiled kernels' own instructions, and there are none: {reason}")
    operators()
    return best([_once(progress) for _ in range(passes)])


def _once(progress: Callable[[str], object]) -> dict:
    threads = torch.get_num_threads()
    record = {
        "machine": machine.describe(),
        "implementation": native.implementation(),
        "threads": threads,
        "quota": machine.cgroup_quota(),
        "caches": machine.caches(),
        "huge_pages": machine.huge_pages(),
        "spread": {},
        "not_measured": {},
    }
    progress("instructions")
    rates = _rates(1, record["spread"])
    record["clock_ghz"] = {"scalar": rates.pop("cycle"), "beside_wide_vectors": rates.pop("wide_cycle")}
    record["rates"] = rates
    if threads > 1:
        rates = _rates(threads, record["spread"])
        record["rates_all"] = {name: rates[name] for name in record["rates"]}
    else:
        record["not_measured"] |= dict.fromkeys(("rates_all", "memory_all"), "torch uses one thread")
    progress("caches and memory, one thread")
    sizes = memory_sizes(record["caches"])
    record["memory"] = [probe_memory(size, 1, record["spread"]) for size in sizes]
    if threads > 1:
        progress(f"caches and memory, {threads} threads")
        record["memory_all"] = [probe_memory(size, threads, record["spread"]) for size in sizes]
    progress("engine")
    record["engine"] = _engine(threads, record["spread"])
    record["training"] = _training(record["spread"])
    record |= _overheads(threads, record["spread"])
    progress("pages")
    record["pages"] = probe_pages(record["spread"])
    progress("matrix products")
    record["matmul_gflops"] = _matmuls(threads, record["spread"], record["not_measured"])
    if not record["caches"]:
        record["not_measured"]["caches"] = "the system does not describe them (/sys/devices/system/cpu/cpu0/cache)"
    return record


def best(records: Sequence[dict]) -> dict:
    """The last of some records of one machine with the best figures of all, one by one, and the largest spread."""
    return _merged(records, max, min)


def median(records: Sequence[dict]) -> dict:
    """The last of some records of one machine with the median of each figure."""
    return _merged(records, statistics.median, statistics.median)


def _merged(records: Sequence[dict], rate: Callable, time: Callable) -> dict:
    """The last of some records, its rates and its times replaced by something of those of all."""
    merged = copy.deepcopy(records[-1])

    def replace(of: Callable, *path: str) -> None:
        places = [functools.reduce(operator.getitem, path, record) for record in records]
        target = places[-1] = functools.reduce(operator.getitem, path, merged)
        for name in target:
            target[name] = of([place[name] for place in places if name in place])

    for name in ("rates", "rates_all", "clock_ghz"):
        if name in merged:
            replace(rate, name)
    replace(max, "spread")
    for threads in merged["matmul_gflops"]:
        replace(rate, "matmul_gflops", threads)
    for dtype in merged["engine"]:
        replace(time, "engine", dtype)
    replace(time, "training")
    for name in ("module_ns", "parallel_ns"):
        merged[name] = time([record[name] for record in records])
    for name in ("memory", "memory_all", "pages", "calls"):
        for number, row in enumerate(merged.get(name, ())):
            times = [key for key in row if key.endswith("ns")]
            row.update({key: time([record[name][number][key] for record in records]) for key in times})
    return merged


def _rates(threads: int, spread: dict) -> dict[str, float]:
    """Operations a nanosecond of each of ``threads`` cores, all at work."""
    memory, lab = aligned_bytes(4096 * threads).zero_(), operators()
    rates = {}
    for number, name in enumerate(INSTRUCTIONS):
        run = rounds_of(lambda rounds, number=number: lab.repeat(number, rounds, memory, threads))
        rates[name] = best_round(run, name if threads == 1 else f"{name}, all", spread, threads=threads) / threads
    return rates


def _engine(threads: int, spread: dict) -> dict[str, dict[str, float]]:
    """Nanoseconds a token of the engine's stages for one small layer on one thread, by dtype, and of a call on all.

    Each call has other tokens than the one before, as a server's calls do.
    """
    found, c, t = {}, REFERENCE, Tiling()
    sizes = (t.tile_tokens, t.groups_per_block, t.prefetch_distance)
    for dtype in DTYPES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            packed = encode(LookupFFN(c), dtype, PROJECTION_DTYPES[dtype])
            turns = itertools.cycle(torch.randn(INPUTS, REFERENCE_TOKENS, c.in_features).unbind(0))

        def stages(packed=packed, turns=turns):
            return torch.ops.lookupffn.stage_seconds(next(turns), packed, *sizes)

        def whole(packed=packed, turns=turns):
            torch.ops.lookupffn.packed_forward(next(turns), packed, c.out_features, *sizes, 0)

        of_stages = _tenth_percentile(stages, f"engine, {dtype}", spread, REFERENCE_TOKENS, CALLS)
        found[dtype] = dict(zip(("project", "hash", "gather"), of_stages, strict=True))
        if threads > 1:
            name = f"engine, {dtype}, all"
            of_call = _tenth_percentile(_timed(whole), name, spread, REFERENCE_TOKENS, CALLS, threads)
            (found[dtype]["all"],) = of_call
    return found


def _timed(call: Callable[[], object]) -> Callable[[], Tensor]:
    def seconds() -> Tensor:
        start = time.perf_counter()
        call()
        return torch.tensor([time.perf_counter() - start], dtype=torch.float64)

    return seconds


def _tenth_percentile(
    seconds: Callable[[], Tensor], name: str, spread: dict, tokens: int, calls: int, threads: int = 1
) -> list[float]:
    """Nanoseconds a token, part by part: the tenth percentile of some calls, in the best round."""
    rounds = []

    def run() -> float:
        rounds.append(torch.stack([seconds() for _ in range(calls)]).quantile(0.1, 0))
        return 1 / float(rounds[-1].sum())

    best_round(run, name, spread, threads=threads)
    return (torch.stack(rounds).amin(0) / tokens * 1e9).tolist()


def _training(spread: dict) -> dict[str, float]:
    """Nanoseconds a token of each stage of a training step of the same layer, on one thread."""
    found, before = {}, torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = training_stages(REFERENCE_STEP)
    torch.set_num_threads(1)
    try:
        for stage, call in calls.items():
            name, size = f"training, {stage}", (REFERENCE_STEP.tokens, TRAINING_CALLS)
            (found[stage],) = _tenth_percentile(_timed(call), name, spread, *size)
    finally:
        torch.set_num_threads(before)
    return found


def training_stages(step: Step) -> dict[str, Callable[[], object]]:
    """Each stage of a training step of a random layer, ready to be called."""
    kernels, c, n = torch.ops.lookupffn, step.config, step.tokens
    layer, x, grad = LookupFFN(c), torch.randn(n, c.in_features), torch.randn(n, c.out_features)
    weight, tables = layer.projection.weight.detach(), layer.tables.detach()
    z = kernels.bh4(x, weight, c.decay, c.code_features)
    z_rows, grad_z = z.view(n, c.num_tables, c.code_bits), torch.randn_like(z)
    codes, scores = kernels.native_hash_codes(z_rows, c.reads, "")
    return {
        "project": lambda: kernels.bh4(x, weight, c.decay, c.code_features),
        "hash": lambda: kernels.native_hash_codes(z_rows, c.reads, ""),
        "gather": lambda: kernels.native_gather(tables, codes, scores, ""),
        "gather backward": lambda: kernels.native_gather_backward(grad, tables, codes, scores, ""),
        "hash backward": lambda: kernels.native_hash_codes_backward(scores, z_rows, codes, ""),
        "project backward": lambda: kernels.bh4_backward(grad_z, x, weight, c.decay),
    }


def _overheads(threads: int, spread: dict) -> dict:
    layer, x = LookupFFN(LookupConfig(16, 16, num_tables=1, code_bits=1, block_size=16)), torch.zeros(1, 16)
    packed, module, t = encode(layer), pack(layer), Tiling()
    memory, none, lab = torch.zeros(64 * threads, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32), operators()

    def call():
        torch.ops.lookupffn.packed_forward(x, packed, 16, t.tile_tokens, t.groups_per_block, t.prefetch_distance, 1)

    def ns(body: Callable[[], object], name: str, threads: int = 1) -> float:
        def work(times):
            for _ in range(times):
                body()
            return times

        return 1 / best_round(rounds_of(work), name, spread, threads=threads)

    one, of_all = (
        ns(lambda parts=parts: lab.read_lines(memory, none, 1, parts), f"region of {parts}", parts)
        for parts in (1, threads)
    )
    with torch.inference_mode():
        through = ns(lambda: module(x), "call of a module")
    calls = _calls(call, spread)
    more = {"module_ns": through - calls[0]["ns"], "parallel_ns": of_all - one}
    return {"calls": calls} | {name: max(0.0, found) for name, found in more.items()}


def _calls(call: Callable[[], object], spread: dict) -> list[dict[str, float]]:
    """Nanoseconds of a call after so many bytes were read, new ones each time, as a layer reads weights and rows.

    They evict Python's and PyTorch's own code and data from the caches that are close to the core.
    """
    memory, found, lab = aligned_bytes(BETWEEN_CALLS[-1] * 8).fill_(1), [], operators()
    lines = torch.from_numpy(shuffled(len(memory) // LINE))
    for size in BETWEEN_CALLS:
        pieces = itertools.cycle(lines.split(size // LINE) if size else (lines[:0],))

        def run(pieces=pieces):
            seconds = 0.0
            for _ in range(CALLS):
                lab.read_lines(memory, next(pieces), 1, 1, PREFETCH_DISTANCE)
                start = time.perf_counter()
                call()
                seconds += time.perf_counter() - start
            return CALLS / seconds / 1e9

        run()
        found.append({"bytes": size, "ns": 1 / best_round(run, f"call after {size:,} bytes", spread, 4 * ROUNDS)})
    return found


# ---- Matrix products -------------------------------------------------------------------------------------------------


def _matmuls(threads: int, spread: dict, not_measured: dict) -> dict[str, dict[str, float]]:
    """Giga operations a second (two a multiply-add) of PyTorch's square products, by dtype: what dense could reach."""
    n, found = MATMUL_SIZE, {"1": {}, str(threads): {}}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        try:
            for name in ("float32", "bfloat16", "float16", "int8", "float32 blocks"):
                if name == "int8":
                    a = b = torch.randint(-127, 127, (n, n), dtype=torch.int8)
                    product = torch._int_mm
                elif name == "float32 blocks":  # as in a stage of the projection in training
                    a, b = torch.randn(*BLOCKS), torch.randn(BLOCKS[0], BLOCKS[-1], BLOCKS[-1])
                    product = torch.bmm
                else:
                    a = b = torch.randn(n, n).to(getattr(torch, name))
                    product = torch.mm

                def work(times, a=a, b=b, product=product):
                    for _ in range(times):
                        product(a, b)
                    return 2 * a.numel() * b.shape[-1] * times

                try:
                    part = a[:MATMUL_TRIAL]
                    work(1, part)  # the first call prepares
                    start = time.perf_counter()
                    rate = work(1, part) / (time.perf_counter() - start) / 1e9
                    if rate * SLOW_SECONDS * 1e9 > 2 * a.numel() * b.shape[-1]:
                        label = f"{name} product, {count} threads"
                        rate = best_round(rounds_of(work), label, spread, threads=count)
                    found[str(count)][name] = rate
                except RuntimeError as error:
                    not_measured[f"{name} product"] = str(error).splitlines()[0]
        finally:
            torch.set_num_threads(threads)
    return found
