"""The packed form by itself: what it stores of each parameter and how exactly, every byte where docs/format.md says,
and damaged bytes refused. The kernels that read it have tests of their own (test_native.py)."""

import copy
import functools
import hashlib
import math
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lookupffn import LookupConfig, LookupFFN, PackedError, native, reference
from lookupffn.memory import HUGE_PAGE, aligned_bytes
from lookupffn.runtime import format
from lookupffn.runtime.format import SECTIONS, checked_header, decode, encode, read_header
from lookupffn.runtime.portable import packed_forward, packed_project

F64 = torch.float64
EXAMPLES = int(os.environ.get("LOOKUPFFN_TEST_EXAMPLES", "0"))  # of all property tests together; 0: a short run
HEADER_BYTES = format.HEADER.itemsize
TYPES = [(t, p) for t in format.TABLE_TYPES for p in format.WEIGHT_TYPES]

# Every way through the packer: blocks that are merged (1, 2, 4, 8), one block, many blocks, cut repeats, D' below a
# vector as a dense matrix, dense and no projection, codes whose scores may be negative.
CONFIGS = [
    LookupConfig(64, 48, num_tables=32, block_size=16),
    LookupConfig(130, 33, num_tables=7, code_bits=5, block_size=1, reads=4),
    LookupConfig(100, 65, num_tables=50, code_bits=3, block_size=2, reads=3),
    LookupConfig(32, 20, num_tables=20, code_bits=4, block_size=4),
    LookupConfig(48, 7, num_tables=9, code_bits=6, block_size=8, reads=2),
    LookupConfig(16, 16, num_tables=5, code_bits=7, block_size=1),
    LookupConfig(65, 17, num_tables=40, code_bits=4, block_size=128),
    LookupConfig(9, 64, num_tables=12, code_bits=4, block_size=8),
    LookupConfig(1, 1, num_tables=1, code_bits=1, block_size=1, reads=2),
    LookupConfig(20, 5, num_tables=17, code_bits=2, block_size=4, reads=4),
    LookupConfig(65, 17, num_tables=5, code_bits=7, projection="dense", reads=2),
    LookupConfig(3, 130, num_tables=33, code_bits=1, projection="dense"),
    LookupConfig(24, 9, num_tables=6, code_bits=4, projection="none"),
    LookupConfig(14, 70, num_tables=7, code_bits=2, projection="none", reads=3),
]


def name(config):
    return f"{config.projection}-D{config.in_features}-b{config.block_size}-tau{config.code_bits}-N{config.reads}"


pytestmark = pytest.mark.usefixtures("one_thread")
every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)
with_projection = pytest.mark.parametrize("config", [c for c in CONFIGS if c.projection != "none"], ids=name)
every_type = pytest.mark.parametrize(("tables", "projection"), TYPES)


@torch.no_grad()
def trained(config, dtype=torch.float32):
    """A layer with biases, tables of very different sizes, and rows, outputs and blocks that are zero."""
    layer = LookupFFN(config, dtype=F64)
    for parameter in layer.parameters():
        parameter.add_(0.1 * parameter.std(correction=0) + 0.02 * torch.randn_like(parameter))
    layer.tables.mul_(10 ** torch.empty(config.num_tables, 1, 1, dtype=F64).uniform_(-3, 3))
    layer.tables[0, -1] = 0
    if config.num_tables > 2:
        layer.tables[2] = 0
    if config.projection == "dense":
        layer.projection.weight[-1] = 0
    elif config.projection == "bh4" and layer.projection.weight.shape[2] > 1:
        layer.projection.weight[0, 1, 0] = 0  # one block of one stage
    return layer.to(dtype)


def reference_matrices(layer):
    """What the projection multiplies x by, for each repeat, in float64: (R, rows, D)."""
    c, weight = layer.config, layer.projection.weight.detach().double()
    if c.projection == "dense":
        return weight[None]
    eye = torch.eye(c.padded_features, dtype=F64)
    return torch.stack([c.decay * reference.bh4_matrix(f) + (1 - c.decay) * eye for f in weight])[..., : c.in_features]


