"""What the engine does for a token: the operations of every loop, counted, and the lines of memory that it reads.

Lines are formulas, of what a loop reads from beyond L1. ``tests/lab/hardware/test_work.py`` demands that those of
weights and rows equal what the engine reads on the shim that counts. ``x`` and ``y`` are float32.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from lookupffn.lab.hardware.case import ITEM_BYTES, LINE, Case
from lookupffn.lab.hardware.counting import Count, count, scaled, tiles
from lookupffn.runtime.format import LANES

RUNS = (1, 2, 4, 8)  # neighbouring lines, as a slice of a row has them
RANDOM = tuple(f"{order}_of_{run}" for order in ("runs", "draws") for run in RUNS)
PATTERNS = ("stream", *RANDOM, *(f"{pattern}_read" for pattern in RANDOM))  # see Traffic

# Scalar operations, which the shim does not see, are estimates: a row is found by its code, a word, and its address;
# elsewhere pointers and counters go along with the loads.
EACH_ROW = Counter(word=1, scalar=2)  # that is read or prefetched
EACH_LOAD = Counter(scalar=1 / 2)  # of other loops


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Lines of 64 bytes that a token reads: how many, from a working set of how many bytes, in which pattern.

    ``run`` is how many neighbours are read in a row at a random place; 0 stands for a stream. With ``repeats`` places
    are chosen anew each time, so that a cache that holds half of them serves half of the reads; without it each is read
    once before any comes again, and a cache that is too small serves next to none. In between, a round reads a
    ``share`` of the places, chosen for each round. Lines are ``prefetched``, or else demand loads.
    """

    lines: float
    bytes: float
    run: int = 0
    repeats: bool = False
    share: float = 1.0
    prefetched: bool = False

    @property
    def pattern(self) -> str:
        """The name of this pattern in a probe's record."""
        if not self.run:
            return "stream"
        return f"{'draws' if self.repeats else 'runs'}_of_{self.run}{'' if self.prefetched else '_read'}"


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a stage: what it executes for a token, on average, and what it reads from beyond L1.

    One that ``only_prefetches`` goes on until as many lines are on their way as a core can have: it takes as long as
    the lines or as what it executes. Others read what they need next: as long as both.
    """

    name: str
    operations: Counter
    traffic: tuple[Traffic, ...] = ()
    only_prefetches: bool = False


def loops(case: Case) -> dict[str, list[Loop]]:
    """The loops of each stage, ``project``, ``hash`` and ``gather``, in the order in which they run."""
    counted = count(case)
    lines = _projection_lines(case, counted)
    lines["rows"] = _gather_lines(case, counted)
    lines["prefetch rows"] = (first_reads(case),)
    return {
        stage: [
            Loop(name, operations + _scalar(case, name, operations), lines.get(name, ()), name == "prefetch rows")
            for name, operations in of_stage.items()
        ]
        for stage, of_stage in counted.stages.items()
    }


def _scalar(case: Case, loop: str, operations: Counter) -> Counter:
    """The estimate of a loop's scalar operations."""
    if loop not in ("rows", "prefetch rows"):
        return scaled(EACH_LOAD, operations["load"])
    slices, row_lines = case.slices
    read = case.config.num_tables * case.config.reads * slices if loop == "rows" else 0
    return scaled(EACH_ROW, read + operations["prefetch"] / row_lines)


# ---- Lines -----------------------------------------------------------------------------------------------------------


def _projection_lines(case: Case, counted: Count) -> dict[str, tuple[Traffic, ...]]:
    h, of_loops, plan = case.header, counted.stages["project"], counted.plan
    of_tiles = tiles(case, plan)
    # What a tile goes around in: x, sums and activations of a repeat, z of all of them.
    width_in, width_out = h["blocks"] * h["block_in"], h["blocks"] * h["block_out"]
    numbers = 4 * width_in + (4 + ITEM_BYTES[h["weight_dtype"]]) * width_out + 4 * h["repeats"] * width_out
    around = max(of_tiles)[0] * numbers
    lines = {name: (Traffic(operations["load"], around),) for name, operations in of_loops.items()}
    sums = h["repeats"] * width_out * 4 / LINE  # of a stage; further levels of butterflies find a token's in L1
    lines["butterflies"] = (Traffic((h["stages"] - 1) * sums, around),)
    lines["butterflies to z"] = (Traffic(2 * sums, around),)
    # A tile reads all weights once; a thread's first one after the gathers of all layers, others where it left them.
    in_all, first = sum(of_tiles.values()) / case.tokens, min(plan.threads, sum(of_tiles.values())) / case.tokens
    lines["products"] = (
        Traffic(case.weight_bytes / LINE * first, (case.weight_bytes + case.read_bytes) * case.layers),
        Traffic(case.weight_bytes / LINE * (in_all - first), case.weight_bytes),
    )
    x = Traffic(case.config.in_features * 4 / LINE, case.tokens * case.config.in_features * 4)
    reader = next(name for name in ("copy x", "largest of x", "products") if name in of_loops)
    lines[reader] = (*lines["products"], x) if reader == "products" else (x,)
    return lines


def _gather_lines(case: Case, counted: Count) -> tuple[Traffic, ...]:
    c, (slices, row_lines), plan = case.config, case.slices, counted.plan
    width, groups = case.header["slice"], -(-c.num_tables // LANES)
    blocks = -(-groups // plan.groups_per_block)
    first = first_reads(case)
    again = c.num_tables * c.reads * row_lines * slices - first.lines
    slice_bytes = c.num_tables * c.num_rows * row_lines * LINE / blocks
    codes = groups * LANES * c.reads * (2 + (1 if case.dtype == "int8" else 4))
    return (
        *(() if plan.early_slices else (first,)),  # prefetched before
        Traffic(again, first.share * slice_bytes, row_lines, repeats=True, prefetched=first.prefetched),
        Traffic(slices * codes / LINE, plan.chunk * codes),
        Traffic(slices * 2 * (blocks - 1) * width * 4 / LINE, plan.chunk * width * 4),  # sums, between blocks
        Traffic(2 * c.out_features * 4 / LINE, case.tokens * c.out_features * 4),  # read to be written
    )


def first_reads(case: Case) -> Traffic:
    """The rows that a chunk reads for the first time, codes uniform; each thread keeps to its share of the slices."""
    c, (slices, row_lines), plan = case.config, case.slices, count(case).plan
    share = 1 - (1 - c.reads / c.num_rows) ** plan.chunk  # of a table's rows
    lines = share * c.num_tables * c.num_rows * row_lines * slices / plan.chunk
    of_thread = case.table_bytes * case.layers / plan.threads
    prefetched = plan.early_slices > 0 or plan.tokens_ahead > 0
    return Traffic(lines, of_thread, row_lines, share=share, prefetched=prefetched)
