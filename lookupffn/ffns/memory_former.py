"""MemoryFormer's memory block: two lookup layers that hash their input's own coordinates, without any projection.

Differs from the paper: its first norm is the one that the model has before every FFN, so this module holds only the
second. The weight of a row is the paper's, the probability of the code; the authors' released code multiplies it by
``sum_j |z_j|``, as LookupFFN does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn import ops
from lookupffn.errors import check


class MemoryLayer(nn.Module):
    """Lookup by the signs of ``x`` itself, ``y = sum_t p_t tables[t, code_t] + bias``: ``x (B, in)`` to ``(B, out)``.

    ``z_t`` are the ``tau`` coordinates from ``t tau`` on, ``code_t = sum_j [z_tj > 0] 2**(tau - 1 - j)``, and
    ``p_t = prod_j sigmoid(2 |z_tj|)``, that code's term of the softmax of ``<z_t, S_i>`` over all sign patterns.
    ``tables (in / tau, 2**tau, out)``; ``bias (out)``, which is in the authors' code.
    """

    row_parameters = ("tables",)

    def __init__(self, in_features: int, out_features: int, code_bits: int, *, device=None, dtype=None):
        super().__init__()
        shape = (in_features // code_bits, 2**code_bits, out_features)
        self.code_bits = code_bits
        self.tables = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(ops.at_least_float32(x.dtype)).unflatten(-1, (len(self.tables), self.code_bits))  # (B, T, tau)
        powers = 2 ** torch.arange(self.code_bits - 1, -1, -1, dtype=torch.int32, device=z.device)
        codes = ((z > 0) * powers).sum(-1, dtype=torch.int32)
        p = F.logsigmoid(2 * z.abs()).sum(-1).exp()
        return ops.call(torch.ops.lookupffn.gather, self.tables, codes[..., None], p[..., None]) + self.bias


class MemoryFormerFFN(nn.Module):
    """Two :class:`MemoryLayer` with a layer norm between, ``y = memory_2(norm(memory_1(x)))``.

    ``x (..., D)``, which should be normed, to the same; float32 or float64. The first has ``D / tau`` tables of
    ``2**tau`` rows of ``D (tau + 2) / tau`` numbers, the second as many of ``2**(tau + 2)`` rows of ``D``: the two bits
    stand for the four times wider middle of a dense FFN. ``intermediate_size`` has no part in it. Costs
    ``2 D^2 (1 + 1 / tau) / tau`` multiply-adds a token: with ``H = 4 D`` 28 times fewer than dense by default, for
    10.5 MiB of tables where ``D`` is 128 (float32).
    Source: Ding et al., "MemoryFormer", NeurIPS 2024, arXiv 2411.12992, section 2; sizes as in the authors' code.

    Args:
        tau: bits of a code in the first layer; 8 in the paper.

    Raises:
        ValueError: ``tau`` is not 1 to 14, or does not divide ``hidden_size``.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, tau: int = 8, device=None, dtype=None):
        super().__init__()
        fits = 1 <= tau <= 14 and hidden_size % tau == 0
        check(fits, "tau", tau, f"1 to 14 and divide hidden_size {hidden_size}")
        middle, where = hidden_size // tau * (tau + 2), {"device": device, "dtype": dtype}
        self.memory_1 = MemoryLayer(hidden_size, middle, tau, **where)
        self.norm = nn.LayerNorm(middle, **where)
        self.memory_2 = MemoryLayer(middle, hidden_size, tau + 2, **where)
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Tables N(0, 0.02^2), the authors' and LookupFFN's, whatever ``std``; biases 0.

        The output starts with the variance ``0.02^2 T E[p^2]``, ``E[p^2] = 0.63**(tau + 2)`` for normal ``z``: at 128
        and 512, a sixth of the standard deviation that the dense FFN starts with where ``std`` is 0.02.
        """
        for memory in (self.memory_1, self.memory_2):
            nn.init.normal_(memory.tables, 0.0, 0.02)
            nn.init.zeros_(memory.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.memory_2(self.norm(self.memory_1(x.reshape(-1, x.shape[-1]))))
        return y.to(x.dtype).reshape(x.shape)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add of rows."""
        return sum(ops.gather_flops(tokens, memory.tables.shape, 1) for memory in (self.memory_1, self.memory_2))

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: biases and norm once, a row of every table for each token."""
        tables = (self.memory_1.tables, self.memory_2.tables)
        once = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        rows = tokens * sum(t.shape[0] * t.shape[2] for t in tables)
        return (once + rows) * tables[0].element_size()

    def extra_repr(self) -> str:
        return f"{len(self.memory_2.bias)}, tau={self.memory_1.code_bits}"
