"""YOSO as an FFN: a neuron fires for a token with the probability that a random hash brings them together.

Computed by dense products with the sampled weights. Its own way of executing, which ``flops`` and ``bytes_read`` count,
is the same sum in another order: values are summed once into ``m`` tables of ``2^tau`` rows, and a token reads ``m``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.errors import check
from lookupffn.ffns.hashed import count_collisions, hash_codes, recomputing
from lookupffn.reference import hadamard_matrix, next_power_of_two

ROTATIONS = 3  # the factors H D of a fast random rotation


class YosoFFN(nn.Module):
    """Attention of tokens to ``H = intermediate_size`` learned keys, by Bernoulli sampling with ``m`` hashes.

    ``y = l2(sum_j B_j values[j]) + bias``, where ``B_j = 1/m sum_{i<m} [code_i(x) = code_i(keys[j])]`` estimates
    ``(1 - arccos(s_j) / pi)^tau``, ``s_j = cos(x, keys[j])``, and ``l2`` scales to length 1. Its gradient is the
    paper's lower bound, ``dB_j / ds_j = tau / 2 B_j``. ``x (..., hidden_size)`` to the same.

    A code has ``tau = hash_bits`` bits, signs of a fast random rotation ``H D_3 H D_2 H D_1 x`` (Walsh-Hadamard ``H``,
    random signs ``D_i``, ``x`` padded to ``D'``, the next power of two), repeated ``R = ceil(m tau / D')`` times. As in
    the paper the hashes are resampled in each training step; evaluation keeps those of the last one. Without
    ``num_hashes``, as many as cost a sixth of the dense FFN.

    Parameters: ``keys (H, D)`` and ``values (H, D)``, N(0, std^2); ``bias (D)``, 0. The buffer ``seed`` determines the
    hashes and counts up with the steps.

    Source: Zeng, Xiong, Ravi, Acharya, Fung, Singh, "You Only Sample (Almost) Once", ICML 2021, arXiv 2111.09714,
    section 3: Bernoulli sampling, the gradient's lower bound, N-YOSO's scaling, fast random projection; as an FFN,
    ``YOSOFFN`` in the code of "LookupFFN", ICML 2023.

    Raises:
        ValueError: an option is out of its range.
    """

    auxiliary_loss: Tensor | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_hashes: int | None = None,
        hash_bits: int = 8,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check(1 <= hash_bits <= 16, "hash_bits", hash_bits, "1 to 16")
        self.padded = next_power_of_two(hidden_size)  # D'
        if num_hashes is None:  # by their cost in flops
            each = hash_bits * ROTATIONS * math.log2(self.padded) + 2 * hidden_size
            num_hashes = max(1, round(4 * hidden_size * intermediate_size / 6 / each))
        check(num_hashes >= 1, "num_hashes", num_hashes, "at least 1")
        self.num_hashes, self.hash_bits = num_hashes, hash_bits
        self.repeats = math.ceil(num_hashes * hash_bits / self.padded)  # R
        where = {"device": device, "dtype": dtype}
        self.keys = nn.Parameter(torch.empty(intermediate_size, hidden_size, **where))
        self.values = nn.Parameter(torch.empty(intermediate_size, hidden_size, **where))
        self.bias = nn.Parameter(torch.empty(hidden_size, **where))
        self.register_buffer("seed", torch.empty((), device=device, dtype=torch.int64))
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Draws keys and values from N(0, std^2), and the seed of the hashes; the bias is 0."""
        nn.init.normal_(self.keys, 0.0, std)
        nn.init.normal_(self.values, 0.0, std)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.seed, int(torch.randint(2**62, (), device="cpu")))

    def projection(self) -> Tensor:
        """The ``R`` rotations as one matrix ``(D, m tau)``: ``x projection`` are the numbers whose signs are hashed."""
        where = {"device": self.keys.device, "dtype": self.keys.dtype}
        generator = torch.Generator().manual_seed(int(self.seed))  # on the CPU: the same hashes on every device
        shape = (ROTATIONS, self.repeats, 1, self.padded)
        signs = torch.randint(2, shape, generator=generator, device="cpu").mul(2).sub(1).to(**where)
        hadamard = hadamard_matrix(self.padded, **where)
        rows = torch.eye(len(self.bias), self.padded, **where)
        for diagonal in signs:
            rows = (rows * diagonal) @ hadamard  # (R, D, D')
        return rows.transpose(0, 1).flatten(1)[:, : self.num_hashes * self.hash_bits]

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not recomputing():
            self.seed += 1
        with torch.no_grad():
            projection = self.projection()
            codes, key_codes = (hash_codes(v, projection, self.hash_bits) for v in (x, self.keys))
            counts = count_collisions(codes, key_codes)  # (..., H)
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.keys, dim=-1))  # (..., H)
        # In value 1, but with the derivative of the lower bound
        slope = 1 + self.hash_bits / 2 * (cosine - cosine.detach())
        fired = counts.to(cosine.dtype) / self.num_hashes * slope
        return F.normalize(fired @ self.values, dim=-1) + self.bias

    def flops(self, tokens: int) -> int:
        """Floating-point operations over ``tokens`` tokens, the tables being made: the rotations' additions, one each,
        since they have no products, and the rows read, two a number, as for any FFN that reads rows."""
        rotation = self.repeats * ROTATIONS * self.padded * int(math.log2(self.padded))
        return tokens * (rotation + 2 * self.num_hashes * len(self.bias))

    def bytes_read(self, tokens: int) -> int:
        """Bytes read: the signs of the rotations, a number each, and the bias once; ``m`` table rows a token."""
        once = self.repeats * ROTATIONS * self.padded + len(self.bias)
        return self.keys.element_size() * (once + tokens * self.num_hashes * len(self.bias))

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, {len(self.keys)}, num_hashes={self.num_hashes}, hash_bits={self.hash_bits}"
