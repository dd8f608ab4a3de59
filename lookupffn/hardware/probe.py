"""What this machine gives: instructions, caches, memory, each measured alone, in under a minute.

Every figure is the best of some rounds, and its ``spread`` says how far a usual round was from the best: other tenants
and a changing clock only ever make a round slower. The instructions are those of the engine's own kernels, so a rate
holds for the implementation that is in use; they run from registers or from 4 KiB of memory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import mmap
import operator
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lookupffn import native
from lookupffn.hardware import system
from lookupffn.hardware.training_work import REFERENCE_STEP, Step
from lookupffn.hardware.work import LINE, PROJECTION_DTYPES, REFERENCE, REFERENCE_TOKENS, RUNS
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.packed import HUGE_PAGE, aligned_bytes, pack
from lookupffn.tiling import Tiling

# In the order of csrc/kernels.h. Each is one operation on sixteen float32 or 64 bytes, but for `rows` (four rows of 64
# bytes interleaved and multiplied), `transpose` (16 x 16), `exp` (the hash's), and the scalar ones behind `store`.
INSTRUCTIONS = (
    *("add", "multiply", "fma", "divide", "convert", "vector", "dot_int8", "dot_int16", "rows", "transpose", "exp"),
    *("load", "store", "prefetch", "word", "scalar", "issue", "cycle", "wide_cycle"),
)
DTYPES = ("int8", "bfloat16", "float32")
PASSES = 2  # half a minute apart: other tenants slow a core down for seconds
ROUNDS = 4
ROUND_SECONDS = 0.01
MEMORY_ROUNDS, MEMORY_SECONDS = 3, 0.005  # there are many sizes
AHEAD = 128  # lines that are asked for before they are read
MATMUL_SIZE = 1024
BLOCKS = (8, 512, 64)  # of a projection in training, tokens, edge of a block
CALLS = 10  # of the engine in a round
MOST_DRAWS = 2**20
SLOW_SECONDS = 0.2  # a product that takes longer is not worth several rounds


def probe(progress: Callable[[str], object] = lambda what: None) -> dict:
    """Measures this machine ``PASSES`` times and keeps the best of each figure; ``progress`` is told what comes next.

    Returns a record for JSON: ``rates`` (operations a nanosecond on one core), ``clock_ghz`` (scalar, and beside wide
    vectors), ``memory`` (a list by size, see :func:`probe_memory`, on one thread) and ``memory_all`` (each thread in
    its own memory, on all), ``pages`` (what small pages cost), ``engine`` (nanoseconds a token of each stage of
    ``REFERENCE``, by dtype), ``training`` (of a training step), ``call_ns`` and ``parallel_ns`` (of a call and of a
    parallel region that do nothing), ``matmul_gflops`` (PyTorch's, by dtype, on one thread and on all), ``caches``,
    ``threads``, ``quota``, ``spread`` (best over usual round, less 1, for each), ``not_measured`` (what and why),
    ``machine``.

    Raises:
        RuntimeError: the compiled kernels are absent, whose instructions are to be measured.
    """
    if reason := native.load():
        raise RuntimeError(f"the probe measures the compiled kernels' own instructions, and there are none: {reason}")
    return best([_once(progress) for _ in range(PASSES)])


def _once(progress: Callable[[str], object]) -> dict:
    threads = torch.get_num_threads()
    record = {
        "machine": system.machine(),
        "implementation": native.implementation(),
        "threads": threads,
        "quota": system.cgroup_quota(),
        "caches": system.caches(),
        "huge_pages": system.huge_pages(),
        "spread": {},
        "not_measured": {},
    }
    progress("instructions")
    record["rates"] = _rates(record["spread"])
    rates = record["rates"]
    record["clock_ghz"] = {"scalar": rates.pop("cycle"), "beside_wide_vectors": rates.pop("wide_cycle")}
    progress("caches and memory, one thread")
    sizes = memory_sizes(record["caches"])
    record["memory"] = [probe_memory(size, 1, record["spread"]) for size in sizes]
    if threads > 1:
        progress(f"caches and memory, {threads} threads")
        record["memory_all"] = [probe_memory(size, threads, record["spread"]) for size in sizes]
    else:
        record["not_measured"]["memory_all"] = "torch uses one thread"
    progress("engine")
    record["engine"] = {dtype: _stages(dtype, record["spread"]) for dtype in DTYPES}
    record["training"] = _training(record["spread"])
    record |= _overheads(threads, record["spread"])
    progress("pages")
    record["pages"] = _pages(record["spread"])
    progress("matrix products")
    record["matmul_gflops"] = _matmuls(threads, record["spread"], record["not_measured"])
    if not record["caches"]:
        record["not_measured"]["caches"] = "the system does not describe them (/sys/devices/system/cpu/cpu0/cache)"
    return record


def best(records: Sequence[dict]) -> dict:
    """The last of some records of one machine with the best figures of all, one by one, and the largest spread."""
    merged = copy.deepcopy(records[-1])

    def most(*path: str) -> None:
        places = [functools.reduce(operator.getitem, path, record) for record in records]
        target = functools.reduce(operator.getitem, path, merged)
        target.update({name: max(place[name] for place in places) for name in target})

    for name in ("rates", "clock_ghz", "spread"):
        most(name)
    for threads in merged["matmul_gflops"]:
        most("matmul_gflops", threads)
    for name in ("call_ns", "parallel_ns"):
        merged[name] = min(record[name] for record in records)
    for dtype, stages in merged["engine"].items():
        stages.update({stage: min(record["engine"][dtype][stage] for record in records) for stage in stages})
    merged["training"] = {stage: min(record["training"][stage] for record in records) for stage in merged["training"]}
    for name in ("memory", "memory_all", "pages"):
        for number, row in enumerate(merged.get(name, ())):
            times = [key for key in row if key.endswith("_ns")]
            row.update({key: min(record[name][number][key] for record in records) for key in times})
    return merged


# ---- Timing ----------------------------------------------------------------------------------------------------------


def _best(run: Callable[[], float], name: str, spread: dict, rounds: int | None = None) -> float:
    """The most work a nanosecond over ``rounds``, ``ROUNDS`` without; ``run`` does one and says its rate."""
    found = sorted(run() for _ in range(rounds or ROUNDS))
    spread[name] = found[-1] / statistics.median(found) - 1
    return found[-1]


def _rate(work: Callable[[int], float], round_seconds: float | None = None) -> Callable[[], float]:
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


def _rates(spread: dict) -> dict[str, float]:
    memory = aligned_bytes(4096).zero_()
    rates = {}
    for number, name in enumerate(INSTRUCTIONS):
        run = _rate(lambda rounds, number=number: torch.ops.lookupffn.repeat(number, rounds, memory))
        rates[name] = _best(run, name, spread)
    return rates


def _stages(dtype: str, spread: dict) -> dict[str, float]:
    """Nanoseconds a token of the engine's stages for one small layer, on one thread: how close its loops come."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = LookupFFN(REFERENCE), torch.randn(REFERENCE_TOKENS, REFERENCE.in_features)
    packed, t = pack(layer, dtype, PROJECTION_DTYPES[dtype]), Tiling()

    def run() -> float:
        calls = [
            torch.ops.lookupffn.stage_seconds(x, packed, t.tile_tokens, t.groups_a_pass, t.prefetch_rows)
            for _ in range(CALLS)
        ]
        best.append(torch.stack(calls).amin(0))
        return 1 / float(best[-1].sum())

    best: list[Tensor] = []
    _best(run, f"engine, {dtype}", spread)
    seconds = torch.stack(best).amin(0) / REFERENCE_TOKENS
    return dict(zip(("project", "hash", "gather"), (seconds * 1e9).tolist(), strict=True))


def _training(spread: dict) -> dict[str, float]:
    """Nanoseconds a token of each stage of a training step of the same layer, on one thread."""
    found, before = {}, torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = training_stages(REFERENCE_STEP)
    torch.set_num_threads(1)
    try:
        for stage, call in calls.items():

            def work(times, call=call):
                for _ in range(times):
                    call()
                return times * REFERENCE_STEP.tokens

            found[stage] = 1 / _best(_rate(work), f"training, {stage}", spread)
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


def _overheads(threads: int, spread: dict) -> dict[str, float]:
    tiny, x, t = (
        pack(LookupFFN(LookupConfig(16, 16, num_tables=1, code_bits=1, block_size=16))),
        torch.zeros(1, 16),
        Tiling(),
    )
    memory, none = torch.zeros(64 * threads, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32)

    def calls(times):
        for _ in range(times):
            torch.ops.lookupffn.prepared(x, tiny, 16, t.tile_tokens, t.groups_a_pass, t.prefetch_rows, 1, "")
        return times

    def regions(parts):
        def work(times):
            for _ in range(times):
                torch.ops.lookupffn.read_lines(memory, none, 1, parts)
            return times

        return work

    call = 1 / _best(_rate(calls), "call", spread)
    alone, together = (1 / _best(_rate(regions(parts)), f"region of {parts}", spread) for parts in (1, threads))
    return {"call_ns": call, "parallel_ns": max(0.0, together - alone)}


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory_sizes(caches: list[dict]) -> list[int]:
    """Working sets in bytes: powers of two from 16 KiB to 8 times the largest cache."""
    largest = max((cache["bytes"] for cache in caches), default=32 * 2**20)
    available = system.machine()["memory_bytes"] // 8
    top = min(8 * largest, available, 2**28)
    sizes = [2**14]
    while sizes[-1] * 2 <= top:
        sizes.append(sizes[-1] * 2)
    return sizes


def probe_memory(size: int, threads: int, spread: dict) -> dict:
    """What memory of ``size`` bytes a thread gives, on huge pages where the system has them.

    ``latency_ns`` of a load that waits for the one before it; ``runs_of_1_ns`` a line of 64 bytes at random places that
    are known beforehand, each once before any comes again, ``runs_of_2_ns``, ``4``, ``8`` where so many neighbours are
    read in a row, as the slices of rows are (a prefetcher of the processor's may fetch beyond their end);
    ``draws_of_1_ns`` and so on where each place is drawn without regard to the others. All these whichever is faster:
    just read, or asked for ``AHEAD`` lines before, as the engine may; ``not_asked_ns`` is ``runs_of_1_ns`` just read.
    ``stream_ns`` a line in order. With several threads a line of all of them together, and each reads ``size`` bytes of
    its own.
    """
    memory = _lines_in_a_ring(size, 0) if threads == 1 else aligned_bytes(size * threads).fill_(1)
    orders = {f"runs_of_{run}": _runs(_shuffled(size // LINE // run), run) for run in RUNS}
    orders |= {f"draws_of_{run}": _runs(_drawn(size // LINE // run), run) for run in RUNS}

    def read(order, ahead):
        def work(times):
            torch.ops.lookupffn.read_lines(memory, order, times, threads, ahead)
            return len(order) * times * threads

        return _rate(work, MEMORY_SECONDS)

    def stream(times):
        torch.ops.lookupffn.read_stream(memory, times, threads)
        return size // LINE * times * threads

    label = f"{size:,} bytes, {threads} thread(s)"

    def best(run, name):
        return 1 / _best(run, f"{name} of {label}", spread, MEMORY_ROUNDS)

    record = {"bytes": size, "stream_ns": best(_rate(stream, MEMORY_SECONDS), "stream")}
    for pattern, order in orders.items():
        read_ns, asked_ns = (best(read(order, ahead), f"{pattern}, {ahead} ahead") for ahead in (0, AHEAD))
        record[f"{pattern}_ns"] = min(read_ns, asked_ns)
        if pattern == "runs_of_1":
            record["not_asked_ns"] = read_ns
    if threads == 1:
        record["latency_ns"] = best(_chasing(memory, orders["runs_of_1"]), "latency")
    return record


def _runs(places: np.ndarray, run: int) -> Tensor:
    """The lines of ``run`` neighbours at each of some places, which count in runs."""
    return torch.from_numpy((run * places[:, None] + np.arange(run, dtype=np.int32)).reshape(-1))


def _drawn(count: int) -> np.ndarray:
    """0 to ``count - 1`` drawn at random, often enough that nearly all of them come."""
    draws = min(4 * count, max(count, MOST_DRAWS))
    return np.random.default_rng(0).integers(count, size=draws, dtype=np.int32)


def _shuffled(count: int) -> np.ndarray:
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
    place, steps = 0, 2**13

    def run() -> float:
        nonlocal place
        seconds = 0.0
        for _ in range(4):
            torch.ops.lookupffn.read_lines(memory, lines, 1)
            start = time.perf_counter()
            place = torch.ops.lookupffn.chase(memory, place, steps)
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


def _pages(spread: dict) -> list[dict]:
    """Latency of a load a page, by the number of pages: 4 KiB ones, which the TLB must hold, and on huge ones."""
    found = []
    page = mmap.PAGESIZE
    for count in (16, 64, 256, 1024, 2048, 4096, 16384):
        size = count * page
        small, large = _lines_in_a_ring(size, 0, page), _huge_copy(_lines_in_a_ring(size, 0, page))
        row = {"pages": count, "page_bytes": page}
        for name, memory in (("small_ns", small), ("huge_ns", large)):
            lines = (torch.arange(count) * (page // LINE) + torch.arange(count) % (page // LINE)).int()
            row[name] = 1 / _best(_chasing(memory, lines), f"{name} of {count} pages", spread)
        found.append(row)
    return found


def _huge_copy(memory: Tensor) -> Tensor:
    return aligned_bytes(max(len(memory), HUGE_PAGE))[: len(memory)].copy_(memory)


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
                    start = time.perf_counter()
                    once = work(1) / (time.perf_counter() - start) / 1e9
                    slow = time.perf_counter() - start > SLOW_SECONDS
                    label = f"{name} product, {count} threads"
                    found[str(count)][name] = once if slow else _best(_rate(work), label, spread)
                except RuntimeError as error:
                    not_measured[f"{name} product"] = str(error).splitlines()[0]
        finally:
            torch.set_num_threads(threads)
    return found
