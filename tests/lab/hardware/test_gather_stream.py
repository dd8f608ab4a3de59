"""The cache simulation: counts made by hand, both simulators, and the stream against a loop over single accesses."""

import itertools
import math

import numpy as np
import pytest

from lookupffn import LookupConfig, LookupFFN, native
from lookupffn.lab.hardware.gather_stream import (
    ITEM_BYTES,
    Cache,
    CacheSimulator,
    Gather,
    code_entropy,
    gather_lines,
    misses,
    skewed_codes,
    uniform_codes,
)
from lookupffn.runtime.format import slice_width

WITHOUT_KERNELS = pytest.param(False, id="python")
WITH_KERNELS = pytest.param(True, id="native", marks=pytest.mark.skipif(bool(native.load("lab")), reason="not built"))


@pytest.fixture(params=[WITHOUT_KERNELS, WITH_KERNELS])
def either(request, monkeypatch):
    """Both simulators: the compiled one and Python's."""
    if not request.param:
        monkeypatch.setattr(native, "load", lambda name="kernels": "not built")


def count(lines, *levels):
    return misses(np.array(lines), [Cache(sets * ways * 64, ways) for sets, ways in levels]).tolist()


# ---- Misses counted by hand ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("lines", "levels", "expected"),
    [
        ([], [(1, 1)], [0]),
        ([7], [(1, 1)], [1]),
        ([7, 7, 7], [(1, 1)], [1]),
        ([0, 4, 0, 4], [(4, 1)], [4]),  # direct-mapped: 0 and 4 share set 0
        ([0, 1, 0, 1], [(4, 1)], [2]),  # not a set
        ([0, 4, 0, 4], [(4, 2)], [2]),  # two ways hold both
        ([0, 3, 0, 3], [(3, 1)], [4]),  # sets need be no power of two: 0 and 3 share set 0
        ([0, 4, 0, 4], [(3, 1)], [2]),  # 4 lies in set 1
        ([0, 1, 0, 2, 0], [(1, 2)], [3]),  # 2 replaces 1, not 0, which was used later
        ([0, 1, 2, 0], [(1, 2)], [4]),  # 2 replaces 0
        ([0, 1, 2, 1, 3, 1, 2], [(1, 2)], [5]),  # 0 1 2 miss, 1 hits, 3 replaces 2, 1 hits, 2 misses
        ([0, 1, 2, 3] * 5, [(2, 2)], [4]),  # exactly full: the first round alone
        ([0, 1, 2, 3, 4] * 5, [(1, 4)], [25]),  # one more than full, in a circle: never there in time
        ([0, 1, 2, 3, 4] * 5, [(2, 2)], [17]),  # 0 2 4 share set 0 and miss each time; 1 and 3 fit
        # 0 leaves L1 for 1 and is found in L2; 2 replaces in L2 the line that came there first.
        ([0, 1, 0], [(1, 1), (1, 2)], [3, 2]),
        # L1 hits do not touch L2: of 0 and 1 it replaces 0, which L1 has used since.
        ([0, 1, 0, 0, 2, 0], [(1, 2), (1, 2)], [3, 3]),
        ([0, 1, 0, 0, 2, 1], [(1, 2), (1, 2)], [4, 3]),
        ([0, 2, 4, 6, 0, 2, 4, 6], [(2, 2), (4, 1), (1, 4)], [8, 8, 4]),
    ],
)
def test_misses_counted_by_hand(lines, levels, expected):
    assert count(lines, *levels) == expected


@pytest.mark.usefixtures("either")
def test_a_stream_in_parts_is_the_same_stream():
    lines = np.random.default_rng(0).integers(300, size=2000)
    levels = [Cache(64 * 32, 4), Cache(64 * 3 * 48, 16)]
    whole = misses(lines, levels)
    assert np.array_equal(misses(np.array_split(lines, 7), levels), whole)
    simulator = CacheSimulator(levels)
    simulator.access(lines)
    assert (simulator.access(lines[-20:]) < 20).any()  # what lies there is kept
    assert (simulator.access(lines[-1:]) == 0).all()


