"""The hardware study: descriptions and their sources, the model by hand, the probe on machines that tell little."""

import dataclasses
import math
import os
from collections import Counter

import pytest

from lookupffn import native
from lookupffn.errors import InputError
from lookupffn.lab.hardware import memory
from lookupffn.lab.hardware import probe as probing
from lookupffn.lab.hardware import validate as validation
from lookupffn.lab.hardware.case import Case
from lookupffn.lab.hardware.described import FEATURES, describe, descriptions
from lookupffn.lab.hardware.model import Machine, _calibration, bound, dense_ns, predict, predict_training
from lookupffn.lab.hardware.training_work import Step, products, training_loops
from lookupffn.lab.hardware.work import PATTERNS, Loop, Traffic
from lookupffn.layer import LookupConfig

pytestmark = pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0")

CONFIG = LookupConfig(256, 256, num_tables=32, block_size=64)


def figures(entry, prefix=""):
    """Dotted names of every number of a description; those of a cache under its level."""
    for key, value in entry.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from figures(value, f"{name}.")
        elif isinstance(value, list):
            for cache in value:
                rest = {k: v for k, v in cache.items() if k != "level"}
                yield from figures(rest, f"{name}.{cache['level']}.")
        elif isinstance(value, int | float):
            yield name


@pytest.mark.parametrize("name", descriptions())
def test_every_figure_of_a_description_has_one_source(name):
    description = descriptions()[name]
    described = {key: value for key, value in description.items() if key not in ("sources", "notes")}
    named = [figure for source in description["sources"] for figure in source["figures"]]
    for figure in figures(described):
        covering = [n for n in named if figure == n or figure.startswith(f"{n}.")]
        assert len(covering) == 1, (figure, covering)
    assert all(source["where"] and source["title"] for source in description["sources"])


@pytest.mark.parametrize("name", descriptions())
def test_a_described_machine_is_sound(name):
    machine = describe(descriptions()[name])
    assert all(
        rate > 0 for kind, rate in machine.rates.items() if kind not in ("dot_bf16", "product_int8", "product_bfloat16")
    )
    for curves in (machine.memory, machine.memory_all):
        for run, curve in curves.items():
            times = [ns for _, ns in curve]
            assert times == sorted(times), "memory further away is not faster"
            nearest = curves["stream" if run.startswith("runs") else run.replace("draws", "runs")]
            slower = all(here >= there for (_, here), (_, there) in zip(curve, nearest, strict=True))
            faster = all(here <= there for (_, here), (_, there) in zip(curve, nearest, strict=True))
            assert faster if run.startswith("draws") else slower, run
    one, many = (predict(Case(CONFIG, tokens=512, threads=n), machine).ns for n in (1, machine.threads))
    assert 0 < many < one
    assert 0 < dense_ns(256, 1024, machine, "int8", 512) <= dense_ns(256, 1024, machine, "float32", 512)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_never_costs_time_and_leaves_the_description_alone(feature):
    for description in descriptions().values():
        before = str(description)
        changed = FEATURES[feature](description)
        assert str(description) == before
        assert (
            changed != description
            or (feature == "half the L3 latency" and len(description["caches"]) < 3)
            or ("L3" in feature and len(description["caches"]) < 3)
        )
        for tokens in (1, 512):
            case = Case(CONFIG, tokens=tokens, layers=12)
            assert predict(case, describe(changed)).ns <= predict(case, describe(description)).ns * (1 + 1e-9)


def flat(**changes) -> Machine:
    """A machine of one operation a nanosecond, and a nanosecond a line from anywhere but L1, which takes none."""
    kinds = ("add", "multiply", "fma", "divide", "convert", "vector", "dot_int8", "dot_int16", "rows", "shuffle", "exp")
    rates = (
        dict.fromkeys((*kinds, "load", "store", "clear", "put", "prefetch", "word", "scalar", "issue"), 1.0) | changes
    )
    curve = {run: [(2**14, 1e-9), (2**15, 1.0), (2**30, 1.0)] for run in PATTERNS}
    return Machine("flat", 2, 64, rates, curve, curve)


