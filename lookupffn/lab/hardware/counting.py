"""Operations of every loop: the kernels that ship, run on a vector shim that counts (csrc/lab/counting_ops.cpp).

A count is in functions of the shim, each on sixteen numbers or 64 bytes; csrc/lab/simd_counting.h says what counts as
what. The projection is run once for each number of tokens that its tiles have, hash and gather for one token: what a
token takes in a call of any size follows. Counts may be written, and read where the library that counts is absent.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import mmap
import sys
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from lookupffn.errors import InputError
from lookupffn.lab.hardware.case import Case
from lookupffn.lab.hardware.library import operators
from lookupffn.layer import LookupConfig
from lookupffn.runtime.format import HEADER, header_bytes
from lookupffn.runtime.tuning import Tiling

Stages = dict[str, dict[str, Counter]]  # operations by kind, of each loop of each stage, in the order in which they run
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in Python from 3.13


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call does: csrc/model/lookup.h, ``Plan``."""

    chunk: int
    threads: int
    tile: int
    groups_per_block: int
    token_parts: int
    early_slices: int
    tokens_ahead: int
    workspace_bytes: int


@dataclasses.dataclass(frozen=True)
class Count:
    """The plan of a call, and what it executes for a token on average."""

    plan: Plan
    stages: Stages


_known: dict[Case, Count] = {}


def count(case: Case) -> Count:
    """The counted operations of ``case``: those that were read, or counted now.

    Raises:
        InputError: neither is possible; the message says what to do.
    """
    case = _identity(case)
    if case not in _known:
        _known[case] = _counted(case)
    return _known[case]


def tiles(case: Case, plan: Plan) -> Counter:
    """How many tiles the projection has in all, of each thread's tokens of a chunk, by ``(tokens, threads)``.

    Threads share a tile where it is the only one of its chunk: then each has some of its repeats.
    """
    found = Counter()
    for chunks, tokens in ((case.tokens // plan.chunk, plan.chunk), (1, case.tokens % plan.chunk)):
        if plan.threads > 1 and tokens <= plan.tile and case.header["repeats"] > 1:
            found[tokens, plan.threads] += chunks
            continue
        share = -(-tokens // plan.threads)
        for threads, of_thread in ((tokens // max(1, share), share), (1, tokens % max(1, share))):
            found[plan.tile, 1] += chunks * threads * (of_thread // plan.tile)
            found[of_thread % plan.tile, 1] += chunks * threads
    return Counter({tile: number for tile, number in found.items() if tile[0] and number})


def scaled(operations: Counter, factor: float) -> Counter:
    return Counter({kind: number * factor for kind, number in operations.items()})


# ---- Counting --------------------------------------------------------------------------------------------------------


def _identity(case: Case) -> Case:
    return dataclasses.replace(case, layers=1, projection_dtype=case.weight_type)


def _counted(case: Case) -> Count:
    try:
        lab = operators()
    except InputError as error:
        raise InputError(
            f"{error}. Where it is there, `lookupffn hardware count --json FILE` writes the operations of the same "
            "options, and `lookupffn hardware predict --operations FILE` takes them"
        ) from None
    layer = dataclasses.replace(case, tokens=1, threads=1, tiling=Tiling())
    plan = Plan(*lab.plan(blank(layer), case.tokens, _sizes(case.tiling), case.threads).tolist())
    early, ahead = min(1, plan.early_slices), min(1, plan.tokens_ahead)
    one = _part(layer, 1, 1, plan.groups_per_block, early, ahead)
    project: dict[str, Counter] = {}
    for (tokens, threads), number in tiles(case, plan).items():
        for loop, operations in _part(layer, tokens, threads, 1 << 20, early, 0)["project"].items():
            project.setdefault(loop, Counter()).update(scaled(operations, number / case.tokens))
    return Count(plan, {"project": project, "hash": one["hash"], "gather": one["gather"]})


@functools.cache
def _part(layer: Case, tokens: int, threads: int, groups_per_block: int, early: int, ahead: int) -> Stages:
    """The operations of some tokens in one tile, with blocks and prefetching of the call that they are a part of."""
    sizes, larger = _sizes(Tiling(tile_tokens=tokens, serial_tokens=0)), [groups_per_block, early, ahead]
    return _stages(operators().count_operations(blank(layer), tokens, sizes, threads, larger))


def _sizes(t: Tiling) -> Tensor:
    return torch.tensor([t.tile_tokens, t.groups_per_block, t.prefetch_distance, t.serial_tokens], dtype=torch.int32)


def _stages(text: str) -> Stages:
    """Counts as the operators write them: loops are "stage.name_of_loop"; those that did nothing are left out."""
    found: Stages = {}
    for name, kinds in json.loads(text)["loops"].items():
        stage, _, loop = name.partition(".")
        if kinds:
            found.setdefault(stage, {})[loop.replace("_", " ")] = Counter(kinds)
    return {"project": {}, "hash": {}, "gather": {}} | found


@functools.lru_cache(maxsize=2)
def blank(case: Case) -> Tensor:
    """A packed layer of the case's sizes whose weights and rows are 0, in memory that is there once it is read."""
    h = case.header
    memory = mmap.mmap(-1, h["total_bytes"], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    packed = torch.frombuffer(memory, dtype=torch.uint8)
    packed[: HEADER.itemsize] = header_bytes(h)
    if "levels" in h["section_shape"]:  # each stage of each repeat has its own in int16
        start, numbers = h["offset"]["levels"], h["repeats"] * h["stages"]
        levels = torch.full((numbers,), 127.0) if case.weight_type == "int8" else torch.arange(1.0, numbers + 1)
        packed[start : start + 4 * numbers].view(torch.float32).copy_(levels)
    return packed


@functools.cache
def training(config: LookupConfig, tokens: int) -> Stages:
    """What hash and gather of a training step and their backward passes execute for a token, on one thread.

    Raises:
        InputError: the library that counts is absent.
    """
    c = config
    found = _stages(operators().count_training(c.num_tables, c.code_bits, c.reads, c.out_features, tokens))
    return {
        stage: {loop: scaled(operations, 1 / tokens) for loop, operations in of_stage.items()}
        for stage, of_stage in found.items()
        if of_stage
    }


# ---- Files -----------------------------------------------------------------------------------------------------------


def record(case: Case) -> dict:
    """The count of ``case`` for JSON."""
    case, found = _identity(case), count(case)
    stages = {stage: {loop: dict(kinds) for loop, kinds in loops.items()} for stage, loops in found.stages.items()}
    return {
        "what": "operations", **dataclasses.asdict(case), "plan": dataclasses.asdict(found.plan), "stages": stages
    }  # fmt: skip


def add_known(records: Iterable[dict]) -> None:
    """Takes counts from the records of a file, whether or not they can be counted here.

    Raises:
        InputError: one is no such record.
    """
    for r in records:
        try:
            fields = {f.name: r[f.name] for f in dataclasses.fields(Case)}
            case = Case(**fields | {"config": LookupConfig(**r["config"]), "tiling": Tiling(**r["tiling"])})
            stages = {
                stage: {loop: Counter(kinds) for loop, kinds in loops.items()} for stage, loops in r["stages"].items()
            }
            _known[case] = Count(Plan(**r["plan"]), stages)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"a record of counted operations is damaged: {error!r}") from None
