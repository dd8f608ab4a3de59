"""The roofline of a layer on a machine: what each loop executes and reads, over what the machine gives.

A loop takes as long as the resource of a core that it keeps busy longest: multipliers, adders, shuffles, all vector
pipes, loads, stores, or the issue of operations at all; and, beside what its loads cost from L1, as long as its lines
take from where they lie:

    time = calibration max_r sum_i operations_i / rate_i[r] + sum_j lines_j (ns(bytes_j) - ns(L1))

The rates and the lines' times are the probe's, or follow from a processor's published figures (``described.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np

from lookupffn.lab.hardware.case import LINE, REFERENCE, REFERENCE_TOKENS, Case
from lookupffn.lab.hardware.counting import count
from lookupffn.lab.hardware.training_work import REFERENCE_STEP, Step, products, training_loops
from lookupffn.lab.hardware.work import PATTERNS, Loop, Traffic, loops
from lookupffn.runtime.tuning import block_sizes

# Which operations a resource of a core serves. `rows` stands for 8 shuffles and 4 dot products.
RESOURCES = {
    "multiply": ("multiply", "fma", "dot_int8", "dot_int16"),
    "add": ("add", "convert"),
    "shuffle": ("rows", "shuffle"),
    "divide": ("divide",),
    "load": ("load", "word", "prefetch"),
    "store": ("store", "clear", "put"),
}
VECTOR = ("multiply", "fma", "dot_int8", "dot_int16", "add", "convert", "vector", "shuffle", "divide")
EXP_OPERATIONS = 16
NEAR_BYTES = 2**14  # lie in any L1
ROUNDS = 8  # over a share, after which next to no line has not come again
LEAST_SHARE = 1e-3  # of a smaller one the lines come again as from this one
TRANSPOSE_SHUFFLES = 64
VECTOR_BYTES = {"amx": 64, "avx512_vnni": 64, "avx512": 64, "avx2_vnni": 32, "avx2": 32}
VECTOR_BYTES |= {"neon_dot": 16, "neon": 16, "scalar": 16}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a model needs to know: operations a nanosecond and core, and nanoseconds a line by pattern and bytes.

    ``memory`` and ``memory_all`` hold ``(bytes, ns a line)`` by pattern (``work.PATTERNS``); the second with all
    ``threads`` at work, a line of all of them together; ``rates_all`` are the rates of a core then, where they differ.
    ``calibration`` has the factor of each stage, measured over roofline time on one small layer, by dtype;
    ``calibration_all`` that of a call on all threads, by dtype. ``rows_operations`` vector instructions interleave and
    multiply four rows of 64 bytes; a core that ``gathers`` has an instruction that finds a row by its code and adds it,
    without the scalar operations of an address. ``calls`` has ``(bytes, ns)``: what a call that does nothing takes
    after so many bytes were read since the last one.
    """

    name: str
    threads: int
    vector_bytes: int
    rates: dict[str, float]
    memory: dict[str, list[tuple[float, float]]]
    memory_all: dict[str, list[tuple[float, float]]]
    rows_operations: int = 12
    gathers: bool = False
    rates_all: dict[str, float] = dataclasses.field(default_factory=dict)
    calibration: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    calibration_all: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: list[tuple[float, float]] = dataclasses.field(default_factory=lambda: [(0.0, 0.0)])
    module_ns: float = 0.0
    parallel_ns: float = 0.0

    @classmethod
    def from_probe(cls, record: dict) -> Machine:
        """The machine that a probe has measured."""
        threads, width = record["threads"], VECTOR_BYTES[record["implementation"]]
        rates = _rates(record["rates"], record["matmul_gflops"]["1"], 1, width)
        rates_all = _rates(record.get("rates_all"), record["matmul_gflops"][str(threads)], threads, width)

        def curves(rows):
            return {pattern: [(row["bytes"], row[f"{pattern}_ns"]) for row in rows] for pattern in PATTERNS}

        memory = curves(record["memory"])
        everyone = curves(record["memory_all"]) if record.get("memory_all") else memory
        bare = cls(record["machine"]["cpu"], threads, width, rates, memory, everyone, rates_all=rates_all)
        factors, case = {}, Case(REFERENCE, tokens=REFERENCE_TOKENS)
        for dtype, measured in record["engine"].items():
            stages = predict(dataclasses.replace(case, dtype=dtype), bare).stages
            factors[dtype] = {stage: _calibration(measured[stage], found) for stage, found in stages.items()}
        measured = record["training"]
        factors["training"] = {
            stage: _calibration(measured[stage], [bound(loop, bare) for loop in of_stage])
            for stage, of_stage in training_loops(REFERENCE_STEP).items()
        }
        factors["training"] |= {
            stage: max(1.0, measured[stage] / ns) for stage, ns in _products_ns(REFERENCE_STEP, bare).items()
        }
        calls = [(row["bytes"], row["ns"]) for row in record["calls"]]
        overheads = {name: record[name] for name in ("module_ns", "parallel_ns")}
        alone = dataclasses.replace(bare, calibration=factors, calls=calls, **overheads)
        of_all = {}
        for dtype, measured in record["engine"].items():
            if "all" in measured:
                found = predict(dataclasses.replace(case, dtype=dtype, threads=threads), alone)
                bounds = [b for of_stage in found.stages.values() for b in of_stage]
                of_all[dtype] = _calibration(measured["all"] - found.overhead_ns, bounds)
        return dataclasses.replace(alone, calibration_all=of_all)

    def operations_ns(self, operations: Counter, threads: int = 1) -> dict[str, float]:
        """Nanoseconds that each resource of a core is busy with these operations, ``threads`` cores being at work."""
        rates = self.rates_all if threads > 1 and self.rates_all else self.rates
        if self.gathers and operations["rows"]:
            operations = Counter(
                {n: count for n, count in operations.items() if n not in ("word", "scalar", "prefetch")}
            )
        busy = {
            name: sum(operations[kind] / rates[kind] for kind in kinds if operations[kind])
            for name, kinds in RESOURCES.items()
        }
        vectors = sum(operations[kind] for kind in VECTOR) + self.rows_operations * operations["rows"]
        busy["vector"] = vectors / rates["vector"] + operations["exp"] / rates["exp"]
        wide = vectors + EXP_OPERATIONS * operations["exp"]
        wide += sum(operations[kind] for kind in ("load", "store", "clear"))
        narrow = sum(operations[kind] for kind in ("word", "put", "prefetch", "scalar"))
        busy["issue"] = (wide * LINE / self.vector_bytes + narrow) / rates["issue"]
        return busy

    def line_ns(self, traffic: Traffic, threads: int = 1) -> float:
        """Nanoseconds a line of this traffic on one thread, or, with ``threads``, of all of them together.

        Where a round reads a share ``p`` of ``S`` bytes, a line comes again in the next round with probability ``p``,
        after ``p S`` other bytes, in the ``k``-th with ``p (1 - p)^(k - 1)``, after ``S (1 - (1 - p)^k)``.
        """
        curve = (self.memory if threads == 1 else self.memory_all)[traffic.pattern]
        sizes, times = zip(*curve, strict=True)
        share = max(traffic.share, LEAST_SHARE)
        rest = (1 - share) ** np.arange(math.ceil(ROUNDS / share) + 1)
        between = np.maximum(traffic.bytes * (1 - rest[1:]), 1)
        found = np.exp(np.interp(np.log(between), np.log(sizes), np.log(times)))
        return float(np.average(found, weights=rest[:-1] - rest[1:]))


