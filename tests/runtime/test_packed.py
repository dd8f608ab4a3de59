"""pack, save_packed and load_packed as their user meets them: layers and models, compiled, exported, and files."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lookupffn import (
    LookupConfig,
    LookupFFN,
    PackedError,
    PackedLookupFFN,
    load_packed,
    native,
    pack,
    reference,
    save_packed,
)
from lookupffn.hf import LookupRobertaConfig, LookupRobertaForMaskedLM
from lookupffn.runtime import packed
from lookupffn.runtime.format import TABLE_TYPES, WEIGHT_TYPES, decode, encode
from lookupffn.runtime.packed import FILE_FORMAT, FILE_VERSION
from lookupffn.runtime.portable import packed_project

CONFIG = LookupConfig(64, 40, 33, 5, block_size=16, reads=2)
SMALL = LookupConfig(20, 20, 9, 4, block_size=4)
every_dtype = pytest.mark.parametrize("dtype", TABLE_TYPES)
needs_kernels = pytest.mark.skipif(not native.available(), reason="the kernels were not built")
# transformers warns of its own to-be-removed names while it saves, inductor and export of torch's
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


@torch.no_grad()
def trained(config, seed=0):
    torch.manual_seed(seed)
    layer = LookupFFN(config)
    for parameter in layer.parameters():
        parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    layer.bias.normal_()
    return layer


class Block(torch.nn.Module):
    """A model with two lookup layers, one of them used twice; what surrounds them is exact whoever compiles it."""

    def __init__(self, config=SMALL):
        super().__init__()
        self.first = trained(config)
        self.again = self.first
        self.rest = torch.nn.ModuleList([torch.nn.ReLU(), trained(dataclasses.replace(config, num_tables=5), 1)])
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = self.again(self.rest[0](self.first(x)) * self.scale)
        return self.rest[1](x)


# ---- Packed layers ---------------------------------------------------------------------------------------------------


def with_tables_apart(config):
    """A layer whose table ``t`` fills outputs ``2 t`` and ``2 t + 1`` only: its outputs show its tables one by one."""
    tables = config.num_tables
    layer = trained(dataclasses.replace(config, out_features=2 * tables))
    with torch.no_grad():
        layer.tables.view(tables, -1, tables, 2).mul_(torch.eye(tables)[:, None, :, None])
    return layer


APART = dataclasses.replace(CONFIG, num_tables=35)  # the last three are no whole four
# How far the quantised projection is off, relative to z, and what share of 105,000 pairs of token and table is safe.
SAFE = {"float32": (1e-6, 0.999), "bfloat16": (5e-4, 0.98), "int8": (0.03, 0.5), "int4": (0.03, 0.5)}


@every_dtype
@pytest.mark.parametrize("config", [APART, dataclasses.replace(APART, projection="dense")], ids=["bh4", "dense"])
def test_a_packed_layer_is_the_layer_for_tables_away_from_a_boundary(config, dtype):
    """A table's codes are the layer's where every ``|z|`` and gap between ``|z|`` exceeds the projection's error; there
    its rows come back up to what the error changes in their scores, and the rounding of tables and scores."""
    layer = with_tables_apart(config)
    module = pack(layer, dtype)
    exact, x = copy.deepcopy(layer).double(), torch.randn(3000, 64)
    relative, most = SAFE[dtype]
    with torch.no_grad():
        z, y = exact.projection(x.double()), (module(x) - layer.bias).view(3000, config.num_tables, 2)
    own_z = packed_project(decode(module.packed), x).double()
    assert (own_z - z).norm() <= relative * z.norm()
    error = (own_z - z).abs().amax(1)
    z, own_z = (one.view(3000, config.num_tables, config.code_bits) for one in (z, own_z))
    smallest = z.abs().sort(-1).values
    safe = torch.minimum(smallest[..., 0], (smallest[..., 1] - smallest[..., 0]) / 2) > error[:, None]  # (B, T)
    assert safe.sum() > most * safe.numel()

    (codes, scores), (own_codes, own_scores) = (reference.nearest_buckets(one, config.reads) for one in (z, own_z))
    assert torch.equal(codes[safe], own_codes[safe])
    tables = exact.tables.detach()
    rows = torch.stack([tables[t, codes[:, t], 2 * t : 2 * t + 2] for t in range(config.num_tables)], 1)  # (B, T, N, 2)
    expected = (scores[..., None] * rows).sum(2)
    size, changed = ((one.abs()[..., None] * rows.abs()).sum(2) for one in (own_scores, own_scores - scores))
    rounding = {"float32": 1e-5, "bfloat16": 2**-8 + 1e-5, "int8": 1e-5, "int4": 1e-5}[dtype] * size
    if dtype == "int8":  # half a step of every entry, and half a step of every score times its row
        largest = tables.abs().amax((1, 2))[:, None]
        weights, shares = own_scores.abs() * largest, rows.abs().sum(2) / largest + config.reads / 254
        rounding += 1.01 / 254 * (weights.sum(2, keepdim=True) + weights.amax((1, 2))[:, None, None] * shares)
    if dtype == "int4":  # the same by the table's scale, and what is cut off at 7 scales
        scale = decode(module.packed).table_scales.double()[:, None].clamp(min=1e-30)
        cut = torch.maximum(scale[..., None] / 2, rows.abs() - 7 * scale[..., None])
        half = (own_scores.abs() * scale).amax((1, 2))[:, None, None] / 254
        rounding += 1.01 * (own_scores.abs()[..., None] * cut).sum(2) + half * (
            rows.abs() / scale[..., None] + 0.5
        ).sum(2)
    wrong = (y - expected).abs() > changed + rounding + 1e-5 * layer.bias.abs().max()
    assert not wrong[safe].any(), f"{int(wrong[safe].sum())} of {2 * int(safe.sum())} outputs"


@every_dtype
def test_the_error_of_a_packed_layer_is_small_on_the_whole(dtype):
    layer = trained(LookupConfig(128, 96, 64, 8, block_size=32))
    x = torch.randn(400, 128)
    with torch.no_grad():
        exact = layer(x) - layer.bias
        error = (pack(layer, dtype)(x) - layer.bias - exact).norm() / exact.norm()
    assert (
        error < {"float32": 1e-2, "bfloat16": 0.05, "int8": 0.25, "int4": 0.3}[dtype]
    )  # codes near a boundary may flip


@every_dtype
@pytest.mark.parametrize(
    "config",
    [CONFIG, SMALL, LookupConfig(12, 70, 3, 4, "none"), LookupConfig(5, 3, 40, 9, "dense")],
    ids=["bh4", "narrow", "none", "dense"],
)
@pytest.mark.usefixtures("with_and_without_kernels")
def test_no_tokens_give_no_rows(config, dtype):
    module = pack(trained(config), dtype)
    for shape in ((0,), (3, 0), (0, 5)):
        y = module(torch.empty(*shape, config.in_features))
        assert y.shape == (*shape, config.out_features)


def test_the_projection_dtype_goes_with_the_tables_or_is_chosen():
    layer = trained(SMALL)
    assert [pack(layer, d).weight_dtype for d in TABLE_TYPES] == ["float32", "int16", "int8", "int8"]
    for kind in WEIGHT_TYPES:
        module = pack(layer, "int8", projection=kind)
        assert (module.table_dtype, module.weight_dtype) == ("int8", kind)


def test_costs_are_those_of_what_is_stored():
    module = pack(trained(CONFIG))
    layer = LookupFFN(CONFIG)
    assert module.flops(7) == layer.flops(7)
    per_token = CONFIG.num_tables * CONFIG.reads * 64  # a row is padded to 64 int8 numbers
    assert module.bytes_read(5) - module.bytes_read(4) == per_token
    assert module.bytes_read(0) < layer.bytes_read(0)


@pytest.fixture(params=[pytest.param(True, marks=needs_kernels), False], ids=["native", "portable"])
def with_and_without_kernels(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(packed, "_HAVE_KERNELS", False)
        monkeypatch.setattr(native, "load", lambda: "a test asks to do without")
        monkeypatch.setattr(native, "warn_if_absent", lambda: None)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_a_backward_pass_through_a_packed_layer_is_refused():
    module = pack(trained(SMALL))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 20, dtype=dtype, requires_grad=True)
        y = module(x)
        assert y.requires_grad
        with pytest.raises(RuntimeError, match="a packed layer has no backward pass: train the layer"):
            y.sum().backward()
    with torch.no_grad():
        assert not module(x).requires_grad
    assert not module(torch.randn(3, 20)).requires_grad
    assert list(module.parameters()) == []


@pytest.mark.parametrize("precision", ["wrong", "fp4", None, 8])
def test_an_unknown_dtype_is_named_with_the_known_ones(precision):
    with pytest.raises(ValueError, match=rf"^tables must be one of float32, bfloat16, int8, int4, not {precision!r}$"):
        pack(trained(SMALL), precision)
    with pytest.raises(ValueError, match=r"^projection must be one of float32, int16, int8, not 'bfloat16'$"):
        pack(trained(SMALL), "int8", projection="bfloat16")


def test_dtypes_may_be_torchs_own():
    module = pack(trained(SMALL), torch.bfloat16, projection=torch.int8)
    assert (module.table_dtype, module.weight_dtype) == ("bfloat16", "int8")
    with pytest.raises(ValueError, match=r"^tables must be one of float32, bfloat16, int8, int4, not 'float16'$"):
        pack(trained(SMALL), torch.float16)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_layers_are_built_packed_and_used_inside_and_outside_of_inference_mode(tmp_path):
    with torch.inference_mode():
        layer = trained(CONFIG)
        inside = pack(layer)
        save_packed(inside, tmp_path / "layer")
        loaded = load_packed(tmp_path / "layer")
        x = torch.randn(5, 64)
        y = inside(x)
    outside = pack(layer)
    for module in (inside, outside, loaded, copy.deepcopy(inside)):
        assert torch.equal(module(torch.tensor(x.tolist())), y)
        assert torch.equal(module(x), y)
        module.load_state_dict(outside.state_dict())
        assert not module.packed.is_inference()


def test_layers_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="Linear holds no LookupFFN layer"):
        pack(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"PackedLookupFFN holds no LookupFFN layer .one that is packed already"):
        pack(pack(trained(SMALL)))
    with pytest.raises(ValueError, match=r"the layer is on meta.*move the model there"):
        pack(LookupFFN(SMALL, device="meta"))
    layer = trained(SMALL)
    with torch.no_grad():
        layer.bias[0] = math.nan
    with pytest.raises(ValueError, match="bias holds values that are not finite"):
        pack(layer)


def test_forward_hooks_of_a_layer_are_kept_and_those_of_its_parts_counted():
    model, seen = Block(), []
    model.first.register_forward_hook(lambda module, args, y: seen.append(("after", type(module), y)) or y)
    model.first.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    model.first.projection.register_forward_hook(lambda *_: seen.append("lost"))
    with pytest.warns(UserWarning, match="layer 'first': 1 forward hooks of its projection are not called") as said:
        fast = pack(model)
    assert said[0].filename == __file__
    x = torch.randn(3, 20)
    y = fast.first(x)
    assert seen == ["before", ("after", PackedLookupFFN, y)]
    model.first(x)
    assert seen[2:4] == ["before", "lost"]


def test_layers_that_another_library_holds_are_refused():
    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    for inplace in (False, True):
        model = torch.nn.Sequential(Adapter(trained(SMALL)))
        with pytest.raises(ValueError, match=r"layer '0.base_layer' is wrapped by Adapter.*merge it first"):
            pack(model, inplace=inplace)
    layer = trained(dataclasses.replace(SMALL, projection="dense"))
    layer.projection = torch.nn.Sequential(layer.projection)
    with pytest.raises(ValueError, match="the layer's projection is a Sequential, put there by another library"):
        pack(layer)


def test_a_model_that_cannot_be_packed_is_left_as_it_was():
    model = Block()
    with torch.no_grad():
        model.rest[1].bias[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        pack(model, inplace=True)
    assert isinstance(model.first, LookupFFN)


@pytest.mark.parametrize("field", ["in_features", "out_features", "num_tables", "code_bits", "reads"])
def test_bytes_of_another_config_are_refused(field):
    config = dataclasses.replace(CONFIG, **{field: getattr(CONFIG, field) - 1})
    with pytest.raises(
        PackedError, match=f"{field} is {getattr(CONFIG, field)} in the packed layer and .* in its config"
    ):
        PackedLookupFFN(config, encode(trained(CONFIG)))


# ---- Models ----------------------------------------------------------------------------------------------------------


def names_and_types(model):
    return {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("inplace", [False, True])
def test_every_name_of_every_layer_is_packed_and_the_rest_is_kept(inplace):
    model = Block().eval()
    before, tables, scale = names_and_types(model), model.first.tables, model.scale
    x = torch.randn(6, 20)
    with torch.no_grad():
        alone = pack(model.first), pack(model.rest[1])
        expected = alone[1](alone[0](torch.relu(alone[0](x)) * scale))
    result = pack(model, inplace=inplace)
    wanted = {n: "PackedLookupFFN" if t == "LookupFFN" else t for n, t in before.items() if "projection" not in n}
    assert names_and_types(result) == wanted
    assert result.again is result.first
    assert not any(isinstance(m, LookupFFN) for m in result.modules())
    with torch.no_grad():
        assert torch.equal(result(x), expected)
    if inplace:
        assert result is model
        assert result.scale is scale
    else:
        assert names_and_types(model) == before
        assert model.first.tables is tables
        assert result.scale is not scale
        assert torch.equal(result.scale, scale)
        assert result.scale.data_ptr() != scale.data_ptr()


def test_the_tables_of_a_model_are_never_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(LookupFFN, "__deepcopy__", lambda self, memo: copied.append(self), raising=False)
    pack(Block())
    assert not copied


def test_training_mode_is_that_of_the_model():
    model = torch.nn.Sequential(trained(SMALL), trained(SMALL)).eval()
    assert not any(module.training for module in pack(model).modules())
    assert pack(trained(SMALL)).training


def tiny_model():
    sizes = dict(vocab_size=97, num_hidden_layers=2, hidden_size=48, num_attention_heads=3)
    sizes["ffn_options"] = dict(num_tables=9, block_size=16)
    torch.manual_seed(0)
    return LookupRobertaForMaskedLM(LookupRobertaConfig.preset("small", **sizes)).eval()


@every_dtype
@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16], ids=str)
def test_a_hugging_face_model_keeps_its_logits(of_model, dtype):
    """By the share of the logits that the lookup layers have, a twentieth: what is missing without their tables."""
    model = tiny_model().to(of_model)
    ids = torch.randint(5, 97, (4, 23))
    fast, without = pack(model, dtype), copy.deepcopy(model)
    assert sum(isinstance(m, PackedLookupFFN) for m in fast.modules()) == 2
    with torch.no_grad():
        for layer in without.encoder.layers:
            layer.ffn.tables.zero_()
        expected, got, least = (m(ids).logits.float() for m in (model, fast, without))
    bound = {"float32": 1e-4, "bfloat16": 0.01, "int8": 0.2, "int4": 0.25}[dtype] if of_model == torch.float32 else 0.25
    assert (got - expected).norm() < bound * (expected - least).norm()


@needs_kernels
def test_a_sentence_alone_and_in_a_padded_batch_gives_its_layers_the_same_bits():
    """The layers' part of the promise: what they return for a token depends on its own numbers alone."""
    model = pack(tiny_model())
    seen = []
    for module in model.modules():
        if isinstance(module, PackedLookupFFN):
            module.register_forward_hook(lambda module, given, y: seen.append((module, given[0], y)))
    ids = torch.randint(5, 97, (4, 23))
    with torch.no_grad():
        model(ids)
        assert len(seen) == 2
        for module, x, y in list(seen):
            for row in range(4):
                assert torch.equal(module(x[row]), y[row])
                assert torch.equal(module(x[row, 5]), y[row, 5])