def stage_matrices(u):
    """The stages of a packed layer as matrices, (R, stages, n block_out, n block_in), in float64."""
    n = u.blocks.shape[2]
    blocks = u.blocks.double() if u.weight_scales is None else u.blocks.double() * u.weight_scales[..., None].double()
    signs = reference.hadamard_matrix(n) * n**0.5
    across = torch.kron(signs, torch.eye(u.blocks.shape[3], dtype=F64))
    return torch.stack([torch.stack([across @ torch.block_diag(*stage) for stage in repeat]) for repeat in blocks])


def folded_blocks(layer, u):
    """The blocks that the packed form should hold, from the reference's whole matrices: (R, stages, n, out, in).

    A stage is ``(signs(H_n) (x) I) diag(B)``, so ``B`` are the diagonal blocks of its inverse times ``H diag(W)``.
    """
    c, (repeats, stages, n, out, width) = layer.config, u.blocks.shape
    if stages == 1:
        rows = reference_matrices(layer).flatten(0, 1)[: c.code_features]
        return torch.nn.functional.pad(rows, (0, width - c.in_features, 0, out - c.code_features))[None, None, None]
    inverse = torch.kron(reference.hadamard_matrix(n) / n**0.5, torch.eye(out, dtype=F64))
    hadamard = reference.hadamard_matrix(n * width)
    blocks = torch.empty(repeats, stages, n, out, width, dtype=F64)
    for r, factors in enumerate(layer.projection.weight.detach().double()):
        for s, factor in enumerate(factors):
            whole = inverse @ hadamard @ torch.block_diag(*factor)
            diagonal = whole.view(n, out, n, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            assert torch.allclose(torch.block_diag(*diagonal), whole, rtol=0, atol=1e-12)  # nothing beside them
            blocks[r, s] = diagonal
    return blocks


# ---- Projection ------------------------------------------------------------------------------------------------------


@with_projection
def test_folded_float32_blocks_are_the_references_matrix(config):
    layer = trained(config, F64)
    u = decode(encode(layer, "int8", "float32"))
    h, stages = u.header, stage_matrices(u)
    got, size = [], []
    for repeat in stages:
        product, absolute = (torch.linalg.multi_dot([*m.flip(0), torch.eye(m.shape[-1], dtype=F64)]) if len(m) > 1
                             else m[0] for m in (repeat, repeat.abs()))  # fmt: skip
        residual = h["residual"] * torch.eye(*product.shape, dtype=F64)
        got.append(h["scale"] * product + residual)
        size.append(h["scale"] * absolute + residual)
    got, size = (torch.cat(m)[: config.code_features, : config.in_features] for m in (got, size))
    expected = reference_matrices(layer).flatten(0, 1)[: config.code_features]
    # 4 blocks, scale and residual are rounded to float32 each once
    assert ((got - expected).abs() <= 5.01 * 2**-24 * size + 1e-300).all()
    assert torch.equal(u.code_bias[: config.code_features], layer.projection.bias.detach().float())
    assert not u.code_bias[config.code_features :].any()


@with_projection
@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_integer_weights_lie_within_half_a_step_and_their_sums_within_32_bits(config, kind):
    layer = trained(config)
    u = decode(encode(layer, "int8", kind))
    expected, q, scale = folded_blocks(layer, u), u.blocks.long(), u.weight_scales.double()[..., None]
    assert ((q * scale - expected).abs() <= 0.5 * scale * (1 + 1e-6) + 1e-36).all()
    most = 127 if kind == "int8" else 32767
    assert q.abs().max() <= most
    assert ((u.levels == u.levels.round()) & (u.levels >= 1) & (u.levels <= most)).all()
    sums = q.abs().sum(-1).flatten(2).amax(-1)  # by how much one step of the activations can move a sum
    assert (sums * u.levels.long() < 2**31).all()
    zero = expected.abs().amax(-1) == 0
    assert not q[zero].any()
    if kind == "int8":
        assert (q.abs().amax(-1)[~zero] == 127).all()  # the whole range is used
        assert (u.levels == 127).all()
    else:  # within a factor of two of what 32 bits allow, shared evenly
        used = sums * u.levels.long()
        assert ((used > 2**29) | (u.levels == 32767)).all()


def projection_bounds(layer, u, x):
    """``(z, bound)``: z of the reference, and six standard deviations of what rounding adds to it, float64.

    Each rounding of an activation or a weight is taken as it is, and all as independent, stage by stage: its square
    passes through the squares of the matrices after it. What they add up to at worst is 200 times as much with int8.
    """
    c, h = layer.config, u.header
    rows = reference_matrices(layer)
    z = torch.cat([x @ m.T for m in rows], 1)[:, : c.code_features] + layer.projection.bias.detach().double()
    exact = folded_blocks(layer, u)
    n, out = u.blocks.shape[2:4]
    across = torch.kron(reference.hadamard_matrix(n) * n**0.5, torch.eye(out, dtype=F64))
    x = torch.nn.functional.pad(x, (0, h["blocks"] * h["block_in"] - x.shape[1]))
    bounds = []
    for r, stages in enumerate(stage_matrices(u)):
        y, variance = x, torch.zeros_like(x)
        for s, stage in enumerate(stages):
            right = across @ torch.block_diag(*exact[r, s])
            unit = y.abs().amax(1, keepdim=True) / u.levels[r, s].double()
            quantised = (y / unit).round() * unit
            variance = (variance + (quantised - y).square()) @ right.square().T
            variance += quantised.square() @ (stage - right).square().T
            variance += (1e-6 * quantised).square() @ stage.square().T  # float32
            y = quantised @ stage.T
        bounds.append(h["scale"] * 6 * variance.sqrt())
    return z, torch.cat(bounds, 1)[:, : c.code_features] + 1e-6 * z.abs()


@with_projection
@pytest.mark.parametrize(("kind", "relative", "sure"), [("int8", 0.02, 0.9), ("int16", 5e-4, 0.99)])
def test_a_quantised_projection_stays_near_the_reference_and_flips_codes_only_there(config, kind, relative, sure):
    layer = trained(config)
    u = decode(encode(layer, "int8", kind))
    x = torch.randn(200, config.in_features)
    z, bound = projection_bounds(layer, u, x.double())
    got = packed_project(u, x).double()
    assert ((got - z).abs() <= bound).all()
    assert (got - z).norm() <= relative * z.norm()
    away = z.abs() > bound
    assert away.double().mean() > sure
    assert torch.equal((got > 0)[away], (z > 0)[away])


def test_int16_weights_have_a_tenth_of_the_error_of_int8_at_most():
    layer = trained(LookupConfig(512, 8, num_tables=64))
    x = torch.randn(100, 512)
    z = reference.bh4(x.double(), layer.projection.weight.detach().double(), 0.7, 512) + layer.projection.bias.detach()
    narrow, wide = (
        (packed_project(decode(encode(layer, "int8", kind)), x) - z).norm().item() for kind in ("int8", "int16")
    )
    assert wide < 0.1 * narrow


# ---- Tables ----------------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("kind", format.TABLE_TYPES)
def test_tables_come_back_within_the_bound_of_their_type(config, kind):
    layer = trained(config)
    u, tables = decode(encode(layer, kind, "int8")), layer.tables.detach().double()
    largest = tables.abs().amax((1, 2), keepdim=True)
    assert u.tables.dtype == {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(kind, torch.int8)
    assert torch.equal(u.bias, layer.bias.detach())
    if most := format.LEVELS.get(kind):
        step = u.table_scales[:, None, None].double()
        rows = u.tables.double()[:, : config.num_rows] * step
        assert u.tables.abs().amax() <= most
        if kind == "int8":
            assert ((rows - tables).abs() <= largest / 254 * (1 + 1e-6)).all()  # half a step, as engine.py promises
            assert torch.allclose(step, largest / 127, rtol=1e-6, atol=0)
        else:
            assert ((rows - tables).abs() <= torch.maximum(step / 2, tables.abs() - 7 * step) * (1 + 1e-6)).all()
            rounded = (tables / (largest / 7)).nan_to_num().round() * largest / 7  # the scale of the largest entry
            assert (
                (rows - tables).square().sum((1, 2))
                <= (rounded - tables).square().sum((1, 2)) * (1 + 1e-6) + 1e-12 * largest.squeeze() ** 2
            ).all()
        negatives = config.reads > 1 and config.code_bits < 3
        assert u.tables.shape[1] == config.num_rows * (2 if negatives else 1)
        assert torch.equal(u.tables[:, config.num_rows :], -u.tables[:, : config.num_rows * negatives])
    else:
        assert u.tables.shape[1] == config.num_rows
        assert ((u.tables.double() - tables).abs() <= (2**-8 * tables.abs() if kind == "bfloat16" else 0)).all()


@pytest.mark.parametrize("tau", [1, 2, 3])
@pytest.mark.parametrize("reads", [1, 2, 3, 4])
def test_scores_below_zero_weigh_rows_as_the_reference_does(tau, reads):
    if reads > 2**tau:
        pytest.skip("a table has fewer buckets")
    config = LookupConfig(19 * tau, 33, num_tables=19, code_bits=tau, projection="none", reads=reads)
    layer = trained(config)
    x = torch.randn(60, config.in_features)
    z = x.double().view(60, 19, tau)
    codes, scores = reference.nearest_buckets(z, reads)
    assert (scores < 0).any() == (tau < 3 and reads > tau)
    exact = reference.gather(layer.tables.detach().double(), codes, scores) + layer.bias.detach()
    u = decode(encode(layer, "int8"))
    steps = u.table_scales.double()[:, None]
    weight = scores.abs() * steps
    unit = weight.amax((1, 2)) / 127
    # half a step of each entry, and half a step of each score on top of the quantised entry
    entries = (weight / 2).sum((1, 2))[:, None]
    rows = reference.gather(u.tables.double().abs()[:, : config.num_rows], codes, torch.ones_like(scores))
    bound = (entries + unit[:, None] / 2 * rows) * (1 + 1e-5) + 1e-6 * exact.abs()
    assert ((packed_forward(u, x) - exact).abs() <= bound).all()


@pytest.mark.parametrize("parameter", ["tables", "bias", "projection.weight", "projection.bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite_are_refused_by_name(parameter, bad):
    layer = trained(CONFIGS[4])
    with torch.no_grad():
        dict(layer.named_parameters())[parameter].view(-1)[3] = bad
    with pytest.raises(ValueError, match=f"^{parameter} holds values that are not finite"):
        encode(layer)


@pytest.mark.parametrize("kind", format.TABLE_TYPES)
def test_parameters_beyond_float32_are_refused_too(kind):
    layer = trained(CONFIGS[4], F64)
    with torch.no_grad():
        layer.tables[0, 0, 0] = 1e300
    with pytest.raises(ValueError, match="tables"):
        encode(layer, kind, "float32")


@pytest.mark.parametrize("types", [("int2", "int8"), ("int8", "bfloat16"), ("int16", "int8"), ("int8", None)])
def test_unknown_types_are_named_with_the_known_ones(types):
    with pytest.raises(ValueError, match=rf"int8.*int16.*not {types[0]!r} and {types[1]!r}"):
        encode(trained(CONFIGS[4]), *types)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_a_layer_of_any_dtype_is_packed_from_its_own_numbers(dtype):
    layer = trained(CONFIGS[4]).to(dtype)
    u = decode(encode(layer, "float32", "float32"))
    assert torch.equal(u.tables, layer.tables.detach().float())
    assert torch.equal(u.bias, layer.bias.detach().float())


@every_type
def test_denormal_parameters_become_zeros(tables, projection):
    layer = trained(CONFIGS[0])
    with torch.no_grad():
        layer.tables.fill_(1e-40)
        layer.projection.weight.fill_(1e-40)
    u = decode(encode(layer, tables, projection))
    assert not u.tables.any()
    assert not u.blocks.any()
    assert torch.equal(packed_forward(u, torch.randn(3, 64)), layer.bias.detach().expand(3, -1))


# ---- Bytes -----------------------------------------------------------------------------------------------------------


@every_config
@every_type
def test_packing_is_deterministic_and_passes_every_check(config, tables, projection):
    layer = trained(config)
    first = encode(layer, tables, projection)
    assert torch.equal(first, encode(copy.deepcopy(layer), tables, projection))
    header = checked_header(first)
    for field in ("in_features", "out_features", "num_tables", "code_bits", "reads"):
        assert header[field] == getattr(config, field)
    assert header["table_dtype"] == tables
    assert header["weight_dtype"] == ("float32" if config.projection == "none" else projection)
    assert first.data_ptr() % 64 == 0


@pytest.mark.parametrize("size", [0, 1, 63, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 65])
def test_memory_is_aligned_to_cache_lines_and_large_memory_to_huge_pages(size):
    memory = aligned_bytes(size).fill_(7)
    assert memory.shape == (size,)
    assert memory.sum(dtype=torch.int64) == 7 * size
    if size:
        assert memory.data_ptr() % (HUGE_PAGE if size >= HUGE_PAGE else 64) == 0


@torch.no_grad()
def golden_layer(**changes):
    """Parameters that are small multiples of powers of two, so that every machine rounds alike."""
    sizes = dict(in_features=20, out_features=3, num_tables=5, code_bits=2, block_size=4, decay=0.75, reads=2)
    layer = LookupFFN(LookupConfig(**sizes | changes))
    for i, parameter in enumerate(layer.parameters()):
        count = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
        parameter.copy_(((count * 37 + 11 * i) % 64 - 31) / 32)
    return layer


GOLDEN_HEADER = """
    4c4f4f4b55504646 01000000
    14000000 03000000 05000000 02000000 02000000
    04000000 01000000 02000000 10000000 10000000 08000000 02000000 02000000 40000000 00000000
    0000403f 0000803e
    c018000000000000
    c000000000000000 c008000000000000 c00a000000000000 c00c000000000000
    000d000000000000 800d000000000000 8017000000000000 c017000000000000
"""
GOLDEN_BYTES = {  # shape/tables/projection: the first 8 bytes of a SHA-256
    "bh4/float32/float32": "2c10a08cb97423f6",
    "bh4/float32/int16": "35f017206e02c0c2",
    "bh4/float32/int8": "3f455da3d445c63d",
    "bh4/bfloat16/float32": "e6785b4dda35f213",
    "bh4/bfloat16/int16": "3365b3dd8c7bf296",
    "bh4/bfloat16/int8": "f384a4be499342bf",
    "bh4/int8/float32": "ab880c9c10cf1466",
    "bh4/int8/int16": "1b27e8ee37270cd9",
    "bh4/int8/int8": "969c9a971a9c7357",
    "dense/bfloat16/int16": "f1eee97de017cc16",
    "dense/int8/int8": "4c9877aa550dbf7a",
    "none/float32/int8": "1070612cd851622c",
    "none/bfloat16/int8": "0ffa0022d4d6ad41",
    "none/int8/int8": "2db4fa60dc48d23d",
    "bh4/int4/int8": "4b08ba323994ea42",
    "none/int4/int8": "33b54d4002cf0475",
}


def test_the_header_of_a_small_layer_is_these_bytes():
    """The format cannot change without a change here, and then FORMAT_VERSION must change too."""
    assert encode(golden_layer())[:HEADER_BYTES].numpy().tobytes().hex() == "".join(GOLDEN_HEADER.split())


@pytest.mark.parametrize("case", GOLDEN_BYTES)
def test_all_bytes_of_small_layers_are_those_of_version_1(case):
    shape, tables, projection = case.split("/")
    changes = {"bh4": {}, "dense": {"projection": "dense"}, "none": {"projection": "none", "in_features": 10}}[shape]
    digest = hashlib.sha256(encode(golden_layer(**changes), tables, projection).numpy().tobytes()).hexdigest()
    assert digest.startswith(GOLDEN_BYTES[case])


@every_type
@pytest.mark.parametrize("config", [CONFIGS[i] for i in (0, 2, 6, 9, 10, 11, 13)], ids=name)
def test_every_element_lies_where_the_specification_says(config, tables, projection):
    """docs/format.md, read by someone who has never seen packed.py."""
    bytes_ = encode(trained(config), tables, projection)
    u = decode(bytes_)
    raw = bytes_.numpy().tobytes()
    fields = struct.unpack_from("<8sI15i2fQ8Q", raw)
    d, e, t, tau, reads, stages, repeats, n, block_in, block_out, rows, weight_type, table_type, width = fields[2:16]
    assert fields[:2] == (b"LOOKUPFF", 1)
    assert (d, e, t, tau, reads) == (
        config.in_features, config.out_features, config.num_tables, config.code_bits, config.reads
    )  # fmt: skip
    assert fields[16] == 0
    assert fields[19] == len(raw)
    offset = dict(zip(SECTIONS, fields[20:], strict=True))
    elements = np.random.default_rng(0).integers

    def at(section, kind, index):
        return struct.unpack_from("<" + kind, raw, offset[section] + struct.calcsize(kind) * index)[0]

    kind, size = {0: ("f", 4), 1: ("h", 2), 2: ("b", 1)}[weight_type]
    inputs = 4 // size  # in a word of four bytes
    panels = min(4, block_out // 16)  # in a group
    for _ in range(60 if stages else 0):
        r, s, k, o, i = (int(elements(m)) for m in (repeats, stages, n, block_out, block_in))
        block = (r * stages + s) * n + k
        index = block * (block_out // 16 // panels) + o // 16 // panels  # group
        index = (index * (block_in // inputs) + i // inputs) * panels + o // 16 % panels  # word
        index = (index * 16 + o % 16) * inputs + i % inputs
        assert at("weights", kind, index) == u.blocks[r, s, k, o, i].item()
        if weight_type:
            assert at("weight_scales", "f", block * block_out + o) == u.weight_scales[r, s, k, o].item()
            assert at("levels", "f", r * stages + s) == u.levels[r, s].item()
        if weight_type == 2:
            assert at("weight_offsets", "i", block * block_out + o) == -128 * u.blocks[r, s, k, o].sum().item()
        j = (r * n + k) * block_out + o
        assert at("code_bias", "f", j) == u.code_bias[j].item()
    slices = -(-e // width)
    for _ in range(60):
        table, row, out = (int(elements(m)) for m in (t, rows, e))
        first = ((out // width * t + table) * rows + row) * width
        o = out % width
        if table_type >= 2:
            j, lane, byte = o % 64 // 16, o % 16 // 4, o % 4
            if table_type == 2:
                stored = at("tables", "b", first + o // 64 * 64 + 16 * lane + 4 * j + byte)
            else:
                both = at("tables", "B", first // 2 + o // 128 * 64 + 16 * lane + 4 * j + byte)
                stored = (both >> 4 * (o % 128 // 64)) % 16
                stored -= 16 * (stored > 7)
            assert at("table_scales", "f", table) == u.table_scales[table].item()
        elif table_type == 1:
            bits = at("tables", "H", first + o // 32 * 32 + 2 * (o % 16) + o % 32 // 16)
            stored = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
        else:
            stored = at("tables", "f", first + o)
        assert stored == u.tables[table, row, out].item()
        assert at("bias", "f", out) == u.bias[out].item()
    # what no element fills is zero
    assert all(at("bias", "f", i) == 0 for i in range(e, width * slices))
    assert not any(raw[152 : offset["weights"]])
    ends = [*[offset[name] for name in SECTIONS[1:]], len(raw)]
    for section, end in zip(SECTIONS, ends, strict=True):
        start = offset[section] + u.header["section_bytes"].get(section, 0)
        assert 0 <= end - start < 64
        assert not any(raw[start:end])


# ---- Damage ----------------------------------------------------------------------------------------------------------


def with_field(bytes_, field, value, index=0):
    changed = bytes_.clone()
    header = changed[:HEADER_BYTES].numpy().view(format.HEADER)[0]
    if field == "offset":
        header["offset"][index] = value
    else:
        header[field] = value
    return changed


def damaged():
    good = encode(golden_layer())
    size = len(good)
    yield "empty", good[:0], f"at least {HEADER_BYTES} bytes"
    yield "shorter than the header", good[: HEADER_BYTES - 1], f"at least {HEADER_BYTES} bytes"
    yield "header alone", good[:HEADER_BYTES], f"header says {size} bytes, but it has {HEADER_BYTES}"
    yield "truncated", good[:-1], f"header says {size} bytes, but it has {size - 1}"
    yield "a byte too long", torch.cat([good, good[:1]]), f"header says {size} bytes, but it has {size + 1}"
    yield "float32", good.float(), f"a vector of at least {HEADER_BYTES} bytes, not .*float32"
    yield "int8", good.view(torch.int8), f"a vector of at least {HEADER_BYTES} bytes, not .*int8"
    yield "a matrix", good.view(-1, 64), rf"a vector of at least {HEADER_BYTES} bytes, not \[{size // 64}, 64\]"
    yield "a number", good[0], f"a vector of at least {HEADER_BYTES} bytes"
    yield "zeros", torch.zeros_like(good), "not with b'LOOKUPFF'"
    yield "another magic", torch.cat([good[1:], good[:1]]), "not with b'LOOKUPFF'"
    yield "newer", with_field(good, "version", 2), "format version is 2, this lookupffn reads 1"
    yield "older", with_field(good, "version", 0), "format version is 0"
    yield "byte order", with_field(good, "version", 1 << 24), "format version is 16777216"
    for field in format._INTS[:5]:
        yield f"{field} 0", with_field(good, field, 0), f"{field} 0"
    for field in format._INTS:
        if not field.endswith("_type"):
            yield f"{field} below 0", with_field(good, field, -1), f"{field} -1"
    yield "code_bits 17", with_field(good, "code_bits", 17), "code_bits 17"
    for field, most in (("weight_type", 2), ("table_type", 3)):
        yield f"{field} {most + 1}", with_field(good, field, most + 1), f"{field} is {most + 1}, not 0 to {most}"
        yield f"{field} below 0", with_field(good, field, -1), f"{field} is -1, not 0 to {most}"
        yield f"{field} changed", with_field(good, field, 0), "section|table_rows"
    for field in ("out_features", "num_tables", "repeats", "blocks", "block_in", "block_out", "table_rows"):
        yield f"{field} huge", with_field(good, field, 2**30), "section|fit"
    wrong = [("reads", 5), ("stages", 2), ("repeats", 0), ("blocks", 3), ("block_in", 24), ("block_out", 24)]
    for field, value in [*wrong, ("table_rows", 4), ("slice", 96), ("reserved", 1), ("in_features", 33)]:
        yield f"{field} {value}", with_field(good, field, value), field
    for field in ("scale", "residual"):
        yield f"{field} NaN", with_field(good, field, math.nan), f"{field} is nan"
        yield f"{field} infinite", with_field(good, field, math.inf), f"{field} is inf"
    yield "total_bytes", with_field(good, "total_bytes", size - 64), f"header says {size - 64} bytes, but it has {size}"
    for i, section in enumerate(SECTIONS):
        yield f"{section} outside", with_field(good, "offset", size, i), f"section {section}"
        yield f"{section} far outside", with_field(good, "offset", 2**64 - 64, i), f"section {section}"
        yield f"{section} misaligned", with_field(good, "offset", 193 + 64 * i, i), f"section {section}"
        yield f"{section} over the header", with_field(good, "offset", 0, i), f"section {section}"
        yield f"{section} over another", with_field(good, "offset", 192 if i else 256, i), f"section {section}"
    yield "levels 0", with_bytes(good, "levels", struct.pack("<f", 0.0)), "level"
    yield "levels NaN", with_bytes(good, "levels", struct.pack("<f", math.nan)), "level"
    yield "levels 128", with_bytes(good, "levels", struct.pack("<f", 128.0)), "level"


def with_bytes(bytes_, section, value):
    changed = bytes_.clone()
    start = read_header(changed)["offset"][section]
    changed[start : start + len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    return changed


@pytest.mark.parametrize(("bytes_", "reason"), [pytest.param(b, r, id=i) for i, b, r in damaged()])
def test_damaged_bytes_are_refused_with_the_reason(bytes_, reason):
    with pytest.raises(PackedError, match=reason):
        checked_header(bytes_)
    with pytest.raises(PackedError):  # without the kernels too
        read_header(bytes_)


@functools.cache
def packed_case(i, types):
    torch.manual_seed(0)
    return encode(trained(CONFIGS[i]), *types)


@pytest.mark.skipif(not native.available(), reason="compares two readers, and one of them was not built")
@settings(max_examples=EXAMPLES // 20 or 150, deadline=None, derandomize=not EXAMPLES, database=None)
@given(
    case=st.sampled_from([(i, types) for i in (0, 4, 9, 10, 12) for types in TYPES]),
    field=st.sampled_from([*format._INTS, "offset", "scale", "version", "total_bytes"]),
    value=st.one_of(st.integers(0, 260), st.integers(0, 40).map(lambda i: 1 << i), st.integers(0, 2**63)),
    index=st.integers(0, len(SECTIONS) - 1),
)
@example(case=(0, ("int8", "int8")), field="scale", value=3, index=0)  # nothing is wrong with these two
@example(case=(9, ("float32", "int16")), field="reads", value=1, index=0)
def test_a_changed_header_is_refused_by_both_readers_or_harms_no_one(case, field, value, index):
    largest = 2**31 - 1 if field in format._INTS else 2**32 - 1
    good = packed_case(*case)
    value = float(value) if field == "scale" else value if field in ("offset", "total_bytes") else value % largest
    bytes_ = with_field(good, field, value, index)
    wrong = torch.ops.lookupffn.check_packed(bytes_)
    try:
        header = read_header(bytes_)
        assert not wrong
    except PackedError:
        assert wrong
        return
    x = torch.randn(3, header["in_features"])
    y = torch.ops.lookupffn.packed_forward(x, bytes_, header["out_features"], 24, 1, 0, 0)
    assert y.shape == packed_forward(decode(bytes_), x).shape


@settings(max_examples=EXAMPLES // 20 or 100, deadline=None, derandomize=not EXAMPLES, database=None)
@given(
    data=st.binary(max_size=400),
    place=st.integers(0, 2 * HEADER_BYTES),
    cut=st.one_of(st.just(0), st.integers(0, 2000)),
)
@example(data=b"", place=0, cut=0)
@example(data=b"any weight", place=HEADER_BYTES + 40, cut=0)
def test_no_bytes_whatever_raise_anything_else(data, place, cut):
    """Some bytes of a whole file replaced, and its end cut off; with weights alone replaced it is read."""
    good = encode(golden_layer()).numpy().tobytes()
    bytes_ = (good[:place] + data + good[place + len(data) :])[: len(good) - cut]
    tensor = torch.frombuffer(bytearray(bytes_), dtype=torch.uint8)
    try:
        header = checked_header(tensor)
    except PackedError:
        assert cut or (place < HEADER_BYTES and data), "nothing is wrong with these"
        return
    assert packed_forward(decode(tensor), torch.randn(2, header["in_features"])).shape == (2, header["out_features"])


@pytest.mark.skipif(not native.available(), reason="runs every implementation of the kernels")
@settings(max_examples=EXAMPLES // 20 or 60, deadline=None, derandomize=not EXAMPLES, database=None)
@given(case=st.sampled_from([(i, types) for i in (0, 4, 9, 10, 12, 13) for types in TYPES]), seed=st.integers(0, 2**32))
def test_whatever_numbers_the_sections_hold_nothing_crashes(case, seed):
    """A file may hold anything behind a right header: nonsense may come out, but the kernels stay in their memory."""
    good = packed_case(*case)
    header = read_header(good)
    bytes_ = torch.randint(0, 256, good.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    bytes_[:HEADER_BYTES] = good[:HEADER_BYTES]
    if "levels" in header["section_bytes"]:
        start, end = header["offset"]["levels"], header["offset"]["code_bias"]
        bytes_[start:end] = good[start:end]
    assert checked_header(bytes_) == header
    x = torch.randn(5, header["in_features"])
    for implementation in native.implementations():
        if implementation["runs_here"]:
            y = torch.ops.lookupffn.packed_forward_isa(
                x, bytes_, header["out_features"], 24, 1, 128, 0, implementation["name"]
            )
            assert y.shape == (5, header["out_features"])
