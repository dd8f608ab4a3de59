"""Loop sizes of the engine: a choice of speed alone, from the sizes of the caches, or timed where that is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lookupffn import machine, native
from lookupffn.errors import InputError, check
from lookupffn.files import atomic_write, cache_folder, make_folder
from lookupffn.layer import LookupConfig
from lookupffn.runtime.format import read_header

LANES = 16  # tables of a group
L2_BYTES = 1 << 20  # where the system does not tell
L2_SHARE = 0.75  # of an L2 cache, for the rows of a block; codes, scores and output need the rest
WHOLE_SHARE = 2.0  # up to which all tables are one block: sums that wait in memory between blocks cost more
TIMED_TOKENS = 256
ROUNDS = 7


@dataclass(frozen=True)
class Tiling:
    """Loop sizes of the engine; the result is the same bits for all of them.

    tile_tokens: tokens projected at once, so that their activations stay in L1 and a block's weights are read once.
    groups_per_block: groups of 16 tables gathered at once, so that a slice of their rows stays in L2; calls of so few
        tokens that they read a row less than once gather all tables at once.
    prefetch_distance: how many rows ahead of their use rows are prefetched, 0 for not at all.
    serial_tokens: batches up to this size run on the calling thread alone.
    """

    tile_tokens: int = 12
    groups_per_block: int = 1 << 20
    prefetch_distance: int = 128
    serial_tokens: int = 4

    def __post_init__(self) -> None:
        for name, least in (
            ("tile_tokens", 1),
            ("groups_per_block", 1),
            ("prefetch_distance", 0),
            ("serial_tokens", 0),
        ):
            value = getattr(self, name)
            check(type(value) is int and value >= least, name, value, f"an int of at least {least}")


def block_sizes(num_tables: int) -> list[int]:
    """The ``groups_per_block`` worth choosing from: all groups of tables at once, half of them, a quarter, to one."""
    groups = -(-num_tables // LANES)
    return [groups >> halvings for halvings in range(groups.bit_length())]


@functools.cache
def _l2_bytes() -> int:
    return next((cache["bytes"] for cache in machine.caches() if cache["level"] == 2), L2_BYTES)


def default_tiling(header: dict) -> Tiling:
    """Loop sizes by the caches, for the layer that ``header`` (``format.read_header``) describes.

    All groups are one block where their slices, ``16 groups table_rows slice`` entries, fill at most ``WHOLE_SHARE`` of
    an L2 cache; else ``groups_per_block`` is the largest of :func:`block_sizes` that fits ``L2_SHARE`` of one, or 1.
    """
    slice_bytes = header["section_bytes"]["tables"] // -(-header["out_features"] // header["slice"])
    group_bytes = LANES * slice_bytes // header["num_tables"]
    whole, *parts = block_sizes(header["num_tables"])
    groups = next((n for n in parts if n * group_bytes <= L2_SHARE * _l2_bytes()), 1)
    if whole * group_bytes <= WHOLE_SHARE * _l2_bytes():
        groups = whole
    tile = 16 if native.implementation() == "amx" else Tiling.tile_tokens  # whose tiles are 16 tokens high
    return Tiling(tile_tokens=tile, groups_per_block=groups)


# ---- Timed -----------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where timed choices are kept: ``tiling.json`` in :func:`lookupffn.files.cache_folder`."""
    return cache_folder() / "tiling.json"


def timed_tiling(config: LookupConfig, packed: Tensor, *, refresh: bool = False) -> Tiling:
    """The fastest of a few tilings for this layer on this machine, from the cache or timed in some tenths of a second.

    A choice is kept for the processor, the implementation, torch's threads and the layer's shape and types; with
    ``refresh`` it is timed though it is there. A cache that cannot be read or written is done without. Without the
    compiled kernels there is nothing to time: the choice is :func:`default_tiling`'s.
    """
    if not native.available():
        return default_tiling(read_header(packed))
    key = json.dumps(
        [machine.cpu_name(), native.implementation(), torch.get_num_threads(), config.to_dict(), packed.numel()]
    )
    if not refresh:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return Tiling(**_read_cache()[key])
    chosen = _timed_choice(config, packed)
    try:
        make_folder(cache_file().parent)
        known = _read_cache() | {key: dataclasses.asdict(chosen)}
        atomic_write(cache_file(), json.dumps(known, indent=1) + "\n")
    except InputError:  # a user without a home, or a folder that takes no file
        pass
    return chosen


def _read_cache() -> dict:
    try:
        known = json.loads(cache_file().read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):  # ValueError: not JSON, or a user without a home
        return {}


@torch.no_grad()
def _timed_choice(config: LookupConfig, packed: Tensor) -> Tiling:
    x = torch.randn(TIMED_TOKENS, config.in_features, generator=torch.Generator().manual_seed(0))
    blocks = [Tiling(groups_per_block=groups) for groups in block_sizes(config.num_tables)]
    best = _fastest({t: (t, x) for t in blocks}, config, packed)
    distances = [dataclasses.replace(best, prefetch_distance=rows) for rows in (0, 128, 256)]
    best = _fastest({t: (t, x) for t in distances}, config, packed)
    if native.implementation() == "amx":  # whose own tiles are 16 tokens high; elsewhere 12 is best or as good
        tiles = [dataclasses.replace(best, tile_tokens=n) for n in (12, 16, 32)]
        best = _fastest({t: (t, x) for t in tiles}, config, packed)
    serial = 0
    if torch.get_num_threads() > 1:
        for tokens in (1, 2, 4, 8, 16, 32):
            alone = dataclasses.replace(best, serial_tokens=tokens)
            shared = dataclasses.replace(best, serial_tokens=0)
            if _fastest({alone: (alone, x[:tokens]), shared: (shared, x[:tokens])}, config, packed) == shared:
                break
            serial = tokens
    return dataclasses.replace(best, serial_tokens=serial)


def _fastest(calls: dict[Tiling, tuple[Tiling, Tensor]], config: LookupConfig, packed: Tensor) -> Tiling:
    """The key whose call ``(tiling, x)`` was the fastest, by the least time of a few rounds through all of them."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for key, (t, x) in calls.items():
            start = time.perf_counter()
            torch.ops.lookupffn.packed_forward(
                x,
                packed,
                config.out_features,
                t.tile_tokens,
                t.groups_per_block,
                t.prefetch_distance,
                t.serial_tokens,
            )
            least[key] = min(least[key], time.perf_counter() - start)
    return min(least, key=least.__getitem__)
