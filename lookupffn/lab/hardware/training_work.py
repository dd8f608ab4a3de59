"""What training does for a token in the compiled kernels, forward and backward: operations and lines of every loop.

Counted as in ``work.py``, of float32 tables, from csrc/training.cpp and csrc/training-inl.h; ``clear`` is a vector of
zeros that memset writes. Exact where tokens times tables and the tables of a unit are multiples of sixteen. The
projection and the dense FFN are PyTorch's products: :func:`products`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from lookupffn import ops
from lookupffn.lab.hardware.work import LANES, LINE, REFERENCE, Loop, Traffic, hash_group, scaled
from lookupffn.layer import LookupConfig
from lookupffn.reference import STAGES

SLICE = 64  # outputs of a table that are read at once, kTrainSlice
PACKED_BYTES = 512 << 10  # of tables that are packed at once
UNIT = 16  # tables of a unit of the backward pass
OUTPUTS = 128  # of a token that are gathered at once without packing
VECTORS = SLICE // LANES


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of one layer on one thread: its shape and its tokens."""

    config: LookupConfig
    tokens: int

    @property
    def table_bytes(self) -> int:
        c = self.config
        return 4 * c.num_tables * c.num_rows * c.out_features

    @property
    def slices(self) -> list[int]:
        """Vectors of each slice of the outputs, the last of which may be cut."""
        return [
            math.ceil(min(SLICE, self.config.out_features - e) / LANES)
            for e in range(0, self.config.out_features, SLICE)
        ]


REFERENCE_STEP = Step(REFERENCE, 1024)  # which the probe times


def training_loops(step: Step) -> dict[str, list[Loop]]:
    """The loops of hash and gather, forward and backward, for a token on average."""
    return {
        "hash": _hash(step),
        "gather": _gather(step),
        "gather backward": _gather_backward(step),
        "hash backward": _hash_backward(step),
    }


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


# ---- Hash ------------------------------------------------------------------------------------------------------------


def _hash(step: Step) -> list[Loop]:
    c = step.config
    groups, bits, reads = c.num_tables / LANES, c.code_bits, c.reads
    count = hash_group(bits, reads)
    if reads == 1:
        count += Counter(load=2, shuffle=1, store=2)  # codes widened, scores copied
    numbers = c.num_tables * bits
    lines = (Traffic(4 * numbers / LINE, 4 * numbers * step.tokens), _reads(step, 2))
    found = [Loop("codes and scores", scaled(count, groups) + _last_rows(step), lines)]
    return found + ([_side_by_side(step)] if reads > 1 else [])


def _hash_backward(step: Step) -> list[Loop]:
    c = step.config
    bits, more = c.code_bits, c.reads - 1
    # z and its gradient, transposed, copied to its place
    count = Counter(load=16 + bits, shuffle=2 * 64, store=16 + bits)
    each_bit = Counter(vector=1 + 4, exp=1, add=2 + 1, divide=1, multiply=1 + 2)
    each_bit += scaled(Counter(vector=3 + 3, add=1 + 1), more)  # whether a read has the bit flipped
    count += scaled(each_bit, bits)
    count += Counter(load=1, divide=1, multiply=1, add=1)
    count += scaled(Counter(load=2 + 1, vector=1, divide=1, exp=1, multiply=2, add=2 + 1 + 2 + 3), more)
    numbers = c.num_tables * bits
    lines = (Traffic(2 * 4 * numbers / LINE, 2 * 4 * numbers * step.tokens), _reads(step, 2))
    return [_side_by_side(step), Loop("gradient of z", scaled(count, c.num_tables / LANES) + _last_rows(step), lines)]


def _side_by_side(step: Step) -> Loop:
    """Two numbers a read, codes and scores or their gradients, one by one between sixteen tables and read by read."""
    return Loop(
        "read by read", scaled(Counter(word=1, put=1, scalar=1), 2 * step.config.num_tables * step.config.reads)
    )


def _last_rows(step: Step) -> Counter:
    """The last sixteen rows of z are copied, since a group reads a little behind its last one."""
    bits = step.config.code_bits
    return scaled(Counter(load=bits, store=bits), 1 / step.tokens) if bits < 16 else Counter()


def _reads(step: Step, arrays: int) -> Traffic:
    """Codes, scores or their gradients, one number a read, in order."""
    numbers = arrays * 4 * step.config.num_tables * step.config.reads
    return Traffic(numbers / LINE, numbers * step.tokens)


# ---- Gather ----------------------------------------------------------------------------------------------------------


