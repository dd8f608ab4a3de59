"""The compiled kernels, every implementation that this processor runs, through the operator and the prepared layer.

The hash is discontinuous, so they are tested in pieces. A layer without a projection is given ``z``: codes, scores and
gather are compared with float64. A layer whose tables spell out the scores shows ``z``: the projection is compared by
itself. With integers both are the same bits on every implementation, and so is the whole.
"""

import ctypes
import dataclasses
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookupffn import LookupConfig, LookupFFN, PreparedLookupFFN, native, ops, prepare, reference
from lookupffn.packed import (
    TABLE_TYPES,
    WEIGHT_TYPES,
    _assemble,
    _deinterleave,
    pack,
    packed_forward,
    packed_project,
    read_header,
    unpack,
)
from lookupffn.tiling import Tiling

F64 = torch.float64
EPS = 2.0**-24
EXAMPLES = int(os.environ.get("LOOKUPFFN_TEST_EXAMPLES", "0"))  # of all property tests together; 0: a short run
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97, 128, 130, 200]
IMPLEMENTATIONS = [i["name"] for i in native.implementations() if i["runs_here"]]
PAIRS = [("int8", "int8"), ("bfloat16", "int16"), ("float32", "float32")]  # tables, projection: what prepare chooses

pytestmark = [
    pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0"),
    pytest.mark.usefixtures("one_thread"),
]
every_implementation = pytest.mark.parametrize("isa", IMPLEMENTATIONS)
every_pair = pytest.mark.parametrize(("tables", "projection"), PAIRS)


def examples(share, short):
    """Settings of a property test that takes ``share`` of a long run, or ``short`` examples, always the same ones."""
    count = math.ceil(EXAMPLES * share) if EXAMPLES else short
    return settings(max_examples=count, deadline=None, derandomize=not EXAMPLES, database=None)


def call(packed, x, isa="", tiling=None):
    t = tiling or Tiling()
    out_features = read_header(packed)["out_features"]
    return torch.ops.lookupffn.prepared(
        x, packed, out_features, t.tile_tokens, t.groups_a_pass, t.prefetch_rows, t.serial_tokens, isa
    )


@torch.no_grad()
def trained(config, seed=0):
    """A layer with biases, tables of different sizes, and a row, an output and a table of zeros."""
    torch.manual_seed(seed)
    layer = LookupFFN(config)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    layer.tables.mul_(10 ** torch.empty(config.num_tables, 1, 1).uniform_(-1, 1))
    layer.tables[0, 0] = 0
    if config.num_tables > 3:
        layer.tables[2] = 0
    if config.projection == "dense":
        layer.projection.weight[-1] = 0
    return layer


# ---- What must come out ----------------------------------------------------------------------------------------------


def expected(u, z, bfloat16=False):
    """``(y, bound)``, float64: a packed layer's output for ``z``, and how far rounding alone may take one from it.

    Codes are those of ``ops.hash_codes``, which compares and adds the same float32 numbers as the kernels. A score is
    ``inner * p``; ``inner`` is exact to tau roundings of ``sum |z|``, ``p`` to six a bit and those of exp. A score that
    lies that near to the middle between two integer steps may become either of them.
    """
    h = u.header
    tables, tau = h["num_tables"], h["code_bits"]
    z = z.view(-1, tables, tau)
    codes, _ = ops.hash_codes(z, h["reads"])  # (B, T, N)
    bits = codes[..., None].long() >> torch.arange(tau - 1, -1, -1) & 1
    signed = z.double()[:, :, None] * (bits * 2 - 1)  # (B, T, N, tau)
    total = z.double().abs().sum(-1, keepdim=True)
    probability = torch.sigmoid(2 * signed).prod(-1)
    scores, cost = signed.sum(-1) * probability, (total - signed.sum(-1)) / 2
    error = EPS * (6 * tau + 10 + 5 * cost) * probability * total + 3e-38 * total
    rows, bias = u.tables.double()[:, : 2**tau], u.bias.double()
    if u.table_scales is None:
        y = reference.gather(rows, codes, scores)
        size = reference.gather(rows.abs(), codes, scores.abs() + error)
        bound = reference.gather(rows.abs(), codes, error) + (tables * h["reads"] + 2) * EPS * size
    else:
        scales = u.table_scales.double()[:, None]
        scores, error = scores * scales, error * scales + EPS * scores.abs() * scales
        largest = scores.abs().amax((1, 2), keepdim=True)
        per_unit = (127 / largest).where(largest > 1e-30, 0)
        drift = (error.amax((1, 2), keepdim=True) / largest).where(largest > 1e-30, 0) + 4 * EPS  # of the step
        value = scores.abs() * per_unit
        slack = error * per_unit + value * drift
        low, high, step = (value - slack).clamp(min=0).round(), (value + slack).round(), largest[:, 0] / 127
        step = step.where(largest[:, 0] > 1e-30, 0)
        y = reference.gather(rows, codes, value.round() * scores.sign()) * step
        bound = reference.gather(rows.abs(), codes, high - low + value.round() * drift) * step
    y, bound = y + bias, bound + 2 * EPS * (y.abs() + bias.abs())
    return y, bound + (2.0**-8 * (y.abs() + bound) if bfloat16 else 0)


