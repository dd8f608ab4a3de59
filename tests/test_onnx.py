"""ONNX: exported by torch with the package's table, run by ONNX Runtime with any number of tokens, equal to reference.

Projection, codes and gather are compared apart, since a code is discontinuous; then layers and a model as wholes.
"""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from lookupffn import LookupConfig, LookupFFN, ops, pack, reference
from lookupffn.extras import MissingExtraError
from lookupffn.hf import LookupRobertaConfig, LookupRobertaForSequenceClassification
from lookupffn.onnx import translation_table

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

F32, F64 = torch.float32, torch.float64
TOKENS = {0: Dim("tokens", max=4096)}
ROUNDING = {F32: 2e-6, F64: 1e-14}


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def exported(model, inputs, dynamic, folder, **options):
    """A session of ONNX Runtime on the exported model."""
    model = model if isinstance(model, nn.Module) else Call(model)
    options |= {"custom_translation_table": translation_table(), "dynamo": True, "verbose": False}
    program = torch.onnx.export(model, inputs, dynamic_shapes=dynamic, **options)
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs):
        return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))]

    return run


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("width", "out", "block", "stages"), [(65, 33, 16, 4), (32, 100, 32, 4), (20, 7, 4, 2)])
def test_projection(tmp_path, dtype, width, out, block, stages):
    padded = reference.next_power_of_two(width)
    weight = torch.randn(-(-out // padded), stages, padded // block, block, block, dtype=dtype) / block**0.5

    def call(x):
        return torch.ops.lookupffn.bh4(x, weight, 0.7, out)

    run = exported(call, (torch.randn(3, width, dtype=dtype),), (TOKENS,), tmp_path)
    for count in (1, 3, 29):
        x = torch.randn(count, width, dtype=dtype)
        (z,) = run(x)
        expected = ops.bh4(x.double(), weight.double(), 0.7, out)  # any number of stages; test_ops has the reference's
        assert z.dtype == dtype
        assert (z - expected).abs().max() <= 20 * ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("bits", "reads"), [(1, 2), (8, 1), (5, 3), (16, 4)])
def test_codes_and_scores(tmp_path, dtype, bits, reads):

    def call(z):
        return torch.ops.lookupffn.hash_codes(z, reads)

    run = exported(call, (torch.randn(3, 7, bits, dtype=dtype),), (TOKENS,), tmp_path)
    for count in (1, 3, 29):
        z = torch.randn(count, 7, bits, dtype=dtype)
        codes, scores = run(z)
        assert codes.dtype == torch.int32
        expected_codes, expected = ops.hash_codes(z.double(), reads)  # test_ops compares it with the reference's search
        assert torch.equal(codes, expected_codes)
        torch.testing.assert_close(scores.double(), expected, rtol=100 * ROUNDING[dtype], atol=ROUNDING[dtype])


def test_ties_and_boundaries_take_the_same_bits(tmp_path):
    z = torch.tensor([[[0.0, -0.0, 0.5, 0.5], [1.0, 1.0, -1.0, 1.0], [-0.5, 0.25, 0.25, -0.0]]])
    (codes, _) = exported(lambda z: torch.ops.lookupffn.hash_codes(z, 4), (z,), None, tmp_path)(z)
    assert torch.equal(codes, ops.hash_codes(z, 4)[0])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("tables", "rows", "width", "reads"), [(1, 2, 1, 1), (16, 8, 33, 2), (37, 16, 20, 3)])
def test_gather(tmp_path, dtype, tables, rows, width, reads):
    values = torch.randn(tables, rows, width, dtype=dtype)

    def draw(count):
        codes = torch.randint(0, rows, (count, tables, reads), dtype=torch.int32)
        return codes, torch.randn(count, tables, reads, dtype=dtype)

    def call(codes, scores):
        return torch.ops.lookupffn.gather(values, codes, scores)

    run = exported(call, draw(3), (TOKENS, TOKENS), tmp_path)
    for count in (1, 3, 29):
        codes, scores = draw(count)
        (y,) = run(codes, scores)
        sizes = reference.gather(values.double().abs(), codes, scores.double().abs())
        error = (y - reference.gather(values.double(), codes, scores.double())).abs()
        assert (error <= 4 * ROUNDING[dtype] * sizes).all()


@pytest.mark.parametrize(
    "config",
    [
        LookupConfig(65, 33, num_tables=20, reads=2, block_size=16),
        LookupConfig(32, 48, num_tables=5, reads=1, projection="dense"),
        LookupConfig(40, 7, num_tables=5, reads=4, projection="none"),
    ],
    ids=["bh4", "dense", "none"],
)
def test_a_layer_of_any_leading_shape(tmp_path, config):
    layer = LookupFFN(config).eval()
    nn.init.normal_(layer.tables)
    run = exported(layer, (torch.randn(3, 5, config.in_features),), ({0: Dim("batch"), 1: Dim("length")},), tmp_path)
    for shape in ((1, 1), (2, 9), (7, 5)):
        x = torch.randn(*shape, config.in_features)
        (y,) = run(x)
        with torch.no_grad():
            expected = layer(x)
            z, scale = layer.project(x), layer.project(x).abs().max()
        clear = (z.abs() > 1e-5 * scale).all(-1).all(-1).view(shape)  # of z whose sign rounding cannot turn
        assert clear.any()
        assert y.shape == expected.shape
        assert (y - expected).abs()[clear].max() <= 1e-5 * expected.abs().max()


def test_a_model_of_any_batch_and_length(tmp_path):
    config = LookupRobertaConfig.preset("small", vocab_size=97, hidden_size=64, num_attention_heads=2)
    model = LookupRobertaForSequenceClassification(config).eval().double()  # whose codes rounding does not turn
    for layer in model.encoder.layers:
        nn.init.normal_(layer.ffn.tables, std=0.1)
    x = torch.randint(5, 97, (2, 9))
    sizes = {0: Dim("batch"), 1: Dim("length", max=512)}
    names = ["input_ids", "attention_mask"]
    options = {"kwargs": dict(zip(names, (x, torch.ones_like(x)), strict=True)), "input_names": names}
    run = exported(model, (), dict.fromkeys(names, sizes), tmp_path, **options)
    for batch, length in ((1, 5), (4, 33), (2, 128)):
        x = torch.randint(5, 97, (batch, length))
        mask = torch.ones_like(x)
        mask[0, length // 2 :] = 0
        with torch.no_grad():
            expected = model(x, attention_mask=mask).logits
        torch.testing.assert_close(run(x, mask)[0], expected, rtol=0, atol=1e-9)


def test_a_packed_layer_says_what_to_export(tmp_path):
    if torch.ops.lookupffn.packed_forward.default not in translation_table():
        pytest.skip("without the kernels a packed layer is no operator")
    layer = pack(LookupFFN(LookupConfig(32, 32, num_tables=16)))
    with pytest.raises(Exception, match="Error when translating node") as raised:
        exported(layer, (torch.randn(3, 32),), None, tmp_path)
    causes, error = [], raised.value
    while error:
        causes.append(str(error))
        error = error.__cause__
    assert "a packed layer has no ONNX form: export the model that it was packed from" in causes


def test_without_onnxscript_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("lookupffn.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs onnx, onnxscript, .*pip install 'lookupffn\[onnx\]'"):
        translation_table()