@pytest.mark.skipif(bool(native.load("lab")), reason="not built")
@pytest.mark.parametrize("seed", range(8))
def test_both_simulators_are_the_same(seed, monkeypatch):
    random = np.random.default_rng(seed)
    lines = random.zipf(1.2, 5000) % random.integers(50, 5000)
    levels = [Cache(64 * int(ways) * int(sets), int(ways)) for ways, sets in random.integers(1, 20, size=(3, 2))]
    compiled = CacheSimulator(levels)
    counts = [compiled.access(part) for part in np.array_split(lines, 3)]
    monkeypatch.setattr(native, "load", lambda name="kernels": "not built")
    plain = CacheSimulator(levels)
    assert [plain.access(part).tolist() for part in np.array_split(lines, 3)] == [c.tolist() for c in counts]
    assert np.array_equal(plain.contents, compiled.contents)


@pytest.mark.usefixtures("either")
def test_a_cache_of_longer_lines():
    lines = np.arange(8)  # 64 bytes each: four of 128
    assert misses(lines, [Cache(128 * 8, 2, line=128)]).tolist() == [4]


@pytest.mark.usefixtures("either")
def test_what_is_refused():
    for wrong in (dict(bytes=100, ways=1), dict(bytes=0, ways=1), dict(bytes=640, ways=0), dict(bytes=640, ways=3)):
        with pytest.raises(ValueError, match=r"must be"):
            Cache(**wrong)
    with pytest.raises(ValueError, match="line must be"):
        Cache(960, 1, line=96)
    with pytest.raises(ValueError, match="levels must be"):
        CacheSimulator([])
    with pytest.raises(ValueError, match="levels must be"):
        CacheSimulator([Cache(640, 1), Cache(1280, 1, line=128)])
    with pytest.raises(ValueError, match="lines must be"):
        count([3, -1], (1, 1))


@pytest.mark.skipif(bool(native.load("lab")), reason="not built")
def test_the_operator_refuses_what_does_not_fit():
    import torch

    def run(lines=(1,), sets=(2,), ways=(2,), contents=4, dtype=torch.int64):
        return torch.ops.lookupffn_lab.simulate_caches(
            torch.tensor(lines, dtype=dtype), torch.tensor(sets), torch.tensor(ways), torch.full((contents,), -1)
        )

    assert run().tolist() == [1]
    wrong = [
        dict(contents=3),
        dict(contents=5),
        dict(sets=(0,)),
        dict(ways=(-1,)),
        dict(ways=(1, 1)),
        dict(lines=(-1,)),
    ]
    for change in [*wrong, dict(dtype=torch.int32), dict(sets=(1 << 62,), ways=(8,)), dict(sets=(2, 1), ways=(2, 1))]:
        with pytest.raises(RuntimeError, match="lookupffn: "):
            run(**change)


# ---- The stream against a loop over single accesses ------------------------------------------------------------------


def loop(g, codes, address):
    """The accesses of one gather, bytes first to last of each, as the kernels have them: (name, offset, bytes)."""
    item, width = ITEM_BYTES[g.dtype], g.out_features
    blocks = [(e, min(64, width - e)) for e in range(0, width, 64)]
    tokens, tables, reads = range(len(codes)), range(g.num_tables), range(g.reads)

    def start(b):
        for e, n in blocks:
            yield from [("bias", 4 * e, 4 * n), ("y", 4 * (b * width + e), 4 * n)]

    def row(b, t, n):
        slot = (b * g.num_tables + t) * g.reads + n
        yield from [("codes", 4 * slot, 4), ("scores", 4 * slot, 4)]
        for e, size in blocks:
            yield "tables", item * ((t * g.table_rows + codes[b, t, n]) * width + e), item * size
            yield "y", 4 * (b * width + e), 4 * size

    if g.order == "token":
        for b in tokens:
            yield from start(b)
            for t, n in itertools.product(tables, reads):
                yield from row(b, t, n)
    elif g.order == "table":
        for b in tokens:
            yield from start(b)
        for t, b, n in itertools.product(tables, tokens, reads):
            yield from row(b, t, n)
    else:
        yield from sliced_loop(g, codes)