def assert_within(got, y, bound):
    wrong = ~((got.double() - y).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} outputs, first at {wrong.nonzero()[0].tolist()}"


# ---- Layers and inputs -----------------------------------------------------------------------------------------------


@st.composite
def configs(draw, projections=("bh4", "dense", "none")):
    tau = draw(st.integers(1, 16))
    num_tables = min(draw(st.sampled_from(SIZES)), max(1, 2**13 >> tau), 97)
    out = min(draw(st.sampled_from(SIZES)), 200 if num_tables << tau <= 2**12 else 33)  # some megabytes at most
    projection = draw(st.sampled_from(projections))
    width = num_tables * tau if projection == "none" else draw(st.one_of(st.sampled_from(SIZES), st.integers(1, 256)))
    block = 1 << draw(st.integers(0, reference.next_power_of_two(width).bit_length() - 1))
    reads = draw(st.integers(1, min(4, 2**tau)))
    decay = draw(st.sampled_from([0.0, 0.5, 0.7, 1.0]))
    block = block if projection == "bh4" else 64
    return LookupConfig(width, out, num_tables, tau, projection, block, decay, reads)


@st.composite
def inputs(draw, layouts=("rows", "misaligned", "wide", "columns", "every other", "one row")):
    return (
        draw(st.sampled_from([1, 2, 3, 5, 8, 15, 17, 24, 25, 33])),
        draw(st.sampled_from(layouts)),
        draw(st.booleans()),
    )


