"""The paper in plain torch, equation by equation: the oracle of every test, never optimised.

Differs from the paper in one thing: the Walsh-Hadamard matrix is orthonormal, and the blocks are larger by
``sqrt(D')`` for it, so that activations keep their size at every stage (docs/math.md, "Scale").

Letters, as everywhere in the project: ``B`` tokens, ``D`` input width, ``D'`` the next power of two, ``E`` output
width, ``T`` tables, ``tau`` code bits, ``K = 2**tau`` rows a table, ``N`` reads, ``R`` repeats, ``b`` block size.

Source: Zeng, Davies, Pulijala, Sankaralingam, Singh, "LookupFFN", ICML 2023, arXiv 2403.07221.
"""

import torch
from torch import Tensor

STAGES = 4  # the 4 of BH4: block-diagonal and Hadamard factors in a row


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``. Raises ValueError for ``n < 1``."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return 1 << (n - 1).bit_length()


def hadamard_matrix(
    size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix ``H (size, size)`` in Sylvester's order; ``H = H^T = H^-1``.

    ``H_1 = [1]``, ``H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)``, hence ``H_mn = H_m (x) H_n``.

    Raises:
        ValueError: ``size`` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of this kind needs a power of two as its size, not {size}")
    signs = torch.ones(1, 1, dtype=dtype, device=device)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)], 0)
    return signs / size**0.5


def bh4_matrix(factors: Tensor) -> Tensor:
    """One repeat of BH4 as an explicit matrix: ``H diag(W_4) H diag(W_3) H diag(W_2) H diag(W_1)``.

    ``factors (4, D'/b, b, b)`` to ``(D', D')``; ``diag(W_i)`` is block-diagonal, rows of a block are outputs.
    """
    size = factors.shape[1] * factors.shape[2]
    hadamard = hadamard_matrix(size, dtype=factors.dtype, device=factors.device)
    product = torch.eye(size, dtype=factors.dtype, device=factors.device)
    for blocks in factors:
        product = hadamard @ torch.block_diag(*blocks) @ product
    return product


def bh4(x: Tensor, weight: Tensor, decay: float, out_features: int) -> Tensor:
    """BH4 projection: ``out_r = decay * M_r x + (1 - decay) * x``, repeats concatenated, first outputs kept.

    ``x (B, D)`` is zero-padded to ``D'``; ``weight (R, 4, D'/b, b, b)``; ``M_r`` is ``bh4_matrix(weight[r])``;
    the result is ``(B, out_features)``, without the bias.
    """
    padded = torch.nn.functional.pad(x, (0, weight.shape[2] * weight.shape[3] - x.shape[1]))
    outs = [decay * padded @ bh4_matrix(factors).T + (1 - decay) * padded for factors in weight]
    return torch.cat(outs, dim=1)[:, :out_features]


def sign_codes(z: Tensor) -> Tensor:
    """Hash codes ``sum_j [z_j > 0] 2**(tau - 1 - j)``: ``z (..., tau)`` to int64 ``(...)``, each in ``[0, K)``.

    A NaN compares false, so its bit is 0 and the code stays in range.
    """
    tau = z.shape[-1]
    return torch.stack([(z[..., j] > 0).long() << (tau - 1 - j) for j in range(tau)]).sum(0)


def sign_score(z: Tensor) -> Tensor:
    """Score of the sign pattern, ``(sum_j m_j) prod_j sigmoid(2 m_j)``, ``m = |z|``: ``(..., tau)`` to ``(...)``."""
    m = z.abs()
    return m.sum(-1) * torch.sigmoid(2 * m).prod(-1)


def bucket_signs(
    code_bits: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """The sign patterns ``S (K, tau)``, entries ``+1`` or ``-1``; row ``i`` is the pattern whose code is ``i``."""
    shifts = torch.arange(code_bits - 1, -1, -1, device=device)
    return ((torch.arange(2**code_bits, device=device)[:, None] >> shifts & 1) * 2 - 1).to(dtype)


def nearest_buckets(z: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    """The ``N`` most probable buckets of a table and their scores, by looking at all ``K`` (the paper's N-term form).

    ``p = softmax_i(<z, S_i>)`` and ``score_i = <z, S_i> p_i``; ``z (..., tau)`` to codes and scores ``(..., N)``,
    most probable first. For ``N = 1`` this equals ``sign_codes`` and ``sign_score``.
    """
    inner = z @ bucket_signs(z.shape[-1], dtype=z.dtype, device=z.device).T  # (..., K)
    codes = inner.argsort(dim=-1, descending=True, stable=True)[..., :reads]
    return codes, (inner * inner.softmax(-1)).gather(-1, codes)


def gather(tables: Tensor, codes: Tensor, scores: Tensor) -> Tensor:
    """``y = sum_t sum_n scores[t, n] tables[t, codes[t, n]]``.

    ``tables (T, K, E)``, ``codes`` and ``scores (B, T, N)`` to ``(B, E)``.
    """
    t = torch.arange(tables.shape[0], device=tables.device)[None, :, None]
    rows = tables[t, codes.long()]  # (B, T, N, E)
    return (scores[..., None] * rows).sum((1, 2))


def lookup_ffn(z: Tensor, tables: Tensor, bias: Tensor, reads: int = 1) -> Tensor:
    """The layer after its projection: ``z (B, T, tau)`` to ``(B, E)``, hash, score, gather and bias."""
    codes, scores = nearest_buckets(z, reads)
    return gather(tables, codes, scores) + bias
