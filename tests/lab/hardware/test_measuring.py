"""The probe on a machine with a clock of its own: each figure that it finds is one that the machine was made of.

Nothing here is timed. ``time.perf_counter`` tells what a clock says that the operators put forward, each by what it
takes on that machine; on the second of its two cores everything takes a quarter longer.
"""

import collections
import contextlib
import math
import time

import pytest
import torch

from lookupffn import LookupConfig, native
from lookupffn.bench.timing import Timing
from lookupffn.lab.hardware import memory, rounds
from lookupffn.lab.hardware import probe as probing
from lookupffn.lab.hardware import validate as validation
from lookupffn.lab.hardware.case import Case
from lookupffn.lab.hardware.model import Machine, dense_ns, predict
from lookupffn.lab.hardware.training_work import Step
from lookupffn.runtime.tuning import Tiling

CONFIG = LookupConfig(256, 256, num_tables=32, block_size=64)
needs_libraries = pytest.mark.skipif(
    bool(native.load() or native.load("lab")), reason="the kernels or the lab's library were not built"
)

THREADS, SLOWER = 4, 1.25
CACHES = [{"level": 1, "bytes": 2**15, "shared_by": 1}, {"level": 2, "bytes": 2**17, "shared_by": 1}]
SIZES = [2**bits for bits in range(14, 21)]  # up to eight times the last of the caches
STAGES = {"int8": (9.0, 12.0, 15.0), "bfloat16": (30.0, 13.0, 20.0), "float32": (60.0, 11.0, 40.0)}  # ns a token
TRAINING = {"project": 70.0, "project backward": 90.0, "hash": 30.0, "hash backward": 45.0, "gather": 50.0,
            "gather backward": 80.0}  # fmt: skip
GFLOPS = {"float32": 8.0, "bfloat16": 1e-4, "int8": 32.0, "float32 blocks": 4.0}  # one thread; all are thrice as fast
MODULE_NS, PARALLEL_NS = 400.0, 900.0


def near_ns(size):
    """Nanoseconds a line from a set of so many bytes."""
    return 1.0 if size <= 2**15 else 4.0 if size <= 2**17 else 10.0


def line_ns(size, run, repeats, prefetched, threads):
    """Neighbours in a row come faster, as do lines that are each read once; prefetching helps where they are far."""
    ns = near_ns(size) * (1 + 1 / run) * (1.5 if repeats else 1) / math.sqrt(threads)
    return ns * (1 if not prefetched else 0.5 if size > 2**15 else 1.1)


def rate(name, threads):
    """Operations a nanosecond and core."""
    return (3 + probing.INSTRUCTIONS.index(name)) / (1 if threads == 1 else 2)


def call_ns(read_bytes):
    return 2000.0 + 3000 * read_bytes / 2**20


