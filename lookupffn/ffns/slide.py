"""SLIDE: of a dense FFN, only the neurons that a hash retrieves for a token; a simulation of its quality."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lookupffn.errors import check
from lookupffn.ffns.hashed import HashedFFN


class SlideFFN(HashedFFN):
    """FFN restricted to neurons retrieved by SimHash with fixed random sparse signs, rehashed ever more rarely.

    :class:`HashedFFN` with a projection of which each column has ``ceil(D / 3)`` entries ``+1`` or ``-1``, the rest 0.
    The tables are built at the first training step and for the ``t``-th time again at the first step that is at least
    ``sum_{i<t} rehash_period exp(rehash_growth i)``.

    Source: Chen, Medini, Farwell, Gobriel, Tai, Shrivastava, "SLIDE", MLSys 2020, arXiv 1903.03129: TopK sampling,
    SimHash by sparse random projection, update schedule. Differs: an FFN's hidden layer, where theirs is a classifier's
    output; buckets have no limit; and where their code fills up neurons from a random point, the code is that point.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_tables: int | None = None,
        hash_bits: int | None = None,
        active: int | None = None,
        rehash_period: int = 50,
        rehash_growth: float = 0.1,
        device=None,
        dtype=None,
    ):
        products = math.ceil(hidden_size / 3)
        sizes = (products, num_tables, hash_bits, active)
        super().__init__(hidden_size, intermediate_size, *sizes, device=device, dtype=dtype)
        check(rehash_period >= 1, "rehash_period", rehash_period, "at least 1")
        check(0 <= rehash_growth <= 1, "rehash_growth", rehash_growth, "0 to 1")
        self.rehash_period, self.rehash_growth = rehash_period, rehash_growth
        self.register_buffer("step", torch.empty((), dtype=torch.int64, device=device))
        self.init_parameters(0.02)

    @torch.no_grad()
    def init_parameters(self, std: float) -> None:
        """Draws the hash and starts the schedule; ``std`` is that of the linear layers, which the model draws."""
        super().init_parameters(std)
        nn.init.zeros_(self.step)
        size = len(self.hash_weight)
        zeros = (size - self.products - 0.5) / size  # a share, of which sparse_ rounds up
        nn.init.sparse_(self.hash_weight, sparsity=zeros).sign_()

    def fresh_projection(self) -> Tensor:
        return self.hash_weight

    def advance(self) -> None:
        built = int(self.rehashes)  # the first time at step 0, a sum over nothing
        if self.step >= self.rehash_period * sum(math.exp(self.rehash_growth * i) for i in range(built)):
            self.rehash()
        self.step += 1
