"""Mixture of experts with one expert a token: the Switch layer.

Differs from the paper: no capacity limit, so no token is dropped; no noise on the router's input in training, nor
dropout in the experts; GELU for ReLU, as in every FFN here; initialised as below, not by a truncated normal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check


def routed_ffn(x: Tensor, expert: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """The FFN ``expert[b]`` for every token ``b``: ``y[b] = gelu(x[b] up[e]^T + up_bias[e]) down[e] + down_bias[e]``.

    ``x (B, D)``, ``expert (B)`` int64, ``up`` and ``down (N, h, D)``, ``up_bias (N, h)``, ``down_bias (N, D)`` to
    ``(B, D)``. Tokens are sorted by expert, so that each expert is two matrix products.
    """
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=len(up)).tolist()
    parts = x.index_select(0, order).split(counts)
    outs = []
    for part, u, b, d, c in zip(parts, up.unbind(), up_bias.unbind(), down.unbind(), down_bias.unbind(), strict=True):
        outs.append(F.linear(F.gelu(F.linear(part, u, b)), d.T, c))
    return torch.cat(outs).index_select(0, order.argsort())


class SwitchFFN(nn.Module):
    """Top-1 mixture of ``N`` small FFNs, ``y = p_i(x) E_i(x)`` with ``p = softmax(W_r x)`` and ``i = argmax p``.

    ``x (..., D)`` to the same; ``E_i`` is an FFN of width ``h``; any float dtype. Costs ``D N + 2 D h`` multiply-adds a
    token: 5.5 times fewer than dense by default with 128 and 512, 5.9 with 512 and 2048. In training
    ``auxiliary_loss = load_balancing * N * sum_i f_i P_i``, ``f_i`` the share of tokens that go to ``i``, ``P_i`` the
    mean of ``p_i``, both over all tokens of the call, padding too.
    Source: Fedus, Zoph, Shazeer, "Switch Transformers", JMLR 2022, arXiv 2101.03961, equations 1, 2 and 4 to 6.

    Args:
        num_experts: ``N``.
        expert_size: ``h``; None: a sixth of ``intermediate_size``.
        load_balancing: ``alpha``, weight of the loss; 0.01 in the paper.

    Raises:
        ValueError: ``num_experts`` or ``expert_size`` is less than 1, or ``load_balancing`` less than 0.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int = 16,
        expert_size: int | None = None,
        load_balancing: float = 0.01,
        device=None,
        dtype=None,
    ):
        super().__init__()
        expert_size = max(1, intermediate_size // 6) if expert_size is None else expert_size
        check(num_experts >= 1, "num_experts", num_experts, "at least 1")
        check(expert_size >= 1, "expert_size", expert_size, "at least 1")
        check(load_balancing >= 0, "load_balancing", load_balancing, "at least 0")
        self.intermediate_size, self.load_balancing = intermediate_size, load_balancing
        self.auxiliary_loss: Tensor | None = None

        def parameter(*shape):
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.up, self.up_bias = parameter(expert_size, hidden_size), parameter(expert_size)
        self.down, self.down_bias = parameter(expert_size, hidden_size), parameter(hidden_size)
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """``up`` N(0, std^2), ``down`` N(0, std^2 H / h): an expert's output varies as the dense FFN's; biases 0.

        The layer's own output starts about ``N`` times smaller, as in the paper: ``p_i`` is little more than ``1 / N``.
        """
        nn.init.normal_(self.up, 0.0, std)
        nn.init.normal_(self.down, 0.0, std * (self.intermediate_size / self.down.shape[1]) ** 0.5)
        nn.init.zeros_(self.up_bias)
        nn.init.zeros_(self.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (B, D)
        probabilities = self.router(flat).softmax(-1)  # (B, N)
        gate, expert = probabilities.max(-1)  # (B)
        self.auxiliary_loss = self._balance(probabilities, expert) if self.training else None
        y = routed_ffn(flat, expert, self.up, self.up_bias, self.down, self.down_bias)
        return (gate[:, None] * y).reshape(x.shape)

    def _balance(self, probabilities: Tensor, expert: Tensor) -> Tensor:
        tokens, experts = max(1, len(expert)), len(self.up)  # no token is no loss, not 0 / 0
        share = torch.bincount(expert, minlength=experts) / tokens  # f, a constant
        return self.load_balancing * experts * (share * probabilities.sum(0) / tokens).sum()

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add: router and expert."""
        return 2 * tokens * (self.router.weight.numel() + 2 * self.up[0].numel())

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: the router once, an expert for each token."""
        expert = self.up[0].numel() + self.up_bias[0].numel() + self.down[0].numel() + self.down_bias[0].numel()
        return (self.router.weight.numel() + tokens * expert) * self.up.element_size()

    def extra_repr(self) -> str:
        experts, expert_size, hidden_size = self.up.shape
        return f"{hidden_size}, {self.intermediate_size}, num_experts={experts}, expert_size={expert_size}"
