"""MONGOOSE: SLIDE with a hash that is learned, and rehashed only when enough codes would change.

A simulation of its quality by dense masked products, as ``hashed.py`` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check
from lookupffn.ffns.hashed import HashedFFN, hash_codes


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension where ``mask``; 0 where it is empty."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


class MongooseFFN(HashedFFN):
    """FFN restricted to neurons retrieved by a SimHash whose projection learns to tell useful neurons from others.

    :class:`HashedFFN` with a learned ``projection P (D, L K)``, trained by ``auxiliary_loss`` alone, the mean over
    tokens that have both kinds of mistake of

        ``auxiliary_weight max(0, mean_{j in N} cos(h(x), h(w_j)) - mean_{j in M} cos(h(x), h(w_j)) + margin)``

    where ``h(v) = tanh(sqrt(D) v / |v| P)`` relaxes the signs, ``w_j = W_1[j]``, ``M`` are the neurons among the
    ``active`` largest ``<x, w_j>`` that were missed, and ``N`` those selected though ``<x, w_j>`` is below the median;
    ``x`` and ``w_j`` are constants. The tables keep the ``P`` that they were built with. They are built at the first
    training step, and again when more than the share ``rehash_threshold`` of all neuron codes would change.

    Source: Chen, Liu, Peng, Xu, Li, Dao, Song, Shrivastava, Re, "MONGOOSE", ICLR 2021: the scheduler, and the triplet
    loss of the learnable LSH. Margin, median and threshold are those of the authors' code, the tanh that of its
    ``TripletNet``. Differs: they cut a random sample of pairs to equal size and take means over the whole batch, and
    measure the change on separate one-bit hashes. ``h`` does not depend on lengths, since the hash does not.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_tables: int | None = None,
        hash_bits: int | None = None,
        active: int | None = None,
        rehash_threshold: float = 0.3,
        margin: float = 1.0,
        auxiliary_weight: float = 1.0,
        device=None,
        dtype=None,
    ):
        sizes = (hidden_size, num_tables, hash_bits, active)
        super().__init__(hidden_size, intermediate_size, *sizes, device=device, dtype=dtype)
        check(0 <= rehash_threshold <= 1, "rehash_threshold", rehash_threshold, "0 to 1")
        check(0 <= margin <= 2, "margin", margin, "0 to 2")
        check(auxiliary_weight >= 0, "auxiliary_weight", auxiliary_weight, "at least 0")
        self.rehash_threshold, self.margin, self.auxiliary_weight = rehash_threshold, margin, auxiliary_weight
        self.projection = nn.Parameter(torch.empty_like(self.hash_weight))
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Draws the projection from N(0, 1 / D); ``std`` is that of the linear layers, which the model draws."""
        super().init_parameters(std)
        nn.init.zeros_(self.hash_weight)
        nn.init.normal_(self.projection, 0.0, len(self.projection) ** -0.5)

    def fresh_projection(self) -> Tensor:
        return self.projection

    @torch.no_grad()
    def advance(self) -> None:
        would_be = hash_codes(self.up.weight, self.projection, self.hash_bits)
        if not self.rehashes or (would_be != self.codes).double().mean() > self.rehash_threshold:
            self.rehash()

    def hash_loss(self, x: Tensor, selected: Tensor) -> Tensor:
        weight = self.up.weight.detach()
        with torch.no_grad():
            inner = F.linear(x, weight)  # (..., H)
            missed = (inner >= inner.topk(self.active).values[..., -1:]) & ~selected
            wrong = (inner < inner.median(-1, keepdim=True).values) & selected
        cosine = F.linear(self._relaxed_hash(x.detach()), self._relaxed_hash(weight))  # (..., H)
        loss = (_masked_mean(cosine, wrong) - _masked_mean(cosine, missed) + self.margin).relu()
        both = missed.any(-1) & wrong.any(-1)
        return self.auxiliary_weight * (loss * both).sum() / both.sum().clamp(min=1)

    def _relaxed_hash(self, v: Tensor) -> Tensor:
        """``h(v)`` of unit length: ``(..., D)`` to ``(..., L K)``."""
        z = F.normalize(v, dim=-1) * v.shape[-1] ** 0.5 @ self.projection
        return F.normalize(z.tanh(), dim=-1)

    def train(self, mode: bool = True) -> MongooseFFN:
        self.auxiliary_loss = None  # holds a graph, with which the module could not be copied
        return super().train(mode)