def sliced_loop(g, codes):
    item, groups = ITEM_BYTES[g.dtype], math.ceil(g.num_tables / 16)
    row_bytes, slots = g.slice * item, groups * g.reads * 16
    score_bytes, at_once = (1, 4) if g.dtype == "int8" else (4, 1)
    lines = range(0, row_bytes, 64)
    for chunk in range(0, len(codes), g.chunk):
        end = min(len(codes), chunk + g.chunk)
        for first_output in range(0, g.out_features, g.slice):
            tables = first_output // g.slice * g.num_tables * g.table_rows * row_bytes
            for first in range(0, groups, g.groups_per_block):
                last = min(first + g.groups_per_block, groups)
                for b in range(chunk, end):
                    saved = ("sums", (b - chunk) * g.slice * 4, g.slice * 4)
                    if first > 0:
                        yield saved
                    for group, n in itertools.product(range(first, last), range(g.reads)):
                        in_group = range(group * 16, min(group * 16 + 16, g.num_tables))
                        for t in in_group[::at_once]:
                            slot = (b - chunk) * slots + (group * g.reads + n) * 16 + t % 16
                            four = range(t, t + at_once)
                            row = [
                                tables + (u * g.table_rows + codes[b, u, n]) * row_bytes
                                if u < g.num_tables
                                else tables + t * g.table_rows * row_bytes
                                for u in four
                            ]
                            score = ("scores", slot * score_bytes, at_once * score_bytes)
                            yield "codes", slot * 2, at_once * 2
                            if g.dtype != "int8":
                                yield score
                            if g.prefetch_tokens and four[-1] < g.num_tables:
                                later = b + g.prefetch_tokens if b + g.prefetch_tokens < end else b
                                yield "codes", (slot + (later - b) * slots) * 2, at_once * 2
                                for u, line in itertools.product(four, lines):
                                    yield (
                                        "tables",
                                        tables + (u * g.table_rows + codes[later, u, n]) * row_bytes + line,
                                        64,
                                    )
                            for line in lines:
                                for r in row:
                                    yield "tables", r + line, 64
                                if g.dtype == "int8":
                                    yield score
                    if last < groups:
                        yield saved
                        continue
                    if g.dtype == "int8":
                        yield "score_scales", 4 * (b - chunk), 4
                    yield "bias", 4 * first_output, 4 * g.slice
                    left = min(g.slice, g.out_features - first_output)
                    yield "y", 4 * (b * g.out_features + first_output), 4 * left


