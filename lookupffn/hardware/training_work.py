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
from lookupffn.hardware.work import LANES, LINE, REFERENCE, Loop, Traffic, hash_group, scaled
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


REFERENCE_STEP = Step(REFERENCE, 2048)  # which the probe times


def training_loops(step: Step) -> dict[str, list[Loop]]:
    """The loops of hash and gather, forward and backward, for a token on average."""
    return {
        "hash": [_hash(step)],
        "gather": _gather(step),
        "gather backward": _gather_backward(step),
        "hash backward": [_hash_backward(step)],
    }


def products(step: Step) -> dict[str, tuple[float, float]]:
    """Multiply-adds a token of the projection's products in PyTorch: of large ones and of small blocks, by stage."""
    c, tokens = step.config, step.tokens
    if c.projection == "none":
        return {}
    outputs = c.num_tables * c.code_bits
    if c.projection == "dense":
        return {"project": (c.in_features * outputs, 0), "project backward": (2 * c.in_features * outputs, 0)}
    width = c.padded_features
    blocks, repeats = width // c.block_size, math.ceil(outputs / width)
    # In a stage each number meets a block of the weights and, across blocks, a row of the Hadamard matrix.
    of_stages = repeats * STAGES * width * (c.block_size + (blocks if blocks > 1 else 0))
    if tokens >= 4 * width and width <= ops.MATRIX_WIDTH:  # as one matrix, made from the identity
        share = width / tokens
        return {
            "project": (c.in_features * outputs, share * of_stages),
            "project backward": (2 * c.in_features * outputs, 4 * share * of_stages),
        }
    return {"project": (0, of_stages), "project backward": (0, 3 * of_stages)}  # forward once more, then both gradients


# ---- Hash ------------------------------------------------------------------------------------------------------------


def _hash(step: Step) -> Loop:
    c = step.config
    groups, bits, reads = c.num_tables / LANES, c.code_bits, c.reads
    count = hash_group(bits, reads)
    if reads == 1:
        count += Counter(load=2, shuffle=1, store=2)  # codes widened, scores copied
    else:
        count += Counter(word=2 * LANES * reads, scalar=2 * LANES * reads)
    numbers = c.num_tables * bits
    lines = (Traffic(4 * numbers / LINE, 4 * numbers * step.tokens), _reads(step, 2))
    return Loop("codes and scores", scaled(count, groups) + _last_rows(step), lines)


def _hash_backward(step: Step) -> Loop:
    c = step.config
    bits, more = c.code_bits, c.reads - 1
    count = Counter(
        load=16 + bits, shuffle=2 * 64, store=16 + bits
    )  # z and its gradient, transposed, copied to its place
    each_bit = Counter(vector=1 + 4, exp=1, add=2 + 1, divide=1, multiply=1 + 2)
    each_bit += scaled(Counter(vector=3 + 3, add=1 + 1), more)  # whether a read has the bit flipped
    count += scaled(each_bit, bits)
    count += Counter(load=1, divide=1, multiply=1, add=1)
    count += scaled(Counter(load=2 + 1, vector=1, divide=1, exp=1, multiply=2, add=2 + 1 + 2 + 3), more)
    count += Counter(word=2 * LANES * c.reads, scalar=2 * LANES * c.reads)  # gradients and codes, read by read
    numbers = c.num_tables * bits
    lines = (Traffic(2 * 4 * numbers / LINE, 2 * 4 * numbers * step.tokens), _reads(step, 2))
    return Loop("gradient of z", scaled(count, c.num_tables / LANES) + _last_rows(step), lines)


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
    pack_lines = (Traffic(table_rows * c.out_features * 4 / LINE, step.table_bytes, 4),)
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
            Traffic(units * width_lines, 4 * c.out_features * tokens, 4),
            Traffic(read_rows * width_lines, step.table_bytes, 4),
        )),
        Loop("scatter", scatter, (
            Traffic(2 * rows * VECTORS * number, 2 * c.num_rows * SLICE * 4, 4, drawn=True),
            Traffic(rows * VECTORS * number, SLICE * 4 * tokens),
        )),
        Loop("unpack", unpack, (Traffic(table_rows * width_lines, 2 * step.table_bytes, 4),)),
    ]  # fmt: skip
