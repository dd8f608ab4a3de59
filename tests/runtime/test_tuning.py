"""Loop sizes: by the caches, timed on request, kept; they change no bit."""

import dataclasses
import json

import pytest
import torch

from lookupffn import LookupConfig, LookupFFN, PackedLookupFFN, machine, native, pack
from lookupffn.runtime import tuning
from lookupffn.runtime.format import encode, read_header
from lookupffn.runtime.tuning import Tiling, block_sizes, default_tiling, timed_tiling

SMALL = LookupConfig(20, 20, 9, 4, block_size=4)
needs_kernels = pytest.mark.skipif(not native.available(), reason="the kernels were not built")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path, one_thread):
    monkeypatch.setenv("LOOKUPFFN_CACHE", str(tmp_path / "cache"))


def layer_of(config, seed=0):
    torch.manual_seed(seed)
    return LookupFFN(config)


# ---- By the caches ---------------------------------------------------------------------------------------------------


def test_block_sizes_are_all_tables_and_their_halves():
    assert block_sizes(1) == block_sizes(16) == [1]
    assert block_sizes(17) == [2, 1]
    assert block_sizes(112) == [7, 3, 1]
    assert block_sizes(128) == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("tables", "l2_kib", "groups"),
    [("int8", 1 << 20, 4), ("int8", 128, 4), ("int8", 127, 1), ("int8", 1, 1), ("bfloat16", 256, 4),
     ("bfloat16", 255, 1), ("float32", 512, 4), ("float32", 511, 1)],
)  # fmt: skip
def test_tables_of_up_to_twice_l2_are_one_block(tables, l2_kib, groups, monkeypatch):
    # four groups of 16 tables of 32 rows, 128 outputs a slice: 256 KiB in int8
    monkeypatch.setattr(tuning, "_l2_bytes", lambda: l2_kib << 10)
    config = LookupConfig(64, 256, num_tables=64, code_bits=5, block_size=16)
    tiling = default_tiling(read_header(encode(layer_of(config), tables, "int8")))
    assert tiling.groups_per_block == groups


@pytest.mark.parametrize(("l2_kib", "groups"), [(256, 8), (255, 2), (171, 2), (170, 1), (85, 1), (1, 1)])
def test_of_more_tables_a_block_fills_at_most_three_quarters_of_l2(l2_kib, groups, monkeypatch):
    # eight groups of 16 tables of 32 rows: 512 KiB
    monkeypatch.setattr(tuning, "_l2_bytes", lambda: l2_kib << 10)
    config = LookupConfig(64, 256, num_tables=128, code_bits=5, block_size=16)
    assert default_tiling(read_header(encode(layer_of(config)))).groups_per_block == groups


def test_without_a_description_of_the_caches_l2_is_taken_for_a_mebibyte(monkeypatch):
    monkeypatch.setattr(machine, "caches", lambda: [{"level": 1, "bytes": 32 << 10, "shared_by": 1}])
    tuning._l2_bytes.cache_clear()
    try:
        assert tuning._l2_bytes() == 1 << 20
    finally:
        tuning._l2_bytes.cache_clear()


def test_packing_times_nothing_and_writes_nothing_unless_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_timed_choice", lambda *given: pytest.fail("it is timed"))
    threads = torch.get_num_threads()
    module = pack(layer_of(SMALL))
    assert module.tiling == default_tiling(read_header(module.packed))
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "cache").exists()


# ---- Timed -----------------------------------------------------------------------------------------------------------


