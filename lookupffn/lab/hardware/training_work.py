"""What training does for a token in the compiled kernels, forward and backward: operations and lines of every loop.

As in ``work.py``, of float32 tables: operations are counted, lines follow from them where every one that a loop loads
is one. Tokens are a multiple of sixteen. The projection is PyTorch's products: :func:`products`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from lookupffn import ops
from lookupffn.lab.hardware import counting
from lookupffn.lab.hardware.case import LINE, REFERENCE
from lookupffn.lab.hardware.counting import scaled
from lookupffn.lab.hardware.work import EACH_LOAD, EACH_ROW, Loop, Traffic
from lookupffn.layer import LookupConfig
from lookupffn.reference import STAGES
from lookupffn.runtime.format import LANES

SLICE = 64  # outputs of a table that are read at once, kTrainSlice
VECTORS = SLICE // LANES
UNIT = 16  # tables whose gradients a thread makes in one go
# A code and a score, or their gradients, are moved one by one between sixteen tables and read by read: an estimate.
EACH_READ = Counter(word=2, put=2, scalar=2)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of one layer on one thread: its shape and its tokens."""

    config: LookupConfig
    tokens: int

    @property
    def table_bytes(self) -> int:
        c = self.config
        return 4 * c.num_tables * c.num_rows * c.out_features


REFERENCE_STEP = Step(REFERENCE, 1024)  # which the probe times


def training_loops(step: Step) -> dict[str, list[Loop]]:
    """The loops of hash and gather, forward and backward, for a token on average."""
    found = {}
    for stage, of_stage in counting.training(step.config, step.tokens).items():
        lines = _LINES[stage](step, of_stage)
        found[stage] = [
            Loop(name, operations + _uncounted(stage, name, operations), lines.get(name, ()))
            for name, operations in of_stage.items()
        ]
    c = step.config
    one_by_one = Loop("read by read", scaled(EACH_READ, c.num_tables * c.reads))
    return {
        stage: [*of_stage, one_by_one] if stage == "hash backward" or (stage == "hash" and c.reads > 1) else of_stage
        for stage, of_stage in found.items()
    }


def _uncounted(stage: str, loop: str, operations: Counter) -> Counter:
    """The estimate of scalar operations, as in ``work.py``, and the gradients that memset clears."""
    if loop == "rows":  # a score is loaded for each row of so many outputs, and is what is not multiplied at once
        return scaled(EACH_ROW, operations["load"] - operations["fma"])
    if loop == "scatter":  # the row of the table, and that of its gradient: a product with one score begins each
        return scaled(EACH_ROW, 2 * operations["multiply"])
    more = scaled(EACH_LOAD, operations["load"])
    if loop == "unpack" and stage == "gather backward":  # sums were cleared before
        more["clear"] = operations["load"]
    return more


# ---- Lines -----------------------------------------------------------------------------------------------------------
# By loop, of those that a token reads from beyond L1; `of_loops` are the counted operations of the stage.


def _hash_lines(step: Step, of_loops: dict[str, Counter]) -> dict[str, tuple[Traffic, ...]]:
    return {"codes and scores": (_z(step), _reads(step, 2))}


def _hash_backward_lines(step: Step, of_loops: dict[str, Counter]) -> dict[str, tuple[Traffic, ...]]:
    z = _z(step)
    return {"gradient of z": (Traffic(2 * z.lines, 2 * z.bytes), _reads(step, 2))}


def _gather_lines(step: Step, of_loops: dict[str, Counter]) -> dict[str, tuple[Traffic, ...]]:
    c, of_rows = step.config, of_loops["rows"]
    y = Traffic(4 * c.out_features / LINE, 4 * c.out_features * step.tokens)
    if "pack" not in of_loops:  # few tokens: straight from the tables
        run = 8 if c.out_features >= 128 else 4
        return {"rows": (Traffic(of_rows["fma"], step.table_bytes, run, repeats=True), y)}
    of_slices = _slices(step) * VECTORS  # lines of a token's sums
    packs = of_rows["store"] / of_slices  # after each, sums are stored
    packed_bytes = c.num_tables / packs * c.num_rows * SLICE * 4
    reads = _reads(step, 2)
    return {
        # At a constant stride, which a core foresees: as if they were prefetched.
        "pack": (Traffic(of_loops["pack"]["load"], step.table_bytes, 4, prefetched=True),),
        "rows": (
            Traffic(of_rows["fma"], packed_bytes, 4, repeats=True),
            Traffic(_slices(step) * reads.lines, reads.bytes),
            Traffic(2 * of_rows["store"] - of_slices, SLICE * 4 * step.tokens),
        ),
        "unpack": (y,),
    }