def _gather(step: Step) -> list[Loop]:
    c, tokens = step.config, step.tokens
    rows = c.num_tables * c.reads
    outputs = Traffic(4 * c.out_features / LINE, 4 * c.out_features * tokens)
    if tokens * c.reads < 2 * c.num_rows:  # packing would read more rows than there are reads
        vectors, rest = divmod(c.out_features, LANES)
        pieces = vectors // 8 + vectors % 8 // 2 + vectors % 2 + (rest > 0)  # of 128, 32 and 16 outputs
        vectors += rest > 0
        count = Counter(load=rows * (vectors + pieces), fma=rows * vectors, word=rows * pieces, store=vectors)
        run = 8 if c.out_features >= OUTPUTS else 4
        lines = (Traffic(rows * c.out_features * 4 / LINE, step.table_bytes, run, drawn=True), outputs)
        return [Loop("rows", count, lines)]
    packed_row = SLICE * 4
    pass_tables = max(1, min(PACKED_BYTES // (c.num_rows * packed_row), c.num_tables))
    passes = math.ceil(c.num_tables / pass_tables)
    table_rows = c.num_tables * c.num_rows / tokens  # packed for a token's share
    pack, gather = Counter(), Counter()
    for vectors in step.slices:
        pack += scaled(Counter(load=vectors, store=vectors), table_rows)
        gather += Counter(load=rows * (VECTORS + 1), fma=rows * VECTORS, word=rows, scalar=2 * rows)
        whole, rest = divmod(c.num_tables, pass_tables)
        of_pass = [pass_tables * c.reads] * whole + [rest * c.reads] * (rest > 0)
        gather += Counter(prefetch=2 * sum(math.ceil(n / LANES) for n in of_pass))
        gather += Counter(load=(passes - 1) * VECTORS, store=passes * VECTORS)  # sums
        gather += Counter(load=vectors, store=vectors)  # to y
    number = len(step.slices)
    # At a constant stride, which a core foresees: as if they were asked for.
    pack_lines = (Traffic(table_rows * c.out_features * 4 / LINE, step.table_bytes, 4, asked=True),)
    gather_lines = (
        Traffic(rows * VECTORS * number, min(pass_tables, c.num_tables) * c.num_rows * packed_row, 4, drawn=True),
        Traffic(number * rows * 8 / LINE, 8 * rows * tokens),  # codes and scores, once a slice
        Traffic(number * VECTORS * (2 * passes - 1), packed_row * tokens),  # sums
        outputs,
    )
    return [Loop("pack", pack, pack_lines), Loop("rows", gather, gather_lines)]


def _gather_backward(step: Step) -> list[Loop]:
    c, tokens = step.config, step.tokens
    units, rows = math.ceil(c.num_tables / UNIT), c.num_tables * c.reads
    few = tokens * c.reads < c.num_rows
    padded = math.ceil(tokens / LANES) * LANES / tokens
    turn = scaled(Counter(load=16, shuffle=64, store=16), 3 * padded * rows / LANES / LANES)  # codes, scores, dots
    turn += Counter(clear=padded * rows / LANES)
    pack, scatter, unpack = Counter(), Counter(), Counter()
    table_rows = c.num_tables * c.num_rows / tokens  # of gradients, for a token's share
    for vectors in step.slices:
        pack += scaled(Counter(load=vectors, store=vectors), units)  # the gradient of y, again for each unit
        pack += scaled(Counter(load=vectors, store=vectors), padded * rows if few else table_rows)
        pack += Counter(clear=table_rows * VECTORS)
        each = Counter(load=3 * VECTORS + 1, multiply=1, fma=2 * VECTORS - 1, store=VECTORS, word=2, scalar=4)
        each += scaled(Counter(shuffle=64, add=15 + 1, load=1, store=1), 1 / LANES)
        scatter += scaled(each, padded * rows)
        unpack += scaled(Counter(load=vectors, store=vectors), table_rows)
    number = len(step.slices)
    width_lines = c.out_features * 4 / LINE
    read_rows = rows if few else table_rows
    return [
        Loop("transpose", turn, (_reads(step, 3),)),
        Loop("pack", pack, (
            Traffic(units * width_lines, 4 * c.out_features * tokens, 4, asked=True),
            Traffic(read_rows * width_lines, step.table_bytes, 4, asked=True),
        )),
        Loop("scatter", scatter, (
            Traffic(2 * rows * VECTORS * number, 2 * c.num_rows * SLICE * 4, 4, drawn=True),
            Traffic(rows * VECTORS * number, SLICE * 4 * tokens),
        )),
        Loop("unpack", unpack, (Traffic(table_rows * width_lines, 2 * step.table_bytes, 4, asked=True),)),
    ]  # fmt: skip
