"""The hardware model's formulas against counters: the engine runs on a vector shim that counts every call."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from lookupffn import LookupConfig, LookupFFN
from lookupffn.lab.hardware.training_work import Step, training_loops
from lookupffn.lab.hardware.work import LINE, PROJECTION_DTYPES, Case, _register_tiles, first_reads, loops
from lookupffn.runtime.format import encode, read_header
from lookupffn.runtime.tuning import Tiling

ROOT = Path(__file__).parents[3]
NOT_COUNTED = ("word", "put", "scalar", "clear")  # kinds of which the shim knows nothing

LARGE = LookupConfig(512, 512, num_tables=128)
SMALL = LookupConfig(256, 256, num_tables=64, reads=3)
PADDED = LookupConfig(320, 192, num_tables=24)  # x padded to 512, slices of 64
ODD = LookupConfig(128, 200, num_tables=17, code_bits=5, reads=2)  # a table by itself, a last slice that is cut

CASES = [
    *(Case(LARGE, dtype, tokens) for dtype in PROJECTION_DTYPES for tokens in (1, 5, 12, 24)),
    *(
        Case(config, dtype, tokens)  # one token asks for its rows early
        for dtype in PROJECTION_DTYPES
        for config in (SMALL, PADDED, ODD)
        for tokens in (1, 12)
    ),
    *(
        Case(SMALL, dtype, 24, tiling=tiling)
        for dtype in PROJECTION_DTYPES
        for tiling in (Tiling(prefetch_distance=0), Tiling(groups_per_block=1))
    ),
    Case(dataclasses.replace(LARGE, reads=3), "float32", 1),  # asks for one slice after the other
    *(Case(SMALL, "int8", 110, tiling=Tiling(tile_tokens=tile)) for tile in (1, 7, 16, 1000)),
    *(Case(SMALL, "float32", 12, projection_dtype=kind) for kind in ("int8", "int16")),
    *(Case(LookupConfig(100, 500, 24, 6, "dense"), dtype, 12) for dtype in PROJECTION_DTYPES),  # 112 numbers: 64, 3 16s
    *(Case(LookupConfig(256, 64, 32, 8, "none"), dtype, 5) for dtype in PROJECTION_DTYPES),
    *(Case(LookupConfig(256, 256, 64, block_size=8), dtype, 12) for dtype in PROJECTION_DTYPES),  # one panel at a time
    *(Case(LookupConfig(64, 256, 64, block_size=block), "int8", 12) for block in (16, 32, 64)),  # no level to two
    Case(LookupConfig(256, 256, 64, code_bits=9), tokens=12),
    Case(LookupConfig(256, 256, 64, decay=1.0), tokens=12),
    Case(LookupConfig(8, 64, 24, 4, block_size=8), tokens=12),  # narrower than a vector
    *(Case(LookupConfig(64, 64, 32, 2, reads=reads), tokens=12) for reads in (2, 4)),  # with negated rows
    Case(dataclasses.replace(ODD, reads=4), tokens=2100),  # more than a chunk
    *(Case(PADDED, tokens=tokens, threads=threads) for threads in (2, 5) for tokens in (5, 64)),  # one repeat, 3 slices
    Case(LARGE, tokens=29, threads=3),
    Case(ODD, tokens=2100, threads=2),
]


def name(case):
    c, t = case.config, case.tiling
    options = dataclasses.asdict(t).items() - dataclasses.asdict(Tiling()).items()
    sizes = f"{c.in_features}x{c.num_tables}x{c.code_bits}x{c.out_features} reads={c.reads} tokens={case.tokens}"
    sizes += f" threads={case.threads}" if case.threads > 1 else ""
    kinds = [f"{c.projection}-{c.block_size}", case.dtype, case.weight_type]
    return " ".join([sizes, *kinds, *(f"{k}={v}" for k, v in sorted(options))])


def built(folder, name, *sources):
    """The program of tests/kernels/ with these sources of the engine."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        pytest.skip("needs a C++ compiler: none of c++, g++, clang++ is there")
    # Not optimised: it counts what the source calls, and most of the time goes into compiling.
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-Wno-psabi", "-Icsrc"]
    files = [f"tests/kernels/{name}.cpp", *(f"csrc/{source}" for source in sources)]
    subprocess.run([*compiler.split(), *flags, *files, "-o", str(folder / name)], cwd=ROOT, check=True)
    return folder / name


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return built(tmp_path_factory.mktemp("counting"), "count_operations", "engine.cpp", "layer.cpp")


@functools.lru_cache(maxsize=1)  # cases of one layer stand together
def packed_layer(config, dtype, weight_type):
    torch.manual_seed(0)
    return encode(LookupFFN(config), dtype, weight_type)


@pytest.fixture(params=CASES, ids=name, scope="module")
def counted(request, program):
    """A case, the header of its packed layer, and what the program counts."""
    case, t = request.param, request.param.tiling
    packed = packed_layer(case.config, case.dtype, case.weight_type)
    path = program.with_name("packed")
    packed.numpy().tofile(path)
    numbers = (case.tokens, t.tile_tokens, t.prefetch_distance, t.groups_per_block, case.threads)
    done = subprocess.run([str(program), str(path), *map(str, numbers)], capture_output=True, text=True)
    path.unlink()
    assert done.returncode == 0, done.stderr
    return case, read_header(packed), json.loads(done.stdout)


