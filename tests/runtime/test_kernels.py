"""The compiled kernels, every implementation that this processor runs, through the operator and the packed layer.

The hash is discontinuous, so they are tested in pieces. A layer without a projection is given ``z``: codes, scores and
gather are compared with float64. A layer whose tables spell out the scores shows ``z``: the projection is compared by
itself. With integers both are the same bits on every implementation, and so is the whole.
"""

import dataclasses
import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_cases import (
    EXAMPLES,
    F64,
    IMPLEMENTATIONS,
    PAIRS,
    assert_within,
    call,
    configs,
    every_implementation,
    every_pair,
    examples,
    expected,
    inputs,
    make_input,
    packed_layer,
    run_python,
    seeds,
    tilings,
    trained,
    types,
)

from lookupffn import LookupConfig, LookupFFN, native, ops, reference
from lookupffn.runtime.format import LEVELS, TABLE_TYPES, decode, encode
from lookupffn.runtime.portable import packed_forward, packed_project
from lookupffn.runtime.tuning import Tiling

pytestmark = [
    pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0"),
    pytest.mark.usefixtures("one_thread"),
]


# ---- Against float64, and against each other -------------------------------------------------------------------------


def test_the_kernels_are_built_and_the_scalar_ones_run_anywhere():
    assert native.available(), native.load()
    assert IMPLEMENTATIONS[-1] == "scalar"
    assert native.implementation() in IMPLEMENTATIONS


@examples(0.5, 120)
@given(configs(), inputs(), types, tilings, seeds)
def test_every_implementation_computes_the_packed_layer(config, source, kinds, tiling, seed):
    """Integer projections and given ``z``: outputs within rounding of float64; integer tables: the same bits."""
    tables, projection = kinds
    if config.projection != "none" and projection == "float32":
        projection = "int16"
    packed = encode(trained(config, seed), tables, projection)
    u = decode(packed)
    x = make_input(*source, config.in_features, seed)
    z = packed_project(u, x.float())
    y, bound = expected(u, z, x.dtype == torch.bfloat16)
    outputs = [call(packed, x, isa, tiling) for isa in IMPLEMENTATIONS]
    for out in outputs:
        assert out.dtype == x.dtype
        assert_within(out, y, bound)
    if tables in LEVELS:
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
    packed = encode(layer, "float32", "float32")
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
    packed = encode(observer(config, seed), "float32", kind)
    u = decode(packed)
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
    codes, scores = reference.nearest_buckets(z, reads)
    y = reference.lookup_ffn(z, rows, bias, reads)
    size = reference.gather(rows.abs(), codes, scores.abs()) + bias.abs()
    # int8: half a step of every entry, and half a step of every score times its row
    largest = rows.abs().amax((1, 2))[:, None]
    weights = scores.abs() * largest
    entries = (weights / 254).sum((1, 2))[:, None]
    step = weights.amax((1, 2), keepdim=True) / 127
    halves = reference.gather(rows.abs() / largest.clamp(min=1e-30)[..., None], codes, step.expand_as(scores) / 2)
    # int4: the same by its own scale, and what is cut off at 7 scales
    scale = decode(encode(layer, "int4")).table_scales.double()[:, None].clamp(min=1e-30)
    cut = torch.maximum(scale[..., None] / 2, rows.abs() - 7 * scale[..., None])
    step = (scores.abs() * scale).amax((1, 2), keepdim=True) / 127
    integers = (rows.abs() / scale[..., None] + 0.5).clamp(max=7)
    cut_off = reference.gather(cut, codes, scores.abs()) + reference.gather(integers, codes, step.expand_as(scores) / 2)
    bounds = {
        "int4": 1.01 * cut_off + 1e-5 * size,
        "float32": 1e-5 * size,
        "bfloat16": (2**-8 + 1e-5) * size,
        "int8": 1.01 * (entries + halves) + 1e-5 * size,
    }
    for tables, bound in bounds.items():
        packed = encode(layer, tables)
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
    out = call(encode(layer, "float32"), z.contiguous(), isa)
    torch.testing.assert_close(out.double() / score, torch.tensor([[1.0], [65534.0]], dtype=F64), rtol=1e-5, atol=0)


@every_implementation
@pytest.mark.parametrize("reads", [2, 3, 4])
def test_ties_go_to_the_bit_that_comes_first(isa, reads):
    config = LookupConfig(3, 8, 1, 3, "none", reads=reads)
    layer = LookupFFN(config)
    with torch.no_grad():
        layer.tables.copy_(torch.eye(8)[None])
    z = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [0.5, 2.0, 0.5], [1.0, 3.0, 2.0]])
    out = call(encode(layer, "float32"), z, isa)
    codes, scores = ops.hash_codes(z.view(4, 1, 3), reads)
    y = torch.zeros(4, 8).scatter(1, codes.view(4, -1).long(), scores.view(4, -1))
    torch.testing.assert_close(out, y)


# ---- The authors' defects, by name -----------------------------------------------------------------------------------


@every_implementation
@every_pair
def test_tokens_that_are_no_multiple_of_64(tables, projection, isa):
    packed = encode(trained(LookupConfig(64, 40, 20, 5, block_size=16)), tables, projection)
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
        packed = encode(trained(config), tables)
        x = torch.randn(9, config.in_features)
        assert_within(call(packed, x, isa), *expected(decode(packed), x))


@every_implementation
@every_pair
def test_two_layers_of_different_shape_in_one_process(tables, projection, isa):
    shapes = [LookupConfig(64, 40, 20, 5, block_size=16), LookupConfig(130, 200, 97, 3, block_size=32, reads=3),
              LookupConfig(7, 1, 1, 2, block_size=1)]  # fmt: skip
    layers = [encode(trained(config), tables, projection) for config in shapes]
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
        packed = encode(layer, "float32", kind)
        assert (packed_forward(decode(packed), x) - z).abs().max() < bound * size
        assert (call(packed, x, isa) - z).abs().max() < bound * size


def test_import_without_a_gpu():
    code = "import lookupffn, torch; assert not torch.cuda.is_available(); print(lookupffn.native.implementation())"
    done = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.strip() == native.implementation()


# ---- Batch, threads, repetition --------------------------------------------------------------------------------------


@examples(0.15, 40)
@given(configs(), inputs(("rows",)), st.sampled_from(PAIRS), st.lists(tilings, min_size=2, max_size=4), seeds)
def test_a_token_does_not_depend_on_its_batch_its_padding_the_tiling_or_the_threads(config, source, kinds, ways, seed):
    packed = encode(trained(config, seed), *kinds)
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
        packed = encode(trained(config), tables, projection)
        x = torch.randn(4099, config.in_features)
        parts = torch.cat([call(packed, part) for part in x.split(97)])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(call(packed, x, "", Tiling(serial_tokens=0)), parts)
            for tokens in (1, 2, 5, 25):
                assert torch.equal(call(packed, x[:tokens], "", Tiling(serial_tokens=0)), parts[:tokens])


@every_pair
def test_a_hundred_runs_are_the_same_bits(tables, projection):
    packed = encode(trained(LookupConfig(130, 70, 50, 6, block_size=32, reads=2)), tables, projection)
    x = torch.randn(40, 130)
    torch.set_num_threads(2)
    first = call(packed, x, "", Tiling(serial_tokens=0))
    assert all(torch.equal(call(packed, x, "", Tiling(serial_tokens=0)), first) for _ in range(100))


@every_pair
def test_sixteen_threads_on_one_module_equal_the_serial_answers(tables, projection):
    module = packed_layer(LookupConfig(64, 70, 33, 5, block_size=16), tables, projection)
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