class Clock:
    """The machine: its operators, what they were given, and the time."""

    def __init__(self, patch):
        self.now, self.core, self.cores, self.threads, self.told = 0.0, 0, [], THREADS, []
        self.pieces, self.patterns, self.small = collections.defaultdict(set), {}, set()
        self.read_bytes, self.slow_products = 0, []
        self.packed = {dtype: torch.zeros(i, dtype=torch.uint8) for i, dtype in enumerate(STAGES, 1)}
        self.on_small_pages, self.huge_copy = memory._on_small_pages, memory._huge_copy
        patch.setattr(time, "perf_counter", lambda: self.now)
        patch.setattr(native, "load", lambda *_: "")
        patch.setattr(native, "implementation", lambda: "avx512_vnni")
        patch.setattr(torch, "get_num_threads", lambda: self.threads)
        patch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        for name, value in {"mm": self.product, "_int_mm": self.product, "bmm": self.product}.items():
            patch.setattr(torch, name, value)
        for name in ("repeat", "read_lines", "read_stream", "chase", "stage_seconds"):
            patch.setattr(torch.ops.lookupffn_lab, name, getattr(self, name), raising=False)
        for name in ("packed_forward", "stage_seconds"):
            patch.setattr(torch.ops.lookupffn, name, getattr(self, name), raising=False)
        patch.setattr(rounds, "some_cores", lambda most: [0, 1])
        patch.setattr(rounds, "on_core", self.on_core)
        patch.setattr(memory, "_on_small_pages", self.region_on_small_pages)
        patch.setattr(memory, "_huge_copy", self.copy_on_huge_pages)
        patch.setattr(memory, "PIECE", 2**10)
        patch.setattr(memory, "ROUND_SECONDS", 2e-4)
        settings = {"MATMUL_SIZE": 128, "CALLS": 3, "TRAINING_CALLS": 3, "BETWEEN_CALLS": (0, 2**16, 2**18)}
        for name, value in settings.items():
            patch.setattr(probing, name, value)
        patch.setattr(probing.machine, "caches", lambda: CACHES)
        patch.setattr(probing, "encode", lambda layer, dtype="int8", projection="int8": self.packed[dtype])
        patch.setattr(probing, "pack", lambda layer: lambda x: self.take(call_ns(0) + MODULE_NS))
        patch.setattr(probing, "training_stages", self.training_stages)

    def take(self, ns):
        self.now += ns * 1e-9 * (SLOWER if self.core else 1)

    @contextlib.contextmanager
    def on_core(self, core):
        self.cores.append(core)
        self.core = core or 0
        yield
        self.core = 0

    def region_on_small_pages(self, size):
        region = self.on_small_pages(size)
        self.small.add(region.data_ptr())
        return region

    def copy_on_huge_pages(self, region):
        copied = self.huge_copy(region)
        self.small.discard(copied.data_ptr())
        return copied

    def repeat(self, number, times, memory, threads):
        self.take(8 * times / rate(probing.INSTRUCTIONS[number], threads))
        return 8 * times * threads

    def read_lines(self, memory, lines, times, threads=1, ahead=0):
        if not len(lines):
            self.take(500 + (PARALLEL_NS if threads > 1 else 0))
            return 0
        count, size = len(lines), len(memory) // threads
        self.read_bytes, key = 64 * count * times, (size, threads, lines.data_ptr(), count)
        if key not in self.patterns:
            run = next(r for r in (8, 4, 2, 1) if not count % r and (lines.view(-1, r).diff() == 1).all())
            self.patterns[key] = run, len(lines.unique()) < count
        run, repeats = self.patterns[key]
        if self.told[-1].startswith("caches"):
            self.pieces[size, threads, run, repeats].add(lines.data_ptr())
        self.take(count * times * threads * line_ns(size, run, repeats, ahead > 0, threads))
        return 0

    def read_stream(self, memory, times, threads):
        self.take(len(memory) // 64 * times * near_ns(len(memory) // threads) / 2)

    def chase(self, memory, place, steps):
        self.take(steps * near_ns(len(memory)) * (7 if memory.data_ptr() in self.small else 5))
        return place

    def stage_seconds(self, x, packed, *sizes):
        seconds = torch.tensor(list(STAGES.values())[len(packed) - 1], dtype=torch.float64) * len(x) * 1e-9
        return seconds * (SLOWER if self.core else 1)

    def packed_forward(self, x, packed, *sizes):
        if len(x) > 1:
            self.take(len(x) * sum(list(STAGES.values())[len(packed) - 1]) / 3)
        else:
            self.take(call_ns(self.read_bytes))
            self.read_bytes = 0

    def training_stages(self, step):
        return {stage: lambda ns=ns: self.take(ns * step.tokens) for stage, ns in TRAINING.items()}

    def product(self, a, b):
        name = str(a.dtype).removeprefix("torch.") + (" blocks" if a.dim() == 3 else "")
        if name == "float16":
            raise RuntimeError("no such product here\nand more about it")
        if name == "bfloat16":
            self.slow_products.append(len(a))
        self.take(2 * a.numel() * b.shape[-1] / (GFLOPS[name] * (1 if self.threads == 1 else 3)))


@pytest.fixture(scope="module")
def probed():
    """The clock after a probe, and what it found."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        record = probing.probe(clock.told.append, passes=1)
    return clock, record


def test_rates_are_those_of_a_core_alone_and_of_each_with_all_at_work(probed):
    _, record = probed
    expected = {name: rate(name, 1) for name in probing.INSTRUCTIONS}
    clocks = {"scalar": expected.pop("cycle"), "beside_wide_vectors": expected.pop("wide_cycle")}
    assert record["clock_ghz"] == pytest.approx(clocks)
    assert record["rates"] == pytest.approx(expected)
    assert record["rates_all"] == pytest.approx({name: rate(name, THREADS) for name in expected})


def test_memory_is_that_of_each_size_read_in_each_order(probed):
    clock, record = probed
    for rows, threads in ((record["memory"], 1), (record["memory_all"], THREADS)):
        assert [row["bytes"] for row in rows] == SIZES
        for row in rows:
            size = row["bytes"]
            expected = {"bytes": size, "stream_ns": near_ns(size) / 2}
            for run in memory.RUNS:
                for pattern, repeats in (("runs", False), ("draws", True)):
                    read, prefetched = (line_ns(size, run, repeats, early, threads) for early in (False, True))
                    expected |= {f"{pattern}_of_{run}_read_ns": read, f"{pattern}_of_{run}_ns": min(read, prefetched)}
            if threads == 1:
                expected["latency_ns"] = 5 * near_ns(size)
            assert row == pytest.approx(expected)
            assert len(clock.pieces[size, threads, 1, False]) == max(1, size // 64 // 2**10), "all of them come"


def test_pages_calls_and_parallel_regions_are_told_apart(probed):
    _, record = probed
    assert [(row["pages"], row["page_bytes"]) for row in record["pages"]] == [
        (count, 4096) for count in (16, 64, 256, 1024, 2048, 4096, 16384)
    ]
    for row in record["pages"]:
        size = row["pages"] * 4096
        assert (row["small_ns"], row["huge_ns"]) == pytest.approx((7 * near_ns(size), 5 * near_ns(size)))
    sizes = (0, 2**16, 2**18)
    assert record["calls"] == [{"bytes": size, "ns": pytest.approx(call_ns(size))} for size in sizes]
    assert (record["module_ns"], record["parallel_ns"]) == pytest.approx((MODULE_NS, PARALLEL_NS))


def test_stages_are_those_of_a_token_of_inference_and_of_training(probed):
    _, record = probed
    for dtype, stages in STAGES.items():
        expected = dict(zip(("project", "hash", "gather"), stages, strict=True)) | {"all": sum(stages) / 3}
        assert record["engine"][dtype] == pytest.approx(expected)
    assert record["training"] == pytest.approx(TRAINING)


def test_products_that_are_slow_are_tried_on_few_rows_and_those_that_are_not_there_are_named(probed):
    clock, record = probed
    assert record["matmul_gflops"]["1"] == pytest.approx(GFLOPS)
    assert record["matmul_gflops"][str(THREADS)] == pytest.approx({name: 3 * rate for name, rate in GFLOPS.items()})
    assert set(clock.slow_products) == {probing.MATMUL_TRIAL}
    assert record["not_measured"] == {"float16 product": "no such product here"}
    assert clock.threads == THREADS


def test_one_thread_tries_both_cores_and_the_spread_says_how_far_they_are_apart(probed):
    clock, record = probed
    alone = [core for core in clock.cores if core is not None]
    assert alone == [0, 1] * (len(alone) // 2)
    one, all_at_work = record["spread"]["fma"], record["spread"]["fma, all"]
    assert (one, all_at_work) == pytest.approx((2 / (1 + 1 / SLOWER) - 1, 0))


def test_what_comes_next_is_told_and_what_was_found_is_a_machine(probed):
    clock, record = probed
    assert clock.told == ["instructions", "caches and memory, one thread", "caches and memory, 4 threads", "engine",
                          "pages", "matrix products"]  # fmt: skip
    assert (record["threads"], record["caches"]) == (THREADS, CACHES)
    machine = Machine.from_probe(record)
    assert set(machine.calibration) == {*STAGES, "training"}
    assert machine.memory["stream"] == [(size, pytest.approx(near_ns(size) / 2)) for size in SIZES]
    assert 0 < predict(Case(CONFIG, tokens=64), machine).ns < 1e6
    assert all(0 < dense_ns(256, 1024, machine, dtype, 64) < math.inf for dtype in STAGES)


def test_passes_are_as_many_as_asked_for_and_their_best_is_kept(monkeypatch):
    monkeypatch.setattr(native, "load", lambda *_: "")
    made, given = [], iter(range(9))
    monkeypatch.setattr(probing, "_once", lambda progress: made.append(progress) or next(given))
    monkeypatch.setattr(probing, "best", max)
    assert probing.probe("progress", passes=4) == 3
    assert made == ["progress"] * 4


# ---- Rounds ----------------------------------------------------------------------------------------------------------


def test_a_round_has_as_much_work_as_fills_its_time(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    calls = []

    def work(times):
        calls.append(times)
        clock["now"] += times * 3e-6
        return 7 * times

    run = rounds.rounds_of(work, 1e-3)
    assert calls == [1, 4, 16, 64]  # until it takes more than an eighth of a round
    assert run() == pytest.approx(7 / 3000)
    assert calls[4:] == [333]


def test_every_line_comes_once_in_runs_and_most_come_again_in_draws():
    for run in memory.RUNS:
        lines = memory._runs(memory.shuffled(512 // run), run)
        assert sorted(lines.tolist()) == list(range(512))
        assert (lines.view(-1, run) - lines.view(-1, run)[:, :1] == torch.arange(run)).all()
        repeated = memory._runs(memory._with_repeats(512 // run), run)
        assert len(repeated) == 4 * 512
        assert (repeated.view(-1, run) - repeated.view(-1, run)[:, :1] == torch.arange(run)).all()
        assert 0.95 * 512 < len(repeated.unique()) <= 512
    assert len(memory._with_repeats(2**21)) == 2**21


# ---- The machine at hand ---------------------------------------------------------------------------------------------


@needs_libraries
def test_a_machine_that_tells_nothing_is_probed_all_the_same(one_thread, monkeypatch):
    """The one probe with the operators and the clock of this machine: that it ends, and what its record holds."""
    monkeypatch.setattr(probing.machine, "caches", lambda: [])
    monkeypatch.setattr(probing.machine, "cgroup_quota", lambda: None)
    monkeypatch.setattr(probing, "memory_sizes", lambda caches: [2**14])
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(memory, "ROUND_SECONDS", 1e-4)
    settings = {"MATMUL_SIZE": 64, "CALLS": 2, "TRAINING_CALLS": 2, "BETWEEN_CALLS": (0, 2**16)}
    for name, value in settings.items():
        monkeypatch.setattr(probing, name, value)
    torch.set_num_threads(2)
    record = probing.probe(passes=1)
    assert record.keys() == {
        *("machine", "implementation", "threads", "quota", "caches", "huge_pages", "rates", "rates_all", "clock_ghz"),
        *("memory", "memory_all", "pages", "engine", "training", "calls", "module_ns", "parallel_ns", "matmul_gflops"),
        *("spread", "not_measured"),
    }
    assert (record["caches"], record["quota"]) == ([], None)
    assert "the system does not describe them" in record["not_measured"]["caches"]
    found = [*record["rates"].values(), *record["clock_ghz"].values(), *record["training"].values()]
    found += [ns for stages in record["engine"].values() for ns in stages.values()]
    found += [ns for row in (*record["memory"], *record["pages"]) for key, ns in row.items() if key.endswith("_ns")]
    found += [row["ns"] for row in record["calls"]]
    assert len(found) > 70
    assert all(0 < figure < math.inf for figure in found)
    assert all(0 <= spread < math.inf for spread in record["spread"].values())
    assert predict(Case(CONFIG, tokens=1), Machine.from_probe(record)).ns > 0


# ---- Validation ------------------------------------------------------------------------------------------------------


@needs_libraries
def test_predictions_stand_beside_the_median_of_the_passes(probed, one_thread, monkeypatch):
    cases = [Case(CONFIG, "int8", 64, 1), Case(CONFIG, "float32", 64, 2), Case(CONFIG, "int8", 1, 1, 2)]
    step = Step(LookupConfig(256, 256, num_tables=32, block_size=32), 64)
    torch.set_num_threads(3)
    told, threads, passes = [], [], iter((3.0, 11.0, 5.0))

    def probe():
        probe.scale = next(passes)
        threads.append(torch.get_num_threads())
        return probed[1]

    def least(calls, seconds, threads_of_call):
        assert seconds == 0.01
        threads.append((threads_of_call, torch.get_num_threads()))
        return dict.fromkeys(calls, 128.0 * probe.scale)

    monkeypatch.setattr(validation, "timed_tiling", lambda config, packed: Tiling(groups_per_block=2))
    monkeypatch.setattr(validation, "_least", least)
    monkeypatch.setattr(validation, "_windows", lambda threads: iter((None, None)))
    found = validation.validate(cases, [step], probe, passes=3, seconds=0.01, progress=told.append)
    assert torch.get_num_threads() == 3
    assert threads == [3, (1, 1), (2, 2), (1, 1), (1, 1)] * 3
    assert (told[0], told[-1]) == ("pass 1 of 3: call 1 of 3", "pass 3 of 3: training step 1 of 1")
    assert len(told) == 3 * 4
    probe_record, *found = found
    assert probe_record["what"] == "probe"
    assert [record["what"] for record in found] == ["prediction"] * 3 + ["training prediction"] * 6
    machine = Machine.from_probe(probe_record)
    for record, case in zip(found[:3], cases, strict=True):
        assert (record["tokens"], record["layers"], record["dtype"]) == (case.tokens, case.layers, case.dtype)
        tokens = case.tokens * case.layers
        assert record["passes_us"] == [128.0 * scale / tokens for scale in (3, 11, 5)]
        assert record["measured_us"] == 128.0 * 5 / tokens
        tiled = Case(CONFIG, case.dtype, case.tokens, case.threads, case.layers, tiling=Tiling(groups_per_block=2))
        assert record["predicted_us"] == pytest.approx(predict(tiled, machine).ns / 1e3)
        assert ("measured_stages_us" in record) == (case.threads == 1 and case.layers == 1)
    for record in found[3:]:
        assert record["passes_us"] == [2.0 * scale for scale in (3, 11, 5)]
        assert record["measured_us"] == 10.0
    errors = [abs(record["predicted_us"] / record["measured_us"] - 1) for record in found]
    of_inference, of_training = validation.summaries(found)
    assert (of_inference["cases"], of_training["cases"]) == (3, 6)
    assert of_inference["median_error"] == pytest.approx(sorted(errors[:3])[1])
    assert of_training["largest_error"] == pytest.approx(max(errors[3:]))


@pytest.mark.parametrize(("threads", "cores"), [(1, [3, 5, 3, 5]), (2, [None] * 4)])
def test_the_least_of_some_windows_is_kept_and_one_thread_takes_a_core_after_the_other(threads, cores, monkeypatch):
    seen, pauses, lows = [], [], iter((4.0, 2.0, 5.0, 3.0))

    def interleaved(calls, seconds, *, block):
        assert (seconds, block) == (0.5, validation.BLOCK)
        low = next(lows)
        return {name: Timing(9.0, low * scale, 10.0, 5) for name, scale in zip(calls, (1, 10), strict=True)}

    monkeypatch.setattr(validation, "time_interleaved", interleaved)
    monkeypatch.setattr(validation, "some_cores", lambda most: [3, 5])
    monkeypatch.setattr(validation, "on_core", lambda core: contextlib.nullcontext(seen.append(core)))
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert validation._least({"a": None, "b": None}, 1.0, threads) == {"a": 2e6, "b": 20e6}
    assert seen == cores
    assert pauses == [validation.PAUSE] * 4
