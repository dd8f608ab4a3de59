"""Predictions beside measurements, for randomly sampled layers: how far the model can be trusted on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lookupffn.bench.timing import on_core, some_cores, time_interleaved
from lookupffn.lab.hardware.case import ITEM_BYTES, Case
from lookupffn.lab.hardware.model import Machine, predict, predict_training
from lookupffn.lab.hardware.probe import median, training_stages
from lookupffn.lab.hardware.training_work import Step
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.runtime.format import encode
from lookupffn.runtime.tuning import timed_tiling

CHAIN = 12  # layers that take turns where tokens are few, as in a model
CHAINED_TOKENS = 8  # up to so many
DISTINCT_TOKENS = 2048  # of inputs, in turn: rows are not those of the call before
MOST_BYTES = 2**30  # of tables in a case
WINDOWS = 4  # of a measurement, as many as the probe has rounds
BLOCK, PAUSE = 2e-3, 5e-3  # seconds
STAGE_CALLS = 20
SIZES = ("in_features", "num_tables", "code_bits", "reads", "block_size")


def sample_cases(count: int, seed: int, threads: int) -> list[Case]:
    """``count`` layers and calls, a random sample of common sizes, types and batches; the same for the same seed."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        width, dtype = rng.choice((128, 192, 256, 320, 384, 512, 640, 768, 1024)), rng.choice(("int8", *ITEM_BYTES))
        config = LookupConfig(
            width,
            width,
            num_tables=rng.choice((16, 24, 32, 48, 64, 96, 128, 160)),
            code_bits=rng.choice((6, 7, 8, 8, 8, 9)),
            reads=rng.choice((1, 1, 2, 3)),
            block_size=64,
        )
        tokens = rng.choice((1, 8, 32, 64, 200, 512, 1024, 4096))
        layers = CHAIN if tokens <= CHAINED_TOKENS else 1
        if dtype == "int16":  # a type of projections only
            continue
        case = Case(config, dtype, tokens, rng.choice((1, threads)), layers)
        if layers * case.table_bytes <= MOST_BYTES:
            found.append(case)
    return found


def validate(
    cases: list[Case],
    steps: list[Step],
    probe: Callable[[], dict],
    passes: int = 12,
    seconds: float = 0.2,
    progress: Callable[[str], object] = lambda what: None,
) -> list[dict]:
    """Records for JSON: the probe, and for every case and every stage of a training step sizes, ``predicted_us`` and
    ``measured_us``.

    Other tenants and a changing clock make each core of a machine up to twice as slow, for seconds to minutes. So all
    measurements and ``probe`` take turns for some ``passes``, ``seconds`` for each, and both sides are the medians over
    the passes, figure by figure, of the best in a pass: predicted is from the :func:`median` of the probes, and
    ``measured_us`` the median of ``passes_us``.
    """
    cases = [tiled(case) for case in cases]
    probes, of_cases, of_steps = measure(cases, steps, probe, passes, seconds, progress)
    record = median(probes)
    machine, records = Machine.from_probe(record), [{"what": "probe", **record}]
    records += (_compare(case, measured, machine) for case, measured in zip(cases, of_cases, strict=True))
    for step, measured in zip(steps, of_steps, strict=True):
        records += _compare_training(step, measured, machine)
    return records


def measure(
    cases: list[Case],
    steps: list[Step],
    probe: Callable[[], dict],
    passes: int,
    seconds: float,
    progress: Callable[[str], object],
) -> tuple[list[dict], list[list[dict]], list[list[dict]]]:
    """What each pass found: the probe, and of every case and every step."""
    probes, of_cases, of_steps = [], [[] for _ in cases], [[] for _ in steps]
    before = torch.get_num_threads()
    try:
        for turn in range(1, passes + 1):
            torch.set_num_threads(before)
            probes.append(probe())
            for number, (case, measured) in enumerate(zip(cases, of_cases, strict=True), 1):
                progress(f"pass {turn} of {passes}: call {number} of {len(cases)}")
                torch.set_num_threads(case.threads)
                measured.append(_measure(case, seconds))
            torch.set_num_threads(1)
            for number, (step, measured) in enumerate(zip(steps, of_steps, strict=True), 1):
                progress(f"pass {turn} of {passes}: training step {number} of {len(steps)}")
                measured.append(_measure_training(step, seconds))
    finally:
        torch.set_num_threads(before)
    return probes, of_cases, of_steps