def make_input(tokens, layout, bfloat16, width, seed):
    """``x (tokens, width)`` in a layout of memory, sizes 0.1 to 10 a token, and one token of zeros."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=random) * 10 ** (torch.rand(tokens, 1, generator=random) * 2 - 1)
    if tokens > 4:
        x[3] = 0
    x = x.to(torch.bfloat16 if bfloat16 else torch.float32)
    if layout == "misaligned":
        storage = x.new_empty(tokens * width + 1)[1:].view(tokens, width)
    elif layout == "wide":
        storage = x.new_full((tokens, width + 3), math.nan)[:, 2 : width + 2]
    elif layout == "columns":
        storage = x.new_empty(width, tokens).T
    elif layout == "every other":
        storage = x.new_full((tokens * 2, width * 2), math.nan)[::2, 1::2]
    elif layout == "one row":
        return x[:1].expand(tokens, -1)
    else:
        return x
    return storage.copy_(x)


tilings = st.builds(
    Tiling,
    tile_tokens=st.sampled_from([1, 2, 5, 24, 96, 1000]),
    groups_a_pass=st.sampled_from([1, 2, 3, 1 << 20]),
    prefetch_rows=st.sampled_from([0, 1, 17, 128, 100_000]),
    serial_tokens=st.sampled_from([0, 4]),
)
types = st.tuples(st.sampled_from(list(TABLE_TYPES)), st.sampled_from(list(WEIGHT_TYPES)))
seeds = st.integers(0, 2**32 - 1)


# ---- Against float64, and against each other -------------------------------------------------------------------------


def test_the_kernels_are_built_and_the_scalar_ones_run_anywhere():
    assert native.available(), native.load()
    assert IMPLEMENTATIONS[-1] == "scalar"
    assert native.implementation() in IMPLEMENTATIONS


@examples(0.5, 120)
@given(configs(), inputs(), types, tilings, seeds)
def test_every_implementation_computes_the_packed_layer(config, source, kinds, tiling, seed):
    """Integer projections and given ``z``: outputs within rounding of float64, and with int8 tables the same bits."""
    tables, projection = kinds
    if config.projection != "none" and projection == "float32":
        projection = "int16"
    packed = pack(trained(config, seed), tables, projection)
    u = unpack(packed)
    x = make_input(*source, config.in_features, seed)
    z = packed_project(u, x.float())
    y, bound = expected(u, z, x.dtype == torch.bfloat16)
    outputs = [call(packed, x, isa, tiling) for isa in IMPLEMENTATIONS]
    for out in outputs:
        assert out.dtype == x.dtype
        assert_within(out, y, bound)
    if tables == "int8":
        for out in outputs[1:]:
            assert torch.equal(out, outputs[0])
    assert_within(packed_forward(u, x.float()), *expected(u, z))


def observer(config, seed):
    """A layer of one-bit codes and tables that spell out its scores: output ``t`` is ``z_t sigmoid(2 |z_t|)``."""
    config = dataclasses.replace(config, code_bits=1, reads=1, out_features=config.code_features,
                                 num_tables=config.code_features)  # fmt: skip
    layer = trained(config, seed)
    with torch.no_grad():
        layer.tables.zero_()
        layer.tables[:, 0].fill_diagonal_(-1)
        layer.tables[:, 1].fill_diagonal_(1)
        layer.bias.zero_()
    return layer


def seen(z):
    return z * torch.sigmoid(2 * z.abs())


projecting = configs(("bh4", "dense")).map(
    lambda c: dataclasses.replace(c, num_tables=-(-min(c.code_features, 200) // c.code_bits))
)


@examples(0.1, 40)
@given(projecting, inputs(), tilings, seeds)
def test_float32_projections_err_no_more_than_twice_plain_torch(config, source, tiling, seed):
    layer = observer(config, seed)
    packed = pack(layer, "float32", "float32")
    x = make_input(*source, config.in_features, seed).float()
    weight, bias = layer.projection.weight.detach(), layer.projection.bias.detach()

    def project(dtype):
        if config.projection == "dense":
            return x.to(dtype) @ weight.to(dtype).T + bias.to(dtype)
        return reference.bh4(x.to(dtype), weight.to(dtype), config.decay, len(bias)) + bias.to(dtype)

    exact = project(F64)
    plain = (project(torch.float32) - exact).norm(dim=1)
    size = x.double().norm(dim=1) + bias.double().norm()
    for isa in IMPLEMENTATIONS:
        error = (call(packed, x, isa, tiling) - seen(exact)).norm(dim=1)
        assert (error <= 1.2 * (2 * plain + 1e-6 * (exact.norm(dim=1) + size))).all()


@examples(0.1, 40)
@given(projecting, inputs(), st.sampled_from(["int8", "int16"]), tilings, seeds)
def test_integer_projections_are_the_same_bits_everywhere(config, source, kind, tiling, seed):
    packed = pack(observer(config, seed), "float32", kind)
    u = unpack(packed)
    x = make_input(*source, config.in_features, seed)
    x = x.float()  # so that the output is not rounded
    outputs = [call(packed, x, isa, tiling) for isa in IMPLEMENTATIONS]
    z = packed_project(u, x)
    for out in outputs:
        assert torch.equal(out, outputs[0])
        torch.testing.assert_close(out.double(), seen(z.double()), rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize(
    ("tau", "reads"), [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4), (3, 4), (5, 3), (8, 1), (8, 2), (8, 4), (10, 4)]
)
def test_given_z_the_layer_is_the_references(tau, reads):
    """``reference.lookup_ffn`` in float64, with the accuracy that ``engine.py`` promises for each type of tables."""
    config = LookupConfig(21 * tau, 70, 21, tau, "none", reads=reads)
    layer = trained(config)
    x = torch.randn(50, config.in_features)
    z, rows, bias = x.double().view(50, 21, tau), layer.tables.detach().double(), layer.bias.detach().double()
    codes, scores = reference.nearest_cells(z, reads)
    y = reference.lookup_ffn(z, rows, bias, reads)
    size = reference.gather(rows.abs(), codes, scores.abs()) + bias.abs()
    # int8: half a step of every entry, and half a step of every score times its row
    largest = rows.abs().amax((1, 2))[:, None]
    weights = scores.abs() * largest
    entries = (weights / 254).sum((1, 2))[:, None]
    step = weights.amax((1, 2), keepdim=True) / 127
    halves = reference.gather(rows.abs() / largest.clamp(min=1e-30)[..., None], codes, step.expand_as(scores) / 2)
    bounds = {
        "float32": 1e-5 * size,
        "bfloat16": (2**-8 + 1e-5) * size,
        "int8": 1.01 * (entries + halves) + 1e-5 * size,
    }
    for tables, bound in bounds.items():
        packed = pack(layer, tables)
        for isa in IMPLEMENTATIONS:
            assert_within(call(packed, x, isa), y, bound)


@every_implementation
def test_codes_of_sixteen_bits_reach_the_first_and_the_last_row(isa):
    config = LookupConfig(16, 1, 1, 16, "none")
    layer = LookupFFN(config)
    with torch.no_grad():
        layer.tables.copy_(torch.arange(2**16).view(1, -1, 1))
    z = torch.tensor([[-3.0], [3.0]]).expand(2, 16) * torch.tensor([1.0] * 15 + [-1.0])
    score = 48 * torch.sigmoid(torch.tensor(6.0, dtype=F64)).item() ** 16
    out = call(pack(layer, "float32"), z.contiguous(), isa)
    torch.testing.assert_close(out.double() / score, torch.tensor([[1.0], [65534.0]], dtype=F64), rtol=1e-5, atol=0)


@every_implementation
@pytest.mark.parametrize("reads", [2, 3, 4])
def test_ties_go_to_the_bit_that_comes_first(isa, reads):
    config = LookupConfig(3, 8, 1, 3, "none", reads=reads)
    layer = LookupFFN(config)
    with torch.no_grad():
        layer.tables.copy_(torch.eye(8)[None])
    z = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [0.5, 2.0, 0.5], [1.0, 3.0, 2.0]])
    out = call(pack(layer, "float32"), z, isa)
    codes, scores = ops.hash_codes(z.view(4, 1, 3), reads)
    y = torch.zeros(4, 8).scatter(1, codes.view(4, -1).long(), scores.view(4, -1))
    torch.testing.assert_close(out, y)


# ---- The authors' defects, by name -----------------------------------------------------------------------------------


@every_implementation
@every_pair
def test_tokens_that_are_no_multiple_of_64(tables, projection, isa):
    packed = pack(trained(LookupConfig(64, 40, 20, 5, block_size=16)), tables, projection)
    x = torch.randn(200, 64)
    whole = call(packed, x, isa)
    for tokens in (1, 2, 3, 7, 31, 33, 63, 64, 65, 97, 127, 129):
        assert torch.equal(call(packed, x[:tokens].clone(), isa), whole[:tokens])


@every_implementation
@pytest.mark.parametrize("tables", TABLE_TYPES)
@pytest.mark.parametrize("tau", [1, 2, 3, 7, 9, 12])
def test_table_sizes_that_are_no_multiple_of_256(tau, tables, isa):
    for num_tables, out in ((5, 33), (17, 3)):
        config = LookupConfig(num_tables * tau, out, num_tables, tau, "none")
        packed = pack(trained(config), tables)
        x = torch.randn(9, config.in_features)
        assert_within(call(packed, x, isa), *expected(unpack(packed), x))


@every_implementation
@every_pair
def test_two_layers_of_different_shape_in_one_process(tables, projection, isa):
    shapes = [LookupConfig(64, 40, 20, 5, block_size=16), LookupConfig(130, 200, 97, 3, block_size=32, reads=3),
              LookupConfig(7, 1, 1, 2, block_size=1)]  # fmt: skip
    layers = [pack(trained(config), tables, projection) for config in shapes]
    xs = [torch.randn(50, config.in_features) for config in shapes]
    alone = [call(packed, x, isa) for packed, x in zip(layers, xs, strict=True)]
    for tokens in (50, 1, 33):
        for packed, x, y in zip(layers, xs, alone, strict=True):
            assert torch.equal(call(packed, x[:tokens], isa), y[:tokens])


@every_implementation
@pytest.mark.parametrize("projection", ["bh4", "dense"])
def test_one_formula_on_every_path(projection, isa):
    """Scale and block transposition: an asymmetric weight through the reference, the operators, the packed form and
    the kernels. A transposed block or a Hadamard off by a factor would be far outside the bound."""
    layer = observer(LookupConfig(32, 40, 40, 1, projection, block_size=8), 0)
    with torch.no_grad():  # each output depends on the inputs before it: nothing like its transpose
        layer.projection.weight.copy_(
            layer.projection.weight.tril() * torch.arange(1, 1 + layer.projection.weight.shape[-1]) / 4
        )
    x, weight, bias = torch.randn(40, 32), layer.projection.weight.detach().double(), layer.projection.bias.detach()
    z = reference.bh4(x.double(), weight, 0.7, 40) if projection == "bh4" else x.double() @ weight.T
    z = seen(z + bias)
    size = z.abs().max()
    with torch.no_grad():
        assert (layer(x) - z).abs().max() < 1e-5 * size  # ops
    for kind, bound in (("float32", 1e-5), ("int16", 2e-3), ("int8", 0.2)):
        packed = pack(layer, "float32", kind)
        assert (packed_forward(unpack(packed), x) - z).abs().max() < bound * size
        assert (call(packed, x, isa) - z).abs().max() < bound * size


def test_import_without_a_gpu():
    code = "import lookupffn, torch; assert not torch.cuda.is_available(); print(lookupffn.native.implementation())"
    done = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.strip() == native.implementation()


# ---- Batch, threads, repetition --------------------------------------------------------------------------------------


@examples(0.15, 40)
@given(configs(), inputs(("rows",)), st.sampled_from(PAIRS), st.lists(tilings, min_size=2, max_size=4), seeds)
def test_a_token_does_not_depend_on_its_batch_its_padding_the_tiling_or_the_threads(config, source, kinds, ways, seed):
    packed = pack(trained(config, seed), *kinds)
    x = make_input(*source, config.in_features, seed)
    whole = call(packed, x)
    for threads, tiling in enumerate(ways, 1):
        torch.set_num_threads(min(threads, 3))
        for isa in IMPLEMENTATIONS:
            assert torch.equal(call(packed, x, isa, tiling), whole if isa == native.implementation()
                               else call(packed, x, isa))  # fmt: skip
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(call(packed, x[order], "", tiling), whole[order])
        padded = torch.nn.functional.pad(x, (0, 0, threads, 3 * threads), value=2.5)
        assert torch.equal(call(packed, padded, "", tiling)[threads : threads + len(x)], whole)
        token = seed % len(x)
        assert torch.equal(call(packed, x[token : token + 1], "", tiling)[0], whole[token])


@every_pair
def test_long_batches_equal_short_ones_for_any_number_of_threads(tables, projection):
    """More tokens than wait in memory at once, and shapes in which threads share repeats, tokens and slices."""
    for config in (LookupConfig(16, 5, 40, 4, block_size=4, reads=2), LookupConfig(8, 300, 3, 2, "dense")):
        packed = pack(trained(config), tables, projection)
        x = torch.randn(4099, config.in_features)
        parts = torch.cat([call(packed, part) for part in x.split(97)])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(call(packed, x, "", Tiling(serial_tokens=0)), parts)
            for tokens in (1, 2, 5, 25):
                assert torch.equal(call(packed, x[:tokens], "", Tiling(serial_tokens=0)), parts[:tokens])


@every_pair
def test_a_hundred_runs_are_the_same_bits(tables, projection):
    packed = pack(trained(LookupConfig(130, 70, 50, 6, block_size=32, reads=2)), tables, projection)
    x = torch.randn(40, 130)
    torch.set_num_threads(2)
    first = call(packed, x, "", Tiling(serial_tokens=0))
    assert all(torch.equal(call(packed, x, "", Tiling(serial_tokens=0)), first) for _ in range(100))


@every_pair
def test_sixteen_threads_on_one_module_equal_the_serial_answers(tables, projection):
    module = prepared(LookupConfig(64, 70, 33, 5, block_size=16), tables, projection)
    torch.set_num_threads(2)
    batches = [torch.randn(n, 64) for n in (1, 3, 24, 25, 60, 130)]
    answers, wrong = [module(x) for x in batches], []
    start = threading.Barrier(16)

    def work(first):
        start.wait()
        for i in range(10_000 if EXAMPLES else 60):
            k = (first + i) % len(batches)
            if not torch.equal(module(batches[k]), answers[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def prepared(config, tables="int8", projection="int8"):
    layer = trained(config)
    return prepare(layer, tables, projection_dtype=projection, tune=False)


# ---- NaN, infinity, denormals, the processor's flags -----------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("tables", TABLE_TYPES)
@pytest.mark.parametrize("projection", [*WEIGHT_TYPES, "none"])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_a_bad_number_stays_in_its_token_and_is_seen_there(projection, tables, reads, isa):
    kind = "none" if projection == "none" else "bh4"
    config = LookupConfig(48, 20, 12, 4, kind, block_size=16, reads=reads)
    packed = pack(trained(config), tables, "float32" if kind == "none" else projection)
    clean = torch.randn(30, 48)
    expected = call(packed, clean, isa)
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        for position in (0, 23, 47):
            x = clean.clone()
            x[7, position] = bad
            y = call(packed, x, isa)
            others = [i for i in range(30) if i != 7]
            assert torch.equal(y[others], expected[others])
            if not math.isfinite(bad):
                assert not y[7].isfinite().any()
                if tables == "int8" or projection in ("int8", "int16") or math.isnan(bad):
                    assert y[7].isnan().all()


@every_implementation
@every_pair
def test_denormal_numbers_count_as_zeros(tables, projection, isa):
    config = LookupConfig(48, 20, 12, 4, block_size=16)
    layer = trained(config)
    with torch.no_grad():
        layer.tables[:, :, ::2] *= 1e-40
        layer.projection.weight[:, 1, 0] *= 1e-40
        layer.projection.bias.fill_(1e-41)
    packed = pack(layer, tables, projection)
    for scale in (1.0, 1e-25, 1e-40):
        x = torch.randn(9, 48) * scale
        y = call(packed, x, isa)
        z = packed_project(unpack(packed), x)
        z = z.where(z.abs() > 1e-37, 0.0)
        if projection == "float32":
            z = reference.bh4(x.double(), layer.projection.weight.detach().double(), 0.7, 48).float()
        exact, bound = expected(unpack(packed), z)
        assert y.isfinite().all()
        if projection != "float32":
            assert_within(y, exact, bound + 1e-30)
        elif scale < 1:
            assert (y - layer.bias.detach()).abs().max() < 1e-20
    token = torch.full((1, 48), 1e-40)
    assert torch.equal(call(packed, token, isa), call(packed, torch.zeros(1, 48), isa))


def denormals_live():
    """Whether products that are denormal come out as such, on torch's other threads too."""
    return bool(((torch.full((200_000,), 1e-30) * 1e-10) > 0).all())