# ---- Compilers -------------------------------------------------------------------------------------------------------


@needs_kernels
@every_dtype
def test_a_packed_layer_compiles_whole_with_a_dynamic_batch(dtype):
    torch.compiler.reset()
    module, graphs = pack(trained(SMALL), dtype), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((5, 20), (17, 20), (70, 20)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), module(x))
    assert len(graphs) == 1
    for x in (torch.randn(3, 2, 20), torch.randn(20), torch.randn(4, 20).bfloat16(), torch.randn(4, 20).double()):
        assert torch.equal(compiled(x), module(x))


@needs_kernels
def test_a_model_compiles_whole_with_and_without_gradients():
    torch.compiler.reset()
    model = pack(torch.nn.Sequential(torch.nn.Linear(20, 20), Block()))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 17):
        x = torch.randn(tokens, 20)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
        y = compiled(x)  # the weights before the packed layer ask for gradients, which will not be computed
        assert torch.equal(y, model(x))
        with pytest.raises(RuntimeError, match="no backward pass"):
            y.sum().backward()


@needs_kernels
@pytest.mark.parametrize("make", [lambda: trained(SMALL), Block], ids=["layer", "model"])
def test_inductor_export_and_aotinductor_give_the_same_bits(make, tmp_path):
    """By AOTInductor the model alone, which is C++ of six seconds: its graph begins and ends with a layer."""
    torch.compiler.reset()
    module = pack(make().eval())
    batch = torch.export.Dim("batch", min=1, max=512)
    with torch.no_grad():
        expected = {tokens: module(torch.arange(tokens * 20.0).sin().view(tokens, 20)) for tokens in (1, 4, 33)}
        program = torch.export.export(module, (torch.randn(4, 20),), dynamic_shapes=({0: batch},))
        runs = [torch.compile(module, fullgraph=True, dynamic=True), program.module()]
        if isinstance(module, Block):
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            runs.append(torch._inductor.aoti_load_package(package))
        for run in runs:
            for tokens, y in expected.items():
                assert torch.equal(run(torch.arange(tokens * 20.0).sin().view(tokens, 20)), y)
    operators = [str(node.target) for node in program.graph.nodes if "lookupffn" in str(node.target)]
    assert operators == ["lookupffn.packed_forward.default"] * (1 if isinstance(module, PackedLookupFFN) else 3)