@needs_kernels
def test_a_tiling_is_timed_once_and_then_kept(monkeypatch):
    layer, timed = layer_of(SMALL), []
    measure = tuning._timed_choice
    monkeypatch.setattr(tuning, "_timed_choice", lambda *given: timed.append(given) or measure(*given))
    first = pack(layer, tune=True)
    assert pack(layer, tune=True).tiling == first.tiling
    assert len(timed) == 1
    entries = json.loads(tuning.cache_file().read_text())
    assert list(entries.values()) == [dataclasses.asdict(first.tiling)]
    pack(layer, "bfloat16", tune=True)  # other types, another choice
    pack(layer_of(dataclasses.replace(SMALL, num_tables=8)), tune=True)
    monkeypatch.setattr(native, "implementation", lambda: "scalar")
    pack(layer, tune=True)
    assert len(timed) == 4
    assert len(json.loads(tuning.cache_file().read_text())) == 4
    pack(layer)
    assert len(timed) == 4


def test_the_timed_choice_is_the_fastest_of_each_size_in_turn(monkeypatch):
    """By a clock that the operator puts forward; every fifth call takes twice as long."""
    now, calls = [0.0], []

    def packed_forward(x, packed, out_features, tile_tokens, groups_per_block, prefetch_distance, serial_tokens):
        calls.append(len(x))
        seconds = {4: 5, 2: 3, 1: 4}[groups_per_block] + {0: 0.5, 128: 0.2, 256: 0.1}[prefetch_distance]
        seconds += 1 if (len(x) <= serial_tokens) != (len(x) <= 4) else 0
        now[0] += seconds * (1 if len(calls) % 5 else 2)

    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.ops.lookupffn, "packed_forward", packed_forward, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(native, "implementation", lambda: "scalar")
    config = LookupConfig(64, 256, num_tables=64, code_bits=5, block_size=16)
    chosen = tuning._timed_choice(config, torch.zeros(0, dtype=torch.uint8))
    assert chosen == Tiling(groups_per_block=2, prefetch_distance=256, serial_tokens=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert tuning._timed_choice(config, torch.zeros(0, dtype=torch.uint8)) == dataclasses.replace(
        chosen, serial_tokens=0
    )


@needs_kernels
@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "\0", '{"a": 1}', "KEY: 3", "KEY: {}", 'KEY: {"rows": 2}', 'KEY: {"tile_tokens": 0}',
     'KEY: {"tile_tokens": "12"}', 'KEY: {"prefetch_distance": -1}', 'KEY: {"serial_tokens": null}'],
)  # fmt: skip
def test_a_damaged_cache_is_done_without(text, monkeypatch):
    layer = layer_of(SMALL)
    expected = pack(layer)(torch.ones(3, 20))
    pack(layer, tune=True)
    key = json.dumps(next(iter(json.loads(tuning.cache_file().read_text()))))
    tuning.cache_file().write_text("{" + text.replace("KEY", key) + "}" if "KEY" in text else text)
    assert torch.equal(pack(layer, tune=True)(torch.ones(3, 20)), expected)


@needs_kernels
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOOKUPFFN_CACHE", str(tmp_path / "file" / "below"))
    layer, chosen = layer_of(SMALL), [Tiling(7), Tiling(8), Tiling(9)]
    monkeypatch.setattr(tuning, "_timed_choice", lambda *given: chosen.pop(0))
    assert [pack(layer, tune=True).tiling for _ in range(2)] == [Tiling(7), Tiling(8)]  # timed anew each time

    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LOOKUPFFN_CACHE")
    monkeypatch.setattr(type(tmp_path), "expanduser", no_home)
    assert pack(layer, tune=True).tiling == Tiling(9)


@needs_kernels
def test_no_tiling_changes_a_bit():
    layer = layer_of(LookupConfig(64, 40, 33, 5, block_size=16, reads=2))
    x = torch.randn(50, 64)
    module = pack(layer)
    expected = module(x)
    assert torch.equal(pack(layer, tune=True)(x), expected)
    for tiling in (Tiling(1, 1, 0, 0), Tiling(5, 2, 1, 0), Tiling(96, 1 << 20, 999, 1000)):
        assert torch.equal(PackedLookupFFN(layer.config, module.packed, tiling)(x), expected)
    assert timed_tiling(layer.config, module.packed) == pack(layer, tune=True).tiling
