"""Counts of operations: those of tiles and of one token add up to what a whole call executes, and some by hand."""

import dataclasses
import json
import os
from collections import Counter

import pytest
from counted_cases import CASES, PADDED, SMALL, name, packed_of, whole_call

from lookupffn import LookupConfig, native
from lookupffn.errors import InputError
from lookupffn.lab.hardware import counting
from lookupffn.lab.hardware.case import Case
from lookupffn.lab.hardware.library import operators
from lookupffn.runtime.format import read_header
from lookupffn.runtime.tuning import Tiling

pytestmark = pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_what_a_token_executes_adds_up_to_what_a_whole_call_does(case):
    expected = {loop: kinds for loop, kinds in whole_call(case)["loops"].items() if kinds}
    got = {
        f"{stage}.{loop.replace(' ', '_')}": {kind: round(n * case.tokens, 6) for kind, n in operations.items()}
        for stage, of_stage in counting.count(case).stages.items()
        for loop, operations in of_stage.items()
    }
    assert got == expected


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_blank_layer_has_the_header_of_one_that_was_packed(case):
    expected, got = read_header(packed_of(case)), read_header(counting.blank(case))
    for field in ("scale", "residual"):
        assert got.pop(field) == pytest.approx(expected.pop(field))
    assert got == expected
    assert case.table_bytes == expected["section_bytes"]["tables"]
    assert case.weight_bytes == expected["section_bytes"].get("weights", 0)
    assert all(case.header[field] == value for field, value in expected.items() if field in case.header)


def test_a_blank_layer_of_a_terabyte_takes_next_to_no_memory():
    case = Case(LookupConfig(512, 4096, num_tables=4096, code_bits=16, block_size=8), "float32", 1)
    assert counting.blank(case).numel() > 2**42
    counting.blank.cache_clear()


# ---- Counted by hand -------------------------------------------------------------------------------------------------


def by_hand(case):
    found = counting.count(case).stages
    return {f"{stage}.{loop}": operations for stage, of_stage in found.items() for loop, operations in of_stage.items()}


@pytest.mark.parametrize(
    ("dtype", "kind", "per_line"), [("int8", "dot_int8", 64), ("bfloat16", "dot_int16", 32), ("float32", "fma", 16)]
)
def test_every_weight_is_multiplied_once_a_token_and_loaded_once_a_register_tile(dtype, kind, per_line):
    for tokens, register_tiles in ((1, 1), (2, 1), (3, 2), (6, 1), (12, 2), (24, 4)):
        case = Case(SMALL, dtype, tokens)
        products = by_hand(case)["project.products"]
        weights = case.weight_bytes * per_line // 64
        assert products[kind] == weights / per_line
        outputs, words = 2 * 4 * 256, case.weight_bytes / 64  # 2 repeats of 4 stages
        loads = words * register_tiles / tokens + words / 4  # of the weights; an activation meets four panels
        loads += outputs / 16 if dtype != "float32" else 0  # scales
        loads += outputs / 16 * register_tiles / tokens if dtype == "int8" else 0  # offsets
        assert products["load"] == pytest.approx(loads)
        assert products["store"] == outputs / 16


def test_operations_of_a_small_layer_by_hand():
    """64 tables with three reads of 256 outputs: 4 groups, 192 rows of 2 slices of 2 lines; one token, one thread."""
    found = by_hand(Case(SMALL, "int8", 1))
    assert list(found) == [
        *("project.largest of x", "project.quantise x", "project.products", "project.butterflies"),
        *("project.quantise between", "project.butterflies to z"),
        *("hash.codes and scores", "hash.prefetch rows", "hash.quantise scores", "gather.rows"),
    ]
    assert found["hash.prefetch rows"] == Counter(prefetch=192 * 2 * 2)
    assert found["hash.codes and scores"]["exp"] == 4 * (8 + 2)  # one a bit, and one for each bucket but the nearest
    assert found["hash.codes and scores"]["divide"] == 4 * 3
    rows = found["gather.rows"]
    assert rows["rows"] == 192 / 4 * 4  # four at once, line by line
    assert rows["load"] == 192 * 4 + 192 / 4 * 4 + 256 / 16  # lines, four scores for each, bias
    assert rows["store"] == rows["add"] == rows["convert"] == 256 / 16
    assert "prefetch" not in rows
    many = by_hand(Case(SMALL, "int8", 512))
    assert "hash.prefetch rows" not in many
    assert many["gather.rows"]["prefetch"] == 192 * 4
    assert "prefetch" not in by_hand(Case(SMALL, "int8", 512, tiling=Tiling(prefetch_distance=0)))["gather.rows"]
    one_each = Tiling(groups_per_block=1)
    blocks = by_hand(Case(SMALL, "int8", 512, tiling=one_each))["gather.rows"]
    assert blocks["load"] - rows["load"] == 3 * 256 / 16, "sums between four blocks"
    few = Case(SMALL, "int8", 24, tiling=one_each)  # 72 reads of 256 rows
    assert by_hand(few)["gather.rows"] == many["gather.rows"], "nothing comes again: one block"
    for dtype, lines in (("bfloat16", 2), ("float32", 1)):
        rows = by_hand(Case(SMALL, dtype, 1))["gather.rows"]
        assert rows["fma"] == 192 * 256 / 16
        assert rows["load"] == 192 * 256 / 16 / lines + 192 * 2 + 256 / 16  # a score for each slice of a row