def _rates(
    rates: dict[str, float] | None, gflops: dict[str, float], threads: int, vector_bytes: int
) -> dict[str, float]:
    """The rates of a core by the names of the counts, from a probe's and from PyTorch's products on some threads."""
    if rates is None:
        return {}
    rates = dict(rates)
    rates["shuffle"] = rates.pop("transpose") * TRANSPOSE_SHUFFLES
    rates["clear"] = rates["put"] = rates["store"]
    rates["issue"] *= (4 + 4 * LINE // vector_bytes) / 8  # it had four scalar operations and four of 64 bytes
    products = {"product": "float32", "block_product": "float32 blocks"}
    products |= {"product_bfloat16": "bfloat16", "product_int8": "int8"}
    return rates | {rate: gflops[name] / 2 / threads for rate, name in products.items() if name in gflops}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A loop's predicted time a token, in nanoseconds, and what it is bound by: a resource of a core, or "memory"."""

    loop: str
    ns: float
    bound_by: str
    busy: dict[str, float]


def bound(loop: Loop, machine: Machine, threads: int = 1, calibration: float = 1.0) -> Bound:
    """The time of one loop: of its busiest resource, times the calibration factor, and of its lines."""
    busy = {name: ns / threads for name, ns in machine.operations_ns(loop.operations, threads).items()}
    busiest = max(busy, key=busy.get)
    far = 0.0
    for t in loop.traffic:
        near = dataclasses.replace(t, bytes=NEAR_BYTES)
        far += t.lines * max(0.0, machine.line_ns(t, threads) - machine.line_ns(near, threads))
    busy["memory"] = far
    executed = calibration * busy[busiest]
    total = max(executed, far) if loop.only_prefetches else executed + far
    return Bound(loop.name, total, "memory" if far > busy[busiest] else busiest, busy)


def _calibration(measured_ns: float, bounds: list[Bound]) -> float:
    """What was measured of some loops over their roofline, without what their lines take; at least 1."""
    far = sum(b.busy["memory"] for b in bounds)
    return max(1.0, (measured_ns - far) / (sum(b.ns for b in bounds) - far))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Nanoseconds a token: the bounds of every loop by stage, and the share of a token in calling at all."""

    stages: dict[str, list[Bound]]
    overhead_ns: float

    @property
    def ns(self) -> float:
        return self.overhead_ns + sum(b.ns for found in self.stages.values() for b in found)


def predict(case: Case, machine: Machine) -> Prediction:
    """The predicted time of a token of ``case`` on ``machine``.

    A machine's calibration factors are measured over roofline time of the engine's own loops on one small layer, by
    dtype and stage: dependent operations, branches and addresses, which the roofline does not know. Every loop's busy
    time is multiplied by its factor, and on several threads by that of all threads too: a thread that wakes late, or
    that another tenant slows down, stalls all.

    Raises:
        InputError: the operations of ``case`` are not known and cannot be counted.
    """
    plan = count(case).plan
    threads = plan.threads
    calibration, found = machine.calibration.get(case.dtype, {}), {}
    of_all = machine.calibration_all.get(case.dtype, 1.0) if threads > 1 else 1.0
    for stage, of_stage in loops(case).items():
        found[stage] = [bound(loop, machine, threads, calibration.get(stage, 1.0) * of_all) for loop in of_stage]
    regions = 2 * math.ceil(case.tokens / plan.chunk) if threads > 1 else 0
    call_ns = float(np.interp(case.weight_bytes + case.read_bytes, *zip(*machine.calls, strict=True)))
    return Prediction(found, (call_ns + regions * machine.parallel_ns) / case.tokens)


def predict_training(step: Step, machine: Machine) -> dict[str, float]:
    """Nanoseconds a token of each stage of a training step, on one thread, forward and backward.

    Hash and gather are their loops, as in :func:`predict`; the projection is PyTorch's products at the rates that the
    probe found for a large one and for small blocks. Each stage has its calibration factor, from one small layer.
    """
    calibration, found = machine.calibration.get("training", {}), {}
    for stage, of_stage in training_loops(step).items():
        factor = calibration.get(stage, 1.0)
        found[stage] = sum(bound(loop, machine, calibration=factor).ns for loop in of_stage)
    return found | {stage: calibration.get(stage, 1.0) * ns for stage, ns in _products_ns(step, machine).items()}


def _products_ns(step: Step, machine: Machine) -> dict[str, float]:
    """Nanoseconds a token of the projection's products, by stage."""
    large, small = machine.rates["product"], machine.rates["block_product"]
    return {
        stage: p.large / large + p.small / small + p.moves.lines * machine.line_ns(p.moves)
        for stage, p in products(step).items()
    }


def tuned(case: Case, machine: Machine) -> Case:
    """The case with the tables per block that are predicted to be the fastest, as ``timed_tiling`` would time it."""
    tilings = (
        dataclasses.replace(case.tiling, groups_per_block=groups) for groups in block_sizes(case.config.num_tables)
    )
    return min((dataclasses.replace(case, tiling=t) for t in tilings), key=lambda c: predict(c, machine).ns)


def dense_ns(
    hidden_size: int,
    intermediate_size: int,
    machine: Machine,
    dtype: str,
    tokens: int,
    threads: int = 1,
    layers: int = 1,
) -> float:
    """The roofline of a dense FFN, nanoseconds a token: its products at the machine's peak, or its weights' lines.

    ``dtype`` is "float32", "bfloat16" or "int8"; infinity where the machine has no such product. The peak is that of
    the vector instructions or of a unit for products; the probe times no bfloat16 instruction, and PyTorch's large
    product stands for it there. No engine reaches it; what a real one takes is measured by ``lookupffn bench``.
    """
    macs = 2 * hidden_size * intermediate_size
    lanes, item = {"float32": (16, 4), "bfloat16": (32, 2), "int8": (64, 1)}[dtype]
    vectors = {"float32": "fma", "bfloat16": "dot_bf16", "int8": "dot_int8"}[dtype]
    rates = machine.rates_all if threads > 1 and machine.rates_all else machine.rates
    rate = max(rates.get(vectors, 0.0) * lanes, rates.get(f"product_{dtype}", 0.0))  # multiply-adds a nanosecond
    if not rate:
        return math.inf
    weights = macs * item
    lines = Traffic(weights / LINE / tokens, weights * layers)
    return max(macs / rate / threads, lines.lines * machine.line_ns(lines, threads))
