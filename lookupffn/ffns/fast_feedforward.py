"""A binary tree of neurons over small feed-forward layers: soft in training, one path in evaluation.

Differs from the paper: the hardening loss is a mean over tokens and nodes, not a sum, so that its weight is one for any
batch and depth (the authors' code averages too); GELU for ReLU, as in every FFN here; no random transposition of
children.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check
from lookupffn.ffns.switch import routed_ffn


class FastFeedForward(nn.Module):
    """Mixture of ``2^d`` small FFNs, ``y = sum_l c_l(x) E_l(x)``, ``c_l`` the product of the choices on the way to it.

    Node ``i`` has the children ``2i + 1`` and ``2i + 2`` and chooses the second with probability
    ``p_i = sigmoid(<w_i, x> + b_i)``, the first with ``1 - p_i``. In evaluation each token takes the more probable way
    and ``y`` is its one leaf. In training ``auxiliary_loss = hardening * mean over tokens and nodes of H(p_i)``, ``H``
    the entropy in nats. ``x (..., D)`` to the same; ``E_l`` is an FFN of width ``leaf_size``; any float dtype.

    Evaluation costs ``d D + 2 D leaf_size`` multiply-adds a token, 5.9 times fewer than dense by default; training
    computes all leaves, 1.3 times the dense FFN.
    Source: Belcak and Wattenhofer, "Fast feedforward networks", 2023, arXiv 2308.14711, algorithm 1 and "Hardening".

    Args:
        depth: ``d``.
        leaf_size: None: a sixth of ``intermediate_size``.
        hardening: ``h``, weight of the loss; 3 in the paper, 5 and 10 in its transformers.

    Raises:
        ValueError: ``depth`` is not 1 to 16, ``leaf_size`` less than 1, or ``hardening`` less than 0.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        depth: int = 3,
        leaf_size: int | None = None,
        hardening: float = 3.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        leaf_size = max(1, intermediate_size // 6) if leaf_size is None else leaf_size
        check(1 <= depth <= 16, "depth", depth, "1 to 16")
        check(leaf_size >= 1, "leaf_size", leaf_size, "at least 1")
        check(hardening >= 0, "hardening", hardening, "at least 0")
        self.intermediate_size, self.depth, self.hardening = intermediate_size, depth, hardening
        self.auxiliary_loss: Tensor | None = None

        def parameter(*shape):
            return nn.Parameter(torch.empty(2**depth, *shape, device=device, dtype=dtype))

        self.nodes = nn.Linear(hidden_size, 2**depth - 1, device=device, dtype=dtype)  # level by level from the root
        self.up, self.up_bias = parameter(leaf_size, hidden_size), parameter(leaf_size)
        self.down, self.down_bias = parameter(leaf_size, hidden_size), parameter(hidden_size)
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """``up`` N(0, std^2), ``down`` N(0, std^2 H / leaf_size): a leaf's output varies as the dense FFN's; biases 0.

        In training the output starts with about ``2^-d`` of that variance, the mean of all leaves.
        """
        nn.init.normal_(self.up, 0.0, std)
        nn.init.normal_(self.down, 0.0, std * (self.intermediate_size / self.down.shape[1]) ** 0.5)
        nn.init.zeros_(self.up_bias)
        nn.init.zeros_(self.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (B, D)
        if self.training:
            return self._soft(flat).reshape(x.shape)
        self.auxiliary_loss = None
        y = routed_ffn(flat, self._leaf(flat), self.up, self.up_bias, self.down, self.down_bias)
        return y.reshape(x.shape)

    def _soft(self, x: Tensor) -> Tensor:
        logits = self.nodes(x)  # (B, 2^d - 1)
        p = logits.sigmoid()
        entropy = F.softplus(logits) - p * logits  # -p log p - (1 - p) log(1 - p), finite for any logit
        self.auxiliary_loss = self.hardening * entropy.sum() / max(1, entropy.numel())
        choice = x.new_ones(len(x), 1)
        for level in range(self.depth):
            right = p[:, 2**level - 1 : 2 ** (level + 1) - 1]
            choice = torch.stack([choice * (1 - right), choice * right], -1).flatten(1)  # (B, 2^(level + 1))
        # The mixture is linear, so it goes into the activations, and all leaves are two products.
        z = F.gelu(F.linear(x, self.up.flatten(0, 1), self.up_bias.flatten()))  # (B, 2^d leaf_size)
        z = (z.unflatten(1, self.up_bias.shape) * choice[..., None]).flatten(1)
        return z @ self.down.flatten(0, 1) + choice @ self.down_bias

    def _leaf(self, x: Tensor) -> Tensor:
        """The leaf of each token, int64 ``(B)``: of each level only the node on the token's path is computed."""
        node = x.new_zeros(len(x), dtype=torch.long)
        for _ in range(self.depth):
            logit = torch.einsum("bd,bd->b", self.nodes.weight[node], x) + self.nodes.bias[node]
            node = 2 * node + 1 + (logit >= 0)
        return node - (2**self.depth - 1)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of an evaluation over ``tokens`` tokens, two a multiply-add: path and leaf."""
        return 2 * tokens * (self.depth * self.nodes.in_features + 2 * self.up[0].numel())

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that an evaluation reads, all of them by token: the nodes of a path and its leaf."""
        path = self.depth * (self.nodes.in_features + 1)
        leaf = self.up[0].numel() + self.up_bias[0].numel() + self.down[0].numel() + self.down_bias[0].numel()
        return tokens * (path + leaf) * self.up.element_size()

    def extra_repr(self) -> str:
        _, leaf_size, hidden_size = self.up.shape
        return f"{hidden_size}, {self.intermediate_size}, depth={self.depth}, leaf_size={leaf_size}"
