"""The dense feed-forward layer with both matrices of low rank: the shape of a truncated SVD, trained from scratch.

Differs from the textbook: the factors start at random, not computed from trained matrices, and nothing keeps their
columns orthogonal; the singular values are part of both factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check


class LowRankFFN(nn.Module):
    """Dense FFN whose matrices are products of two of rank ``r``, ``y = U_2 V_2 gelu(U_1 V_1 x + b_1) + b_2``.

    ``x (..., D)`` to the same, ``U_1 (H, r)``, ``V_1 (r, D)``, ``U_2 (D, r)``, ``V_2 (r, H)``; any float dtype.
    Costs ``2 r (D + H)`` multiply-adds a token. Source: Sainath et al., "Low-rank matrix factorization for deep neural
    network training", ICASSP 2013; that the best such matrix is the truncated SVD: Eckart and Young, 1936.

    Args:
        rank: ``r``; None: the rank that makes it 6 times cheaper than the dense FFN.

    Raises:
        ValueError: ``rank`` is not 1 to ``min(hidden_size, intermediate_size)``.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, rank: int | None = None, device=None, dtype=None):
        super().__init__()
        most = min(hidden_size, intermediate_size)
        if rank is None:
            rank = max(1, round(hidden_size * intermediate_size / (6 * (hidden_size + intermediate_size))))
        check(1 <= rank <= most, "rank", rank, f"1 to {most} (the smaller width)")

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.up_v, self.up_u = parameter(rank, hidden_size), parameter(intermediate_size, rank)
        self.down_v, self.down_u = parameter(rank, intermediate_size), parameter(hidden_size, rank)
        self.up_bias, self.down_bias = parameter(intermediate_size), parameter(hidden_size)
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Factors N(0, std / sqrt(r)): an entry of ``U V`` has the variance ``std^2`` of a dense one; biases 0."""
        for factor in (self.up_v, self.up_u, self.down_v, self.down_u):
            nn.init.normal_(factor, 0.0, (std / len(self.up_v) ** 0.5) ** 0.5)
        for bias in (self.up_bias, self.down_bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        z = F.gelu(F.linear(F.linear(x, self.up_v), self.up_u, self.up_bias))
        return F.linear(F.linear(z, self.down_v), self.down_u, self.down_bias)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add of the products."""
        return 2 * tokens * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: each once, however many tokens."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def extra_repr(self) -> str:
        return f"{self.up_v.shape[1]}, {self.up_u.shape[0]}, rank={len(self.up_v)}"