def sample_steps(count: int, seed: int) -> list[Step]:
    """``count`` training steps of a layer, a random sample of common sizes; the same for the same seed."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        width = rng.choice((128, 256, 384, 512, 768))
        config = LookupConfig(
            width,
            width,
            num_tables=rng.choice((16, 32, 64, 96, 128)),
            code_bits=rng.choice((6, 8, 8, 9)),
            reads=rng.choice((1, 2, 3)),
            block_size=64,
        )
        found.append(Step(config, rng.choice((512, 2048, 4096))))
    return found


def summaries(records: list[dict]) -> list[dict]:
    """Median and largest relative error, of inference and of the stages of training."""
    found = []
    for what, of in (("prediction", "inference"), ("training prediction", "training")):
        errors = [abs(r["predicted_us"] / r["measured_us"] - 1) for r in records if r["what"] == what]
        if errors:
            worst = {"median_error": statistics.median(errors), "largest_error": max(errors)}
            found.append({"what": "summary", "of": of, "cases": len(errors), **worst})
    return found


# ---- Calls -----------------------------------------------------------------------------------------------------------


def tiled(case: Case) -> Case:
    """The case with the loop sizes that ``pack`` chooses."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            return dataclasses.replace(case, tiling=timed_tiling(case.config, _packed(case, 1)[0]))
    finally:
        torch.set_num_threads(before)


def _packed(case: Case, layers: int) -> list[Tensor]:
    return [encode(LookupFFN(case.config), case.dtype, case.weight_type) for _ in range(layers)]


def _measure(case: Case, seconds: float) -> dict:
    """``us`` a token, and where it is one layer on one thread ``stages_us``."""
    c, t = case.config, case.tiling
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        packed = _packed(case, case.layers)
        inputs = torch.randn(max(1, DISTINCT_TOKENS // case.tokens), case.tokens, c.in_features).unbind(0)
    sizes = (t.tile_tokens, t.groups_per_block, t.prefetch_distance)
    forward, turns = torch.ops.lookupffn.packed_forward, itertools.cycle(inputs)

    def call():
        x = next(turns)
        for layer in packed:
            forward(x, layer, c.out_features, *sizes, t.serial_tokens)

    def stages():
        calls = [torch.ops.lookupffn.stage_seconds(next(turns), packed[0], *sizes) for _ in range(STAGE_CALLS)]
        return torch.stack(calls).quantile(0.1, 0)

    found = {"us": _least({"call": call}, seconds, case.threads)["call"] / case.layers / case.tokens}
    if case.threads == 1 and case.layers == 1:
        least = torch.stack([stages() for _ in _windows(1)]).amin(0)
        found["stages_us"] = (least / case.tokens * 1e6).tolist()
    return found


def _least(calls: dict[str, Callable[[], object]], seconds: float, threads: int) -> dict[str, float]:
    """Microseconds of each call: the least tenth percentile of some windows."""
    share = seconds / WINDOWS * len(calls)
    found = [time_interleaved(calls, share, block=BLOCK) for _ in _windows(threads)]
    return {name: min(timing[name].low for timing in found) * 1e6 for name in calls}


def _windows(threads: int) -> Iterator[None]:
    """``WINDOWS`` turns; one thread tries a core after the other, several may change places in a pause."""
    cores = some_cores(WINDOWS) if threads == 1 else [None]
    for core in itertools.islice(itertools.cycle(cores), WINDOWS):
        time.sleep(PAUSE)
        with on_core(core):
            yield


def _compare(case: Case, measured: list[dict], machine: Machine) -> dict:
    c, found, passes_us = case.config, predict(case, machine), [one["us"] for one in measured]
    record = {
        "what": "prediction",
        **{name: getattr(c, name) for name in SIZES},
        **{name: getattr(case, name) for name in ("dtype", "tokens", "threads", "layers")},
        "tiling": dataclasses.asdict(case.tiling),
        "predicted_us": found.ns / 1e3,
        "measured_us": statistics.median(passes_us),
        "passes_us": passes_us,
        "predicted_stages_us": {s: sum(b.ns for b in bounds) / 1e3 for s, bounds in found.stages.items()},
        "limits": {b.loop: b.bound_by for bounds in found.stages.values() for b in bounds},
    }
    if "stages_us" in measured[0]:
        stages = map(statistics.median, zip(*(one["stages_us"] for one in measured), strict=True))
        record["measured_stages_us"] = dict(zip(("project", "hash", "gather"), stages, strict=True))
    return record


# ---- Training --------------------------------------------------------------------------------------------------------


def _measure_training(step: Step, seconds: float) -> dict[str, float]:
    """Microseconds a token of each stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = training_stages(step)
    return {stage: us / step.tokens for stage, us in _least(calls, seconds, 1).items()}


def _compare_training(step: Step, measured: list[dict[str, float]], machine: Machine) -> Iterator[dict]:
    for stage, ns in predict_training(step, machine).items():
        of_passes = [found[stage] for found in measured]
        yield {
            "what": "training prediction",
            "stage": stage,
            **{name: getattr(step.config, name) for name in SIZES},
            "tokens": step.tokens,
            "threads": 1,
            "predicted_us": ns / 1e3,
            "measured_us": statistics.median(of_passes),
            "passes_us": of_passes,
        }