@needs_kernels
def test_the_operator_is_well_formed():
    """Schema, shape function and dynamic shapes, by PyTorch's own checker."""
    packed = encode(trained(SMALL))
    for shape in ((9, 20), (2, 3, 20), (20,), (0, 20)):
        arguments = (torch.randn(shape), packed, 20, 12, 4, 128, 4)
        torch.library.opcheck(
            torch.ops.lookupffn.packed_forward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


# ---- Copies and files ------------------------------------------------------------------------------------------------


@every_dtype
def test_copies_and_state_dicts_are_the_same_bits(dtype):
    module = pack(trained(CONFIG), dtype)
    x = torch.randn(9, 64)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert set(module.state_dict()) == {"packed"}
    other = pack(trained(CONFIG, seed=5), dtype)
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(module.float().bfloat16().double()(x), y)  # bytes are no numbers to convert


@every_dtype
@pytest.mark.usefixtures("with_and_without_kernels")
def test_a_pickled_layer_comes_back_bit_for_bit(dtype, tmp_path):
    module, x = pack(trained(CONFIG), dtype), torch.randn(9, 64)
    torch.save(module, tmp_path / "module.pt")
    assert (tmp_path / "module.pt").stat().st_size < module.packed.numel() + 10_000  # once
    for loaded in (torch.load(tmp_path / "module.pt", weights_only=False), pickle.loads(pickle.dumps(module))):
        assert torch.equal(loaded(x), module(x))
        assert (loaded.table_dtype, loaded.tiling) == (dtype, module.tiling)


def test_state_dicts_of_packed_layers_and_of_others_do_not_pass_for_each_other():
    model, x = Block(), torch.randn(3, 20)
    fast = pack(model)
    expected, packed_expected = model(x), fast(x)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"first.tables: of a layer that is not packed; load it into the model"):
            fast.load_state_dict(model.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match=r"first.packed: of a packed layer; pack the model first, or use load_p"):
            model.load_state_dict(fast.state_dict(), strict=strict)
    assert torch.equal(model(x), expected)
    assert torch.equal(fast(x), packed_expected)


