"""The layer as its user meets it: any shape, dtype and device, compiled and exported, converted from the authors'."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lookupffn import LookupConfig, LookupFFN, ops, reference

F64 = torch.float64

# Widths that are no power of two, T tau that is no multiple of anything, every projection, one to four reads.
CONFIGS = [
    LookupConfig(512, 512, num_tables=16),
    LookupConfig(384, 384, num_tables=50, code_bits=3, reads=3),
    LookupConfig(130, 33, num_tables=7, code_bits=5, block_size=16, reads=4),
    LookupConfig(768, 100, num_tables=11, code_bits=9, block_size=128, reads=2),
    LookupConfig(20, 5, num_tables=3, code_bits=1, block_size=4, reads=2),
    LookupConfig(1, 1, num_tables=1, code_bits=1, block_size=1),
    LookupConfig(65, 17, num_tables=5, code_bits=7, projection="dense", reads=2),
    LookupConfig(24, 9, num_tables=6, code_bits=4, projection="none"),
]


def name(config):
    return f"{config.projection}-D{config.in_features}-T{config.num_tables}-tau{config.code_bits}-N{config.reads}"


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)


def reference_z(layer, x):
    c = layer.config
    if c.projection == "bh4":
        z = reference.bh4(x, layer.projection.weight, c.decay, c.code_features) + layer.projection.bias
    elif c.projection == "dense":
        z = x @ layer.projection.weight.T + layer.projection.bias
    else:
        z = x
    return z.view(-1, c.num_tables, c.code_bits)


def randomised(layer):
    """Biases away from zero, so that a forgotten one is seen."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@every_config
@pytest.mark.parametrize("tokens", [1, 70])
def test_layer_and_gradients_equal_the_reference_in_float64(config, tokens, device):
    layer = randomised(LookupFFN(config, dtype=F64, device=device))
    x = torch.randn(tokens, config.in_features, dtype=F64, device=device, requires_grad=True)
    y = layer(x)
    expected = reference.lookup_ffn(reference_z(layer, x), layer.tables, layer.bias, config.reads)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    inputs, grad = (x, *layer.parameters()), torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, inputs, grad) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_config
def test_float32_flips_a_code_only_within_the_projections_bound(config, device):
    layer = randomised(LookupFFN(config, dtype=torch.float32, device=device))
    exact = copy.deepcopy(layer).double()
    x = torch.randn(200, config.in_features, device=device)
    z64 = reference_z(exact, x.double())
    ours = layer.projection(x).view_as(z64)
    bound = 1e-5 * z64.abs().max()
    assert (ours - z64).abs().max() <= bound
    away = (z64.abs() > bound).all(-1)
    assert away.double().mean() > 0.99
    codes, _ = ops.hash_codes(ours, config.reads)
    assert torch.equal(codes[..., 0][away], reference.sign_codes(z64)[away].int())
    same = ~((ours > 0) != (z64 > 0)).flatten(1).any(1)
    if config.reads > 1:  # the order of two buckets as likely as each other may differ too
        rank, rank64 = (reference.nearest_buckets(z, config.reads)[0] for z in (ours.double(), z64))
        same &= (rank == rank64).flatten(1).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(layer(x)[same].double(), exact(x.double())[same], rtol=0, atol=1e-4)


@every_config
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3, 4)])
def test_any_leading_shape(config, shape, device):
    layer = LookupFFN(config, dtype=F64, device=device)
    x = torch.randn(*shape, config.in_features, dtype=F64, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, config.out_features)
    torch.testing.assert_close(y.reshape(-1, config.out_features), layer(x.reshape(-1, config.in_features)))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.tables.grad.isfinite().all()


def test_strided_input_gives_the_same(device):
    layer = LookupFFN(CONFIGS[2], dtype=F64, device=device)
    x = torch.randn(130, 2, 9, dtype=F64, device=device)
    strided = x.permute(2, 1, 0)[::2]
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=0, atol=0)


