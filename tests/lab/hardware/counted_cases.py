"""Layers and calls whose operations and lines are counted, and what the shim counts in them."""

import dataclasses
import functools
import json

import torch

from lookupffn import LookupConfig, LookupFFN
from lookupffn.lab.hardware import counting
from lookupffn.lab.hardware.case import DTYPES, Case
from lookupffn.lab.hardware.library import operators
from lookupffn.runtime.format import encode
from lookupffn.runtime.tuning import Tiling

LARGE = LookupConfig(512, 512, num_tables=128)
SMALL = LookupConfig(256, 256, num_tables=64, reads=3)
PADDED = LookupConfig(320, 192, num_tables=24)  # x padded to 512, slices of 64
ODD = LookupConfig(128, 200, num_tables=17, code_bits=5, reads=2)  # a table by itself, a last slice that is cut

CASES = [
    *(Case(LARGE, dtype, tokens) for dtype in DTYPES for tokens in (1, 5, 12, 24)),
    *(
        Case(config, dtype, tokens)  # one token prefetches its rows early
        for dtype in DTYPES
        for config in (SMALL, PADDED, ODD)
        for tokens in (1, 12)
    ),
    *(
        Case(SMALL, dtype, 100, tiling=tiling)  # which read a row more than once: tables in blocks
        for dtype in DTYPES
        for tiling in (Tiling(prefetch_distance=0), Tiling(groups_per_block=1))
    ),
    Case(dataclasses.replace(LARGE, reads=3), "float32", 1),  # prefetches one slice after the other
    *(Case(SMALL, "int8", 110, tiling=Tiling(tile_tokens=tile)) for tile in (1, 7, 16, 1000)),
    *(Case(SMALL, "float32", 12, projection_dtype=kind) for kind in ("int8", "int16")),
    *(Case(LookupConfig(100, 500, 24, 6, "dense"), dtype, 12) for dtype in DTYPES),  # 112 numbers: 64, 3 16s
    *(Case(LookupConfig(256, 64, 32, 8, "none"), dtype, 5) for dtype in DTYPES),
    *(Case(LookupConfig(256, 256, 64, block_size=8), dtype, 12) for dtype in DTYPES),  # one panel at a time
    *(Case(LookupConfig(64, 256, 64, block_size=block), "int8", 12) for block in (16, 32, 64)),  # no level to two
    Case(LookupConfig(256, 256, 64, code_bits=9), tokens=12),
    Case(LookupConfig(256, 256, 64, decay=1.0), tokens=12),
    Case(LookupConfig(8, 64, 24, 4, block_size=8), tokens=12),  # narrower than a vector
    *(Case(LookupConfig(64, 64, 32, 2, reads=reads), tokens=12) for reads in (2, 4)),  # with negated rows
    Case(dataclasses.replace(ODD, reads=4), tokens=2100),  # more than a chunk
    *(Case(PADDED, tokens=tokens, threads=threads) for threads in (2, 5) for tokens in (5, 64)),  # one repeat, 3 slices
    Case(LARGE, tokens=29, threads=3),
    Case(LARGE, tokens=7, threads=3, tiling=Tiling(serial_tokens=0)),  # two repeats of one tile, shared out
    Case(ODD, tokens=2100, threads=2),
]


def name(case):
    c, t = case.config, case.tiling
    options = dataclasses.asdict(t).items() - dataclasses.asdict(Tiling()).items()
    sizes = f"{c.in_features}x{c.num_tables}x{c.code_bits}x{c.out_features} reads={c.reads} tokens={case.tokens}"
    sizes += f" threads={case.threads}" if case.threads > 1 else ""
    kinds = [f"{c.projection}-{c.block_size}", case.dtype, case.weight_type]
    return " ".join([sizes, *kinds, *(f"{k}={v}" for k, v in sorted(options))])


@functools.lru_cache(maxsize=1)  # cases of one layer stand together
def packed_layer(config, dtype, weight_type):
    torch.manual_seed(0)
    return encode(LookupFFN(config), dtype, weight_type)


def packed_of(case):
    return packed_layer(case.config, case.dtype, case.weight_type)


def whole_call(case):
    """What the shim counts in the whole call of a random layer."""
    packed = packed_of(case)
    return json.loads(operators().count_operations(packed, case.tokens, counting._sizes(case.tiling), case.threads))
