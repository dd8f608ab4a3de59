"""The dense feed-forward layer with both matrices Monarch: two block-diagonal factors and fixed permutations.

Differs from the paper: the factors start with the variance of the dense layer they stand for, not Kaiming's, and
widths must be multiples of the number of blocks, where the authors' code pads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.ffns.block_diagonal import block_product, check_blocks


class Monarch(nn.Module):
    """Product with a Monarch matrix, ``y = P_out diag(L) P diag(R) x + b``: ``x (B, in)`` to ``(B, out)``.

    With ``n`` blocks and ``m = min(in, out)``, ``R (n, m/n, in/n)`` and ``L (n, out/n, m/n)``, rows of a block are
    outputs. ``P`` reads its ``m`` numbers as a matrix ``(m/n, n)`` and transposes it, ``P_out`` its ``out`` numbers as
    ``(n, out/n)``: for ``n = sqrt(in) = sqrt(out)`` both are the ``P = P^T`` of ``M = P L P^T R`` (Dao et al., section
    3.1). Rectangular as ``MonarchLinear`` of the authors' code.
    """

    def __init__(self, in_features: int, out_features: int, num_blocks: int, *, device=None, dtype=None):
        super().__init__()
        n, middle = num_blocks, min(in_features, out_features)
        self.right = nn.Parameter(torch.empty(n, middle // n, in_features // n, device=device, dtype=dtype))
        self.left = nn.Parameter(torch.empty(n, out_features // n, middle // n, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def init_parameters(self, std: float) -> None:
        """Factors N(0, std n / sqrt(m)); ``m in / n^2`` paths give an output the variance ``in std^2``; bias 0."""
        n, rows, _ = self.right.shape  # m / n^2 = rows / n
        for blocks in (self.right, self.left):
            nn.init.normal_(blocks, 0.0, (std**2 * n / rows) ** 0.25)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, rows, _ = self.right.shape
        z = block_product(x, self.right).transpose(0, 1).flatten(1)  # (B, m)
        z = z.unflatten(1, (rows, n)).mT.flatten(1)  # (B, m), transposed by P
        y = block_product(z, self.left)  # (n, B, out/n)
        return y.permute(1, 2, 0).flatten(1) + self.bias  # (B, out), transposed by P_out


class MonarchFFN(nn.Module):
    """Dense FFN with Monarch matrices, ``y = M_2 gelu(M_1 x + b_1) + b_2``: ``x (..., D)`` to the same.

    ``M_1 (H, D)`` and ``M_2 (D, H)`` are :class:`Monarch` matrices of ``num_blocks`` blocks; any float dtype. Costs
    ``2 (D H + min(D, H)^2) / num_blocks`` multiply-adds a token: with ``H = 4 D`` 6.4 times fewer than dense by default
    (the paper has 4 blocks, 3.2 times). Source: Dao et al., "Monarch", ICML 2022, arXiv 2204.00595.

    Raises:
        ValueError: ``num_blocks`` does not divide both widths.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, num_blocks: int = 8, device=None, dtype=None):
        super().__init__()
        check_blocks("num_blocks", num_blocks, hidden_size, intermediate_size)
        self.up = Monarch(hidden_size, intermediate_size, num_blocks, device=device, dtype=dtype)
        self.down = Monarch(intermediate_size, hidden_size, num_blocks, device=device, dtype=dtype)
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Both as :meth:`Monarch.init_parameters`: the output variance of dense matrices N(0, std^2)."""
        self.up.init_parameters(std)
        self.down.init_parameters(std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.reshape(-1, x.shape[-1])))).reshape(x.shape)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add of the products."""
        return 2 * tokens * sum(p.numel() for p in self.parameters() if p.dim() == 3)

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: each once, however many tokens."""
        return sum(p.numel() * p.element_size() for p in self.parameters())
