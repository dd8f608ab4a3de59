"""What the engine does for a token: operations and lines of memory of every loop, counted from the loops themselves.

A count is in functions of the vector shim (csrc/simd_scalar.h), that is for sixteen numbers or 64 bytes, and in scalar
operations; tests/kernels/simd_counting.h says what counts as what. ``tests/test_hardware_work.py`` demands that all but
``word``, ``put`` and ``scalar``, which are estimates, equal what the engine executes on that shim. ``x`` and ``y`` are
float32.

Left out: with several threads a single tile is shared out by repeats, and each thread quantises ``x`` for itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from lookupffn.layer import LookupConfig
from lookupffn.reference import STAGES
from lookupffn.runtime.format import LANES, slice_width
from lookupffn.runtime.tuning import Tiling

CHUNK = 2048  # tokens whose codes wait in memory at once, as in csrc/engine.cpp
EARLY_BYTES = 1 << 19  # of several tokens' rows, up to which they are asked for outside of the gather, there too
MAX_TILE = 96  # tokens that are projected at once, as in csrc/kernels.h
TILE_TOKENS, TILE_PANELS = 6, 4  # of the product's sums in registers, AVX-512
PROJECTION_DTYPES = {"int8": "int8", "bfloat16": "int16", "float32": "float32"}  # what pack pairs with the tables
ITEM_BYTES = {"int8": 1, "int16": 2, "bfloat16": 2, "float32": 4}
LINE = 64  # bytes
RUNS = (1, 2, 4, 8)  # neighbouring lines, as a slice of a row has them
ASKED = tuple(f"{order}_of_{run}" for order in ("runs", "draws") for run in RUNS)
PATTERNS = ("stream", *ASKED, *(f"{pattern}_read" for pattern in ASKED))  # see Traffic
REFERENCE = LookupConfig(256, 256, num_tables=32, block_size=64)  # which the probe times: its slices lie in L2
REFERENCE_TOKENS = 240


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Lines of 64 bytes that a token reads: how many, from a working set of how many bytes, in which pattern.

    ``run`` is how many neighbours are read together at a random place; 0 stands for a stream. ``drawn`` says that
    places are drawn anew each time, so that a cache that holds half of them serves half of the reads; without it
    each is read once before any comes again, and a cache that is too small serves next to none. In between, a round
    reads a ``share`` of the places, drawn for each round. Unless they are ``asked`` for early, lines are just read.
    """

    lines: float
    bytes: float
    run: int = 0
    drawn: bool = False
    share: float = 1.0
    asked: bool = False

    @property
    def pattern(self) -> str:
        """The name of this pattern in a probe's record."""
        if not self.run:
            return "stream"
        return f"{'draws' if self.drawn else 'runs'}_of_{self.run}{'' if self.asked else '_read'}"


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a stage: what it executes for a token, on average, and what it reads from beyond L1.

    One that ``asks`` for its lines goes on until as many are on their way as a core can have: it takes as long as the
    lines or as what it executes. Others read what they need next: as long as both.
    """

    name: str
    operations: Counter
    traffic: tuple[Traffic, ...] = ()
    asks: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """What is to be timed: a layer, the types it is packed in, and how it is called.

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

    @property
    def table_bytes(self) -> int:
        """Bytes of the packed tables, padding included."""
        c, (slices, row_lines) = self.config, self.slices
        negated = 2 if self.dtype == "int8" and c.reads > 1 and c.code_bits < 3 else 1
        return negated * c.num_tables * c.num_rows * slices * row_lines * LINE

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the packed tables."""
        slices, row_lines = self.slices
        return slices * row_lines * LINE

    @property
    def read_bytes(self) -> int:
        """Bytes of rows that a call reads, at most."""
        return min(self.tokens * self.config.num_tables * self.config.reads * self.row_bytes, self.table_bytes)

    @property
    def slices(self) -> tuple[int, int]:
        """How many slices a row of the packed tables has, and how many lines of 64 bytes each of them."""
        width = slice_width(self.config.out_features)
        return -(-self.config.out_features // width), width * ITEM_BYTES[self.dtype] // LINE

    @property
    def product(self) -> tuple[int, int, int, int, int]:
        """``(repeats, stages, blocks, block_in, block_out)`` of the packed projection, as in docs/format.md."""
        c = self.config
        if c.projection == "none":
            return 1, 0, 1, 0, 0
        if c.projection == "dense" or c.padded_features < LANES:
            return 1, 1, 1, -(-c.in_features // LANES) * LANES, -(-c.code_features // 64) * 64
        width = c.padded_features
        block = max(c.block_size, LANES)
        return -(-c.code_features // width), STAGES, width // block, block, block

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed projection's weights."""
        repeats, stages, blocks, block_in, block_out = self.product
        return repeats * stages * blocks * block_in * block_out * ITEM_BYTES[self.weight_type]

    @property
    def shares(self) -> int:
        """How many threads take part."""
        return self.threads if self.tokens > self.tiling.serial_tokens else 1

    @property
    def tiles(self) -> Counter:
        """How many tiles of how many tokens the projection has in all: of each thread's tokens of a chunk."""
        tile, found = min(self.tiling.tile_tokens, MAX_TILE, self.tokens), Counter()
        for chunks, tokens in ((self.tokens // CHUNK, CHUNK), (1, self.tokens % CHUNK)):
            share = -(-tokens // self.shares) if tokens > tile or self.product[0] == 1 else tokens
            for threads, of_thread in ((tokens // max(1, share), share), (1, tokens % max(1, share))):
                found[tile] += chunks * threads * (of_thread // tile)
                found[of_thread % tile] += chunks * threads
        return Counter({tokens: tiles for tokens, tiles in found.items() if tokens and tiles})

    @property
    def early(self) -> bool:
        """Whether rows are asked for as soon as their codes are known, repeat by repeat: few tokens on one thread."""
        c = self.config
        reads = -(-c.num_tables // LANES) * LANES * c.reads  # padding included
        return self.shares == 1 and (self.tokens == 1 or self.tokens * reads * self.row_bytes <= EARLY_BYTES)

    @property
    def ahead(self) -> bool:
        """Whether the gather asks for rows some tokens before it reads them."""
        return self.tiling.prefetch_distance > 0 and self.tokens > 1


def loops(case: Case) -> dict[str, list[Loop]]:
    """The loops of each stage, ``project``, ``hash`` and ``gather``, in the order in which they run."""
    return {"project": _projection(case), "hash": _hash(case), "gather": _gather(case)}


# ---- Projection ------------------------------------------------------------------------------------------------------


def _projection(case: Case) -> list[Loop]:
    repeats, stages, blocks, block_in, block_out = case.product
    c, kind = case.config, case.weight_type
    width_in, width_out = blocks * block_in, blocks * block_out
    integer = kind != "float32"
    x = Traffic(c.in_features * 4 / LINE, case.tokens * c.in_features * 4)
    if stages == 0:
        vectors = math.ceil(c.in_features / LANES)
        return [Loop("copy x", Counter(load=vectors, store=vectors), (x,))]
    tile = max(case.tiles)
    # What a tile goes around in: x, sums and activations of a repeat, z of all of them.
    around = tile * (4 * width_in + (4 + ITEM_BYTES[kind]) * width_out + 4 * repeats * width_out)

    def of_tile(numbers: float, item: int = 4) -> Traffic:
        return Traffic(numbers * item / LINE, around)

    found = []
    calls = repeats if case.early else 1  # of the kernel; each begins with x
    vectors = width_in / LANES
    if width_in != c.in_features:  # with zeros behind it, which the compiler stores as vectors
        whole, numbers = divmod(c.in_features, LANES)
        scalar = 2 * numbers + (width_in - c.in_features) / LANES
        found.append(Loop("copy x", scaled(Counter(load=whole, store=whole, scalar=scalar), calls), (x,)))
        x = of_tile(width_in)
    if integer:
        largest = Counter(load=vectors, vector=2 * vectors) + _largest_lane()
        found.append(Loop("largest of x", scaled(largest, calls), (x,)))
        # To as many levels as the first stage of a repeat bears: always 127 in int8, in int16 each has its own number.
        times = repeats if kind == "int16" else calls
        found.append(Loop("quantise x", scaled(_quantise(width_in, kind), times), (of_tile(times * width_in),)))
    # A tile reads all weights once; a thread's first one after the gathers of all layers, others where it left them.
    tiles, first = sum(case.tiles.values()) / case.tokens, min(case.shares, sum(case.tiles.values())) / case.tokens
    weights = (
        Traffic(case.weight_bytes / LINE * first, (case.weight_bytes + case.read_bytes) * case.layers),
        Traffic(case.weight_bytes / LINE * (tiles - first), case.weight_bytes),
    )
    lines = weights if integer else (*weights, x)
    found.append(Loop("products", scaled(_product(case), repeats * stages), lines))
    levels = round(math.log2(blocks))
    if stages > 1:
        n = repeats * (stages - 1)
        # The largest result is looked for even where float32 weights have no use for it.
        between = _butterflies(width_out, levels) + Counter(vector=width_out / LANES) + _largest_lane()
        found.append(Loop("butterflies", scaled(between, n), (of_tile(n * width_out),)))
        if integer:
            found.append(Loop("quantise between", scaled(_quantise(width_out, kind), n), (of_tile(n * width_out),)))
    last, vectors = _butterflies(width_out, levels), width_out / LANES
    last += Counter(multiply=vectors, add=vectors, load=vectors)  # times the scale, plus the bias
    residual = stages > 1 and c.decay != 1
    last += Counter(multiply=vectors, add=vectors, load=vectors) if residual else Counter()
    found.append(Loop("butterflies to z", scaled(last, repeats), (of_tile(2 * repeats * width_out),)))
    return found


def _product(case: Case) -> Counter:
    """One stage of one repeat for one token: a tile of up to 6 tokens by 4 panels of 16 outputs keeps its sums."""
    _, _, blocks, block_in, block_out = case.product
    item, dot = ITEM_BYTES[case.weight_type], {"float32": "fma", "int16": "dot_int16", "int8": "dot_int8"}
    words = block_in * item // 4
    panels = blocks * block_out / LANES
    wide = TILE_PANELS if min(4, block_out // LANES) % TILE_PANELS == 0 else 1
    tiles = sum(n * _register_tiles(tokens) for tokens, n in case.tiles.items()) / case.tokens  # a token's share
    steps = words * panels / wide  # in which `wide` weights meet an activation
    count = Counter({dot[case.weight_type]: words * panels, "load": steps})  # the activation, a word for all lanes
    count["load"] += steps * wide * tiles  # the weights
    count["scalar"] += 3 * steps * tiles  # pointers and the loop
    count["store"] += panels
    if case.weight_type != "float32":
        count += Counter(convert=panels, multiply=panels, load=panels)  # by the scales
    if case.weight_type == "int8":
        count += Counter(load=panels * tiles)  # sums begin with the offsets
    return count


def _register_tiles(tokens: int) -> int:
    """Into how many tiles of 6, 2 and 1 tokens the product splits ``tokens``."""
    full, rest = divmod(tokens, TILE_TOKENS)
    return full + rest // 2 + rest % 2


def _butterflies(width: int, levels: int) -> Counter:
    """``levels`` levels over a vector of ``width``: passes of up to three, each reads and writes everything once."""
    vectors, passes = width / LANES, max(1, math.ceil(levels / 3))
    return Counter(load=vectors * passes, store=vectors * passes, add=vectors * levels, scalar=vectors * passes)


def _quantise(width: int, kind: str) -> Counter:
    vectors = width / LANES
    count = Counter(load=vectors, multiply=vectors, convert=vectors, shuffle=vectors, scalar=vectors / 2)
    if kind == "int16":
        return count + Counter(store=vectors)
    stores = sum(divmod(width // LANES, 4))  # four vectors at once, then one by one; 128 is added before each
    return count + Counter(vector=stores, store=stores)


def _largest_lane() -> Counter:
    """The largest of a vector's sixteen numbers: its upper half on the lower one, four times."""
    return Counter(shuffle=4, vector=4)


# ---- Hash ------------------------------------------------------------------------------------------------------------


def _hash(case: Case) -> list[Loop]:
    c = case.config
    groups, bits, reads = -(-c.num_tables // LANES), c.code_bits, c.reads
    found = [Loop("codes and scores", scaled(hash_group(bits, reads), groups))]
    if case.early:
        slices, row_lines = case.slices
        ask = Counter(prefetch=row_lines, word=1, scalar=2 + row_lines)
        found.append(Loop("ask for rows", scaled(ask, c.num_tables * reads * slices), (first_reads(case),), True))
    if case.dtype == "int8":
        vectors = groups * reads
        each = Counter(load=2, multiply=1, store=1, vector=2)  # times the table's scale, and the largest
        each += Counter(load=1, multiply=1, vector=1, convert=1, shuffle=1, store=1)  # to integers
        if reads > 1 and bits < 3:  # a negative score reads a negated row
            each += Counter(load=2, shuffle=2, vector=3, store=1)
        found.append(Loop("quantise scores", scaled(each, vectors) + _largest_lane()))
    return found


def hash_group(bits: int, reads: int) -> Counter:
    """Codes and scores of sixteen tables of a token."""
    exp = Counter(exp=1)
    count = Counter(load=16, shuffle=24, vector=8) if bits == 8 else Counter(load=16, shuffle=64)  # z, transposed
    insert = Counter(vector=3 * (reads - 1) + 2 * max(0, reads - 2))  # into the sorted smallest magnitudes
    count += scaled(exp + insert + Counter(vector=4, add=2, multiply=1), bits)
    store = Counter(vector=2, shuffle=1, store=2)  # code and score, 0 in padded tables
    count += store + Counter(divide=1, load=1, vector=1)  # which tables are padding, from the lanes' numbers
    count += Counter(add=1, vector=4) if reads == 4 else Counter()  # the third bit, or the first two
    return count + scaled(exp + store + Counter(add=2, multiply=1, divide=1, vector=1), reads - 1)


# ---- Gather ----------------------------------------------------------------------------------------------------------


def _gather(case: Case) -> list[Loop]:
    c = case.config
    slices, row_lines = case.slices
    width, rows = slice_width(c.out_features), c.num_tables * c.reads
    groups = -(-c.num_tables // LANES)
    passes = -(-groups // case.tiling.groups_per_block)
    ahead = case.ahead
    sums = width / LANES
    if case.dtype == "int8":
        # Four rows at once, and their four scores; where a group's last four are not whole, other rows fill them up.
        four = Counter(load=4 * row_lines + row_lines, rows=row_lines, word=4, scalar=8)
        body = scaled(four, math.ceil(c.num_tables / 4) * c.reads)
        asked = Counter(prefetch=4 * row_lines, word=4, scalar=8)  # whole fours only
        body += scaled(asked, c.num_tables // 4 * c.reads) if ahead else Counter()
    else:
        one = Counter(load=row_lines + 1, fma=width / LANES, word=1, scalar=3)
        one += Counter(vector=width / LANES) if case.dtype == "bfloat16" else Counter()
        one += Counter(prefetch=row_lines, word=1, scalar=2) if ahead else Counter()
        body = scaled(one, rows)
    body += scaled(Counter(scalar=6), groups * c.reads)
    end = Counter(load=sums, add=sums, store=sums)
    end += Counter(convert=sums, multiply=sums) if case.dtype == "int8" else Counter()
    end += scaled(Counter(load=sums, store=sums), passes - 1)
    count = scaled(body + end, slices)
    cut = math.ceil(c.out_features % width / LANES)  # what there is of the last slice is copied to y
    count += Counter(load=cut, store=cut)

    chunk, first = min(case.tokens, CHUNK), first_reads(case)
    again = rows * row_lines * slices - first.lines
    slice_bytes = c.num_tables * c.num_rows * row_lines * LINE / passes
    codes = groups * LANES * c.reads * (2 + (1 if case.dtype == "int8" else 4))
    traffic = (
        *(() if case.early else (first,)),  # which had been asked for
        Traffic(again, first.share * slice_bytes, row_lines, drawn=True, asked=first.asked),
        Traffic(slices * codes / LINE, chunk * codes),
        Traffic(slices * 2 * (passes - 1) * width * 4 / LINE, chunk * width * 4),  # sums, between passes
        Traffic(2 * c.out_features * 4 / LINE, case.tokens * c.out_features * 4),  # read to be written
    )
    return [Loop("rows", count, traffic)]


def first_reads(case: Case) -> Traffic:
    """The rows that a chunk reads for the first time, codes uniform; each thread keeps to its share of the slices."""
    c, (slices, row_lines) = case.config, case.slices
    chunk = min(case.tokens, CHUNK)
    share = 1 - (1 - c.reads / c.num_rows) ** chunk  # of a table's rows
    lines = share * c.num_tables * c.num_rows * row_lines * slices / chunk
    of_thread = case.table_bytes * case.layers / case.shares
    return Traffic(lines, of_thread, row_lines, share=share, asked=case.early or case.ahead)


def scaled(count: Counter, factor: float) -> Counter:
    return Counter({name: number * factor for name, number in count.items()})
