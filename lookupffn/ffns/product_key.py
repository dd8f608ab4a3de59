"""A memory of values read by product keys, in the place of the feed-forward layer.

Differs from the authors' code in sizes, and in a single token in training: it has no variance, so batch norm takes its
running statistics. The values have the learning rate of everything else, where the authors give them one of their own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn import ops
from lookupffn.errors import check
from lookupffn.ffns.block_diagonal import block_product


class ProductKeyFFN(nn.Module):
    """Sum over heads of the ``k`` values whose keys fit the query best, ``y = sum_heads sum_{i in I} w_i v_i``.

    ``I = top_k(<q(x), key_i>)``, ``w`` the softmax of these scores, ``q`` linear with batch norm. The ``n^2`` keys of
    a head are all pairs of two sets of ``n`` sub-keys, ``<q, key_{i n + j}> = <q_1, c_i> + <q_2, c'_j>`` with the
    halves of ``q``, so that the best ``k`` are among ``k^2`` pairs; heads share the values. ``x (..., D)`` to the same,
    float32 or float64. Parameters: ``query``, ``query_norm``, ``keys (heads, 2, n, d_q / 2)``, ``values (n^2, D)``.
    ``intermediate_size`` has no part in it.

    Costs ``heads (D d_q + n d_q + k D)`` multiply-adds a token: by default 5.3 times fewer than dense with 128 and 512,
    10.7 times with 512 and 2048, where larger ``num_keys`` would make the values hundreds of MiB.
    Source: Lample et al., "Large memory layers with product keys", NeurIPS 2019, arXiv 1907.05242, section 3.

    Args:
        num_heads: 4 in the paper.
        num_keys: ``n``, sub-keys in a set; 512 in the paper.
        key_size: ``d_q``, width of a head's query, even; None: an eighth of ``hidden_size``; 512 in the paper.
        top_k: ``k``; 32 in the paper.

    Raises:
        ValueError: ``key_size`` is odd, or an option is out of its range.
    """

    row_parameters = ("values",)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_heads: int = 4,
        num_keys: int = 128,
        key_size: int | None = None,
        top_k: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        key_size = max(2, hidden_size // 16 * 2) if key_size is None else key_size
        check(num_heads >= 1, "num_heads", num_heads, "at least 1")
        check(num_keys >= 1, "num_keys", num_keys, "at least 1")
        check(key_size >= 2 and key_size % 2 == 0, "key_size", key_size, "even and at least 2")
        check(1 <= top_k <= num_keys, "top_k", top_k, f"1 to {num_keys} (num_keys)")
        where = {"device": device, "dtype": dtype}
        self.top_k = top_k
        self.query = nn.Linear(hidden_size, num_heads * key_size, bias=False, **where)  # the norm has a bias
        self.query_norm = nn.BatchNorm1d(num_heads * key_size, **where)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_size // 2, **where))
        self.values = nn.Parameter(torch.empty(num_keys**2, hidden_size, **where))
        self.init_parameters(0.02)

    def init_parameters(self, std: float) -> None:
        """Keys uniform within ``1 / sqrt(d_q / 2)``, values N(0, 1 / D), the authors' whatever ``std``; the output then
        starts with the variance ``heads / (k D)``, at 128 and 512 about the dense FFN's where ``std`` is 0.02."""
        half = self.keys.shape[-1]
        nn.init.uniform_(self.keys, -(half**-0.5), half**-0.5)
        nn.init.normal_(self.values, 0.0, self.values.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        heads, _, n, _ = self.keys.shape
        k = self.top_k
        query = self._normed(self.query(x.reshape(-1, x.shape[-1])))  # (B, heads d_q)
        scores = block_product(query, self.keys.flatten(0, 1)).unflatten(0, (heads, 2))  # (heads, 2, B, n)
        scores, subkeys = scores.topk(k)  # (heads, 2, B, k)
        pairs = scores[:, 0, :, :, None] + scores[:, 1, :, None, :]  # (heads, B, k, k)
        scores, pair = pairs.flatten(-2).topk(k)  # (heads, B, k)
        rows = n * subkeys[:, 0].gather(-1, pair // k) + subkeys[:, 1].gather(-1, pair % k)
        rows, weights = (t.transpose(0, 1).flatten(1) for t in (rows, scores.softmax(-1)))  # (B, heads k)
        y = ops.call(torch.ops.lookupffn.gather, self.values[None], rows.int()[:, None], weights[:, None])
        return y.reshape(x.shape)

    def _normed(self, query: Tensor) -> Tensor:
        norm, batch = self.query_norm, self.training and len(query) > 1
        statistics = (norm.running_mean, norm.running_var)
        return F.batch_norm(query, *statistics, norm.weight, norm.bias, batch, norm.momentum, norm.eps)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add of the products."""
        reads = self.keys.shape[0] * self.top_k
        return 2 * tokens * (self.query.weight.numel() + self.keys.numel() + reads * self.values.shape[1])

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: query, norm and keys once, ``heads k`` values a token."""
        once = sum(p.numel() for p in self.parameters()) - self.values.numel()
        rows = tokens * self.keys.shape[0] * self.top_k
        return (once + rows * self.values.shape[1]) * self.values.element_size()

    def extra_repr(self) -> str:
        heads, _, n, half = self.keys.shape
        return f"{self.values.shape[1]}, num_heads={heads}, num_keys={n}, key_size={2 * half}, top_k={self.top_k}"
