"""The lookup beside dense on every described machine, over sizes that exist and over chips that do not yet.

All times are rooflines (``model.py``), of the lookup as of dense: the least that is possible, which no engine reaches.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator

from lookupffn.ffns.dense import DenseFFN
from lookupffn.lab.hardware.advice import BLOCK_SIZE, largest
from lookupffn.lab.hardware.case import DTYPES, Case
from lookupffn.lab.hardware.described import FEATURES, describe, descriptions
from lookupffn.lab.hardware.model import Machine, dense_ns, predict, tuned
from lookupffn.layer import LookupConfig

LAYERS = 12
WIDTH, TOKENS = 768, 512  # where one of them is not varied
WIDTHS = (128, 256, 384, 512, 768, 1024, 1536, 2048)
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
TABLES = (16, 32, 64, 128, 192, 256, 384)
READS, FEWER = 3, 6  # of the recipe in docs/quality.md: buckets probed, times fewer multiply-adds than dense
SWEEPS = {  # of what is not built yet: the figure, its values, and whether they multiply it
    "L2, KiB": ((512, 1024, 2048, 4096, 8192, 16384), False),
    "L3 bandwidth and lines in flight, times": ((0.5, 1, 2, 4), True),
    "L3 latency, times": ((0.25, 0.5, 1, 2), True),
    "load ports": ((1, 2, 3, 4), False),
}


def study(machines: dict[str, Machine]) -> Iterator[dict]:
    """Records for JSON: ``what`` is ``sweep`` (lookup and dense over width, tables, batch), ``hypothetical`` (a figure
    of a described machine changed) or ``feature`` (by how much each of :data:`FEATURES` helps, best first).

    ``machines`` are those of the sweeps, by name; hypothetical ones come from the descriptions.
    """
    for name, machine in machines.items():
        for width in WIDTHS:
            for tokens in (1, 64, 4096):
                yield _beside_dense(name, machine, "width", recipe(width), tokens)
        for tables in TABLES:
            config = LookupConfig(WIDTH, WIDTH, tables, reads=READS, block_size=BLOCK_SIZE)
            yield _beside_dense(name, machine, "tables", config, TOKENS)
        for tokens in BATCHES:
            yield _beside_dense(name, machine, "tokens", recipe(WIDTH), tokens)
    yield from _hypothetical()
    yield from sorted(_features(), key=lambda record: -record["times_faster"])


def recipe(width: int) -> LookupConfig:
    """The layer of docs/quality.md at this width: three reads, at least six times fewer multiply-adds than dense."""
    return largest(width, DenseFFN(width, 4 * width, device="meta").flops(1) / 2 / FEWER, math.inf, "int8", 8, READS)


def _beside_dense(name: str, machine: Machine, over: str, config: LookupConfig, tokens: int) -> dict:
    width = config.in_features
    lookup = predict(tuned(Case(config, "int8", tokens, 1, LAYERS), machine), machine)
    dense = {d: dense_ns(width, 4 * width, machine, d, tokens, 1, LAYERS) for d in DTYPES}
    of_rows = (b for stage in ("hash", "gather") for b in lookup.stages[stage] if "rows" in b.loop)
    reading = max(of_rows, key=lambda b: b.ns)  # prefetching them, or the gather
    return {
        "what": "sweep", "over": over, "machine": name, "hidden_size": width, "num_tables": config.num_tables,
        "code_bits": config.code_bits, "reads": config.reads, "dtype": "int8", "tokens": tokens, "layers": LAYERS,
        "threads": 1, "lookup_us": lookup.ns / 1e3, "gather_waits_for": reading.bound_by,
        "dense_us": {d: ns / 1e3 for d, ns in dense.items() if ns < math.inf},
        "times_faster": min(dense.values()) / lookup.ns,
        "times_faster_than_float32": dense["float32"] / lookup.ns,
    }  # fmt: skip


def _recipe_ns(config: LookupConfig, tokens: int, machine: Machine) -> float:
    return predict(tuned(Case(config, "int8", tokens, 1, LAYERS), machine), machine).ns


def _hypothetical() -> Iterator[dict]:
    config = recipe(WIDTH)
    for name, description in descriptions().items():
        for figure, (values, multiplies) in SWEEPS.items():
            for value in values:
                changed = _changed(description, figure, value, multiplies)
                if changed is None:
                    continue
                ns = _recipe_ns(config, TOKENS, describe(changed))
                about = {"what": "hypothetical", "machine": name, "figure": figure, "value": value}
                yield about | {"hidden_size": WIDTH, "tokens": TOKENS, "layers": LAYERS, "lookup_us": ns / 1e3}


def _changed(description: dict, figure: str, value: float, multiplies: bool) -> dict | None:
    """The description with one figure changed; None where it has none."""
    new = copy.deepcopy(description)
    levels = {cache["level"]: cache for cache in new["caches"]}
    if figure == "load ports":
        new["per_cycle"]["load"] = value
        return new
    level = levels.get(int(figure[1]))
    if level is None:
        return None
    if not multiplies:
        level["kib"] = value * level["shared_by"]
    elif "latency" in figure:
        for name in ("latency_ns", "latency_cycles"):
            if name in level:
                level[name] *= value
    else:
        for name in ("bytes_per_cycle", "core_gbs", "outstanding"):
            if name in level:
                level[name] *= value
    return new


def _features() -> Iterator[dict]:
    """Each feature's speed-up of the recipe, the geometric mean over machines and batches, and its range."""
    config = recipe(WIDTH)
    for feature, change in FEATURES.items():
        faster = {}
        for name, description in descriptions().items():
            before, after = describe(description), describe(change(description))
            for tokens in (1, 64, 4096):
                faster[f"{name}, {tokens:,} token{'s' * (tokens > 1)}"] = _recipe_ns(
                    config, tokens, before
                ) / _recipe_ns(config, tokens, after)
        yield {
            "what": "feature", "feature": feature, "times_faster": statistics.geometric_mean(faster.values()),
            "least": min(faster.values()), "most": max(faster.values()), "most_on": max(faster, key=faster.get),
        }  # fmt: skip