@pytest.mark.usefixtures("with_and_without_kernels")
def test_a_state_dict_of_another_layer_is_refused_and_changes_nothing():
    model, x = torch.nn.Sequential(pack(trained(CONFIG))), torch.randn(9, 64)
    y, good = model(x), model.state_dict()["0.packed"].clone()
    other = pack(trained(dataclasses.replace(CONFIG, reads=1)))
    assert other.packed.shape == good.shape
    for bad, reason in (
        (other.packed, "0.packed: reads is 1 in the packed layer and 2 in its config"),
        (newer(good), "0.packed: its format version is 2"),
        (good[:-64], "0.packed: its header says"),
        (good.float(), "0.packed: a packed layer is a vector of at least"),
    ):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"Error.s. in loading state_dict for Sequential:\\s*{reason}"):
                model.load_state_dict({"0.packed": bad}, strict=strict)
            assert torch.equal(model(x), y)
    model.load_state_dict({"0.packed": good}, assign=True)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", TABLE_TYPES)
@pytest.mark.parametrize(
    "config",
    [CONFIG, LookupConfig(12, 70, 3, 4, "none"), LookupConfig(5, 3, 40, 9, "dense")],
    ids=lambda c: c.projection,
)
def test_a_saved_layer_comes_back_bit_for_bit(config, dtype, tmp_path):
    module = pack(trained(config), dtype)
    save_packed(module, tmp_path / "layer.safetensors")
    for path in (tmp_path / "layer.safetensors", str(tmp_path / "layer.safetensors")):
        loaded = load_packed(path)
        assert torch.equal(loaded.packed, module.packed)
        assert loaded.packed.data_ptr() % 64 == 0
        assert loaded.config == config
        x = torch.randn(9, config.in_features)
        assert torch.equal(loaded(x), module(x))
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {
            "format": "lookupffn-packed", "version": "1", "configs": json.dumps({"": config.to_dict()})
        }  # fmt: skip
        assert list(file.keys()) == ["packed"]