@every_config
def test_bfloat16_stays_near_float32_for_the_same_codes(config, device):
    layer = LookupFFN(config, device=device).bfloat16()
    x = torch.randn(40, config.in_features, device=device).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.tables.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
    z = layer.projection(x).double().view(-1, config.num_tables, config.code_bits)
    expected = reference.lookup_ffn(z, layer.tables.double(), layer.bias.double(), config.reads)
    codes, scores = reference.nearest_buckets(z, config.reads)
    size = reference.gather(layer.tables.double().abs(), codes, scores.abs()) + layer.bias.double().abs()
    assert ((y.double() - expected).abs() <= 0.02 * size + 1e-6).all()


def test_autocast_does_not_round_the_z_of_a_dense_projection(device):
    layer = LookupFFN(CONFIGS[6], device=device)
    x = torch.randn(40, 65, device=device)
    with torch.autocast(device, torch.bfloat16):
        z = layer.projection(x)
        narrow = layer.projection(x.bfloat16())
    assert z.dtype == narrow.dtype == torch.float32
    exact = x.double() @ layer.projection.weight.double().T
    assert (z.double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[6]], ids=name)
def test_autocast_keeps_codes_and_scores_in_float32(config, device):
    layer = LookupFFN(config, device=device)
    x = torch.randn(40, config.in_features, device=device, requires_grad=True)
    seen = []
    layer.projection.register_forward_hook(lambda _, __, z: seen.append(z))
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert layer.projection.weight.grad.dtype == layer.tables.grad.dtype == torch.float32
    z = seen[0].detach().double().view(-1, config.num_tables, config.code_bits)
    expected = reference.lookup_ffn(z, layer.tables.double(), layer.bias.double(), config.reads)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)  # float32 from z on, whatever z's own error


def test_inputs_that_do_not_fit_are_named():
    layer = LookupFFN(CONFIGS[0])
    with pytest.raises(ValueError, match=r"in_features = 512; x is \[3, 511\]"):
        layer(torch.zeros(3, 511))
    with pytest.raises(ValueError, match="in_features = 512"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        layer(torch.zeros(3, 512, dtype=F64))


@every_config
def test_meta_device_then_materialised(config):
    layer = LookupFFN(config, device="meta")
    assert layer(torch.empty(2, 3, config.in_features, device="meta")).shape == (2, 3, config.out_features)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)  # whatever memory may hold
    drawn = LookupFFN(config)
    for one in (layer, drawn):
        torch.manual_seed(5)
        one.init_parameters()
    for (name, ours), theirs in zip(layer.state_dict().items(), drawn.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[6]], ids=name)
def test_compiles_whole_with_a_dynamic_batch(config):
    torch.compiler.reset()
    layer = LookupFFN(config)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 17, 70):
        x = torch.randn(tokens, config.in_features)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inside inductor
def test_inductor_trains_the_layer():
    torch.compiler.reset()
    layer = LookupFFN(CONFIGS[1])
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = torch.randn(33, 384)
    expected, got = layer(x), compiled(x)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (expected, got)]
    torch.testing.assert_close(*grads)


def test_exports_with_a_dynamic_batch():
    layer = LookupFFN(CONFIGS[1]).eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(layer, (torch.randn(4, 384),), dynamic_shapes=({0: batch},))
    x = torch.randn(70, 384)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


@every_config
def test_flops_are_those_of_pytorchs_counter(config):
    layer = LookupFFN(config)
    for tokens in (1, 100):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(tokens, config.in_features))
        assert counter.get_total_flops() == layer.flops(tokens)


@pytest.mark.parametrize(
    ("tables", "projection", "macs", "ratio"),
    [
        (64, "bh4", 163_840, 12.8),
        (128, "bh4", 327_680, 6.4),
        (64, "dense", 294_912, 7.1),
        (128, "dense", 589_824, 3.6),
    ],
)
def test_costs_of_the_authors_configs(tables, projection, macs, ratio):
    layer = LookupFFN(LookupConfig(512, 512, num_tables=tables, projection=projection), device="meta")
    assert layer.flops(3) == 3 * 2 * macs
    assert round(2 * 512 * 2048 / macs, 1) == ratio
    assert layer.bytes_read(2) - layer.bytes_read(1) == tables * 512 * 4  # row bytes a token
    weights = 512 * tables * 8 if projection == "dense" else tables * 8 // 512 * 4 * 512 * 64
    assert layer.bytes_read(0) == 4 * (weights + tables * 8 + 512)