def test_the_busiest_resource_and_the_lines_make_the_time():
    operations = Counter(fma=6, add=2, load=4, scalar=5)
    assert bound(Loop("x", operations), flat()).ns == pytest.approx(17)  # everything has to be issued
    quick = flat(issue=100.0, vector=100.0)
    assert bound(Loop("x", operations), quick).ns == pytest.approx(6)
    assert bound(Loop("x", operations), quick).bound_by == "multiply"
    assert bound(Loop("x", operations), quick, calibration=1.5).ns == pytest.approx(9)
    far = Loop("x", operations, (Traffic(3, 2**20), Traffic(4, 2**14)))
    assert bound(far, quick).ns == pytest.approx(6 + 3)
    assert bound(far, quick, calibration=2).ns == pytest.approx(12 + 3), "lines do not come slower for clumsy loops"


def test_narrow_vectors_take_more_issue_slots():
    narrow = dataclasses.replace(flat(vector=100.0), vector_bytes=16)
    assert bound(Loop("x", Counter(fma=6, scalar=5)), narrow).ns == pytest.approx(6 * 4 + 5)


def test_four_rows_count_as_their_shuffles_and_products():
    assert bound(Loop("x", Counter(rows=3)), flat(issue=100.0)).bound_by == "vector"
    gathers = dataclasses.replace(flat(), gathers=True, rows_operations=4)
    assert bound(Loop("x", Counter(rows=3, word=50, scalar=50)), gathers).ns == pytest.approx(12)


def test_a_loop_that_only_prefetches_takes_as_long_as_its_lines_or_itself():
    operations, lines = Counter(fma=6), (Traffic(8, 2**20),)
    assert bound(Loop("x", operations, lines), flat()).ns == pytest.approx(6 + 8)
    assert bound(Loop("x", operations, lines, only_prefetches=True), flat()).ns == pytest.approx(8)
    assert bound(Loop("x", operations, lines, only_prefetches=True), flat(), calibration=2).ns == pytest.approx(12)


def test_lines_that_come_again_soon_are_still_near():
    """A cache of 1 MiB, 1 ns from within and 3 beyond; of 2 MiB each round reads a share, chosen anew."""
    curve = {pattern: [(2**20, 1.0), (2**20 + 1, 3.0), (2**30, 3.0)] for pattern in PATTERNS}
    machine = dataclasses.replace(flat(), memory=curve)

    def ns(share):
        return machine.line_ns(Traffic(1, 2**21, 1, share=share))

    assert ns(1.0) == pytest.approx(3)
    assert ns(0.5) == pytest.approx(0.5 * 1 + 0.5 * 3, rel=1e-2), "in half of the cases after half of the bytes"
    assert ns(0.6) == pytest.approx(3), "after 1.2 MiB at the earliest"
    assert ns(0.001) == pytest.approx(0.5 * 1 + 0.5 * 3, rel=1e-2), "as many as fit"


def test_with_several_threads_the_rates_are_those_of_all_cores_at_work():
    machine = dataclasses.replace(flat(), rates_all={kind: rate / 2 for kind, rate in flat().rates.items()})
    loop = Loop("x", Counter(fma=6, scalar=5))
    assert bound(loop, machine).ns == pytest.approx(11)
    assert bound(loop, machine, threads=4).ns == pytest.approx(2 * 11 / 4)
    assert dense_ns(256, 1024, machine, "float32", 4096, 2) == pytest.approx(2 * 256 * 1024 / 16)


def test_calibration_is_of_what_is_executed_and_no_loop_beats_its_roofline():
    loop = Loop("x", Counter(fma=6), (Traffic(4, 2**20),))
    found = [bound(loop, flat())]
    assert _calibration(6 + 4, found) == pytest.approx(1)
    assert _calibration(2 * 6 + 4, found) == pytest.approx(2), "lines do not come slower for clumsy loops"
    assert _calibration(3, found) == 1.0