def test_large_layers_come_back_on_huge_pages(tmp_path):
    module = pack(trained(LookupConfig(16, 64, 32, 10, block_size=16)))
    save_packed(module, tmp_path / "layer")
    assert module.packed.data_ptr() % (2 << 20) == load_packed(tmp_path / "layer").packed.data_ptr() % (2 << 20) == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_a_saved_model_is_read_into_one_without_tables(inplace, tmp_path):
    model = Block()
    fast = pack(model)
    save_packed(fast, tmp_path / "model")
    with torch.device("meta"):
        target = copy.deepcopy(model).to("meta")
    target.scale = model.scale
    loaded = load_packed(tmp_path / "model", target, inplace=inplace)
    assert (loaded is target) == inplace
    x = torch.randn(9, 20)
    assert torch.equal(loaded(x), fast(x))
    assert loaded.again is loaded.first
    single = load_packed(tmp_path / "model", Block())
    assert torch.equal(single(x), fast(x))


def test_a_hugging_face_model_is_saved_beside_its_config_and_read_back(tmp_path):
    model = tiny_model()
    fast = pack(model)
    save_packed(fast, tmp_path / "packed.safetensors")
    loaded = load_packed(tmp_path / "packed.safetensors", model)
    ids = torch.randint(5, 97, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, fast(ids).logits)


