"""The dense FFNs that a user could pick, each built as its own library would have it; for ``lookupffn bench``.

An engine makes a chain of dense FFNs, ``x -> W2 gelu(W1 x + b1) + b2`` again and again, from the same weights and
returns it as a function of nothing that runs the whole chain once on a given input.
"""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[], object]


@dataclass(frozen=True)
class Engine:
    """A way to run a chain of FFNs: ``build(chain, x, threads)`` gives the function that is timed."""

    name: str
    dtype: str
    compiled: bool
    package: str | None
    build: Callable[[nn.Sequential, Tensor, int], Run]

    @property
    def available(self) -> bool:
        return self.package is None or find_spec(self.package) is not None

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}{', compiled' if self.compiled else ''}"


def dense_chain(hidden_size: int, intermediate_size: int, layers: int, seed: int) -> nn.Sequential:
    """``layers`` dense FFNs in a row, float32, PyTorch's initialisation."""
    torch.manual_seed(seed)
    parts = []
    for _ in range(layers):
        parts += [nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)]
    return nn.Sequential(*parts).eval()


def torch_runner(model: nn.Module, inputs: Sequence[Tensor], *, compiled: bool) -> Run:
    """Runs a PyTorch module on ``inputs`` in turn without gradients, eager or compiled for exactly their shape.

    Whoever goes on to another set of models calls ``torch._dynamo.reset()`` first: a class of modules is compiled for
    some shapes and types only.
    """
    if compiled:
        model = torch.compile(model, fullgraph=True, dynamic=False)

    turns = itertools.cycle(inputs)

    def run():
        with torch.inference_mode():
            return model(next(turns))

    run()
    return run


def _torch(dtype: torch.dtype, compiled: bool):
    def build(chain: nn.Sequential, x: Tensor, threads: int) -> Run:
        return torch_runner(copy.deepcopy(chain).to(dtype), [x.to(dtype)], compiled=compiled)

    return build


def _torchao(compiled: bool):
    def build(chain: nn.Sequential, x: Tensor, threads: int) -> Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            model = copy.deepcopy(chain)
            quantize_(model, Int8DynamicActivationInt8WeightConfig())
            return torch_runner(model, [x], compiled=compiled)

    return build


def _onnx_bytes(chain: nn.Sequential) -> bytes:
    """The chain as an ONNX graph of MatMul, Add and Gelu, any number of rows."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, last = [], [], "x"
    for i, part in enumerate(chain):
        if isinstance(part, nn.GELU):
            nodes.append(helper.make_node("Gelu", [last], [f"y{i}"]))
        else:
            for name, value in ((f"w{i}", part.weight.detach().T), (f"b{i}", part.bias.detach())):
                weights.append(numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name))
            nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"p{i}"]))
            nodes.append(helper.make_node("Add", [f"p{i}", f"b{i}"], [f"y{i}"]))
        last = f"y{i}"
    rows = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", chain[0].in_features]) for n in ("x", last)]
    graph = helper.make_graph(nodes, "chain", rows[:1], rows[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _quantized(chain: nn.Sequential, x: Tensor | None) -> bytes:
    """The chain as ONNX with int8 products: with ranges of the activations found on ``x``, or at every call."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Calibration(CalibrationDataReader):
        left = [] if x is None else [{"x": x.numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on preprocessing, which changes nothing here
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            source.write_bytes(_onnx_bytes(chain))
            if x is None:
                quantize_dynamic(source, target, weight_type=QuantType.QInt8)
            else:
                kinds = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"], "per_channel": True}
                quantize_static(source, target, Calibration(), **kinds)
            return target.read_bytes()
    finally:
        root.setLevel(level)


def _onnxruntime(int8: bool):
    def build(chain: nn.Sequential, x: Tensor, threads: int) -> Run:
        import onnxruntime as ort

        model = _quantized(chain, None) if int8 else _onnx_bytes(chain)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # not while another engine is timed
        options.log_severity_level = 3
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        # Input and output stay in ONNX Runtime's own memory, so that nothing is copied in a run.
        binding = session.io_binding()
        value = ort.OrtValue.ortvalue_from_numpy(x.numpy())
        binding.bind_ortvalue_input("x", value)
        binding.bind_output(session.get_outputs()[0].name)
        return lambda: session.run_with_iobinding(binding)

    return build


def _openvino(precision: str):
    def build(chain: nn.Sequential, x: Tensor, threads: int) -> Run:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(_quantized(chain, x[:512]) if precision == "int8" else _onnx_bytes(chain))
        model.reshape({"x": list(x.shape)})
        settings = {
            "INFERENCE_PRECISION_HINT": {"int8": "f32"}.get(precision, precision),  # of what is not quantised
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
        return request.infer

    return build


DENSE_ENGINES = (
    Engine("PyTorch", "float32", False, None, _torch(torch.float32, False)),
    Engine("PyTorch", "float32", True, None, _torch(torch.float32, True)),
    Engine("PyTorch", "bfloat16", False, None, _torch(torch.bfloat16, False)),
    Engine("PyTorch", "bfloat16", True, None, _torch(torch.bfloat16, True)),
    Engine("torchao", "int8", False, "torchao", _torchao(False)),
    Engine("torchao", "int8", True, "torchao", _torchao(True)),
    Engine("ONNX Runtime", "float32", False, "onnxruntime", _onnxruntime(False)),
    Engine("ONNX Runtime", "int8", False, "onnxruntime", _onnxruntime(True)),
    Engine("OpenVINO", "float32", False, "openvino", _openvino("f32")),
    Engine("OpenVINO", "bfloat16", False, "openvino", _openvino("bf16")),
    Engine("OpenVINO", "int8", False, "openvino", _openvino("int8")),
)


def dense_runs(chain: nn.Sequential, x: Tensor, threads: int) -> tuple[dict[Engine, Run], dict[Engine, str]]:
    """``chain`` on ``x`` in every engine at hand, each run once; and why the others are left out."""
    torch._dynamo.reset()
    runs, left_out = {}, {}
    for engine in DENSE_ENGINES:
        if not engine.available:
            left_out[engine] = f"{engine.package} is not installed: pip install 'lookupffn[bench]'"
            continue
        try:
            runs[engine] = engine.build(chain, x, threads)
        except Exception as error:  # whatever a baseline's library raises must not end the comparison
            left_out[engine] = first_line(error)
    return runs, left_out


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