def check_stream(g, tokens, seed=0):
    random = np.random.default_rng(seed)
    codes = random.integers(g.table_rows, size=(tokens, g.num_tables, g.reads))
    address, free = {}, 64 * int(random.integers(100))
    for name, size in g.buffers(tokens).items():  # y, codes and scores anywhere, as a caller may have them
        free += 0 if name in ("y", "codes", "scores") and g.order != "sliced" else -free % 64
        address[name] = free
        free += size + (4 if name == "bias" and g.order != "sliced" else 64)
    expected = []
    for name, offset, size in loop(g, codes, address):
        first, last = address[name] + offset, address[name] + offset + size - 1
        assert 0 <= offset <= offset + size <= g.buffers(tokens)[name], name
        expected += range(first // 64, last // 64 + 1)
    parts = list(gather_lines(g, codes, address))
    assert all(part.dtype == np.int64 and part.ndim == 1 for part in parts)
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == expected


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("num_tables", [1, 15, 17, 33])
@pytest.mark.parametrize("order", ["sliced", "token", "table"])
def test_stream_is_that_of_the_loop(order, num_tables, tokens):
    for reads, dtype, width in itertools.product((1, 2, 3), ITEM_BYTES, (3, 64, 100, 129)):
        check_stream(Gather(num_tables, 8, width, reads, dtype, order), tokens, seed=reads + width)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize(
    "change",
    [
        dict(groups_per_block=1),
        dict(groups_per_block=2),
        dict(prefetch_tokens=1),
        dict(prefetch_tokens=2),
        dict(slice=64),
    ],
)
def test_stream_of_the_engines_loop_sizes(change, dtype):
    for num_tables, reads, chunk in ((33, 1, 2), (50, 2, 3), (64, 1, 2048)):
        check_stream(Gather(num_tables, 8, 200, reads, dtype, chunk=chunk, **change), tokens=7)


def test_long_streams_come_in_parts(monkeypatch):
    whole = {}
    codes = uniform_codes(tokens=40, num_tables=20, code_bits=4, reads=2)
    for limit, order in itertools.product((1 << 20, 1), ("sliced", "token", "table")):
        monkeypatch.setattr("lookupffn.lab.hardware.gather_stream.LINES_A_PART", limit)
        parts = list(gather_lines(Gather(20, 16, 200, 2, order=order, chunk=16, groups_per_block=1), codes))
        lines = np.concatenate(parts)
        assert np.array_equal(whole.setdefault(order, lines), lines)
        assert limit > 1 or len(parts) >= 40


@pytest.mark.parametrize("order", ["sliced", "token", "table"])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_lines_of_rows_are_the_bytes_that_the_layer_says(order, dtype):
    config = LookupConfig(in_features=64, out_features=256, num_tables=24, code_bits=4, reads=2)
    layer = LookupFFN(config)
    g = Gather(24, 16, 256, reads=2, dtype=dtype, order=order)
    codes = uniform_codes(tokens=5, num_tables=24, code_bits=4, reads=2)
    lines = np.concatenate(list(gather_lines(g, codes)))  # without addresses tables come first
    rows = (lines < g.buffers(5)["tables"] // 64).sum() * 64
    assert rows == (layer.bytes_read(5) - layer.bytes_read(0)) * ITEM_BYTES[dtype] // 4


def test_buffers_do_not_overlap_and_slices_are_those_of_packed_layers():
    g = Gather(17, 8, 100, reads=2)
    assert g.slice == slice_width(100, g.dtype) == 64
    assert g.buffers(3)["tables"] == 2 * 17 * 8 * 64
    lines = np.concatenate(list(gather_lines(g, np.zeros((3, 17, 2), int))))
    assert 0 <= lines.min() <= lines.max() < sum(g.buffers(3).values()) // 64 + 2 * 7


def test_streams_that_are_refused():
    g = Gather(4, 8, 64)
    for codes in (np.full((2, 4, 1), 8), np.full((2, 4, 1), -1), np.zeros((2, 3, 1), int), np.zeros((2, 4), int)):
        with pytest.raises(ValueError, match=r"codes must be"):
            next(gather_lines(g, codes))
    with pytest.raises(ValueError, match="address of tables must be"):
        next(gather_lines(g, np.zeros((2, 4, 1), int), dict.fromkeys(g.buffers(2), 32)))
    for change in (dict(order="row"), dict(dtype="int4"), dict(slice=96), dict(reads=0), dict(prefetch_tokens=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
            Gather(4, 8, 64, **change)


# ---- Codes -----------------------------------------------------------------------------------------------------------


def test_codes_have_the_entropy_asked_for_and_the_reads_of_nearest_buckets():
    for entropy in (0, 2.5, 5, 6):
        codes = skewed_codes(tokens=4000, num_tables=5, code_bits=6, reads=3, entropy=entropy)
        assert codes.shape == (4000, 5, 3)
        assert codes.min() >= 0
        assert codes.max() < 64
        assert code_entropy(codes, 64) == pytest.approx(np.full(5, entropy), abs=0.1)
        flipped = [codes[..., 0] ^ codes[..., n] for n in (1, 2)]
        assert all(np.isin(bits, 1 << np.arange(6)).all() for bits in flipped)
        assert (flipped[0] != flipped[1]).all()
    with pytest.raises(ValueError, match="entropy must be"):
        skewed_codes(1, 1, 4, entropy=4.5)
    with pytest.raises(ValueError, match="reads must be"):
        uniform_codes(1, 1, 2, reads=4)


def test_entropy_of_known_codes():
    codes = np.array([[0, 0, 3], [1, 0, 3], [2, 0, 3], [3, 1, 3]])[..., None]  # (4 tokens, 3 tables, 1)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert code_entropy(codes, 4) == pytest.approx(np.array([2, quarter, 0]))