def _gather_backward_lines(step: Step, of_loops: dict[str, Counter]) -> dict[str, tuple[Traffic, ...]]:
    c, scatter = step.config, of_loops["scatter"]
    grad = Traffic(math.ceil(c.num_tables / UNIT) * c.out_features * 4 / LINE, 4 * c.out_features * step.tokens, 4)
    rows = (scatter["fma"] + scatter["multiply"]) / 2  # each line of a row is multiplied and added to
    return {
        "transpose": (_reads(step, 3),),
        "pack": (
            dataclasses.replace(grad, prefetched=True),
            Traffic(of_loops["pack"]["load"] - grad.lines, step.table_bytes, 4, prefetched=True),
        ),
        "scatter": (
            Traffic(2 * rows, 2 * c.num_rows * SLICE * 4, 4, repeats=True),
            Traffic(rows, SLICE * 4 * step.tokens),
        ),
        "unpack": (Traffic(of_loops["unpack"]["load"], 2 * step.table_bytes, 4, prefetched=True),),
    }


_LINES = {
    "hash": _hash_lines,
    "gather": _gather_lines,
    "gather backward": _gather_backward_lines,
    "hash backward": _hash_backward_lines,
}


def _slices(step: Step) -> int:
    return math.ceil(step.config.out_features / SLICE)


def _z(step: Step) -> Traffic:
    numbers = step.config.code_features
    return Traffic(4 * numbers / LINE, 4 * numbers * step.tokens)


def _reads(step: Step, arrays: int) -> Traffic:
    """Codes, scores or their gradients, one number a read, in order."""
    numbers = arrays * 4 * step.config.num_tables * step.config.reads
    return Traffic(numbers / LINE, numbers * step.tokens)


# ---- Projection ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Products:
    """A projection in PyTorch for a token: multiply-adds in large products and in those of small blocks, and the lines
    that it moves between them, adding, copying and multiplying by the few numbers of a Hadamard matrix."""

    large: float
    small: float
    moves: Traffic


def products(step: Step) -> dict[str, Products]:
    """The projection's products in PyTorch, forward and backward (``ops.py``)."""
    c, tokens = step.config, step.tokens
    if c.projection == "none":
        return {}
    outputs = c.num_tables * c.code_bits
    if c.projection == "dense":
        x = Traffic(0, 4 * c.in_features * tokens)
        return {
            "project": Products(c.in_features * outputs, 0, x),
            "project backward": Products(2 * c.in_features * outputs, 0, x),
        }
    width = c.padded_features
    if tokens >= 4 * width and width <= ops.MATRIX_WIDTH:  # as one matrix, made from the identity
        forward, backward = _stages(step, width)
        large = c.in_features * outputs
        moves = dataclasses.replace(forward.moves, lines=forward.moves.lines + backward.moves.lines)
        return {
            "project": dataclasses.replace(forward, large=large),
            "project backward": Products(2 * large, forward.small + backward.small, moves),
        }
    forward, backward = _stages(step, tokens)
    return {"project": forward, "project backward": backward}


def _stages(step: Step, rows: int) -> tuple[Products, Products]:
    """The projection of ``rows`` rows by its stages and the way back, in shares of a step's token."""
    c, width = step.config, step.config.padded_features
    blocks, block, repeats = width // c.block_size, c.block_size, math.ceil(c.num_tables * c.code_bits / width)
    share, across = rows / step.tokens, blocks > 1
    # In a stage each number meets a block of the weights and, across blocks, a row of the Hadamard matrix.
    macs = share * repeats * STAGES * width * (block + (blocks if across else 0))
    fold = repeats * STAGES * width * block**2 / step.tokens if rows > block else 0  # of H_b into the weights
    lines = share * repeats * width * 4 / LINE  # of one pass over the activations of all repeats
    held = 2 * repeats * width * 4 * rows
    # Forward: x for each repeat (2), the residual (2 + 3), the order of the outputs (2), those that are wanted (2).
    forward = Products(0, macs + fold, Traffic((11 + 2 * STAGES * across) * lines, held))
    # Backward: forward once more, then both gradients; the outputs' gradient (2 + 2), its sums (1 + 1), x (2).
    backward = Products(0, 3 * macs + 2 * fold, Traffic((8 + (4 * STAGES - 2) * across) * lines, held))
    return forward, backward
