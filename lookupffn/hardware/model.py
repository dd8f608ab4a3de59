"""The time of a layer on a described machine: what each loop executes and reads, over what the machine gives.

A loop takes as long as the resource of a core that it keeps busy longest: multipliers, adders, shuffles, all vector
pipes, loads, stores, or the issue of operations at all; and, beside what its loads cost from L1, as long as its lines
take from where they lie:

    time = slack max_r sum_i operations_i / rate_i[r] + sum_j lines_j (ns(bytes_j) - ns(L1))

The rates and the lines' times are the probe's, or follow from a processor's published figures (``described.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np

from lookupffn.hardware.training_work import REFERENCE_STEP, Step, products, training_loops
from lookupffn.hardware.work import CHUNK, LINE, PATTERNS, REFERENCE, REFERENCE_TOKENS, Case, Loop, Traffic, loops
from lookupffn.tiling import passes

# Which operations a resource of a core serves. `rows` stands for 8 shuffles and 4 dot products.
RESOURCES = {
    "multiply": ("multiply", "fma", "dot_int8", "dot_int16"),
    "add": ("add", "convert"),
    "shuffle": ("rows", "shuffle"),
    "divide": ("divide",),
    "load": ("load", "word", "prefetch"),
    "store": ("store", "clear"),
}
VECTOR = ("multiply", "fma", "dot_int8", "dot_int16", "add", "convert", "vector", "shuffle", "divide")
EXP_OPERATIONS = 16
NEAR_BYTES = 2**14  # lie in any L1
TRANSPOSE_SHUFFLES = 64
VECTOR_BYTES = {"amx": 64, "avx512_vnni": 64, "avx512": 64, "avx2_vnni": 32, "avx2": 32}
VECTOR_BYTES |= {"neon_dot": 16, "neon": 16, "scalar": 16}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a model needs to know: operations a nanosecond and core, and nanoseconds a line by pattern and bytes.

    ``memory`` and ``memory_all`` hold ``(bytes, ns a line)`` by pattern (``work.PATTERNS``); the second with all
    ``threads`` at work, a line of all of them together. ``rows_operations`` vector
    instructions interleave and multiply four rows of 64 bytes; a core that ``gathers`` has an instruction that finds a
    row by its code and adds it, without the scalar operations of an address.
    """

    name: str
    threads: int
    vector_bytes: int
    rates: dict[str, float]
    memory: dict[str, list[tuple[float, float]]]
    memory_all: dict[str, list[tuple[float, float]]]
    rows_operations: int = 12
    gathers: bool = False
    slack: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    call_ns: float = 0.0
    parallel_ns: float = 0.0

    @classmethod
    def from_probe(cls, record: dict) -> Machine:
        """The machine that a probe has measured."""
        rates, width = dict(record["rates"]), VECTOR_BYTES[record["implementation"]]
        rates["shuffle"] = rates.pop("transpose") * TRANSPOSE_SHUFFLES
        rates["clear"] = rates["store"]
        one = record["matmul_gflops"]["1"]
        products = {"product": "float32", "block_product": "float32 blocks"}
        products |= {"product_bfloat16": "bfloat16", "product_int8": "int8"}
        rates |= {rate: one[name] / 2 for rate, name in products.items() if name in one}  # multiply-adds
        rates["issue"] *= (4 + 4 * LINE // width) / 8  # it had four scalar operations and four of 64 bytes

        def curves(rows):
            return {pattern: [(row["bytes"], row[f"{pattern}_ns"]) for row in rows] for pattern in PATTERNS}

        memory = curves(record["memory"])
        everyone = curves(record["memory_all"]) if record.get("memory_all") else memory
        bare = cls(record["machine"]["cpu"], record["threads"], width, rates, memory, everyone)
        slack = {}
        for dtype, measured in record["engine"].items():
            stages = predict(Case(REFERENCE, dtype, REFERENCE_TOKENS), bare).stages
            slack[dtype] = {stage: _slack(measured[stage], found) for stage, found in stages.items()}
        measured = record["training"]
        slack["training"] = {
            stage: _slack(measured[stage], [bound(loop, bare) for loop in of_stage])
            for stage, of_stage in training_loops(REFERENCE_STEP).items()
        }
        slack["training"] |= {stage: measured[stage] / ns for stage, ns in _products_ns(REFERENCE_STEP, bare).items()}
        return dataclasses.replace(bare, slack=slack, call_ns=record["call_ns"], parallel_ns=record["parallel_ns"])

    def operations_ns(self, operations: Counter) -> dict[str, float]:
        """Nanoseconds that each resource of a core is busy with these operations."""
        if self.gathers and operations["rows"]:
            operations = Counter(
                {n: count for n, count in operations.items() if n not in ("word", "scalar", "prefetch")}
            )
        busy = {
            name: sum(operations[kind] / self.rates[kind] for kind in kinds if operations[kind])
            for name, kinds in RESOURCES.items()
        }
        vectors = sum(operations[kind] for kind in VECTOR) + self.rows_operations * operations["rows"]
        busy["vector"] = vectors / self.rates["vector"] + operations["exp"] / self.rates["exp"]
        wide = vectors + EXP_OPERATIONS * operations["exp"]
        wide += sum(operations[kind] for kind in ("load", "store", "clear"))
        narrow = sum(operations[kind] for kind in ("word", "prefetch", "scalar"))
        busy["issue"] = (wide * LINE / self.vector_bytes + narrow) / self.rates["issue"]
        return busy

    def line_ns(self, traffic: Traffic, threads: int = 1) -> float:
        """Nanoseconds a line of this traffic on one thread, or, with ``threads``, of all of them together."""
        curve = (self.memory if threads == 1 else self.memory_all)[traffic.pattern]
        sizes, times = zip(*curve, strict=True)
        return float(np.exp(np.interp(math.log(max(traffic.bytes, 1)), np.log(sizes), np.log(times))))


@dataclasses.dataclass(frozen=True)
class Bound:
    """A loop's predicted time a token, in nanoseconds, and what it waits for."""

    loop: str
    ns: float
    limit: str
    busy: dict[str, float]


def bound(loop: Loop, machine: Machine, threads: int = 1, slack: float = 1.0) -> Bound:
    """The time of one loop: the busiest resource or the lines, whichever takes longer."""
    busy = {name: ns / threads for name, ns in machine.operations_ns(loop.operations).items()}
    limit = max(busy, key=busy.get)
    far = 0.0
    for t in loop.traffic:
        near = dataclasses.replace(t, bytes=NEAR_BYTES)
        far += t.lines * max(0.0, machine.line_ns(t, threads) - machine.line_ns(near, threads))
    busy["memory"] = far
    total = slack * busy[limit] + far
    return Bound(loop.name, total, "memory" if far > busy[limit] else limit, busy)


def _slack(measured_ns: float, bounds: list[Bound]) -> float:
    """What was measured of some loops over their bound, without what their lines take."""
    far = sum(b.busy["memory"] for b in bounds)
    return (measured_ns - far) / (sum(b.ns for b in bounds) - far)


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

    A machine's ``slack`` is by how much the engine's own loops missed their bound on one small layer, by dtype and
    stage: dependent operations, branches and addresses, which the bound does not know. Every loop's busy time is
    multiplied by it.
    """
    threads = case.shares
    slack, found = machine.slack.get(case.dtype, {}), {}
    for stage, of_stage in loops(case).items():
        found[stage] = [bound(loop, machine, threads, slack.get(stage, 1.0)) for loop in of_stage]
    if case.early:
        found["gather"] = [_asked_early(found, case.product[0])]
    regions = 2 * math.ceil(case.tokens / CHUNK) if threads > 1 else 0
    return Prediction(found, (machine.call_ns + regions * machine.parallel_ns) / case.tokens)


def _asked_early(found: dict[str, list[Bound]], repeats: int) -> Bound:
    """The gather when rows are asked for after each repeat of the projection, while the next is computed.

    The lines of the first repeats are on their way meanwhile; those of the last are only asked for when all is known.
    """
    (gather,) = found["gather"]
    known = sum(b.ns for stage in ("project", "hash") for b in found[stage])
    lines = gather.busy["memory"]
    waits = max(lines / repeats, lines - (1 - 1 / repeats) * known)
    return dataclasses.replace(gather, ns=gather.ns - lines + waits)


def predict_training(step: Step, machine: Machine) -> dict[str, float]:
    """Nanoseconds a token of each stage of a training step, on one thread, forward and backward.

    Hash and gather are their loops, as in :func:`predict`; the projection is PyTorch's products at the rates that the
    probe found for a large one and for small blocks. What a stage of one small layer took beyond its bound is slack.
    """
    slack, found = machine.slack.get("training", {}), {}
    for stage, of_stage in training_loops(step).items():
        found[stage] = sum(bound(loop, machine, slack=slack.get(stage, 1.0)).ns for loop in of_stage)
    return found | {stage: slack.get(stage, 1.0) * ns for stage, ns in _products_ns(step, machine).items()}


def _products_ns(step: Step, machine: Machine) -> dict[str, float]:
    """Nanoseconds a token of the projection's products, by stage."""
    large, small = machine.rates["product"], machine.rates["block_product"]
    return {stage: a / large + b / small for stage, (a, b) in products(step).items()}


def tuned(case: Case, machine: Machine) -> Case:
    """The case with the number of passes that is predicted to be the fastest, as ``choose_tiling`` would time it."""
    tilings = (dataclasses.replace(case.tiling, groups_a_pass=groups) for groups in passes(case.config))
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
    """The least time of a token in a dense FFN, in nanoseconds: its products at the machine's peak, or its weights.

    ``dtype`` is "float32", "bfloat16" or "int8"; infinity where the machine has no such product. The peak is that of
    the vector instructions or of a unit for products; the probe times no bfloat16 instruction, and PyTorch's large
    product stands for it there. No engine reaches it; what a real one takes is measured by ``lookupffn bench``.
    """
    macs = 2 * hidden_size * intermediate_size
    lanes, item = {"float32": (16, 4), "bfloat16": (32, 2), "int8": (64, 1)}[dtype]
    vectors = {"float32": "fma", "bfloat16": "dot_bf16", "int8": "dot_int8"}[dtype]
    # multiply-adds a nanosecond
    rate = max(machine.rates.get(vectors, 0.0) * lanes, machine.rates.get(f"product_{dtype}", 0.0))
    if not rate:
        return math.inf
    weights = macs * item
    lines = Traffic(weights / LINE / tokens, weights * layers)
    return max(macs / rate / threads, lines.lines * machine.line_ns(lines, threads))
