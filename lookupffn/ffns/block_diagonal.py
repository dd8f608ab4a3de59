"""The dense feed-forward layer with both matrices block-diagonal and a channel shuffle between them.

Differs from ShuffleNet: the two products may have different numbers of blocks, and GELU stands between them, where
ShuffleNet has a batch norm, ReLU and a depthwise convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check


def block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """Product with a block-diagonal matrix, block by block: ``x (B, n p)`` and ``blocks (n, q, p)`` to ``(n, B, q)``.

    ``y[i] = x[:, i p : (i + 1) p] blocks[i]^T``; equal to ``x @ block_diag(*blocks).T`` after ``transpose(0, 1)`` and
    ``flatten(1)``, which callers join with the permutation that comes next.
    """
    n, _, p = blocks.shape
    return torch.bmm(x.unflatten(-1, (n, p)).transpose(0, 1), blocks.mT)


def check_blocks(name: str, blocks: int, hidden_size: int, intermediate_size: int) -> None:
    """Raises ValueError unless ``blocks`` divides both widths."""
    fits = blocks >= 1 and hidden_size % blocks == 0 and intermediate_size % blocks == 0
    widths = f"hidden_size {hidden_size} and intermediate_size {intermediate_size}"
    check(fits, name, blocks, f"at least 1 and divide {widths}")


class BlockDiagonalFFN(nn.Module):
    """Dense FFN with block-diagonal matrices, ``y = diag(W_2) S gelu(diag(W_1) x + b_1) + b_2``, ``S`` a shuffle.

    ``x (..., D)`` to the same; ``W_1 (g_1, H/g_1, D/g_1)``, ``W_2 (g_2, D/g_2, H/g_2)``, rows of a block are outputs;
    any float dtype. ``S`` moves channel ``j`` of block ``i`` to ``j g_1 + i``: a block of ``W_2`` sees every block of
    ``W_1``. Costs ``D H (1 / g_1 + 1 / g_2)`` multiply-adds a token: 5.3 times fewer than dense by default.
    Source: Zhang et al., "ShuffleNet", CVPR 2018, section 3.1.

    Raises:
        ValueError: ``up_blocks`` (``g_1``) or ``down_blocks`` (``g_2``) does not divide both widths.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        up_blocks: int = 4,
        down_blocks: int = 8,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_blocks("up_blocks", up_blocks, hidden_size, intermediate_size)
        check_blocks("down_blocks", down_blocks, hidden_size, intermediate_size)

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.up = parameter(up_blocks, intermediate_size // up_blocks, hidden_size // up_blocks)
        self.down = parameter(down_blocks, hidden_size // down_blocks, intermediate_size // down_blocks)
        self.up_bias, self.down_bias = parameter(intermediate_size), parameter(hidden_size)
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Blocks N(0, g std^2): a ``g``-th of the summands at ``g`` times the variance of a dense matrix; biases 0."""
        for blocks, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            nn.init.normal_(blocks, 0.0, std * len(blocks) ** 0.5)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        z = block_product(x.reshape(-1, x.shape[-1]), self.up)  # (g_1, B, H/g_1)
        z = F.gelu(z + self.up_bias.view(len(z), 1, -1))
        z = z.permute(1, 2, 0).flatten(1)  # (B, H), shuffled
        y = block_product(z, self.down).transpose(0, 1).flatten(1)  # (B, D)
        return (y + self.down_bias).reshape(x.shape)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add of the products."""
        return 2 * tokens * (self.up.numel() + self.down.numel())

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: each once, however many tokens."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def extra_repr(self) -> str:
        widths = f"{self.down_bias.numel()}, {self.up_bias.numel()}"
        return f"{widths}, up_blocks={len(self.up)}, down_blocks={len(self.down)}"