@every_implementation
@pytest.mark.parametrize("serial_tokens", [0, 1000])
def test_the_callers_floating_point_flags_are_left_as_found(isa, serial_tokens):
    packed = pack(trained(LookupConfig(48, 20, 12, 4, block_size=16)))
    x = torch.randn(100, 48)
    tiling = Tiling(serial_tokens=serial_tokens)
    torch.set_num_threads(2)
    before = call(packed, x, isa, tiling)
    assert denormals_live()
    if torch.set_flush_denormal(True):
        try:
            assert torch.equal(call(packed, x, isa, tiling), before)
            assert torch.tensor(1e-30) * torch.tensor(1e-10) == 0
        finally:
            torch.set_flush_denormal(False)
    assert denormals_live()


@every_implementation
def test_rounding_is_to_nearest_inside_and_the_callers_outside(isa):
    libm = ctypes.CDLL(None)
    packed, x = pack(trained(LookupConfig(48, 20, 12, 4, block_size=16))), torch.randn(20, 48)
    tiling = Tiling(serial_tokens=1000)
    expected, upward = call(packed, x, isa, tiling), {"x86_64": 0x800, "aarch64": 0x400000}.get(os.uname().machine)
    if upward is None:
        pytest.skip("no number for FE_UPWARD on this processor")
    before = libm.fegetround()
    assert libm.fesetround(upward) == 0
    try:
        got, after = call(packed, x, isa, tiling), libm.fegetround()
    finally:
        libm.fesetround(before)
    assert after == upward
    assert torch.equal(got, expected)