def test_two_reads_double_the_gather_only():
    one, two = (LookupFFN(LookupConfig(512, 512, reads=n), device="meta") for n in (1, 2))
    assert two.flops(1) - one.flops(1) == 2 * 64 * 512


# ---- Initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], LookupConfig(300, 8)], ids=name)
def test_initial_codes_have_no_dead_bit_and_z_keeps_its_size(config):
    z = LookupFFN(config).projection(torch.randn(4000, config.in_features))
    share = (z > 0).float().mean(0)
    assert share.min() > 0.2
    assert share.max() < 0.8
    mixed = config.in_features / config.padded_features  # padding carries no variance: spread over all outputs ...
    direct = (torch.arange(config.code_features) % config.padded_features < config.in_features).float().mean().item()
    assert z.var().item() == pytest.approx(0.7**2 * mixed + 0.3**2 * direct, rel=0.15)  # ... or met as it is


def test_near_identity_blocks_would_leave_dead_bits():
    """The trap that the initial law avoids: H^4 = I brings the zero padding straight back."""
    layer = LookupFFN(LookupConfig(300, 8))
    with torch.no_grad():
        layer.projection.weight.copy_(torch.eye(64).expand_as(layer.projection.weight))
    z = layer.projection(torch.randn(100, 300))
    assert (z.abs() < 1e-5).all(0).sum() == 512 - 300


def test_initial_parameters_follow_the_table():
    layer = LookupFFN(LookupConfig(512, 512))
    assert layer.projection.weight.std().item() == pytest.approx(64**-0.5, rel=0.01)
    assert layer.tables.std().item() == pytest.approx(0.02, rel=0.01)
    assert layer.bias.abs().max() == layer.projection.bias.abs().max() == 0
    dense = LookupFFN(LookupConfig(512, 512, projection="dense"))
    assert dense.projection.weight.std().item() == pytest.approx(512**-0.5, rel=0.01)


# ---- The authors' checkpoints --------------------------------------------------------------------------------------


def authors_layer(state, x, table_size):
    """The authors' forward pass in their own terms: unnormalised Hadamard, blocks as einsum, exp for the score."""

    def hadamard(y):
        if y.shape[-1] == 1:
            return y
        a, b = y.chunk(2, -1)
        return torch.cat([hadamard(a + b), hadamard(a - b)], -1)

    weight, bias = state["hash.projection.weight"], state["hash.projection.bias"]
    if weight.dim() == 2:
        z = x @ weight.T + bias
    else:
        width = weight.shape[2] * weight.shape[3]
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        outs = []
        for repeat in weight:
            y = x
            for factor in repeat:
                y = hadamard(
                    torch.einsum("bni,noi->bno", y.view(len(x), *factor.shape[:2]), factor).reshape(len(x), width)
                )
            outs.append(y)
        z = (0.7 * torch.cat(outs, -1) + 0.3 * x.repeat(1, len(weight)))[:, : len(bias)] + bias
    tables = state["tables"]
    z = z.view(len(x), tables.shape[0], -1)
    code = sum((z[..., j] > 0).long() * 2 ** (z.shape[-1] - 1 - j) for j in range(z.shape[-1]))
    score = z.abs().sum(-1) / (1 + torch.exp(-2 * z.abs())).prod(-1)
    rows = tables.reshape(-1, tables.shape[-1])[code + torch.arange(tables.shape[0]) * table_size]
    return (score[..., None] * rows).sum(1) + state["bias"]


