"""Which cache lines the gather touches, in which order, and how many of them a hierarchy of caches misses.

    codes = uniform_codes(tokens=512, num_tables=128, code_bits=8)
    gather = Gather(num_tables=128, table_rows=256, out_features=512)
    misses(gather_lines(gather, codes), [Cache(48 << 10, 12), Cache(1 << 20, 16)])  # lines missed in L1, in L2

The stream has every line that the loop turns to, reads and writes alike: codes, scores, rows, sums, outputs; not the
stack. Caches are as cachegrind has them, and ``benchmarks/cachegrind.py`` compares them: no hardware prefetcher, no
other rule than LRU, and sets found from these addresses, where L2 and L3 go by physical ones. Letters
are those of docs/math.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lookupffn import native
from lookupffn.errors import check
from lookupffn.lab.hardware.library import operators
from lookupffn.runtime.format import slice_width

LINE = 64  # bytes
LANES = 16  # tables of a group
ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}
ORDERS = ("sliced", "token", "table")
LINES_A_PART = 1 << 20  # of a stream, about: 8 MiB


# ---- Codes -----------------------------------------------------------------------------------------------------------


def uniform_codes(tokens: int, num_tables: int, code_bits: int, reads: int = 1, seed: int = 0) -> np.ndarray:
    """Codes ``(tokens, T, N)`` that read every row as often: the hardest case for a cache."""
    return skewed_codes(tokens, num_tables, code_bits, reads, entropy=code_bits, seed=seed)


def skewed_codes(
    tokens: int, num_tables: int, code_bits: int, reads: int = 1, *, entropy: float, seed: int = 0
) -> np.ndarray:
    """Codes ``(tokens, T, N)`` whose nearest rows have ``entropy`` bits a table: ``code_bits`` would be uniform.

    Every bit takes the rarer of its values with the same probability ``p``, ``tau H(p) = entropy``, whatever the others
    are; which value that is is random for each table. Each other read has one more bit flipped, any of them, as
    ``reference.nearest_buckets`` has it. ``HashMonitor`` gives a trained layer's entropy, as a share of ``code_bits``.
    Left out: in a text the rows of neighbouring tokens are more alike than those of any two tokens.
    """
    most = min(4, code_bits + 1)
    check(1 <= reads <= most, "reads", reads, f"1 to {most} with code_bits {code_bits}")
    check(0 <= entropy <= code_bits, "entropy", entropy, f"0 to {code_bits}, code_bits")
    random = np.random.default_rng(seed)
    place = np.arange(code_bits)
    rarer = random.random((tokens, num_tables, code_bits)) < _rarer_bit(entropy / code_bits)
    nearest = (rarer @ (1 << place))[..., None] ^ random.integers(2**code_bits, size=(num_tables, 1))
    flipped = random.permuted(np.broadcast_to(place, rarer.shape), axis=-1)[..., : reads - 1]
    return np.concatenate([nearest, nearest ^ (1 << flipped)], -1)


def _rarer_bit(entropy: float) -> float:
    """The probability ``p``, at most 1/2, with ``H(p) = entropy`` bits: by halving, since H grows up to 1/2."""
    low, high = 0.0, 0.5
    for _ in range(60):
        p = (low + high) / 2
        if -p * math.log2(p) - (1 - p) * math.log2(1 - p) < entropy:
            low = p
        else:
            high = p
    return high


def code_entropy(codes: np.ndarray, table_rows: int) -> np.ndarray:
    """Entropy of the nearest rows of each table, the first reads of ``codes (tokens, T, N)``: ``(T,)`` bits."""
    entropy = []
    for table in np.asarray(codes)[..., 0].T:
        share = np.bincount(table, minlength=table_rows) / table.size
        entropy.append(-sum(p * math.log2(p) for p in share if p))
    return np.array(entropy)


# ---- Stream ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gather:
    """``y[b] = bias + sum_t sum_n score[b, t, n] tables[t, code[b, t, n]]``, float32, as one of three loops has it.

    order: ``"sliced"`` is csrc/model/lookup.cpp on one thread: a chunk of tokens at a time, of it a slice of the
        outputs, of it a block of tables, then token by token. Codes are uint16, scores uint8 for int8 rows and else
        float32. ``"token"`` takes whole rows, token by token, ``"table"`` table by table over all tokens, as the
        authors' code does. Both add each row to the output in memory; codes are int32, scores float32,
        ``tables (T, K, E)``.
    table_rows: ``K``. out_features: ``E``. dtype: of rows, ``"int8"``, ``"bfloat16"`` or ``"float32"``.
    slice, groups_per_block (of 16 tables), prefetch_tokens, chunk: of ``"sliced"`` alone. Without ``slice`` it is that
        of packed layers. Rows are prefetched ``prefetch_tokens`` tokens before they are used, an access like any other;
        the engine's is ``prefetch_distance / (16 reads groups_per_block)`` rounded up, less than all tokens.
    """

    num_tables: int
    table_rows: int
    out_features: int
    reads: int = 1
    dtype: str = "int8"
    order: str = "sliced"
    slice: int | None = None
    groups_per_block: int = 1 << 20
    prefetch_tokens: int = 0
    chunk: int = 2048

    def __post_init__(self):
        check(self.order in ORDERS, "order", self.order, f"one of {', '.join(ORDERS)}")
        check(self.dtype in ITEM_BYTES, "dtype", self.dtype, f"one of {', '.join(ITEM_BYTES)}")
        for name in ("num_tables", "table_rows", "out_features", "reads", "groups_per_block", "chunk"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.prefetch_tokens >= 0, "prefetch_tokens", self.prefetch_tokens, "at least 0")
        if self.slice is None:
            object.__setattr__(self, "slice", slice_width(self.out_features, self.dtype))
        check(self.slice in (64, 128), "slice", self.slice, "64 or 128")

    @property
    def groups(self) -> int:
        return -(-self.num_tables // LANES)

    @property
    def slots(self) -> int:
        """Codes a token."""
        return (self.groups * LANES if self.order == "sliced" else self.num_tables) * self.reads

    @property
    def width(self) -> int:
        """Outputs of a stored row, all slices together."""
        return -(-self.out_features // self.slice) * self.slice if self.order == "sliced" else self.out_features

    def buffers(self, tokens: int) -> dict[str, int]:
        """Bytes of what the loop reads and writes for so many tokens, by name."""
        rows = {"tables": self.num_tables * self.table_rows * self.width * ITEM_BYTES[self.dtype]}
        rows |= {"bias": self.width * 4, "y": tokens * self.out_features * 4}
        if self.order != "sliced":
            return rows | {"codes": tokens * self.slots * 4, "scores": tokens * self.slots * 4}
        chunk = min(tokens, self.chunk)
        scores = chunk * self.slots * (1 if self.dtype == "int8" else 4)
        return rows | {
            "codes": chunk * self.slots * 2,
            "scores": scores,
            "score_scales": chunk * 4,
            "sums": chunk * self.slice * 4,
        }


def gather_lines(gather: Gather, codes: np.ndarray, address: Mapping[str, int] | None = None) -> Iterator[np.ndarray]:
    """The stream of 64-byte line numbers that ``gather`` touches for ``codes (tokens, T, N)``, int64, in parts.

    ``address`` is where each of ``gather.buffers`` begins, in bytes, tables on a line of their own; without it they lie
    one after the other with 64 bytes or more between, as the engine's do. Which lines share a set depends on it.

    Raises:
        ValueError: codes of another shape, or outside the tables.
    """
    codes = np.asarray(codes)
    tokens, shape = len(codes), (gather.num_tables, gather.reads)
    check(
        codes.ndim == 3 and codes.shape[1:] == shape, "shape of codes", codes.shape, f"(tokens, {shape[0]}, {shape[1]})"
    )
    inside = codes.size == 0 or (codes.min() >= 0 and codes.max() < gather.table_rows)
    check(inside, "codes", codes, f"0 to {gather.table_rows - 1}")
    if address is None:
        sizes = [-(-size // LINE) * LINE + LINE for size in gather.buffers(tokens).values()]
        address = dict(zip(gather.buffers(tokens), np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    check(address["tables"] % LINE == 0, "address of tables", address["tables"], f"a multiple of {LINE}")
    parts = {"token": _token_by_token, "table": _table_by_table, "sliced": _sliced}[gather.order]
    for part in parts(gather, codes.astype(np.int64), address):
        yield part[part >= 0]


def _lines(start: np.ndarray, size: np.ndarray | int) -> np.ndarray:
    """Lines of bytes ``[start, start + size)`` on a new last axis, padded with -1 where others have more."""
    first, last = start // LINE, (start + size - 1) // LINE
    lines = first[..., None] + np.arange((last - first).max(initial=0) + 1)
    return np.where(lines <= last[..., None], lines, -1)


def _side_by_side(*parts: np.ndarray) -> np.ndarray:
    """Concatenates along the last axis what agrees, or broadcasts, in all others."""
    shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return np.concatenate([np.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], -1)


def _token_parts(begin: int, end: int, lines_a_token: int) -> Iterator[np.ndarray]:
    step = max(1, LINES_A_PART // max(1, lines_a_token))
    for first in range(begin, end, step):
        yield np.arange(first, min(first + step, end))


def _plain_loops(g: Gather, codes: np.ndarray, address: Mapping[str, int]) -> tuple:
    """Of the two loops over whole rows: lines of ``y = bias``, and of all reads of some tables, for some tokens.

    Both go along a row by 64 outputs: those of the row or the bias, then the same of the output.
    """
    first = np.arange(0, g.out_features, 64)
    size, item = np.minimum(64, g.out_features - first), ITEM_BYTES[g.dtype]

    def outputs(token: np.ndarray) -> np.ndarray:
        return _lines(address["y"] + 4 * (token[..., None] * g.out_features + first), 4 * size)

    def start(token: np.ndarray) -> np.ndarray:
        return _side_by_side(_lines(address["bias"] + 4 * first, 4 * size), outputs(token)).reshape(len(token), -1)

    def reads(token: np.ndarray, table: np.ndarray) -> np.ndarray:
        shape = (len(token), len(table) * g.reads)
        slot = (token[:, None, None] * g.num_tables + table[:, None]) * g.reads + np.arange(g.reads)
        row = (table[:, None] * g.table_rows + codes[token[:, None], table]) * g.out_features  # (B, tables, N)
        rows = _lines(address["tables"] + item * (row[..., None] + first), item * size)  # (B, tables, N, blocks, lines)
        row_lines = _side_by_side(rows, outputs(token)[:, None, None]).reshape(*shape, -1)
        code, score = (_lines(address[name] + 4 * slot, 4).reshape(*shape, 1) for name in ("codes", "scores"))
        return _side_by_side(code, score, row_lines)

    return start, reads


def _token_by_token(g: Gather, codes: np.ndarray, address: Mapping[str, int]) -> Iterator[np.ndarray]:
    start, reads = _plain_loops(g, codes, address)
    tables = np.arange(g.num_tables)
    for token in _token_parts(0, len(codes), g.slots * g.out_features // 8):
        yield _side_by_side(start(token), reads(token, tables).reshape(len(token), -1))


def _table_by_table(g: Gather, codes: np.ndarray, address: Mapping[str, int]) -> Iterator[np.ndarray]:
    start, reads = _plain_loops(g, codes, address)
    parts = list(_token_parts(0, len(codes), g.reads * g.out_features // 8))
    for token in parts:
        yield start(token)
    for table in range(g.num_tables):
        for token in parts:
            yield reads(token, np.array([table]))


def _sliced(g: Gather, codes: np.ndarray, address: Mapping[str, int]) -> Iterator[np.ndarray]:
    """csrc/model/lookup.cpp, ``gather`` on one thread."""
    for start in range(0, len(codes), g.chunk):
        end = min(start + g.chunk, len(codes))
        for slice_ in range(g.width // g.slice):
            for first in range(0, g.groups, g.groups_per_block):
                call = _Block(g, codes, address, start, end, slice_, first, min(first + g.groups_per_block, g.groups))
                for token in _token_parts(start, end, 2 * call.table.size * len(call.row_lines)):
                    yield _side_by_side(*call.before(token), call.steps(token), *call.after(token))


class _Block:
    """One call of ``gather`` (csrc/kernels/gather-inl.h): tokens [start, end) of a chunk, a slice, a block of groups.

    A step of the inner loop is four tables of int8 rows, or one of others. ``table``, ``read`` and the code's place
    ``slot`` are ``(steps, tables a step)``; where a last step has fewer tables (``exists``) it repeats its first table.
    """

    def __init__(
        self,
        g: Gather,
        codes: np.ndarray,
        address: Mapping[str, int],
        start: int,
        end: int,
        slice_: int,
        first: int,
        last: int,
    ):
        self.g, self.codes, self.address, self.start, self.end = g, codes, address, start, end
        self.starts, self.ends, self.first_output = first == 0, last == g.groups, slice_ * g.slice
        self.score_bytes, at_once = (1, 4) if g.dtype == "int8" else (4, 1)
        self.row_bytes = g.slice * ITEM_BYTES[g.dtype]
        self.row_lines = np.arange(self.row_bytes // LINE)
        self.tables = address["tables"] + slice_ * g.num_tables * g.table_rows * self.row_bytes
        loop = itertools.product(range(first, last), range(g.reads), range(0, LANES, at_once))
        group, self.read, t = np.array([step for step in loop if step[0] * LANES + step[2] < g.num_tables]).T[..., None]
        self.exists = group * LANES + t + np.arange(at_once) < g.num_tables
        t = t + np.arange(at_once) * self.exists
        self.table, self.slot = group * LANES + t, (group * g.reads + self.read) * LANES + t

    def _place(self, name: str, token: np.ndarray, size: int) -> np.ndarray:
        """Lines ``(B, steps, 1)`` of each step's codes or scores, of ``size`` bytes each."""
        place = (token - self.start)[:, None] * self.g.slots + self.slot[:, 0]
        return _lines(self.address[name] + size * place, size)

    def _rows(self, token: np.ndarray) -> np.ndarray:
        """First lines ``(B, steps, tables a step)`` of the rows; row 0 where there is no table."""
        code = self.codes[token[:, None, None], self.table, self.read] * self.exists
        return (self.tables + (self.table * self.g.table_rows + code) * self.row_bytes) // LINE

    def steps(self, token: np.ndarray) -> np.ndarray:
        shape = (len(token), len(self.table), -1)
        parts = [self._place("codes", token, 2)]
        score = self._place("scores", token, self.score_bytes)
        rows = self._rows(token)[..., None, :] + self.row_lines[:, None]  # (B, steps, lines, tables a step)
        if self.g.dtype == "int8":  # four rows are multiplied with their scores line by line
            rows = _side_by_side(rows, score[..., None])
        else:
            parts.append(score)
        if ahead := self.g.prefetch_tokens:
            later = np.where(token + ahead < self.end, token + ahead, token)
            prefetched = (self._rows(later)[..., None] + self.row_lines).reshape(shape)
            prefetched = _side_by_side(self._place("codes", later, 2), prefetched)
            parts.append(np.where(self.exists.all(1)[:, None], prefetched, -1))
        return _side_by_side(*parts, rows.reshape(shape)).reshape(len(token), -1)

    def _sums(self, token: np.ndarray) -> list[np.ndarray]:
        size = 4 * self.g.slice
        return [_lines(self.address["sums"] + size * (token - self.start), size)]

    def before(self, token: np.ndarray) -> list[np.ndarray]:
        return [] if self.starts else self._sums(token)

    def after(self, token: np.ndarray) -> list[np.ndarray]:
        if not self.ends:
            return self._sums(token)
        left = min(self.g.slice, self.g.out_features - self.first_output)
        scale = [_lines(self.address["score_scales"] + 4 * (token - self.start), 4)] if self.g.dtype == "int8" else []
        bias = _lines(np.array([self.address["bias"] + 4 * self.first_output]), 4 * self.g.slice)
        y = _lines(self.address["y"] + 4 * (token * self.g.out_features + self.first_output), 4 * left)
        return [*scale, bias, y]


