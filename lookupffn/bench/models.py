"""A whole encoder in the runtime and in every dense engine at hand: microseconds a token, in one interleaved run.

Each engine runs the same weights from token ids to hidden states; one that cannot be built is named. Beside them the
runtime with lookups for FFNs, whose weights are random: what such a model would take.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookupffn import machine
from lookupffn.bench import dense_models, encoders
from lookupffn.bench.benchmark import versions
from lookupffn.bench.dense_models import Built, Run, Source
from lookupffn.bench.engines import first_line
from lookupffn.bench.footprint import footprint
from lookupffn.bench.timing import time_interleaved
from lookupffn.errors import InputError
from lookupffn.files import make_folder
from lookupffn.runtime.export import export
from lookupffn.runtime.families import graph_of
from lookupffn.runtime.records import model_bytes
from lookupffn.runtime.session import MODEL_FILE, Session

RAGGED = "ragged"  # 64 texts as long as sentences are: padded to the longest, and timed by their own tokens
Shape = tuple[int, int] | str
SHAPES: tuple[Shape, ...] = ((1, 8), (1, 32), (1, 128), (8, 32), (64, 128), RAGGED)
LONGEST_RAGGED = 64
FOOTPRINT = (64, 512)  # texts and tokens
TOO_SLOW = 20  # times as long as PyTorch float32: left out, as every other engine would wait for it

OWN = {f"lookupffn {linears}": linears for linears in ("int8", "float32")}
LOOKUPS = {f"lookupffn, lookup {tables}": tables for tables in ("int8", "int4")}


def engine_names() -> list[str]:
    return [*OWN, *LOOKUPS, *(engine.name for engine in dense_models.ENGINES)]


def parse_shape(text: str) -> Shape:
    """``8x32``, texts and tokens of each, or ``ragged``."""
    if text == RAGGED:
        return text
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise InputError(f"a shape is texts x tokens, as 8x32, or {RAGGED}, not {text!r}")
    return int(sizes[0]), int(sizes[1])


def chosen(names: Sequence[str]) -> list[str]:
    """The engines of these names, or else whose names begin so, in either case; all where none is named."""
    known, found = engine_names(), set()
    for name in names:
        matches = {full for full in known if full.lower().startswith(name.lower())}
        exact = {full for full in known if full.lower() == name.lower()}
        if not matches:
            raise InputError(f"there is no engine {name!r}; there are: {'; '.join(known)}")
        found |= exact or matches
    return [name for name in known if not names or name in found]


def lengths_of(shape: Shape, generator: np.random.Generator) -> np.ndarray:
    """Tokens of each text of a batch. Ragged ones are log-normal, as sentences are: a median of 20, 6 to 64."""
    if isinstance(shape, str):
        return np.exp(generator.normal(3.0, 0.5, 64)).round().clip(6, LONGEST_RAGGED).astype(int)
    return np.full(*shape)


def bench_model(
    name: str,
    model: Any,
    threads: int,
    seconds: float,
    seed: int = 0,
    shapes: Sequence[Shape] = SHAPES,
    engines: Sequence[str] = (),
    progress: Callable[[str], object] = lambda text: None,
) -> Iterator[dict]:
    """One record an engine and shape: median and quantiles of microseconds a token (of texts, not of padding), what
    it computes and stores, machine and versions; one of the memory and the opening of the packed model; and one of what
    was left out. ``progress`` is told what goes on.

    Raises:
        InputError: the model has no such engine or shape; before anything is built.
    """
    names, graph = chosen(engines), graph_of(model)
    fits = encoders.longest(graph)
    for shape in shapes:
        length = LONGEST_RAGGED if isinstance(shape, str) else shape[1]
        if length > fits:
            raise InputError(
                f"shape {shape_name(shape)} has texts of {length} tokens, {name} takes {fits}: choose another"
            )
    lookup = encoders.with_lookups(graph, seed)
    ffn = {"dense": encoders.ffn_flops(graph), "lookup": encoders.ffn_flops(lookup)}
    ffn["factor"] = ffn["dense"] / ffn["lookup"]
    left_out = dict(dense_models.NO_ENGINE) if not engines else {}
    common = {"model": name, "threads": threads, "seed": seed}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        common["machine"] = machine.describe() | {"versions": versions()}
        with tempfile.TemporaryDirectory() as temporary:
            source = Source(model, Path(temporary), threads, seed)
            built = _own(names, source, lookup, progress) | build_dense(names, source, left_out, progress)
            generator = np.random.default_rng(seed)
            for shape in shapes:
                lengths = lengths_of(shape, generator)
                mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
                ids = generator.integers(0, model.config.vocab_size, mask.shape) * mask
                _first_calls(built, source, ids, mask, shape_name(shape), left_out, progress)
                progress(f"{shape_name(shape)}: timing")
                calls = {engine: (lambda run=b.run, ids=ids, mask=mask: run(ids, mask)) for engine, b in built.items()}
                times = time_interleaved(calls, seconds * len(calls)) if calls else {}
                for engine, taken in times.items():
                    computed = lookup if engine in LOOKUPS else graph
                    yield common | {
                        "what": "model",
                        "engine": engine,
                        "shape": shape_name(shape),
                        "tokens": int(lengths.sum()),
                        "us_per_token": taken.median / lengths.sum() * 1e6,
                        "spread": [taken.low / lengths.sum() * 1e6, taken.high / lengths.sum() * 1e6],
                        "flops_per_token": encoders.flops_per_token(computed, lengths),
                        "bytes": built[engine].bytes,
                        **({"ffn_flops": ffn} if engine in LOOKUPS else {}),
                    }
            for engine in [engine for engine in built if OWN.get(engine) == "int8"]:
                progress("memory and opening")
                texts, tokens = FOOTPRINT[0], min(FOOTPRINT[1], fits)
                found = footprint(source.folder / engine, (texts, tokens), threads)
                about = {"shape": shape_name((texts, tokens)), "bytes": built[engine].bytes}
                yield common | {"what": "footprint", "engine": engine, **about, **found}
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()
    yield common | {"what": "left out", "engines": left_out}


def shape_name(shape: Shape) -> str:
    return shape if isinstance(shape, str) else f"{shape[0]} x {shape[1]}"


def _own(names: list[str], source: Source, lookup: Any, progress: Callable[[str], object]) -> dict[str, Built]:
    """The runtime's sessions, each of a file in the folder of its name."""
    built = {}
    for name in [name for name in names if name in OWN or name in LOOKUPS]:
        progress(f"building {name}")
        folder = source.folder / name
        if name in OWN:
            export(source.model, folder, linears=OWN[name])
        else:
            make_folder(folder)
            with open(folder / MODEL_FILE, "wb") as file:
                file.writelines(model_bytes(lookup, "int8", LOOKUPS[name]))
        built[name] = Built(Session(folder, source.threads), (folder / MODEL_FILE).stat().st_size)
    return built


