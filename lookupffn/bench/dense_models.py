"""The engines that a user could run a whole dense encoder in, each at its best; for ``lookupffn bench --model``.

An engine takes the same weights from token ids to hidden states. What it builds for one shape (compiled code, a graph
of fixed sizes) it builds in the first call of that shape, which is not timed. Static quantisation finds the ranges of
activations on random ids.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Run = Callable[[np.ndarray, np.ndarray], object]  # ids and mask, int64 (batch, length)
CALIBRATION = (32, 4, 32)  # batches, texts and tokens, of random ids
# Named beside the engines that fail here: the package is built from source, for minutes, and neither it nor `gguf` has
# the converter of BERT weights, which lies in llama.cpp's repository.
NO_ENGINE = {"llama.cpp": "no package has its converter of weights, and its library is built from source"}


@dataclass(frozen=True)
class Built:
    """An engine that is ready: its call, and bytes of the weights as it has them, None where it does not say."""

    run: Run
    bytes: int | None


@dataclass(frozen=True)
class Engine:
    """A way to run an encoder; ``packages`` are those that it needs beside torch, as they are imported."""

    name: str
    packages: tuple[str, ...]
    build: Callable[[Source], Built]

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if find_spec(package) is None]


class Source:
    """An encoder as engines take it: the module itself, and ONNX files of it, each written when first asked for."""

    def __init__(self, model: Any, folder: Path, threads: int, seed: int):
        self.model, self.folder, self.threads, self.seed = model, folder, threads, seed
        self.hidden = _Hidden(model).eval()

    @cached_property
    def onnx(self) -> Path:
        """By tracing, whose graphs ONNX Runtime's fusions know."""
        file, x = self.folder / "model.onnx", torch.ones(2, 16, dtype=torch.long)
        attention = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        names, sizes = ["input_ids", "attention_mask"], {0: "batch", 1: "length"}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    self.hidden,
                    (x, x),
                    str(file),
                    input_names=names,
                    output_names=["hidden"],
                    dynamic_axes=dict.fromkeys([*names, "hidden"], sizes),
                    dynamo=False,
                    opset_version=17,
                )
        finally:
            self.model.set_attn_implementation(attention)
        return file

    @cached_property
    def fused(self) -> Path:
        """With ONNX Runtime's fusions of transformers."""
        from onnxruntime.transformers import optimizer

        file, config = self.folder / "fused.onnx", self.model.config
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        with _quiet():
            optimizer.optimize_model(str(self.onnx), model_type="bert", **sizes).save_model_to_file(str(file))
        return file

    def calibration(self) -> list[dict[str, np.ndarray]]:
        batches, *shape = CALIBRATION
        ids = np.random.default_rng(self.seed).integers(0, self.model.config.vocab_size, (batches, *shape))
        return [{"input_ids": x, "attention_mask": np.ones_like(x)} for x in ids]


