"""What is to be timed or counted: a layer, the types it is packed in, how it is called, and the sizes that follow."""

from __future__ import annotations

import dataclasses
import functools

from lookupffn.layer import LookupConfig
from lookupffn.reference import STAGES
from lookupffn.runtime.format import LANES, TABLE_TYPES, WEIGHT_TYPES, slice_width
from lookupffn.runtime.tuning import Tiling

LINE = 64  # bytes
PROJECTION_DTYPES = {"int8": "int8", "bfloat16": "int16", "float32": "float32"}  # what pack pairs with the tables
ITEM_BYTES = {"int8": 1, "int16": 2, "bfloat16": 2, "float32": 4}
REFERENCE = LookupConfig(256, 256, num_tables=32, block_size=64)  # which the probe times: its slices lie in L2
REFERENCE_TOKENS = 240


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and how it is called.

    ``layers`` is how many such layers take turns, so that each finds its weights and rows where the others left them.
    """

    config: LookupConfig
    dtype: str = "int8"
    tokens: int = 512
    threads: int = 1
    layers: int = 1
    projection_dtype: str | None = None
    tiling: Tiling = Tiling()

    @property
    def weight_type(self) -> str:
        return self.projection_dtype or PROJECTION_DTYPES[self.dtype]

    @functools.cached_property
    def header(self) -> dict:
        """The header of the packed layer without its offsets, as ``format.read_header`` would give it."""
        c, kind = self.config, self.weight_type
        if c.projection == "none":
            repeats, stages, blocks, block_in, block_out, kind = 1, 0, 1, 0, 0, "float32"
        elif c.projection == "dense" or c.padded_features < LANES:  # one matrix
            repeats, stages, blocks = 1, 1, 1
            block_in, block_out = -(-c.in_features // LANES) * LANES, -(-c.code_features // 64) * 64
        else:
            block_in = block_out = max(c.block_size, LANES)
            repeats, stages, blocks = c.repeats, STAGES, c.padded_features // block_in
        mixed = stages == STAGES
        negated = self.dtype == "int8" and c.reads > 1 and c.code_bits < 3  # scores may be negative
        return {
            **{name: getattr(c, name) for name in ("in_features", "out_features", "num_tables", "code_bits", "reads")},
            "stages": stages, "repeats": repeats, "blocks": blocks, "block_in": block_in, "block_out": block_out,
            "table_rows": c.num_rows * (2 if negated else 1), "slice": slice_width(c.out_features),
            "weight_type": WEIGHT_TYPES[kind], "weight_dtype": kind,
            "table_type": TABLE_TYPES[self.dtype], "table_dtype": self.dtype,
            "scale": c.decay if mixed else 1.0, "residual": 1 - c.decay if mixed else 0.0,
        }  # fmt: skip

    @property
    def slices(self) -> tuple[int, int]:
        """How many slices a row of the packed tables has, and how many lines of 64 bytes each of them."""
        width = self.header["slice"]
        return -(-self.config.out_features // width), width * ITEM_BYTES[self.dtype] // LINE

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the packed tables, padding included."""
        slices, row_lines = self.slices
        return slices * row_lines * LINE

    @property
    def table_bytes(self) -> int:
        return self.config.num_tables * self.header["table_rows"] * self.row_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed projection's weights."""
        h = self.header
        each = h["block_in"] * h["block_out"] * ITEM_BYTES[h["weight_dtype"]]
        return h["repeats"] * h["stages"] * h["blocks"] * each

    @property
    def read_bytes(self) -> int:
        """Bytes of rows that a call reads, at most."""
        return min(self.tokens * self.config.num_tables * self.config.reads * self.row_bytes, self.table_bytes)