def test_the_formulas_count_what_the_engine_executes(counted):
    case, _, counts = counted
    for stage, of_stage in loops(case).items():
        formula = sum((loop.operations for loop in of_stage), Counter())
        expected = {kind: round(n * case.tokens, 6) for kind, n in formula.items() if kind not in NOT_COUNTED}
        got = {kind: n for kind, n in counts[stage].items() if n}
        assert expected == got, stage


def test_bytes_are_those_of_the_packed_layer(counted):
    case, header, _ = counted
    assert case.table_bytes == header["section_bytes"]["tables"]
    assert case.weight_bytes == header["section_bytes"].get("weights", 0)


def test_lines_are_those_that_are_read(counted):
    case, header, counts = counted
    c, lines = case.config, counts["lines"]
    slices = -(-c.out_features // header["slice"])
    row_lines = header["section_bytes"]["tables"] // (slices * c.num_tables * header["table_rows"]) // LINE
    first = first_reads(case)
    again = next(t for t in loops(case)["gather"][0].traffic if t.drawn)
    asked = [t for loop in loops(case)["hash"] if loop.asks for t in loop.traffic]
    assert (asked, first in loops(case)["gather"][0].traffic) == (([first], False) if case.early else ([], True))
    assert first.run == again.run == row_lines
    read = (first.lines + again.lines) * case.tokens
    assert read == pytest.approx(case.tokens * c.num_tables * c.reads * row_lines * slices)
    # Rows of int8 are read in fours, and any rows fill up the last one: no lines that were not read anyway.
    filled = -c.num_tables % 4 * c.reads * row_lines * slices * case.tokens if case.dtype == "int8" else 0
    assert lines["rows"]["loads"] == round(read) + filled

    weights = [t for loop in loops(case)["project"] if loop.name == "products" for t in loop.traffic[:2]]
    tiles = sum(case.tiles.values())
    assert counts["project_calls"] == tiles * (header["repeats"] if case.early else 1)
    assert lines["weights"]["different"] * LINE == case.weight_bytes  # each is used
    assert sum(t.lines for t in weights) * case.tokens == pytest.approx(tiles * case.weight_bytes / LINE)
    # In a tile a line comes again for every six of its tokens, then from L1.
    times = sum(n * _register_tiles(tokens) for tokens, n in case.tiles.items())
    assert lines["weights"]["loads"] * LINE == case.weight_bytes * times


def test_weights_are_read_again_after_the_gathers_of_all_layers():
    """By hand: 64 KiB of weights for two tiles of 12 tokens, whose 768 rows of 256 bytes come between two calls."""
    case = Case(LookupConfig(256, 256, num_tables=32, block_size=64), "int8", 24, layers=3)
    first, others = next(loop for loop in loops(case)["project"] if loop.name == "products").traffic
    assert (first.lines, first.bytes) == (pytest.approx(1024 / 24), 3 * (65536 + 768 * 256))
    assert (others.lines, others.bytes) == (pytest.approx(1024 / 24), 65536)


FEW = [Case(SMALL, tokens=1), Case(SMALL, tokens=24), Case(LARGE, tokens=24)]


@pytest.mark.parametrize("counted", FEW, ids=name, indirect=True)
def test_different_lines_of_rows_are_as_many_as_with_uniform_codes(counted):
    """The formula takes codes for uniform and independent; those of random layers and inputs nearly are."""
    case, _, counts = counted
    first = first_reads(case)
    assert counts["lines"]["rows"]["different"] == pytest.approx(first.lines * case.tokens, rel=0.03)
    of_tables = case.config.num_tables * case.config.num_rows * case.row_bytes
    assert first.share * of_tables == pytest.approx(first.lines * case.tokens * LINE)


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def training_program(tmp_path_factory):
    return built(tmp_path_factory.mktemp("counting"), "count_training", "training.cpp")


STEPS = [
    Step(LookupConfig(64, 128, 32, 4, reads=1), 64),  # packed
    Step(LookupConfig(64, 128, 32, 4, reads=2), 48),
    Step(LookupConfig(64, 80, 16, 5, reads=4), 32),  # a last slice that is cut
    Step(LookupConfig(64, 128, 16, 8, reads=1), 16),  # few tokens: straight from the tables
    Step(LookupConfig(64, 176, 32, 8, reads=3), 32),
    Step(LookupConfig(64, 64, 48, 6, reads=2), 128),
    Step(LookupConfig(64, 64, 32, 8, reads=1), 512),  # several passes
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_the_formulas_of_training_count_what_its_kernels_execute(step, training_program):
    c = step.config
    numbers = (c.num_tables, c.code_bits, c.reads, c.out_features, step.tokens)
    done = subprocess.run([str(training_program), *map(str, numbers)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    for stage, of_stage in training_loops(step).items():
        formula = sum((loop.operations for loop in of_stage), Counter())
        expected = {kind: round(n * step.tokens, 6) for kind, n in formula.items() if kind not in NOT_COUNTED}
        got = {kind: n for kind, n in counts[stage].items() if n}
        assert {kind: n for kind, n in expected.items() if n} == got, stage