def test_operations_of_training_by_hand():
    """32 tables of 16 rows of 128 outputs, read once by 64 tokens: packed for their sums, in two slices."""
    found = counting.training(LookupConfig(64, 128, 32, 4), 64)
    assert set(found) == {"hash", "gather", "gather backward", "hash backward"}
    assert found["hash"]["codes and scores"]["exp"] == 2 * 4
    assert found["gather"]["rows"]["fma"] == 32 * 128 / 16
    assert found["gather"]["pack"]["load"] == 32 * 16 * 128 / 16 / 64
    assert found["gather"]["unpack"] == Counter(load=128 / 16, store=128 / 16)
    scatter = found["gather backward"]["scatter"]
    assert scatter["fma"] + scatter["multiply"] == 2 * 32 * 128 / 16
    assert scatter["load"] == 32 * 2 * (3 * 4 + 1 + 1 / 16)  # of a slice: gradient, row, sums, score; and the dots
    assert found["gather backward"]["unpack"]["store"] == 32 * 16 * 128 / 16 / 64
    few = counting.training(LookupConfig(64, 128, 32, 8), 16)
    assert set(few["gather"]) == {"rows"}, "packing would read more rows than there are reads"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(SMALL, tokens=110), {(12, 1): 9, (2, 1): 1}),
        (Case(SMALL, tokens=5), {(5, 1): 1}),
        (Case(SMALL, tokens=500, tiling=Tiling(tile_tokens=1000)), {(96, 1): 5, (20, 1): 1}),
        (Case(SMALL, tokens=2100), {(12, 1): 170 + 4, (8, 1): 1, (4, 1): 1}),  # chunks of 2,048 and 52
        (Case(SMALL, tokens=2100, threads=2), {(12, 1): 2 * 85 + 2 * 2, (4, 1): 2, (2, 1): 2}),
        (Case(SMALL, tokens=30, threads=4), {(8, 1): 3, (6, 1): 1}),
        (Case(SMALL, tokens=10, threads=4), {(10, 4): 1}),  # each thread has some of its repeats
        (Case(SMALL, tokens=4, threads=4), {(4, 1): 1}),  # too few to share out
        (Case(PADDED, tokens=10, threads=4), {(3, 1): 3, (1, 1): 1}),  # of one repeat, nothing to share
    ],
)
def test_tiles_by_hand(case, expected):
    assert counting.tiles(case, counting.count(case).plan) == expected


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(counting, "_known", {})


def test_counts_that_were_written_do_where_they_cannot_be_counted(nothing_known, monkeypatch):
    case = Case(SMALL, "bfloat16", 24, threads=2, layers=12)
    expected, lines = counting.count(case), json.dumps(counting.record(case))
    counting._known.clear()
    monkeypatch.setattr(native, "load", lambda name="kernels": f"{name} was not built")
    with pytest.raises(InputError, match=r"lab was not built.*`lookupffn hardware count --json FILE`"):
        counting.count(case)
    counting.add_known([json.loads(lines)])
    assert counting.count(case) == expected
    with pytest.raises(InputError, match="lab was not built"):
        counting.count(dataclasses.replace(case, tokens=25))
    with pytest.raises(InputError, match="lab was not built"):
        counting.training(LookupConfig(64, 64, 16, 4), 48)


@pytest.mark.parametrize("damage", [{"plan": {}}, {"stages": {"hash": 3}}, {"config": {"width": 1}}, {"tiling": None}])
def test_a_damaged_record_is_refused(nothing_known, damage):
    record = counting.record(Case(SMALL, tokens=1))
    for damaged in (record | damage, {field: record[field] for field in record if field not in damage}):
        with pytest.raises(InputError, match="a record of counted operations is damaged"):
            counting.add_known([damaged])


# ---- The operators ---------------------------------------------------------------------------------------------------


def test_the_operators_refuse_what_does_not_fit():
    lab, case = operators(), Case(SMALL, tokens=1)
    packed, sizes = counting.blank(case), counting._sizes(Tiling())
    for arguments in (
        (packed[:100], 1, sizes, 1),
        (packed.clone().fill_(1), 1, sizes, 1),
        (packed, 0, sizes, 1),
        (packed, 1, sizes, 0),
        (packed, 1, sizes[:3], 1),
        (packed, 1, sizes.long(), 1),
    ):
        with pytest.raises(RuntimeError, match="lookupffn: "):
            lab.plan(*arguments)
        with pytest.raises(RuntimeError, match="lookupffn: "):
            lab.count_operations(*arguments)
    for larger in ([1], [0, 0, 0]):
        with pytest.raises(RuntimeError, match="larger must be"):
            lab.count_operations(packed, 1, sizes, 1, larger)
    for shape in ((0, 4, 1, 64, 16), (16, 17, 1, 64, 16), (16, 4, 5, 64, 16), (1 << 20, 16, 1, 1 << 20, 16)):
        with pytest.raises(RuntimeError, match="sizes must be positive"):
            lab.count_training(*shape)