class _Hidden(nn.Module):
    """Ids and mask to hidden states, by position, as exporters want it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that quantisers log and print; levels are what they were behind it."""
    loggers = [logging.getLogger(name) for name in (None, "onnxruntime", "nncf", "torchao")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_run(module: nn.Module) -> Run:
    @torch.inference_mode()
    def run(ids: np.ndarray, mask: np.ndarray) -> object:
        return module(torch.from_numpy(ids), torch.from_numpy(mask))

    return run


def _stored(module: nn.Module) -> int:
    """Bytes of the parameters, of quantised ones those of the tensors that they are made of."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(size(parameter) for parameter in module.parameters())


def _compiled(module: nn.Module) -> Run:
    """For each shape anew (``torch._dynamo.reset()`` between them), with weights laid out for the CPU's products."""

    @torch.no_grad()  # not inference_mode: weights are frozen into the code under no_grad only
    def run(ids: np.ndarray, mask: np.ndarray) -> object:
        return compiled(torch.from_numpy(ids), torch.from_numpy(mask))

    compiled = torch.compile(module, fullgraph=True, dynamic=False, options={"freezing": True})
    return run


def _torch(dtype: torch.dtype, compiled: bool) -> Callable[[Source], Built]:
    def build(source: Source) -> Built:
        module = copy.deepcopy(source.hidden).to(dtype)
        return Built(_compiled(module) if compiled else torch_run(module), _stored(module))

    return build


def _torchao(source: Source) -> Built:
    with _quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        module = copy.deepcopy(source.hidden)
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return Built(_compiled(module), _stored(module))


def _zentorch(dtype: torch.dtype) -> Callable[[Source], Built]:
    def build(source: Source) -> Built:
        if "AVX512" not in torch.backends.cpu.get_cpu_capability():
            raise RuntimeError("its optimisations need AVX-512, which this CPU does not have")
        with _quiet():
            import zentorch  # noqa: F401  # registers its backend

        module = copy.deepcopy(source.hidden).to(dtype)
        return Built(torch_run(torch.compile(module, backend="zentorch", dynamic=False)), _stored(module))

    return build


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


def _onnxruntime(quantised: bool, per_channel: bool = False) -> Callable[[Source], Built]:
    def build(source: Source) -> Built:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = source.fused
        if quantised:
            file = source.folder / f"quantised{per_channel:d}.onnx"
            with _quiet():
                quantize_dynamic(
                    source.fused,
                    file,
                    weight_type=QuantType.QInt8,
                    per_channel=per_channel,
                    reduce_range=False,
                    extra_options={"DefaultTensorType": 1},
                )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = source.threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # not while another engine is timed
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(ids: np.ndarray, mask: np.ndarray) -> object:
            return session.run(None, {name: ids if name == "input_ids" else mask for name in names})[0]

        return Built(run, file.stat().st_size)

    return build


# ---- OpenVINO --------------------------------------------------------------------------------------------------------


def _openvino(precision: str) -> Callable[[Source], Built]:
    def build(source: Source) -> Built:
        import openvino

        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeError("on this CPU, without bfloat16 instructions, OpenVINO runs it in float32")
        model, stored = core.read_model(str(source.onnx)), source.onnx.stat().st_size if precision == "f32" else None
        if precision == "int8":
            model = _quantised(model, source)
            openvino.save_model(model, str(source.folder / "int8.xml"), compress_to_fp16=False)
            stored = (source.folder / "int8.bin").stat().st_size
        settings = {
            "INFERENCE_PRECISION_HINT": {"int8": "f32"}.get(precision, precision),  # of what is not quantised
            "INFERENCE_NUM_THREADS": source.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        requests: dict[tuple, Any] = {}  # of the last shape only

        def run(ids: np.ndarray, mask: np.ndarray) -> object:
            if ids.shape not in requests:
                requests.clear()
                fixed = model.clone()
                fixed.reshape({name: list(ids.shape) for name in ("input_ids", "attention_mask")})
                requests[ids.shape] = core.compile_model(fixed, "CPU", settings)
            return requests[ids.shape]({"input_ids": ids, "attention_mask": mask})[0]

        return Built(run, stored)

    return build


def _quantised(model: Any, source: Source) -> Any:
    """Weights and activations in int8, by NNCF's quantisation after training for transformers."""
    with _quiet(), _environment({"CI": "true", "NNCF_CI": "1"}):  # in which it sends no usage statistics
        import nncf

        data = nncf.Dataset(source.calibration())
        return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION[0])


ENGINES = (
    Engine("PyTorch float32", (), _torch(torch.float32, False)),
    Engine("PyTorch float32, compiled", (), _torch(torch.float32, True)),
    Engine("PyTorch bfloat16, compiled", (), _torch(torch.bfloat16, True)),
    Engine("torchao int8, compiled", ("torchao",), _torchao),
    Engine("ONNX Runtime float32", ("onnx", "onnxruntime"), _onnxruntime(False)),
    Engine("ONNX Runtime int8", ("onnx", "onnxruntime"), _onnxruntime(True)),
    Engine("ONNX Runtime int8 per channel", ("onnx", "onnxruntime"), _onnxruntime(True, per_channel=True)),
    Engine("OpenVINO float32", ("onnx", "openvino"), _openvino("f32")),
    Engine("OpenVINO bfloat16", ("onnx", "openvino"), _openvino("bf16")),
    Engine("OpenVINO int8", ("onnx", "openvino", "nncf"), _openvino("int8")),
    Engine("zentorch float32, compiled", ("zentorch",), _zentorch(torch.float32)),
    Engine("zentorch bfloat16, compiled", ("zentorch",), _zentorch(torch.bfloat16)),
)