def test_the_calibration_of_all_threads_is_of_what_they_execute():
    near = dataclasses.replace(flat(), memory_all={pattern: [(2**14, 1e-9), (2**30, 1e-9)] for pattern in PATTERNS})
    case, far = Case(CONFIG, tokens=64, threads=2), flat()
    factor = {"calibration_all": {"int8": 2.0}}
    alone, calibrated = (predict(case, machine).ns for machine in (near, dataclasses.replace(near, **factor)))
    assert calibrated == pytest.approx(2 * alone)
    lines = predict(case, far).ns - alone
    assert lines > 0
    assert predict(case, dataclasses.replace(far, **factor)).ns == pytest.approx(2 * alone + lines), "memory once"
    one = dataclasses.replace(case, threads=1)
    assert predict(one, dataclasses.replace(far, **factor)).ns == predict(one, far).ns


def test_a_call_takes_longer_the_more_was_read_since_the_last_one():
    machine = dataclasses.replace(flat(), calls=[(0, 1000.0), (2**20, 3000.0)])
    case = Case(CONFIG, tokens=1)
    read = case.weight_bytes + 32 * 256  # one row of every table
    assert predict(case, machine).overhead_ns == pytest.approx(1000 + 2000 * read / 2**20)
    many = dataclasses.replace(case, tokens=2**12)
    assert predict(many, machine).overhead_ns * 2**12 == pytest.approx(3000), "no table is read twice, and no further"


def test_calls_and_parallel_regions_are_shared_by_the_tokens():
    machine = dataclasses.replace(flat(), calls=[(0, 1000.0)], parallel_ns=300.0)
    assert predict(Case(CONFIG, tokens=10), machine).overhead_ns == pytest.approx(100)
    assert predict(Case(CONFIG, tokens=10, threads=2), machine).overhead_ns == pytest.approx(160)
    assert predict(Case(CONFIG, tokens=2, threads=2), machine).overhead_ns == pytest.approx(500), "too few to share out"


def test_a_training_step_is_its_loops_and_its_products():
    machine = flat(product=4.0, block_product=2.0)
    step = Step(dataclasses.replace(CONFIG, block_size=32), 64)
    found = predict_training(step, machine)
    assert set(found) == {"project", "project backward", "hash", "hash backward", "gather", "gather backward"}
    loops = training_loops(step)["gather backward"]
    assert found["gather backward"] == pytest.approx(sum(bound(loop, machine).ns for loop in loops))
    of_stages = 4 * 256 * (32 + 8)  # one repeat of 256 numbers, by a block of 32 and across 8 blocks
    fold = 4 * 256 * 32 * 32 / 64  # of 32 numbers into each of a block's 32 columns, shared by 64 tokens
    # A pass over 256 numbers is 16 lines, which take a nanosecond each.
    assert found["project"] == pytest.approx((of_stages + fold) / 2 + (11 + 8) * 16)
    assert found["project backward"] == pytest.approx((3 * of_stages + 2 * fold) / 2 + (8 + 14) * 16)
    few = products(Step(step.config, 16))["project"]
    assert few.small == of_stages, "nothing is folded for as few tokens as a block is wide"
    many = products(Step(step.config, 1024))  # one matrix of 256 x 256, made of a fourth as many rows
    fold = 4 * 256 * 32 * 32 / 1024
    assert (many["project"].large, many["project"].small) == (256 * 256, of_stages / 4 + fold)
    assert many["project backward"].small == pytest.approx(of_stages + 3 * fold)
    assert many["project"].moves.lines == pytest.approx((11 + 8) * 16 / 4)
    dense = products(Step(LookupConfig(100, 256, 16, 8, "dense"), 64))
    assert {stage: (p.large, p.small, p.moves.lines) for stage, p in dense.items()} == {
        "project": (12800, 0, 0),
        "project backward": (25600, 0, 0),
    }
    assert products(Step(LookupConfig(128, 64, 16, 8, "none"), 64)) == {}


