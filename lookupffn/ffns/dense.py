"""The dense feed-forward layer, the baseline of every comparison: ``y = W_2 gelu(W_1 x + b_1) + b_2``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseFFN(nn.Module):
    """Two matrix products with an exact GELU between: ``x (..., D)`` to the same through width ``intermediate_size``.

    Initialised as any linear layer of the model it stands in. Source: "Attention is all you need", section 3.3, with
    GELU as in BERT and RoBERTa.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, device=device, dtype=dtype)
        self.down = nn.Linear(intermediate_size, hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add of the products."""
        return 2 * tokens * (self.up.weight.numel() + self.down.weight.numel())

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: each once, however many tokens."""
        return sum(p.numel() * p.element_size() for p in self.parameters())