def authors_state(width, tables, tau, out, block, projection):
    padded = reference.next_power_of_two(width)
    if projection == "bh4":
        shape = (-(-tables * tau // padded), 4, padded // block, block, block)
        weight = torch.randn(shape, dtype=F64) / (block * padded) ** 0.5  # their law
    else:
        weight = torch.randn(tables * tau, width, dtype=F64) / width**0.5
    return {
        "tables": torch.randn(tables, 2**tau, out, dtype=F64),
        "bias": torch.randn(out, dtype=F64),
        "hash.projection.weight": weight,
        "hash.projection.bias": torch.randn(tables * tau, dtype=F64),
    }


@pytest.mark.parametrize("projection", ["bh4", "dense"])
@pytest.mark.parametrize(("width", "tables", "tau", "out", "block"), [(64, 32, 8, 48, 16), (48, 20, 5, 7, 32)])
def test_from_reference_has_the_authors_outputs_and_gradients(width, tables, tau, out, block, projection):
    state = {k: v.requires_grad_() for k, v in authors_state(width, tables, tau, out, block, projection).items()}
    layer = LookupFFN.from_reference({f"encoder.0.{k}": v for k, v in state.items()}, width, prefix="encoder.0.")
    x = torch.randn(30, width, dtype=F64, requires_grad=True)
    expected, got = authors_layer(state, x, 2**tau), layer(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(got)
    theirs = torch.autograd.grad(expected, (x, *state.values()), grad)
    ours = torch.autograd.grad(got, (x, layer.tables, layer.bias, layer.projection.weight, layer.projection.bias), grad)
    scale = reference.next_power_of_two(width) ** 0.5 if projection == "bh4" else 1  # d/dW_theirs = scale * d/dW_ours
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a * scale if i == 3 else a, b, rtol=0, atol=1e-10)
    back = layer.to_reference("encoder.0.")
    for k, v in state.items():
        torch.testing.assert_close(back[f"encoder.0.{k}"], v.detach(), rtol=1e-15, atol=0)


def test_from_reference_names_what_is_wrong():
    state = authors_state(64, 8, 4, 5, 16, "bh4")
    with pytest.raises(KeyError, match=r"ffn\.tables"):
        LookupFFN.from_reference(state, 64, prefix="ffn.")
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 16, 16\].*\[1, 4, 4, 16, 16\]"):
        LookupFFN.from_reference(state, 65)
    with pytest.raises(ValueError, match=r"tables must be \(T, a power of two, E\), not \[8, 15, 5\]"):
        LookupFFN.from_reference(state | {"tables": torch.zeros(8, 15, 5)}, 64)
    with pytest.raises(ValueError, match="no layer with projection"):
        LookupFFN(CONFIGS[-1]).to_reference()


# ---- Configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 0}, "in_features must be at least 1, not 0"),
        ({"out_features": -3}, "out_features must be at least 1, not -3"),
        ({"num_tables": 0}, "num_tables must be at least 1, not 0"),
        ({"code_bits": 0}, "code_bits must be 1 to 16, not 0"),
        ({"code_bits": 17}, "code_bits must be 1 to 16, not 17"),
        ({"projection": "fft"}, "projection must be one of bh4, dense, none, not 'fft'"),
        ({"block_size": 48}, "block_size must be a power of two, 1 to 512.*not 48"),
        ({"block_size": 1024}, "block_size must be a power of two, 1 to 512.*not 1024"),
        ({"block_size": 0}, "block_size must be a power of two"),
        ({"decay": 1.5}, "decay must be 0 to 1, not 1.5"),
        ({"reads": 5}, "reads must be 1 to 4 with code_bits 8, not 5"),
        ({"reads": 3, "code_bits": 1}, "reads must be 1 to 2 with code_bits 1, not 3"),
        ({"projection": "none"}, "in_features must be num_tables \\* code_bits = 512.*not 300"),
        ({"version": 2}, "version must be 1"),
    ],
)
def test_config_names_field_value_and_range(change, message):
    with pytest.raises(ValueError, match=message):
        LookupConfig(**{"in_features": 300, "out_features": 8} | change)


@pytest.mark.parametrize(
    "change", [{"num_tables": 8.0}, {"code_bits": True}, {"decay": "0.7"}, {"reads": "1"}, {"block_size": "16"}]
)
def test_config_refuses_other_types(change):
    with pytest.raises(TypeError, match=f"{next(iter(change))} must be"):
        LookupConfig(**{"in_features": 300, "out_features": 8} | change)


def test_config_round_trips_and_is_frozen():
    config = CONFIGS[2]
    assert LookupConfig(**config.to_dict()) == config
    with pytest.raises(AttributeError):
        config.reads = 2


@pytest.mark.parametrize(("width", "block_size"), [(1, 1), (20, 32), (32, 32), (33, 64), (64, 64), (700, 64)])
def test_blocks_fit_the_width_where_nobody_set_them(width, block_size):
    config = LookupConfig(width, 5, num_tables=3)
    assert config.block_size == block_size
    assert LookupConfig(**config.to_dict()) == config
    assert LookupFFN(config)(torch.randn(2, width)).shape == (2, 5)
