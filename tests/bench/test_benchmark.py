"""The benchmark: what stands beside what, by times on paper; nothing is timed or compiled here."""

import io
import json

import pytest
import torch
from rich.console import Console

from lookupffn import native
from lookupffn.bench import benchmark, engines
from lookupffn.bench.benchmark import CHAIN, Lookup, tables_for
from lookupffn.bench.engines import DENSE_ENGINES, Engine, dense_chain, dense_runs
from lookupffn.bench.timing import Timing

EAGER = tuple(engine for engine in DENSE_ENGINES if engine.package is None and not engine.compiled)


def fails(chain, x, threads):
    raise RuntimeError("no such instruction\nand more about it")


BROKEN, ABSENT = Engine("Broken", "int8", True, None, fails), Engine("Absent", "int8", False, "absent_engine", fails)


def test_engines_at_hand_run_the_chain_and_the_others_say_why_not(monkeypatch):
    monkeypatch.setattr(engines, "DENSE_ENGINES", (*EAGER, BROKEN, ABSENT))
    chain, x = dense_chain(24, 40, 2, seed=0), torch.randn(5, 24)
    runs, left_out = dense_runs(chain, x, 1)
    assert left_out == {
        BROKEN: "no such instruction", ABSENT: "absent_engine is not installed: pip install 'lookupffn[bench]'"
    }  # fmt: skip
    assert [engine.label for engine in runs] == ["PyTorch float32", "PyTorch bfloat16"]
    with torch.no_grad():
        expected = chain(x)
    for engine, run in runs.items():
        assert (run().float() - expected).norm() <= {"float32": 1e-6, "bfloat16": 0.02}[engine.dtype] * expected.norm()


@pytest.mark.skipif(not native.available(), reason="the kernels were not built")
def test_lookups_stand_beside_every_dense_engine_and_the_fastest_of_those(monkeypatch, one_thread):
    lookups = [Lookup(32, 2, "int8"), Lookup(32, 2, "bfloat16", projection_dtype="int8")]
    microseconds = {"PyTorch float32": 9, "PyTorch bfloat16": 6, lookups[0].label: 2, lookups[1].label: 12}
    seen = []

    def time_interleaved(calls, seconds, *, block, pause):
        seen.append({label: call().shape for label, call in calls.items()})
        assert (seconds, block, pause) == (0.1 * 4, benchmark.BLOCK_SECONDS, benchmark.PAUSE_SECONDS)
        return {label: Timing(*(microseconds[label] * 1e-6 * scale for scale in (1, 0.5, 2)), 7) for label in calls}

    monkeypatch.setattr(engines, "DENSE_ENGINES", (*EAGER, BROKEN))
    monkeypatch.setattr(benchmark, "lookups_for", lambda hidden_size, intermediate_size: lookups)
    monkeypatch.setattr(benchmark, "_gather_bandwidth", lambda seed: [])
    monkeypatch.setattr(benchmark, "time_interleaved", time_interleaved)
    console = Console(width=150, record=True, file=io.StringIO())
    (records,) = benchmark.bench([(32, 128)], [1, 24], [1], seconds=0.1, seed=0, training=False, console=console)
    assert seen == [dict.fromkeys(microseconds, (tokens, 32)) for tokens in (1, 24)]
    for tokens, layers in ((1, CHAIN), (24, 1)):
        found = {r["label"]: r for r in records if r["tokens"] == tokens}
        assert list(found) == list(microseconds)
        for label, r in found.items():
            us = microseconds[label] / tokens / layers
            assert (r["us_per_token"], *r["spread"]) == pytest.approx((us, us / 2, us * 2))
            assert (r["layers"], r["runs"], r["threads"], r["hidden_size"]) == (layers, 7, 1, 32)
    wide = {"ffn": "lookup", "engine": "lookupffn", "dtype": "bfloat16", "projection_dtype": "int8", "reads": 2}
    assert found[lookups[1].label].items() >= wide.items()
    assert json.loads(json.dumps(records)) == records
    rows = [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]
    assert f"{lookups[0].label} 0.17 (3.0x) 0.08 (3.0x)" in rows  # than bfloat16
    assert f"{lookups[1].label} 1.00 (0.5x) 0.50 (0.5x)" in rows
    assert rows.count("left out: Broken int8, compiled: no such instruction") == 1


@pytest.mark.parametrize(("width", "tables"), [(128, 32), (512, 128), (768, 256)])  # 32: as few as it gets
def test_tables_are_as_many_as_leave_six_times_fewer_multiply_adds(width, tables):
    assert tables_for(width, 4 * width) == tables