# ---- Arguments -------------------------------------------------------------------------------------------------------

CONFIG = LookupConfig(20, 5, 9, 4, block_size=4)


@every_pair
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0), (2, 3, 4), (1, 1, 1, 1)])
def test_any_leading_shape(shape, tables, projection):
    module = prepared(CONFIG, tables, projection)
    x = torch.randn(*shape, 20)
    y = module(x)
    assert y.shape == (*shape, 5)
    assert y.dtype == torch.float32
    assert torch.equal(y.reshape(-1, 5), call(module.packed, x.reshape(-1, 20)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_other_floating_point_inputs_pass_through_float32(dtype):
    module = prepared(CONFIG)
    x = torch.randn(30, 20).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert torch.equal(y, module(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_inputs_that_are_no_real_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        prepared(CONFIG)(torch.ones(3, 20).to(dtype))


def test_layouts_of_memory_change_nothing():
    module = prepared(CONFIG)
    x = torch.randn(6, 4, 20)
    y = module(x)
    assert torch.equal(module(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(module(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)), y)
    assert torch.equal(module(x[::2, 1:]), y[::2, 1:])
    assert torch.equal(module(x[:1, :1].expand(6, 4, 20)), y[:1, :1].expand(6, 4, 5))
    assert torch.equal(module(x[..., :1].expand(6, 4, 20)), module(x[..., :1].expand(6, 4, 20).contiguous()))
    complex_ = torch.complex(x, -x)
    assert torch.equal(module(complex_.conj().imag), y)  # a lazy minus sign
    assert torch.equal(module(x.flip(0)), y.flip(0))
    one = prepared(LookupConfig(1, 5, 9, 4, "dense"))
    column = torch.randn(6, 20)[:, 3:4]
    assert torch.equal(one(column), one(column.contiguous()))


def test_packed_bytes_may_be_misaligned():
    packed = pack(trained(CONFIG))
    x = torch.randn(30, 20)
    storage = packed.new_empty(len(packed) + 64)
    for shift in (1, 4, 33):
        assert torch.equal(call(storage[shift : shift + len(packed)].copy_(packed), x), call(packed, x))


def test_the_layer_names_what_does_not_fit():
    module = prepared(CONFIG)
    for shape in ((3, 19), (20, 3), (3, 21), (3, 0), ()):
        with pytest.raises(ValueError, match=r"in_features = 20; x is \["):
            module(torch.zeros(shape))
    assert module(torch.empty(3, 20, device="meta")).shape == (3, 5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.zeros(3, 20).to_sparse())


def test_a_layer_on_another_device_is_refused():
    module = prepared(CONFIG).to("meta")
    with pytest.raises(RuntimeError, match=r"(?i)device|meta"):
        module(torch.zeros(3, 20))
    assert module(torch.empty(3, 20, device="meta")).is_meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.tensor(0.0)), r"x must be \(..., features\) in float32 or bfloat16, not \(\)"),
        (dict(x=torch.zeros(3, 20, dtype=F64)), "float32 or bfloat16"),
        (dict(x=torch.zeros(3, 20, dtype=torch.float16)), "float32 or bfloat16"),
        (dict(x=torch.zeros(3, 20, dtype=torch.int32)), "float32 or bfloat16"),
        (dict(x=torch.zeros(3, 21)), r"x \(3, 21\) must have the layer's in_features, 20"),
        (dict(packed=torch.zeros(4000)), "packed must be a contiguous vector of bytes"),
        (dict(packed=torch.zeros(2, 99, dtype=torch.uint8)), r"contiguous vector of bytes on the CPU, not \(2, 99\)"),
        (dict(packed=torch.zeros(4000, dtype=torch.uint8)[::2]), "contiguous vector of bytes"),
        (dict(packed=torch.zeros(3, dtype=torch.uint8)), "3 bytes, fewer than its header"),
        (dict(packed=torch.zeros(4000, dtype=torch.uint8)), "does not begin with LOOKUPFF"),
        (dict(out_features=6), "out_features is 6, the packed layer's 5"),
        (dict(out_features=-1), "out_features is -1"),
        (dict(tile_tokens=0), "must be positive.* not negative"),
        (dict(groups_a_pass=-(2**40)), "must be positive.* not negative"),
        (dict(prefetch_rows=-1), "must be positive.* not negative"),
        (dict(serial_tokens=-1), "must be positive.* not negative"),
        (dict(isa="mmx"), "no implementation 'mmx'; this build has .*scalar"),
    ],
)
def test_the_operator_names_what_does_not_fit(changes, message):
    given = dict(x=torch.zeros(3, 20), packed=pack(trained(CONFIG)), out_features=5, tile_tokens=24, groups_a_pass=1,
                 prefetch_rows=0, serial_tokens=0, isa="")  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lookupffn.prepared(*(given | changes).values())


def test_tiling_numbers_may_be_as_large_as_they_come():
    packed, x = pack(trained(CONFIG)), torch.randn(30, 20)
    huge = Tiling(2**62, 2**62, 2**62, 2**62)
    assert torch.equal(call(packed, x, "", huge), call(packed, x))


@pytest.mark.skipif(not EXAMPLES, reason="6 GB of memory; make test-all runs it")
def test_tables_of_more_than_two_to_the_31_numbers():
    T, K, E, scale = 520, 2**16, 64, 0.01  # 2.03 GiB of int8
    fields = dict(
        in_features=16 * T, out_features=E, num_tables=T, code_bits=16, reads=1, stages=0, repeats=1, blocks=1
    )
    fields |= dict(block_in=0, block_out=0, scale=1.0, residual=0.0, weight_type=0, table_rows=K, slice=64)
    tables = torch.zeros(1, T, K, E, dtype=torch.int8)
    tables[0, -1, -1] = torch.arange(E)  # the last row of all
    scales = torch.zeros(528)
    scales[T - 1] = scale
    sections = {"tables": tables, "table_scales": scales, "bias": torch.zeros(E)}
    packed = _assemble(fields | {"table_type": TABLE_TYPES["int8"]}, sections)
    x = torch.full((3, 16 * T), 0.5)  # every code is that of the last row
    m = torch.full((16,), 0.5, dtype=F64)
    score = m.sum() / (1 + torch.exp(-2 * m)).prod()
    expected = (score * scale * _deinterleave(torch.arange(E, dtype=torch.int8)[None])[0].double()).expand(3, E)
    torch.testing.assert_close(call(packed, x).double(), expected, rtol=1e-5, atol=1e-6)


def test_raw_reads_check_every_line():
    memory = torch.zeros(640, dtype=torch.uint8)
    lines = torch.arange(10, dtype=torch.int32)
    assert torch.ops.lookupffn.read_lines(memory, lines, 3) == 0
    for bad in (10, -1, 2**31 - 1):
        with pytest.raises(RuntimeError, match="outside memory"):
            torch.ops.lookupffn.read_lines(memory, torch.cat([lines, lines.new_tensor([bad])]), 1)


# ---- Processes -------------------------------------------------------------------------------------------------------


def run_python(code, timeout=120, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done


FORK = """
import os, sys, time, torch
from lookupffn import LookupConfig, LookupFFN, prepare

def in_child(work):  # the child's exit status, or None where it has not ended in time
    pid = os.fork()
    if not pid:
        status = 9
        try:
            status = work()
        finally:
            os._exit(status)
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""


def test_a_forked_child_computes_the_same_and_never_hangs():
    code = (
        FORK
        + """
torch.set_num_threads(2)
module = prepare(LookupFFN(LookupConfig(64, 70, 40, 5, block_size=16)), tune=False)
x = torch.randn(300, 64)
y = module(x)  # torch's threads run now, and a child will not have them
for threads in (1, 2, None):
    def work():
        if threads:
            torch.set_num_threads(threads)
        return 0 if torch.equal(module(x), y) and torch.equal(module(x[:1]), y[:1]) else 1
    print(in_child(work))
assert torch.equal(module(x), y)
"""
    )
    assert run_python(code).stdout.split() == ["0", "0", "0"]


def test_each_implementation_can_be_forced_and_says_so():
    """LOOKUPFFN_ISA is read once a process, so one process forks before it is read."""
    names = [*(i["name"] for i in native.implementations()), ""]
    code = (
        FORK
        + f"""
torch.set_num_threads(1)
from lookupffn import native
from lookupffn.engine import PreparedLookupFFN
torch.manual_seed(0)
layer = LookupFFN(LookupConfig(64, 70, 40, 5, block_size=16))
native.load()
x, results = torch.randn(9, 64), {{}}
for name in {names}:
    read, write = os.pipe()
    def work():
        os.environ["LOOKUPFFN_ISA"] = name
        module = prepare(layer, tune=False)
        bits = module(x).view(torch.int32).long().sum().item()
        os.write(write, f"{{native.implementation()}} {{bits}}".encode())
        return 0
    print(name or "none", in_child(work), end=" ", flush=True)
    os.close(write)
    print(os.read(read, 1000).decode(), flush=True)
"""
    )
    lines = [line.split() for line in run_python(code).stdout.splitlines()]
    assert [line[0] for line in lines] == [*names[:-1], "none"]
    assert lines[-1][1:3] == ["0", IMPLEMENTATIONS[0]]  # the best one, where none is forced
    for line in lines[:-1]:
        if line[0] in IMPLEMENTATIONS:
            assert line[1:3] == ["0", line[0]]
        else:
            assert line[1] == "9"  # it cannot run here, and said so
    assert len({line[3] for line in lines if len(line) > 3}) == 1  # the same bits


def test_an_unknown_implementation_is_an_error_that_names_the_known_ones():
    code = """
from lookupffn import LookupConfig, LookupFFN, native, prepare
for attempt in (native.implementation, lambda: prepare(LookupFFN(LookupConfig(64, 5)), tune=False),
                lambda: prepare(LookupFFN(LookupConfig(64, 5)))):
    try:
        attempt()
    except RuntimeError as error:
        print(error)
"""
    lines = run_python(code, LOOKUPFFN_ISA="pentium").stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("LOOKUPFFN_ISA: there is no implementation 'pentium'; this build has ")
        assert line.endswith(", ".join(i["name"] for i in native.implementations()))


def test_without_the_kernels_everything_works_says_so_once_and_agrees(tmp_path):
    config = LookupConfig(64, 70, 40, 5, block_size=16, reads=2)
    layer = trained(config)
    x = torch.randn(40, 64)
    torch.save({"layer": layer.state_dict(), "x": x}, tmp_path / "in.pt")
    code = f"""
import torch, warnings
from lookupffn import LookupConfig, LookupFFN, native, prepare
from lookupffn.tiling import choose_tiling
warnings.simplefilter("always")
saved = torch.load({str(tmp_path / "in.pt")!r})
layer = LookupFFN({config})
layer.load_state_dict(saved["layer"])
assert not native.available() and native.implementation() == "torch" and native.implementations() == []
out = dict()
with warnings.catch_warnings(record=True) as said:
    for tables in {list(TABLE_TYPES)}:
        out[tables] = prepare(layer, tables)(saved["x"])
assert len(said) == 1, [str(w.message) for w in said]
x = saved["x"].requires_grad_()
try:
    prepare(layer)(x).sum().backward()
except RuntimeError as error:
    assert "no backward pass" in str(error), error
else:
    raise AssertionError("a gradient came out")
other = prepare(LookupFFN(layer.config))
other.load_state_dict(prepare(layer).state_dict())
assert torch.equal(other(saved["x"]), out["int8"])
torch.save(out, {str(tmp_path / "out.pt")!r})
print(said[0].message)
"""
    said = run_python(code, LOOKUPFFN_NATIVE="0").stdout
    assert "without its compiled kernels" in said
    assert "LOOKUPFFN_NATIVE=0" in said
    for tables, y in torch.load(tmp_path / "out.pt").items():
        module = prepare(layer, tables, tune=False)
        u = unpack(module.packed)
        if tables != "float32":  # the projection's integers are the same bits on both paths
            exact, bound = expected(u, packed_project(u, x))
            assert_within(y, exact, bound)
            assert_within(module(x), exact, bound)
        else:
            torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)


def test_a_prepared_layer_is_what_it_says():
    module = prepared(CONFIG, "bfloat16", "int16")
    assert isinstance(module, PreparedLookupFFN)
    assert "tables=bfloat16, projection=int16" in repr(module)
    assert (module.table_dtype, module.weight_dtype) == ("bfloat16", "int16")