# ---- Caches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """One level: ``bytes`` in sets of ``ways`` lines, LRU."""

    bytes: int
    ways: int
    line: int = LINE

    def __post_init__(self):
        check(self.ways >= 1, "ways", self.ways, "at least 1")
        check(self.line >= LINE and self.line % LINE == 0, "line", self.line, f"a multiple of {LINE}")
        whole = self.bytes >= 1 and self.bytes % (self.ways * self.line) == 0
        check(whole, "bytes", self.bytes, f"a multiple of ways * line, {self.ways * self.line}")

    @property
    def sets(self) -> int:
        return self.bytes // (self.ways * self.line)


class CacheSimulator:
    """Caches from L1 outwards, empty at first; exact with the compiled kernels and, many times slower, without.

    As in cachegrind a miss at one level is an access of the next, a hit ends the walk, and what a line replaces in one
    level stays where it is in the others.
    """

    def __init__(self, levels: Sequence[Cache]):
        check(len({level.line for level in levels}) == 1, "levels", levels, "one or more caches of one size of line")
        self.levels = tuple(levels)
        # Level by level (sets, ways) line numbers, the latest used first, -1 where nothing lies.
        self.contents = np.full(sum(level.sets * level.ways for level in levels), -1, np.int64)

    def access(self, lines: np.ndarray) -> np.ndarray:
        """Misses of each level for ``lines``, numbers of 64-byte lines in order; the caches keep what they then have.

        Raises:
            ValueError: a line is negative.
        """
        lines = np.ravel(lines).astype(np.int64) // (self.levels[0].line // LINE)
        check(lines.min(initial=0) >= 0, "lines", lines, "not negative")
        if native.load("lab"):
            return self._access(lines.tolist())
        sizes = np.array([[level.sets, level.ways] for level in self.levels]).T
        arrays = (torch.from_numpy(np.ascontiguousarray(a)) for a in (lines, *sizes, self.contents))
        return operators().simulate_caches(*arrays).numpy()

    def _access(self, lines: list[int]) -> np.ndarray:
        """The same without the compiled kernels."""
        ends = np.cumsum([level.sets * level.ways for level in self.levels])[:-1]
        parts = np.split(self.contents, ends)
        caches = [part.reshape(level.sets, level.ways).tolist() for part, level in zip(parts, self.levels, strict=True)]
        missed = [0] * len(caches)
        for line in lines:
            for level, cache in enumerate(caches):
                ways = cache[line % len(cache)]
                hit = line in ways
                if hit:
                    ways.remove(line)
                else:
                    ways.pop()
                    missed[level] += 1
                ways.insert(0, line)
                if hit:
                    break
        self.contents[:] = [line for cache in caches for ways in cache for line in ways]
        return np.array(missed)


def misses(lines: np.ndarray | Iterable[np.ndarray], levels: Sequence[Cache]) -> np.ndarray:
    """Misses of each level, from empty caches, for a stream of line numbers or for its parts in order."""
    simulator = CacheSimulator(levels)
    parts = [lines] if isinstance(lines, np.ndarray) else lines
    return sum((simulator.access(part) for part in parts), np.zeros(len(simulator.levels), np.int64))