def test_dense_is_bound_by_products_or_by_its_weights():
    machine = flat(fma=1.0)
    assert dense_ns(256, 1024, machine, "float32", 4096) == pytest.approx(2 * 256 * 1024 / 16)
    assert dense_ns(256, 1024, machine, "int8", 1) == pytest.approx(2 * 256 * 1024 / 64)
    assert dense_ns(256, 1024, dataclasses.replace(machine, rates=machine.rates | {"dot_int8": 100.0}), "int8", 1) == (
        pytest.approx(2 * 256 * 1024 / 64)
    ), "its lines"
    assert math.isinf(dense_ns(256, 1024, machine, "bfloat16", 1))


def test_sizes_to_probe_end_where_memory_would():
    assert memory.memory_sizes([])[0] == 2**14
    assert max(memory.memory_sizes([{"bytes": 2**40}])) <= 2**28
    sizes = memory.memory_sizes([{"bytes": 2**20}, {"bytes": 2**22}])
    assert sizes == [2**k for k in range(14, 26)]


def test_shuffled_places_are_each_there_once():
    for bits in range(1, 15):
        assert sorted(memory.shuffled(2**bits)) == list(range(2**bits))
    steps = memory.shuffled(2**14)[1:] - memory.shuffled(2**14)[:-1]
    assert len(set(steps.tolist())) > 1000, "no stride that a prefetcher could learn"


def test_without_kernels_the_probe_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name="kernels": "nothing was built")
    with pytest.raises(InputError, match="there are none: nothing was built"):
        probing.probe()


# ---- Predictions beside measurements ---------------------------------------------------------------------------------


def record_of(quick):
    """What a probe finds, with figures that follow each other."""
    row = {"bytes": 2**14, "stream_ns": quick, "latency_ns": 2 * quick}
    return {
        "rates": {"fma": 1 / quick},
        "clock_ghz": {"scalar": 1 / quick},
        "spread": {"fma": 0.1},
        "matmul_gflops": {"1": {"float32": 1 / quick}},
        "engine": {"int8": {"hash": quick}},
        "training": {"hash": quick},
        "calls": [{"bytes": 0, "ns": quick}],
        "module_ns": quick,
        "parallel_ns": quick,
        "memory": [dict(row)],
        "pages": [{"pages": 16, "small_ns": quick, "huge_ns": quick}],
        "caches": [],
    }


def test_the_best_of_some_probes_is_the_best_of_each_figure():
    records = [record_of(2.0), record_of(1.0), record_of(4.0)]
    records[1]["rates"]["fma"] = 0.1
    records[2]["memory"][0]["latency_ns"] = 1.5
    records[0]["spread"]["fma"] = 0.3
    before = str(records)
    best = probing.best(records)
    expected = record_of(1.0)
    expected["rates"]["fma"] = 0.5
    expected["memory"][0]["latency_ns"] = 1.5
    expected["spread"]["fma"] = 0.3
    assert best == expected
    assert str(records) == before


def test_the_median_of_some_probes_is_the_median_of_each_figure():
    records = [record_of(2.0), record_of(1.0), record_of(4.0)]
    records[0]["memory"][0]["latency_ns"] = 9.0
    records[2]["engine"]["int8"]["hash"] = 0.5
    expected = record_of(2.0)
    expected["memory"][0]["latency_ns"] = 8.0
    expected["engine"]["int8"]["hash"] = 1.0
    assert probing.median(records) == expected


def test_samples_are_the_same_for_a_seed_and_fit_into_memory():
    cases = validation.sample_cases(40, 5, threads=2)
    assert cases == validation.sample_cases(40, 5, threads=2) != validation.sample_cases(40, 6, threads=2)
    assert {case.threads for case in cases} == {1, 2}
    assert {case.dtype for case in cases} == {"int8", "bfloat16", "float32"}
    assert all(case.layers * case.table_bytes <= validation.MOST_BYTES for case in cases)
    assert all((case.layers == validation.CHAIN) == (case.tokens <= 8) for case in cases)
