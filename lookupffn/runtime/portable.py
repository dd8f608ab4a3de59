"""The forward pass of a packed layer in plain torch: the arithmetic of the kernels, for machines without them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lookupffn.runtime.format import Decoded


def packed_project(u: Decoded, x: Tensor) -> Tensor:
    """``z (B, T tau)`` of a packed layer, ``x (B, D)`` float32: what the kernels compute, integers bit for bit.

    Every stage quantises a token, ``q = round(y / scale)`` with ``scale = max |y| / levels``, and computes ``y = H_n
    (weight_scales * (blocks q))``; at last ``z = scale * y * (product of scales) + residual * x + bias``. Sums of
    integers are exact in float64.
    """
    h, tokens = u.header, x.shape[0]
    if u.blocks is None or u.code_bias is None:  # no projection
        return x
    repeats, stages, n, block_out, block_in = u.blocks.shape
    x = F.pad(x, (0, n * block_in - x.shape[1]))
    outs = []
    for r in range(repeats):
        y, scales = x, torch.ones(tokens, 1)
        for s in range(stages):
            if u.levels is not None:
                largest, levels = y.abs().amax(1, keepdim=True), u.levels[r, s]
                tiny = largest < 1e-30
                inverse = (levels / largest).where(~tiny & largest.isfinite(), 0.0)
                scale = (largest / levels).where(~tiny, 0.0).where(largest.isfinite(), torch.nan)
                y, scales = (y.nan_to_num(0.0, 0.0, 0.0) * inverse).round(), scales * scale if s else scale
            y = y.view(tokens, n, 1, block_in).double() @ u.blocks[r, s].mT.double()  # (B, n, 1, block_out)
            y = y.float().view(tokens, n, block_out)
            if u.weight_scales is not None:
                y = y * u.weight_scales[r, s]
            half = 1
            while half < n:  # the butterflies of H_n, in the order of the kernels
                a, b = y.view(tokens, n // (2 * half), 2, half, block_out).unbind(2)
                y, half = torch.stack([a + b, a - b], 2), 2 * half
            y = y.reshape(tokens, n * block_out)
        out = y * (scales * h["scale"])
        outs.append(out + x * h["residual"] if h["residual"] else out)
    return (torch.cat(outs, 1) + u.code_bias)[:, : h["num_tables"] * h["code_bits"]]


def packed_forward(u: Decoded, x: Tensor) -> Tensor:
    """``y (B, E)`` of a packed layer, ``x (B, D)`` float32: the kernels' arithmetic in plain torch.

    Integer tables: a token's scores times table scales are quantised to 0 to 127 with one scale, a 127th of the
    largest; sums of integers are exact.
    """
    h = u.header
    z = packed_project(u, x).view(-1, h["num_tables"], h["code_bits"])
    codes, scores = torch.ops.lookupffn.hash_codes(z, h["reads"])  # (B, T, N)
    if u.table_scales is None:
        return torch.ops.lookupffn.gather(u.tables.float(), codes, scores) + u.bias
    scores = scores * u.table_scales[:, None]
    largest = scores.abs().amax((1, 2), keepdim=True)
    tiny = largest < 1e-30
    inverse = (127 / largest).where(~tiny & largest.isfinite(), 0.0)
    scales = (largest / 127).where(~tiny, 0.0).where(largest.isfinite(), torch.nan)
    quantised = (scores.nan_to_num(0.0, 0.0, 0.0).abs() * inverse).round()
    if u.tables.shape[1] != 2 ** h["code_bits"]:
        codes = codes + (scores < 0) * 2 ** h["code_bits"]
    sums = torch.ops.lookupffn.gather(u.tables.double(), codes, quantised.double())
    return sums.float() * scales[:, 0] + u.bias
