"""What is to be timed or counted: a layer, the types it is packed in, how it is called, and the sizes that follow."""

from __future__ import annotations

import dataclasses
import functools

from lookupffn.layer import LookupConfig
from lookupffn.runtime.format import PROJECTION_DTYPES, layout
from lookupffn.runtime.tuning import Tiling

LINE = 64  # bytes
DTYPES = ("int8", "bfloat16", "float32")  # of the tables that the study knows
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
        """The header of the packed layer (``format.layout``)."""
        return layout(self.config, self.dtype, self.weight_type)

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
        return self.header["section_bytes"]["tables"]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed projection's weights."""
        return self.header["section_bytes"].get("weights", 0)

    @property
    def read_bytes(self) -> int:
        """Bytes of rows that a call reads, at most."""
        return min(self.tokens * self.config.num_tables * self.config.reads * self.row_bytes, self.table_bytes)
