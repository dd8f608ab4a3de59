"""What FFNs with neurons retrieved by a hash share: codes, collisions, and the dense FFN restricted by them.

A simulation of their quality: the selected set, its gradients and the schedule are exactly those of the methods, but
computed by dense products under a mask. ``flops`` and ``bytes_read`` count what the methods themselves would do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check


def recomputing() -> bool:
    """Whether this forward pass is activation checkpointing's second one, which must see the state of the first."""
    return torch._C._current_graph_task_id() != -1  # inside a backward pass; torch's own checkpointing asks this too


def hash_codes(x: Tensor, projection: Tensor, hash_bits: int) -> Tensor:
    """SimHash: ``x (..., D)`` and ``projection (D, L K)`` to ``L`` codes of ``K = hash_bits`` bits, ``(..., L)``.

    ``code[t] = sum_j [z[t, j] > 0] 2**(K-1-j)`` with ``z = x projection``, int32. Never under autocast: a product
    rounded to bfloat16 would move codes.
    """
    with torch.autocast(x.device.type, enabled=False):
        z = x.to(projection.dtype) @ projection
    places = 2 ** torch.arange(hash_bits - 1, -1, -1, dtype=torch.int32, device=x.device)
    return ((z > 0).unflatten(-1, (-1, hash_bits)) * places).sum(-1, dtype=torch.int32)


def count_collisions(codes: Tensor, neuron_codes: Tensor) -> Tensor:
    """Tables in which token and neuron share a code: ``(..., L)`` and ``(H, L)`` to ``(..., H)``, int32."""
    counts = codes.new_zeros(*codes.shape[:-1], len(neuron_codes))
    for token, neuron in zip(codes.unbind(-1), neuron_codes.unbind(-1), strict=True):
        counts += token[..., None] == neuron
    return counts


class HashedFFN(nn.Module):
    """A dense FFN of which each token uses the ``active`` neurons that share its code in most of ``L`` hash tables.

    ``y = b_2 + sum_{j in S(x)} W_2[:, j] gelu(<W_1[j], x> + b_1[j])``, where ``S(x)`` holds the ``active`` neurons with
    the largest ``c_j = sum_t [code_t(x) = code_t(W_1[j])]``. Ties, and neurons without a collision where too few have
    one, go upwards and around from neuron ``code_0(x) H / 2^K``: always the same for a code, but no neuron is favoured.
    Neurons not in ``S(x)`` get neither output nor gradient. ``x (..., hidden_size)`` to the same.

    Neuron codes are those of the last :meth:`rehash`; before the first, those of the present weights. A subclass says
    when to rehash (:meth:`advance`), with what (:meth:`fresh_projection`), and how many entries of a column of the
    projection are not zero (``products``). Without ``num_tables`` the hash costs a 24th of the dense FFN.

    Raises:
        ValueError: an option is out of its range.
    """

    auxiliary_loss: Tensor | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        products: int,
        num_tables: int | None,
        hash_bits: int | None,
        active: int | None,
        **where,
    ):
        super().__init__()
        if hash_bits is None:  # about 8 neurons a bucket
            hash_bits = min(max(round(math.log2(intermediate_size)) - 3, 1), 16)
        check(1 <= hash_bits <= 16, "hash_bits", hash_bits, "1 to 16")
        if num_tables is None:
            num_tables = max(1, round(hidden_size * intermediate_size / (12 * hash_bits * products)))
        active = max(1, intermediate_size // 8) if active is None else active
        check(num_tables >= 1, "num_tables", num_tables, "at least 1")
        check(1 <= active <= intermediate_size, "active", active, f"1 to {intermediate_size} (intermediate_size)")
        self.products, self.num_tables, self.hash_bits, self.active = products, num_tables, hash_bits, active
        self.up = nn.Linear(hidden_size, intermediate_size, **where)
        self.down = nn.Linear(intermediate_size, hidden_size, **where)
        self.register_buffer("hash_weight", torch.empty(hidden_size, num_tables * hash_bits, **where))  # (D, L K)
        where = {"device": self.up.weight.device, "dtype": torch.int32}
        self.register_buffer("codes", torch.empty(intermediate_size, num_tables, **where))  # (H, L)
        self.register_buffer("rehashes", torch.empty((), **where))

    def init_parameters(self, std: float) -> None:
        """Forgets the codes: those of the weights, which the model draws, count until the first :meth:`rehash`."""
        nn.init.zeros_(self.codes)
        nn.init.zeros_(self.rehashes)

    def fresh_projection(self) -> Tensor:
        """The projection ``(D, L K)`` that the next :meth:`rehash` will hash with."""
        raise NotImplementedError

    def advance(self) -> None:
        """Called once a training step, before the forward pass: rehashes when that is due."""
        raise NotImplementedError

    def hash_loss(self, x: Tensor, selected: Tensor) -> Tensor | None:
        """What training the hash adds to the loss, given the mask ``selected (..., H)`` of ``S(x)``."""
        return None

    @torch.no_grad()
    def rehash(self) -> None:
        """Rebuilds the hash tables from the present weights."""
        self.hash_weight.copy_(self.fresh_projection())
        self.codes.copy_(hash_codes(self.up.weight, self.hash_weight, self.hash_bits))
        self.rehashes += 1

    @torch.no_grad()
    def select(self, x: Tensor) -> Tensor:
        """Mask of ``S(x)``: ``(..., D)`` to bool ``(..., H)`` with ``active`` neurons each."""
        projection = self.hash_weight if self.rehashes else self.fresh_projection()
        neurons = self.codes if self.rehashes else hash_codes(self.up.weight, projection, self.hash_bits)
        codes, size = hash_codes(x, projection, self.hash_bits), len(neurons)
        start = codes[..., :1].long() * size >> self.hash_bits
        turn = (start - 1 - torch.arange(size, device=x.device)) % size  # H - 1 at start, then down to 0
        best = (count_collisions(codes, neurons) * size + turn).topk(self.active, sorted=False).indices  # no two equal
        return torch.zeros_like(turn, dtype=torch.bool).scatter_(-1, best, True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not recomputing():
            self.advance()
        selected = self.select(x)
        self.auxiliary_loss = self.hash_loss(x, selected) if self.training else None
        return self.down(F.gelu(self.up(x).masked_fill(~selected, 0)))

    def flops(self, tokens: int) -> int:
        """Floating-point operations of the method over ``tokens`` tokens, two a multiply-add: the hash of the token
        (of sparse signs those that are not zero) and both products of its active neurons."""
        return (
            2 * tokens * (self.codes.shape[1] * self.hash_bits * self.products + 2 * self.active * len(self.down.bias))
        )

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters read: the projection's non-zero entries and ``b_2`` once, and for each token a row of
        ``W_1``, a column of ``W_2`` and a number of ``b_1`` an active neuron; not the buckets' lists of neurons."""
        once = self.num_tables * self.hash_bits * self.products + len(self.down.bias)
        return self.up.weight.element_size() * (once + tokens * self.active * (2 * len(self.down.bias) + 1))

    def extra_repr(self) -> str:
        return f"num_tables={self.num_tables}, hash_bits={self.hash_bits}, active={self.active}"