def test_an_encoder_takes_the_layers_of_the_model_that_it_was_part_of_and_the_other_way_round(tmp_path):
    model, ids = tiny_model(), torch.randint(5, 97, (2, 9))
    fast = pack(model)
    for saved, into in ((fast, model.encoder), (fast.encoder, model), (fast.encoder, model.encoder)):
        save_packed(saved, tmp_path / "layers")
        loaded = load_packed(tmp_path / "layers", into)
        loaded, expected = (getattr(m, "encoder", m) for m in (loaded, fast))
        with torch.no_grad():
            assert torch.equal(loaded(ids).last_hidden_state, expected(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("wanted", "stored", "pairs"),
    [
        (["a.ffn", "b.ffn"], ["b.ffn", "a.ffn"], {"a.ffn": "a.ffn", "b.ffn": "b.ffn"}),
        (["a.ffn", "b.ffn"], ["e.b.ffn", "e.a.ffn"], {"a.ffn": "e.a.ffn", "b.ffn": "e.b.ffn"}),
        (["e.a.ffn", "e.b.ffn"], ["a.ffn", "b.ffn"], {"e.a.ffn": "a.ffn", "e.b.ffn": "b.ffn"}),
        (["a.ffn", "b.ffn"], ["xa.ffn", "xb.ffn"], {}),  # no whole name before it
        (["a.ffn"], ["a.ffn", "b.ffn"], {}),
        (["a.ffn", "b.ffn"], ["e.a.ffn", "f.b.ffn"], {}),
    ],
)
def test_names_are_matched_but_for_one_prefix(wanted, stored, pairs):
    assert packed._matched(wanted, stored) == pairs


def test_a_module_without_packed_layers_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="LookupFFN holds no packed layer: call pack first"):
        save_packed(trained(SMALL), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "layer"
    save_packed(pack(trained(SMALL)), path)
    before = path.read_bytes()

    def fails(tensors, file, metadata):
        file.write_bytes(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr("lookupffn.runtime.packed.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_packed(pack(trained(SMALL, seed=3)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def write(path, tensors=None, configs=None, **metadata):
    """A file as save_packed writes it, but for what is given."""
    if tensors is None:
        tensors = {"packed": encode(trained(SMALL))}
    if configs is None:
        configs = {"": SMALL.to_dict()}
    fields = {"format": FILE_FORMAT, "version": FILE_VERSION, "configs": json.dumps(configs)} | metadata
    save_file(tensors, path, metadata={k: v for k, v in fields.items() if v is not None})
    return path


def changed(**fields):
    return {"": SMALL.to_dict() | fields}


def cut(packed):
    return packed[:-64].clone()


def newer(packed):
    packed = packed.clone()
    packed[8] = 2
    return packed


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (dict(format="pt"), "format 'pt', version '1', where 'lookupffn-packed', version '1' is needed"),
        (dict(format=None), "format None"),
        (dict(version="2"), "version '2'"),
        (dict(configs=None, version="1.0"), "version '1.0'"),
        (dict(configs=[]), "damaged or no file of packed layers"),
        (dict(configs=3), "damaged or no file of packed layers"),
        (dict(configs={"": None}), "damaged or no file of packed layers"),
        (dict(configs=changed(surprise=1)), "surprise"),
        (dict(configs=changed(version=2)), "version must be 1"),
        (dict(configs=changed(num_tables="9")), "num_tables must be an int"),
        (dict(configs=changed(num_tables=10)), "num_tables is 9 in the packed layer and 10 in its config"),
        (dict(configs=changed(in_features=21)), "in_features is 20 in the packed layer and 21 in its config"),
        (dict(configs=changed(in_features=2**30)), "in_features is 20 in the packed layer"),
        (dict(configs=changed(in_features=2**50)), "in_features must be less than"),
        (dict(configs=changed(reads=2)), "reads is 1 in the packed layer and 2 in its config"),
        (dict(configs={"a": SMALL.to_dict()}), "a.packed"),
        (dict(tensors={"a.packed": encode(trained(SMALL))}), "packed"),
        (dict(tensors={"packed": encode(trained(SMALL)).float()}), "vector of at least"),
        (dict(tensors={"packed": encode(trained(SMALL))[None]}), "vector of at least"),
        (dict(tensors={"packed": torch.zeros(0, dtype=torch.uint8)}), "vector of at least"),
        (dict(tensors={"packed": cut(encode(trained(SMALL)))}), "header says .* bytes, but it has"),
        (dict(tensors={"packed": newer(encode(trained(SMALL)))}), "format version is 2"),
    ],
)
@pytest.mark.parametrize("tune", [False, True])
def test_files_that_are_not_what_they_say_are_refused_by_name(given, reason, tune, tmp_path):
    path = write(tmp_path / "some name", **given)
    with pytest.raises(PackedError, match=f"some name.*{reason}"):
        load_packed(path, tune=tune)


def test_damaged_files_are_refused_by_name(tmp_path):
    whole = write(tmp_path / "whole").read_bytes()
    cases = [b"", b"{}", b"PK\x03\x04 a pickle", whole[:7], whole[:100], whole[:1000], whole[:-1], whole + b"\0"]
    cases += [b"\xff" * 8 + whole[8:], bytes(8) + whole[8:], whole.replace(b"[0,", b"[8,")]
    cases += [whole.replace(b'"U8"', other) for other in (b'"F8"', b'"F4"', b'"I8"')]
    path = tmp_path / "some name"
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(PackedError, match="some name"):
            load_packed(path)


def test_what_the_system_refuses_to_read_is_said_in_its_words(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        load_packed(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_packed(tmp_path / "absent")

    def refused(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError, match="secret"):
        load_packed(tmp_path / "secret")


def test_a_file_of_other_layers_is_refused(tmp_path):
    save_packed(pack(Block()), tmp_path / "model")
    with pytest.raises(PackedError, match=r"model holds the layers of a model .first, rest.1.: pass the model"):
        load_packed(tmp_path / "model")
    for other in (trained(SMALL), torch.nn.Sequential(trained(SMALL)), Block(dataclasses.replace(SMALL, decay=0.5))):
        with pytest.raises(PackedError, match=r"model holds the layers \['first', 'rest.1'\], which are not those"):
            load_packed(tmp_path / "model", other)
    with pytest.raises(ValueError, match="holds no LookupFFN layer"):
        load_packed(tmp_path / "model", torch.nn.ReLU())
    save_packed(pack(trained(SMALL)), tmp_path / "layer")
    assert isinstance(load_packed(tmp_path / "layer", trained(SMALL)), PackedLookupFFN)


def test_nothing_in_a_file_is_unpickled(tmp_path, monkeypatch):
    path = write(tmp_path / "file")
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("pickle.loads", None)
    monkeypatch.setattr("pickle.load", None)
    x = torch.randn(3, 20)
    assert torch.equal(load_packed(path)(x), pack(trained(SMALL))(x))
