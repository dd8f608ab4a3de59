"""Each operator against the float64 reference, apart: the hash is discontinuous, so projection, codes and gather are
compared by themselves (a projection by a bound, codes exactly for the same z, the gather for given codes)."""

import math

import pytest
import torch
from torch.library import opcheck

from lookupffn import ops, reference

F64 = torch.float64
# (D, out_features, block): padding, one block, many repeats, cut repeats, block 1
BH4_SHAPES = [
    (1, 1, 1),
    (2, 3, 1),
    (8, 8, 8),
    (20, 7, 4),
    (64, 128, 16),
    (130, 99, 32),
    (96, 400, 64),
    (512, 1024, 64),
]


def bh4_case(width, out, block, tokens, dtype=F64, device="cpu"):
    padded = reference.next_power_of_two(width)
    shape = (-(-out // padded), 4, padded // block, block, block)
    weight = torch.randn(shape, dtype=F64, device=device) / block**0.5
    return torch.randn(tokens, width, dtype=F64, device=device).to(dtype), weight.to(dtype)


# Folded above the block size, unfolded below; as one matrix from four times the width, up to a width of 256.
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 17, 33, 64, 65, 97, 1030])
@pytest.mark.parametrize(("width", "out", "block"), BH4_SHAPES)
def test_bh4_equals_reference_in_float64(width, out, block, tokens, device):
    x, weight = bh4_case(width, out, block, tokens, device=device)
    torch.testing.assert_close(ops.bh4(x, weight, 0.7, out), reference.bh4(x, weight, 0.7, out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, 200, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out", "block"), BH4_SHAPES)
def test_bh4_error_is_at_most_twice_plain_torch(width, out, block, tokens, dtype, device):
    x, weight = bh4_case(width, out, block, tokens, dtype, device)
    exact = reference.bh4(x.double(), weight.double(), 0.7, out)
    plain = (reference.bh4(x, weight, 0.7, out).double() - exact).norm()
    ours = ops.bh4(x, weight, 0.7, out)
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).norm() <= 2 * plain + 1e-6 * exact.norm()


@pytest.mark.parametrize("tokens", [3, 21, 70])
@pytest.mark.parametrize(("width", "out", "block"), [(1, 1, 1), (6, 19, 4), (16, 40, 8)])
def test_bh4_gradients(width, out, block, tokens, device):
    x, weight = bh4_case(width, out, block, tokens, device=device)
    x.requires_grad_()
    weight.requires_grad_()
    grad = torch.randn(tokens, out, dtype=F64, device=device)
    ours = torch.autograd.grad(ops.bh4(x, weight, 0.7, out), (x, weight), grad)
    theirs = torch.autograd.grad(reference.bh4(x, weight, 0.7, out), (x, weight), grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_bh4_gradcheck():
    x, weight = bh4_case(6, 19, 4, 3)
    assert torch.autograd.gradcheck(lambda x, w: ops.bh4(x, w, 0.7, 19), (x.requires_grad_(), weight.requires_grad_()))


# tau with the most reads it allows
HASH_SHAPES = [(tau, reads) for tau in (1, 2, 3, 7, 8, 12) for reads in range(1, min(4, 2**tau) + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("tau", "reads"), HASH_SHAPES)
def test_hash_equals_the_search_over_all_buckets(tau, reads, dtype, device):
    z = torch.randn(17, 5, tau, dtype=dtype, device=device)
    codes, scores = ops.hash_codes(z, reads)
    expected_codes, expected_scores = reference.nearest_buckets(z.double(), reads)
    assert torch.equal(codes, expected_codes.int())  # bitwise: the same z, so no tolerance
    torch.testing.assert_close(
        scores.double(),
        expected_scores,
        rtol=20 * torch.finfo(dtype).eps,
        atol=1e-6 * scores.abs().max().item(),
    )


def test_hash_of_sixteen_bits_reaches_the_last_bucket():
    codes, scores = ops.hash_codes(torch.full((1, 1, 16), 3.0), 1)
    assert codes.item() == 2**16 - 1
    assert scores.item() == pytest.approx(48 * torch.sigmoid(torch.tensor(6.0)).item() ** 16, rel=1e-5)


def test_hash_on_boundaries_and_ties_stays_in_range_and_takes_the_first_bit():
    z = torch.tensor([[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]], [[-1.0, 1.0, -1.0]]])
    codes, scores = ops.hash_codes(z, 3)
    assert codes[:, 0].tolist() == [[0, 4, 2], [7, 3, 5], [2, 6, 0]]
    assert scores[0].abs().max() == 0
    assert not torch.isnan(scores).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_a_bad_number_stays_in_its_token(bad, reads):
    z = torch.randn(4, 3, 5)
    tables = torch.randn(3, 32, 7)
    clean = ops.gather(tables, *ops.hash_codes(z, reads))
    z[1, 2, 3] = bad
    codes, scores = ops.hash_codes(z, reads)
    assert 0 <= codes.min() <= codes.max() < 32
    y = ops.gather(tables, codes, scores)
    others = [0, 2, 3]
    assert torch.equal(y[others], clean[others])
    assert not y[1].isfinite().any()


@pytest.mark.parametrize(("tau", "reads"), [(1, 2), (2, 4), (5, 1), (5, 2), (5, 4)])
def test_hash_gradients(tau, reads, device):
    z = torch.randn(9, 3, tau, dtype=F64, device=device).requires_grad_()
    grad = torch.randn(9, 3, reads, dtype=F64, device=device)
    (ours,) = torch.autograd.grad(ops.hash_codes(z, reads)[1], z, grad)
    (theirs,) = torch.autograd.grad(reference.nearest_buckets(z, reads)[1], z, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    away = z.detach() + 0.1 * z.detach().sign()  # no sign flips and no bucket changes rank within the step of gradcheck
    assert torch.autograd.gradcheck(lambda z: ops.hash_codes(z, reads)[1], away.requires_grad_())


def test_score_gradient_is_the_formula_of_the_method():
    z = torch.randn(6, 2, 8, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.hash_codes(z, 1)[1].sum(), z)
    m = z.detach().abs()
    product = torch.sigmoid(2 * m).prod(-1, keepdim=True)
    score = m.sum(-1, keepdim=True) * product
    torch.testing.assert_close(grad, z.detach().sign() * (product + 2 * score * torch.sigmoid(-2 * m)))


GATHER_SHAPES = [
    (0, 3, 1, 4, 5),
    (1, 1, 1, 2, 1),
    (7, 3, 2, 8, 33),
    (65, 9, 4, 16, 64),
    (130, 2, 3, 2, 97),
]  # B, T, N, K, E


def gather_case(tokens, tables, reads, rows, width, dtype=F64, device="cpu"):
    codes = torch.randint(0, rows, (tokens, tables, reads), dtype=torch.int32, device=device)
    scores = torch.randn(tokens, tables, reads, dtype=F64, device=device)
    return (
        torch.randn(tables, rows, width, dtype=F64, device=device).to(dtype),
        codes,
        scores.to(ops.at_least_float32(dtype)),
    )


@pytest.mark.parametrize("shape", GATHER_SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gather_equals_reference(shape, dtype, bound, device):
    tables, codes, scores = gather_case(*shape, dtype, device)
    exact = reference.gather(tables.double(), codes, scores.double())
    size = reference.gather(
        tables.double().abs(), codes, scores.double().abs()
    )  # the bound is relative to the summands
    assert ((ops.gather(tables, codes, scores).double() - exact).abs() <= bound * size + 1e-300).all()


@pytest.mark.parametrize("shape", GATHER_SHAPES[1:])
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_gather_gradients(shape, dtype, bound, device):
    tables, codes, scores = gather_case(*shape, dtype, device)
    grad = torch.randn(shape[0], shape[4], dtype=F64, device=device)
    inputs = tables.requires_grad_(), scores.requires_grad_()
    ours = torch.autograd.grad(ops.gather(tables, codes, scores), inputs, grad.to(dtype))
    doubles = tables.detach().double().requires_grad_(), scores.detach().double().requires_grad_()
    theirs = torch.autograd.grad(reference.gather(doubles[0], codes, doubles[1]), doubles, grad)
    for a, b, parameter in zip(ours, theirs, inputs, strict=True):
        assert a.dtype == parameter.dtype
        assert (a.double() - b).norm() <= bound * b.norm()


def test_gather_refuses_what_does_not_fit():
    tables, codes, scores = gather_case(4, 3, 1, 8, 5)
    for bad in (8, -1):
        codes[2, 1, 0] = bad
        with pytest.raises(IndexError, match=f"{bad}.*tables of 8 rows"):
            ops.gather(tables, codes, scores)
    with pytest.raises(ValueError, match=r"\[3, 8, 5\], \[4, 2, 1\]"):
        ops.gather(tables, codes[:, :2], scores[:, :2])
    tables, codes, scores = gather_case(4, 3, 1, 8, 5)
    for bad, reason in (
        ((tables, codes.float(), scores), "not codes torch.float32"),
        ((tables, codes.long(), scores), "not codes torch.int64"),
        ((tables.int(), codes, scores), "tables torch.int32"),
        ((tables, codes, codes), "scores torch.int32"),
    ):
        with pytest.raises(ValueError, match=f"gather needs codes in int32, .*{reason}"):
            ops.gather(*bad)


def test_the_other_operators_refuse_what_does_not_fit():
    x, weight = bh4_case(6, 8, 4, 3)
    with pytest.raises(ValueError, match="width 9"):
        ops.bh4(torch.zeros(3, 9, dtype=F64), weight, 0.7, 8)
    with pytest.raises(ValueError, match="9 outputs"):
        ops.bh4(x, weight, 0.7, 9)
    with pytest.raises(ValueError, match=r"powers of two in weight .*\[1, 4, 2, 3, 3\]"):
        ops.bh4(x, torch.zeros(1, 4, 2, 3, 3, dtype=F64), 0.7, 6)
    with pytest.raises(ValueError, match=r"x torch.int64"):
        ops.bh4(x.long(), weight.long(), 0.7, 8)
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        ops.bh4(x[0], weight, 0.7, 8)
    with pytest.raises(ValueError, match=r"bfloat16"):
        ops.hash_codes(torch.zeros(1, 1, 4, dtype=torch.bfloat16), 1)
    with pytest.raises(ValueError, match="reads must be 1 to 2 with 1 bits, not 3"):
        ops.hash_codes(torch.zeros(1, 1, 1), 3)


def test_operators_are_well_formed():
    """Schema, shape function, autograd registration and dynamic shapes, by PyTorch's own checker."""
    x, weight = bh4_case(6, 19, 4, 9)
    opcheck(torch.ops.lookupffn.bh4, (x.requires_grad_(), weight.requires_grad_(), 0.7, 19))
    # the checker of compiled gradients cannot sum an integer output; test_layer compiles this one within the layer
    without_aot = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.lookupffn.hash_codes, (torch.randn(5, 3, 4).requires_grad_(), 2), test_utils=without_aot)
    tables, codes, scores = gather_case(9, 3, 2, 8, 5)
    opcheck(torch.ops.lookupffn.gather, (tables.requires_grad_(), codes, scores.requires_grad_()))
