import math

import pytest
import torch

from lookupffn.ffns.dense import DenseFFN


def test_dense_is_its_equation_with_the_exact_gelu():
    ffn = DenseFFN(6, 10, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    inner = x @ ffn.up.weight.T + ffn.up.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(ffn(x), inner @ ffn.down.weight.T + ffn.down.bias)


def test_dense_costs():
    ffn = DenseFFN(512, 2048, device="meta")
    assert ffn.flops(3) == 3 * 2 * 2_097_152
    assert ffn.bytes_read(1) == ffn.bytes_read(100) == 4 * (2_097_152 + 2048 + 512)


def test_dense_has_the_interface_of_an_ffn():
    assert DenseFFN(6, 10)(torch.randn(0, 6)).shape == (0, 6)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        DenseFFN(6, 10)(torch.randn(2, 5))
