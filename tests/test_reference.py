"""The oracle itself, against numbers worked by hand and against the paper's own words."""

import math

import pytest
import torch

from lookupffn import reference

F64 = torch.float64


def test_hadamard_is_orthonormal_symmetric_and_a_kronecker_product():
    h8, h2, h4 = (reference.hadamard_matrix(n) for n in (8, 2, 4))
    torch.testing.assert_close(h2, torch.tensor([[1, 1], [1, -1]], dtype=F64) / math.sqrt(2))
    torch.testing.assert_close(h8 @ h8, torch.eye(8, dtype=F64))
    torch.testing.assert_close(h8, torch.kron(h2, h4))
    with pytest.raises(ValueError, match="power of two as its size, not 12"):
        reference.hadamard_matrix(12)


def test_bh4_by_hand():
    # D' = 2, b = 1: W_1 = diag(1, 2), W_2 = diag(3, 1), W_3 = W_4 = I, r = 1/sqrt(2).
    # x = (1, 0) -> W_1 (1, 0) -> H (r, r) -> W_2 (3r, r) -> H (2, 1) -> H (3r, r) -> H (2, 1)
    weight = torch.tensor([[1, 2], [3, 1], [1, 1], [1, 1]], dtype=F64).view(1, 4, 2, 1, 1)
    out = reference.bh4(torch.tensor([[1, 0]], dtype=F64), weight, decay=0.7, out_features=2)
    torch.testing.assert_close(out, torch.tensor([[0.7 * 2 + 0.3 * 1, 0.7 * 1 + 0.3 * 0]], dtype=F64))


def test_bh4_pads_repeats_and_cuts():
    weight = torch.randn(3, 4, 2, 4, 4, dtype=F64)
    x = torch.randn(5, 6, dtype=F64)
    out = reference.bh4(x, weight, decay=0.5, out_features=19)
    padded = torch.cat([x, torch.zeros(5, 2, dtype=F64)], 1)
    for repeat, columns in ((0, slice(0, 8)), (1, slice(8, 16)), (2, slice(16, 19))):
        y = padded
        for blocks in weight[repeat]:
            y = torch.cat([y[:, :4] @ blocks[0].T, y[:, 4:] @ blocks[1].T], 1)
            y = y @ reference.hadamard_matrix(8)
        torch.testing.assert_close(out[:, columns], (0.5 * y + 0.5 * padded)[:, : columns.stop - columns.start])


def test_codes_are_most_significant_bit_first_and_zero_and_nan_are_zero_bits():
    z = torch.tensor([[1.0, -2.0, 3.0], [0.0, -0.0, 1e-30], [math.nan, 1.0, -1.0], [math.inf, -math.inf, 1.0]])
    assert reference.sign_codes(z).tolist() == [0b101, 0b001, 0b010, 0b101]


def test_score_by_hand():
    # m = (1, 2): 3 * sigmoid(2) * sigmoid(4) = 3 * 0.8807970779778823 * 0.9820137900379085
    score = reference.sign_score(torch.tensor([1.0, -2.0], dtype=F64))
    assert score.item() == pytest.approx(2.5948646304, abs=1e-9)


@pytest.mark.parametrize("tau", [1, 2, 3, 8])
def test_score_is_the_largest_softmax_term_times_its_inner_product(tau):
    z = torch.randn(50, tau, dtype=F64) * 2
    inner = z @ reference.bucket_signs(tau).T
    code, score = reference.sign_codes(z), reference.sign_score(z)
    assert torch.equal(inner.argmax(1), code)
    torch.testing.assert_close(inner.softmax(1).max(1).values * inner.max(1).values, score)
    m = z.abs()  # the other spelling of the same number
    torch.testing.assert_close(m.sum(1) / (1 + torch.exp(-2 * m)).prod(1), score)
    codes, scores = reference.nearest_buckets(z, 1)
    assert torch.equal(codes[:, 0], code)
    torch.testing.assert_close(scores[:, 0], score)


def test_nearest_buckets_by_hand():
    # z = (1, -2): buckets 10 (3), 00 (1), 11 (-1), 01 (-3) by inner product
    codes, scores = reference.nearest_buckets(torch.tensor([[1.0, -2.0]], dtype=F64), 4)
    assert codes.tolist() == [[0b10, 0b00, 0b11, 0b01]]
    total = sum(math.exp(v) for v in (3, 1, -1, -3))
    expected = [v * math.exp(v) / total for v in (3, 1, -1, -3)]
    torch.testing.assert_close(scores[0], torch.tensor(expected, dtype=F64))


def test_gather_by_hand():
    tables = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    y = reference.gather(tables, torch.tensor([[[1], [0]]]), torch.tensor([[[2.0], [-1.0]]]))
    assert y.tolist() == [[2 * 3 - 5, 2 * 4 - 6]]
