"""A whole encoder in the runtime and in every dense engine at hand: microseconds a token, in one interleaved run.

Each engine runs the same weights from token ids to hidden states: ONNX Runtime with transformer fusions, in float32 and
with dynamic int8; OpenVINO in float32 and bfloat16; PyTorch in float32. One that cannot be built is named. Beside them
the runtime with lookups for FFNs, whose weights are random: what such a model would take.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lookupffn import machine
from lookupffn.bench.timing import time_interleaved
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.runtime.export import export
from lookupffn.runtime.families import graph_of
from lookupffn.runtime.records import model_bytes
from lookupffn.runtime.session import MODEL_FILE, Session

SHAPES = ((1, 8), (1, 32), (1, 128), (8, 32), (64, 128))
LOOKUP = {"num_tables": 64, "code_bits": 8, "block_size": 64}
RAGGED = "ragged"  # 64 texts as long as sentences are: padded to the longest, and timed by their own tokens
Run = Callable[[np.ndarray, np.ndarray], object]  # ids and mask, int64 (batch, length)


class _Hidden(nn.Module):
    """Ids and mask to hidden states, by position, as exporters want it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def engines(model: Any, folder: Path, threads: int, left_out: dict[str, str]) -> dict[str, Run]:
    """Every engine's call, by name; ``left_out`` gets those that could not be built, with the reason."""
    runs: dict[str, Run] = {}
    for linears in ("int8", "float32"):
        session = Session(export(model, folder / linears, linears=linears, tables="int8"), threads)
        runs[f"lookupffn {linears}"] = session
    for tables in ("int8", "int4"):
        lookups = _with_lookups(model, folder / f"lookup {tables}", tables)
        runs[f"lookupffn, lookup {tables}"] = Session(lookups, threads)
    hidden = _Hidden(model).eval()

    @torch.no_grad()
    def eager(ids: np.ndarray, mask: np.ndarray) -> object:
        return hidden(torch.from_numpy(ids), torch.from_numpy(mask))

    runs["PyTorch float32"] = eager
    builders = {"onnxruntime": _onnxruntime, "openvino": _openvino}
    file = folder / "model.onnx"
    for package, build in builders.items():
        if find_spec(package) is None or find_spec("onnx") is None:
            left_out[package] = "not installed: pip install 'lookupffn[bench]'"
            continue
        try:
            if not file.exists():
                _to_onnx(hidden, file)
            runs |= build(file, model.config, threads)
        except Exception as error:  # whatever a baseline's library raises: there are others
            left_out[package] = (str(error).splitlines() or [type(error).__name__])[0]
    return runs


def _with_lookups(model: Any, folder: Path, tables: str) -> Path:
    """The model with random lookups of its width for FFNs: the time of one that was trained so, and nothing else."""
    graph = graph_of(model)
    config = LookupConfig(graph.width, graph.width, reads=3, **LOOKUP)
    layers = []
    for layer in graph.layers:
        ffn = LookupFFN(config)
        nn.init.normal_(ffn.tables)
        layers.append(dataclasses.replace(layer, ffn=ffn))
    folder.mkdir()
    with open(folder / MODEL_FILE, "wb") as file:
        file.writelines(model_bytes(dataclasses.replace(graph, layers=layers), "int8", tables))
    return folder


def _to_onnx(hidden: _Hidden, file: Path) -> None:
    """By tracing, whose graphs ONNX Runtime's fusions know."""
    x = torch.ones(2, 16, dtype=torch.long)
    attention = hidden.model.config._attn_implementation
    hidden.model.set_attn_implementation("eager")
    names, sizes = ["input_ids", "attention_mask"], {0: "batch", 1: "length"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                hidden,
                (x, x),
                str(file),
                input_names=names,
                output_names=["hidden"],
                dynamic_axes=dict.fromkeys([*names, "hidden"], sizes),
                dynamo=False,
                opset_version=17,
            )
    finally:
        hidden.model.set_attn_implementation(attention)


def _onnxruntime(file: Path, config: Any, threads: int) -> dict[str, Run]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    fused, quantised = (file.with_name(f"{name}.onnx") for name in ("fused", "quantised"))
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimizer.optimize_model(str(file), model_type="bert", **sizes).save_model_to_file(str(fused))
    quantize_dynamic(fused, quantised, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    runs: dict[str, Run] = {}
    for dtype, path in (("float32", fused), ("int8", quantised)):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(ids: np.ndarray, mask: np.ndarray, session: Any = session, names: list[str] = names) -> object:
            return session.run(None, {name: ids if name == "input_ids" else mask for name in names})

        runs[f"ONNX Runtime {dtype}"] = run
    return runs


def _openvino(file: Path, config: Any, threads: int) -> dict[str, Run]:
    import openvino

    runs: dict[str, Run] = {}
    for dtype, hint in (("float32", "f32"), ("bfloat16", "bf16")):
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(str(file), "CPU", settings)
        runs[f"OpenVINO {dtype}"] = lambda ids, mask, compiled=compiled: compiled([ids, mask])
    return runs


def lengths_of(shape: tuple[int, int] | str, generator: np.random.Generator) -> np.ndarray:
    """Tokens of each text of a batch. Ragged ones are log-normal, as sentences are: a median of 20, 6 to 64."""
    if shape == RAGGED:
        return np.exp(generator.normal(3.0, 0.5, 64)).round().clip(6, 64).astype(int)
    return np.full(shape[0], shape[1])


def bench_model(
    name: str, model: Any, threads: int, seconds: float, seed: int = 0, shapes: Any = (*SHAPES, RAGGED)
) -> Iterator[dict]:
    """One record an engine and shape: median and quartiles of microseconds a token (of texts, not of padding), machine
    and versions; then one of what was left out."""
    generator, left_out = np.random.default_rng(seed), {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs = engines(model, Path(folder), threads, left_out)
            for shape in shapes:
                lengths = lengths_of(shape, generator)
                mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
                ids = generator.integers(0, model.config.vocab_size, mask.shape) * mask
                calls = {engine: (lambda run=run, ids=ids, mask=mask: run(ids, mask)) for engine, run in runs.items()}
                times = time_interleaved(calls, seconds * len(calls))
                for engine, time in times.items():
                    yield {
                        "what": "model",
                        "model": name,
                        "engine": engine,
                        "shape": shape if shape == RAGGED else f"{len(ids)} x {ids.shape[1]}",
                        "tokens": int(lengths.sum()),
                        "threads": threads,
                        "us_per_token": time.median / lengths.sum() * 1e6,
                        "spread": [time.low / lengths.sum() * 1e6, time.high / lengths.sum() * 1e6],
                        "seed": seed,
                        "machine": machine.describe(),
                    }
    finally:
        torch.set_num_threads(before)
    yield {"what": "left out", "model": name, "engines": left_out}