def build_dense(
    names: list[str],
    source: Source,
    left_out: dict[str, str],
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Built]:
    """The dense engines at hand; ``left_out`` gets those that could not be built, with the reason."""
    built = {}
    for engine in [engine for engine in dense_models.ENGINES if engine.name in names]:
        if engine.missing:
            left_out[engine.name] = f"{', '.join(engine.missing)} not installed"
            continue
        progress(f"building {engine.name}")
        try:
            built[engine.name] = engine.build(source)
        except Exception as error:  # whatever a baseline's library raises: there are others
            left_out[engine.name] = first_line(error)
    return built


def _first_calls(
    built: dict[str, Built],
    source: Source,
    ids: np.ndarray,
    mask: np.ndarray,
    shape: str,
    left_out: dict[str, str],
    progress: Callable[[str], object],
) -> None:
    """Calls each engine for the first time at this shape, in which some compile; takes out those that fail or lag."""
    torch._dynamo.reset()  # a class of modules is compiled for some shapes only
    limit = TOO_SLOW * _seconds(dense_models.torch_run(source.hidden), ids, mask)
    for name in list(built):
        progress(f"{shape}: first call of {name}")
        try:
            built[name].run(ids, mask)
            taken = _seconds(built[name].run, ids, mask)
        except Exception as error:
            if name in OWN or name in LOOKUPS:
                raise
            left_out[name] = f"{first_line(error)} ({shape})"
            del built[name]
            continue
        if taken > limit and name not in OWN and name not in LOOKUPS:
            left_out[name] = f"more than {TOO_SLOW} times as long as PyTorch float32 ({shape})"
            del built[name]


def _seconds(run: Run, ids: np.ndarray, mask: np.ndarray) -> float:
    start = time.perf_counter()
    run(ids, mask)
    return time.perf_counter() - start
