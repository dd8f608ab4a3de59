"""The lines of memory that the model has in formulas, against those that the shim counts, and by hand."""

import math
import os
from collections import Counter

import pytest
from counted_cases import CASES, LARGE, SMALL, name, packed_of, whole_call

from lookupffn import LookupConfig
from lookupffn.lab.hardware import counting
from lookupffn.lab.hardware.case import LINE, Case
from lookupffn.lab.hardware.training_work import Step, training_loops
from lookupffn.lab.hardware.work import first_reads, loops
from lookupffn.runtime.format import read_header
from lookupffn.runtime.tuning import Tiling

pytestmark = pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_lines_are_those_that_are_read(case):
    header, counts, c = read_header(packed_of(case)), whole_call(case), case.config
    lines, plan = counts["lines"], counting.count(case).plan
    slices = -(-c.out_features // header["slice"])
    row_lines = header["section_bytes"]["tables"] // (slices * c.num_tables * header["table_rows"]) // LINE
    first, found = first_reads(case), loops(case)
    again = next(t for t in found["gather"][0].traffic if t.repeats)
    prefetched = [t for loop in found["hash"] if loop.only_prefetches for t in loop.traffic]
    assert (prefetched, first in found["gather"][0].traffic) == (([first], False) if plan.early_slices else ([], True))
    assert first.run == again.run == row_lines
    read = (first.lines + again.lines) * case.tokens
    assert read == pytest.approx(case.tokens * c.num_tables * c.reads * row_lines * slices)
    # Rows of int8 are read in fours, and any rows fill up the last one: no lines that were not read anyway.
    filled = -c.num_tables % 4 * c.reads * row_lines * slices * case.tokens if case.dtype == "int8" else 0
    assert lines["rows"]["loads"] == round(read) + filled

    weights = [t for loop in found["project"] if loop.name == "products" for t in loop.traffic[:2]]
    tiles = counting.tiles(case, plan)
    parts = header["repeats"] if plan.early_slices else 1
    assert counts["project_calls"] == sum(
        n * (parts if threads == 1 else min(threads, header["repeats"])) for (_, threads), n in tiles.items()
    )
    assert lines["weights"]["different"] * LINE == case.weight_bytes  # each is used
    assert sum(t.lines for t in weights) * case.tokens == pytest.approx(sum(tiles.values()) * case.weight_bytes / LINE)


def test_weights_are_read_again_after_the_gathers_of_all_layers():
    """By hand: 64 KiB of weights for two tiles of 12 tokens, whose 768 rows of 256 bytes come between two calls."""
    case = Case(LookupConfig(256, 256, num_tables=32, block_size=64), "int8", 24, layers=3)
    first, others = next(loop for loop in loops(case)["project"] if loop.name == "products").traffic
    assert (first.lines, first.bytes) == (pytest.approx(1024 / 24), 3 * (65536 + 768 * 256))
    assert (others.lines, others.bytes) == (pytest.approx(1024 / 24), 65536)


def test_x_is_read_by_the_loop_that_comes_first_and_sums_go_around_in_a_tile():
    """By hand: 16 lines of x; two repeats of 256 sums, 16 lines each, in a tile of twelve tokens."""
    x = 16.0, 24 * 1024
    for dtype, config, reader in (
        ("int8", SMALL, "largest of x"),
        ("float32", SMALL, "products"),
        ("int8", LookupConfig(255, 256, num_tables=64), "copy x"),
        ("int8", LookupConfig(256, 64, 32, 8, "none"), "copy x"),
    ):
        found = {loop.name: loop for loop in loops(Case(config, dtype, 24))["project"]}
        stream = (found[reader].traffic[-1].lines, found[reader].traffic[-1].bytes)
        assert stream == (pytest.approx(x[0] * config.in_features / 256), 24 * 4 * config.in_features)
        assert sum(t.bytes == 24 * 4 * config.in_features for loop in found.values() for t in loop.traffic) == 1
    found = {loop.name: loop for loop in loops(Case(SMALL, "int8", 24))["project"]}
    around = 12 * (4 * 256 + 5 * 256 + 4 * 2 * 256)
    lines = {
        "quantise x": 16,
        "butterflies": 2 * 3 * 16,
        "quantise between": 2 * 3 * 16,
        "butterflies to z": 2 * 2 * 16,
    }
    for loop, expected in lines.items():
        (traffic,) = found[loop].traffic
        assert (traffic.lines, traffic.bytes, traffic.pattern) == (expected, around, "stream"), loop


FEW = [Case(SMALL, tokens=1), Case(SMALL, tokens=24), Case(LARGE, tokens=24)]


@pytest.mark.parametrize("case", FEW, ids=name)
def test_different_lines_of_rows_are_as_many_as_with_uniform_codes(case):
    """The formula takes codes for uniform and independent; those of random layers and inputs nearly are."""
    first = first_reads(case)
    assert whole_call(case)["lines"]["rows"]["different"] == pytest.approx(first.lines * case.tokens, rel=0.03)
    of_tables = case.config.num_tables * case.config.num_rows * case.row_bytes
    assert first.share * of_tables == pytest.approx(first.lines * case.tokens * LINE)


@pytest.mark.parametrize("case", [*FEW, Case(SMALL, tokens=3), Case(LARGE, "float32", 1)], ids=name)
def test_rows_are_prefetched_before_they_are_read(case):
    """All of them, or within the gather all but the first token's."""
    lines, plan, c = whole_call(case)["lines"]["rows"], counting.count(case).plan, case.config
    first_token = 0 if plan.early_slices else c.num_tables * c.reads * case.row_bytes // LINE
    assert lines["different"] - first_token <= lines["prefetched"] <= lines["different"]
    assert lines["prefetched"] == lines["different"] or plan.tokens_ahead


def test_lines_of_a_gather_by_hand():
    """64 tables of 256 rows, three reads, two slices of two lines, in four blocks; 96 tokens, two layers in turn."""
    case = Case(SMALL, "int8", 96, layers=2, tiling=Tiling(groups_per_block=1))
    share = 1 - (1 - 3 / 256) ** 96
    first, again, reads, sums, y = next(loop for loop in loops(case)["gather"]).traffic
    assert (first.lines, first.bytes) == (pytest.approx(share * 64 * 256 * 4 / 96), 2 * 64 * 256 * 256)
    assert (first.pattern, again.pattern) == ("runs_of_2", "draws_of_2")
    assert (again.lines, again.bytes) == (pytest.approx(192 * 4 - first.lines), pytest.approx(share * 16 * 256 * 128))
    assert (reads.lines, reads.bytes) == (2 * 192 * 3 / 64, 96 * 192 * 3)
    assert (sums.lines, sums.bytes) == (2 * 2 * 3 * 8, 96 * 512)
    assert (y.lines, y.bytes) == (2 * 16, 96 * 1024)
    alone = Case(SMALL, "int8", 24, tiling=Tiling(prefetch_distance=0))
    assert [t.pattern for t in loops(alone)["gather"][0].traffic[:2]] == ["runs_of_2_read", "draws_of_2_read"]
    of_thread = next(loop for loop in loops(Case(SMALL, "int8", 64, threads=2))["gather"]).traffic[0]
    assert of_thread.bytes == 64 * 256 * 256 / 2, "each thread keeps to its slices"


def test_scalar_operations_go_with_rows_and_with_loads():
    found = {loop.name: loop for stage in loops(Case(SMALL, tokens=1)).values() for loop in stage}
    counted = counting.count(Case(SMALL, tokens=1)).stages
    rows = 192 * 2  # of two slices
    for stage, loop in (("gather", "rows"), ("hash", "prefetch rows")):
        assert found[loop].operations - counted[stage][loop] == Counter(word=rows, scalar=2 * rows)
    products = found["products"].operations - counted["project"]["products"]
    assert products == Counter(scalar=counted["project"]["products"]["load"] / 2)
    later = next(loop for loop in loops(Case(SMALL, tokens=512))["gather"])
    assert later.operations["word"] == 2 * rows, "a row that is read, and one that is prefetched"


# ---- Training --------------------------------------------------------------------------------------------------------

STEPS = [
    Step(LookupConfig(64, 128, 32, 4, reads=1), 64),  # packed
    Step(LookupConfig(64, 128, 32, 4, reads=2), 48),
    Step(LookupConfig(64, 80, 16, 5, reads=4), 32),  # a last slice that is cut
    Step(LookupConfig(64, 128, 16, 8, reads=1), 16),  # few tokens: straight from the tables
    Step(LookupConfig(64, 176, 32, 8, reads=3), 32),
    Step(LookupConfig(64, 64, 48, 6, reads=2), 128),
    Step(LookupConfig(64, 64, 32, 8, reads=1), 512),  # packed one part after the other
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_lines_of_training(step):
    """Formulas of the sizes, beside what follows from the counts."""
    c, tokens = step.config, step.tokens
    rows, slices = c.num_tables * c.reads, math.ceil(c.out_features / 64)
    table_lines = c.num_tables * c.num_rows * math.ceil(c.out_features / 16)
    lines = {
        f"{stage}.{loop.name}": loop.traffic for stage, of_stage in training_loops(step).items() for loop in of_stage
    }
    if tokens * c.reads < 2 * c.num_rows:
        (read, y) = lines["gather.rows"]
        assert "gather.pack" not in lines
        assert (read.lines, read.bytes) == (rows * math.ceil(c.out_features / 16), step.table_bytes)
        assert read.pattern == ("draws_of_8_read" if c.out_features >= 128 else "draws_of_4_read")
    else:
        packed = max(1, min(2**19 // (c.num_rows * 256), c.num_tables))  # tables, in half a MiB
        parts = math.ceil(c.num_tables / packed)
        read, codes, sums = lines["gather.rows"]
        (pack,), (y,) = lines["gather.pack"], lines["gather.unpack"]
        assert (pack.lines, pack.bytes, pack.prefetched) == (
            pytest.approx(table_lines / tokens),
            step.table_bytes,
            True,
        )
        assert (read.lines, read.bytes) == (rows * 4 * slices, c.num_tables / parts * c.num_rows * 256)
        assert (codes.lines, codes.bytes) == (slices * rows * 8 / 64, 8 * rows * tokens)
        assert (sums.lines, sums.bytes) == (slices * 4 * (2 * parts - 1), 256 * tokens)
    assert (y.lines, y.bytes) == (c.out_features / 16, 4 * c.out_features * tokens)
    grad, pack = lines["gather backward.pack"]
    assert (grad.lines, grad.bytes) == (math.ceil(c.num_tables / 16) * c.out_features / 16, 4 * c.out_features * tokens)
    few = tokens * c.reads < c.num_rows  # then rows are packed one by one, as they are read
    assert pack.lines == pytest.approx(rows * math.ceil(c.out_features / 16) if few else table_lines / tokens)
    scatter, stream = lines["gather backward.scatter"]
    assert (scatter.lines, scatter.bytes) == (pytest.approx(2 * rows * 4 * slices), 2 * c.num_rows * 256)
    assert (stream.lines, stream.bytes) == (pytest.approx(rows * 4 * slices), 256 * tokens)
    (unpack,) = lines["gather backward.unpack"]
    assert (unpack.lines, unpack.bytes) == (pytest.approx(table_lines / tokens), 2 * step.table_bytes)


def test_what_training_does_beside_its_counts_by_hand():
    for reads in (1, 2):
        step = Step(LookupConfig(64, 128, 32, 4, reads=reads), 64)
        found = {
            f"{stage}.{loop.name}": loop.operations
            for stage, of_stage in training_loops(step).items()
            for loop in of_stage
        }
        moved = Counter(word=2 * 32 * reads, put=2 * 32 * reads, scalar=2 * 32 * reads)
        assert found.get("hash.read by read") == (moved if reads > 1 else None)
        assert found["hash backward.read by read"] == moved
        assert found["gather.rows"]["word"] == pytest.approx(2 * 32 * reads, rel=0.1), "each slice of each row"
        assert found["gather backward.scatter"]["word"] == 2 * 2 * 32 * reads
        unpacked = counting.training(step.config, 64)["gather backward"]["unpack"]["store"]
        assert found["gather backward.unpack"]["clear"] == unpacked
