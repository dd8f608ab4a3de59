"""The three operations of the layer as PyTorch operators: BH4 projection, hash and gather.

Each is a ``torch.library`` operator with a shape function, a backward operator and a formula for PyTorch's flop
counter, so ``torch.compile``, ``torch.export``, meta tensors and ``FlopCounterMode`` all see it as one operation.
Each equals the function of ``reference.py`` that its docstring names, on every device, up to rounding.

On the CPU hash and gather run in the compiled kernels (``native.py``), forward and backward, for float32 and bfloat16;
elsewhere, in float64, and with ``LOOKUPFFN_NATIVE=0`` in plain PyTorch.

Differs from the textbook: the Hadamard of size ``D'`` is ``H_n (x) H_b`` with ``n = D'/b`` blocks, so ``H_b`` is
multiplied into the blocks once a call (their gradient comes back through it) and only ``H_n`` acts on activations.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from lookupffn import native
from lookupffn.reference import hadamard_matrix

MATRIX_WIDTH = 256  # up to this width many tokens are projected by one dense matrix, see _as_matrix
MAX_READS = 4  # buckets probed per table; more would need a search instead of the closed form below


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which codes and scores of data in ``dtype`` are computed."""
    return torch.promote_types(dtype, torch.float32)


def refuse_forward_mode(*inputs: object) -> None:
    """Raises NotImplementedError where an input carries a forward-mode tangent (``torch.func.jvp``, ``jacfwd``).

    The operators have no such derivative, and where no input requires a gradient torch would take it for zero.
    """
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise NotImplementedError(
            "lookup layers have no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors): use a backward pass"
        )


def call(operator: Callable, *inputs: Any) -> Any:
    """What the operator gives for inputs that fit it, unchecked but for :func:`refuse_forward_mode`."""
    refuse_forward_mode(*inputs)
    return operator(*inputs)


def _have_kernels() -> bool:
    """Whether the compiled kernels are there; where they are not, what they would have done is slow, and says so."""
    if native.available():
        return True
    native.warn_if_absent()
    return False


# ---- BH4 projection ----------------------------------------------------------------------------------------------


@functools.lru_cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard_matrix(size, dtype=dtype, device=device)


def _times_hadamard(blocks: Tensor) -> Tensor:
    """``H_b @ block`` for every block, in float32 or better: ``(..., b, b)`` to the same."""
    hadamard = _hadamard(blocks.shape[-1], at_least_float32(blocks.dtype), blocks.device)
    return (hadamard @ blocks.to(hadamard.dtype)).to(blocks.dtype)


class _BH4Stages:
    """The stages, four in the paper, on activations ``(R, n, B, b)``: both products are plain matrix products."""

    def __init__(self, x: Tensor, weight: Tensor):
        self.repeats, self.stages, self.n, self.b, _ = weight.shape
        tokens = x.shape[0]
        # Folding costs b^3 a block whatever the batch; below b tokens it is cheaper to transform the activations.
        self.fold = tokens > self.b
        self.blocks = (_times_hadamard(weight) if self.fold else weight).flatten(2, 2)  # (R, 4, n, b, b)
        self.hadamard_b = _hadamard(self.b, x.dtype, x.device)
        self.hadamard_n = _hadamard(self.n, x.dtype, x.device)
        x = F.pad(x, (0, self.n * self.b - x.shape[1]))
        self.x = x.view(tokens, self.n, self.b).transpose(0, 1).expand(self.repeats, -1, -1, -1)

    def across_blocks(self, y: Tensor) -> Tensor:
        """``H_n`` over the block index, its own transpose: ``(R, n, B, b)`` to the same."""
        return (self.hadamard_n @ y.flatten(2)).view(y.shape) if self.n > 1 else y

    def forward(self, i: int, y: Tensor) -> Tensor:
        y = y @ self.blocks[:, i].mT
        return self.across_blocks(y if self.fold else y @ self.hadamard_b)

    def backward(self, i: int, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of stage ``i`` with input ``y``: to its input, and to ``weight[:, i]``."""
        grad = self.across_blocks(grad)
        if not self.fold:
            grad = grad @ self.hadamard_b
        grad_blocks = grad.mT @ y
        return grad @ self.blocks[:, i], _times_hadamard(grad_blocks) if self.fold else grad_blocks


def _as_matrix(tokens: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the whole projection is cheaper as one dense matrix, built in each call.

    More multiply-adds, but in one large product instead of ``stages`` times ``R n`` small ones, which run at a tenth of
    its rate; measured on the CPU at widths of 128 to 1024. Not in 16 bits, where the matrix would be rounded.
    """
    width = weight.shape[2] * weight.shape[3]
    return tokens >= 4 * width and width <= MATRIX_WIDTH and dtype in (torch.float32, torch.float64)


def _bh4_matrix(weight: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
    """BH4 with its residual as a matrix ``(D', R D')``, the projection of the identity."""
    eye = torch.eye(weight.shape[2] * weight.shape[3], dtype=dtype, device=weight.device)
    return _bh4_stages(eye, weight, decay)


def _bh4_stages(x: Tensor, weight: Tensor, decay: float) -> Tensor:
    """All outputs ``(B, R D')`` by the stages."""
    stages = _BH4Stages(x, weight)
    y = stages.x
    for i in range(stages.stages):
        y = stages.forward(i, y)
    # The last sum in float32, so that z, whose sign is the code, is not rounded once more.
    out = y.to(at_least_float32(x.dtype)).mul_(decay).add_(stages.x, alpha=1 - decay)
    return out.permute(2, 0, 1, 3).flatten(1)


@torch.library.custom_op("lookupffn::bh4", mutates_args=())
def _bh4(x: Tensor, weight: Tensor, decay: float, out_features: int) -> Tensor:
    if _as_matrix(x.shape[0], weight, x.dtype):
        return x @ _bh4_matrix(weight, decay, x.dtype)[: x.shape[1], :out_features]
    return _bh4_stages(x, weight, decay)[:, :out_features].contiguous()


@_bh4.register_fake
def _(x, weight, decay, out_features):
    return x.new_empty(x.shape[0], out_features, dtype=at_least_float32(x.dtype))


@torch.library.custom_op("lookupffn::bh4_backward", mutates_args=())
def _bh4_backward(grad: Tensor, x: Tensor, weight: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    if not _as_matrix(x.shape[0], weight, x.dtype):
        return _bh4_stages_backward(grad, x, weight, decay)
    matrix = _bh4_matrix(weight, decay, x.dtype)
    grad_x = grad @ matrix[: x.shape[1], : grad.shape[1]].mT
    # The gradient of the matrix is that of the stages' outputs for the identity.
    grad_matrix = F.pad(x.mT @ grad, (0, 0, 0, len(matrix) - x.shape[1]))
    eye = torch.eye(len(matrix), dtype=x.dtype, device=x.device)
    return grad_x, _bh4_stages_backward(grad_matrix, eye, weight, decay)[1]


def _bh4_stages_backward(grad: Tensor, x: Tensor, weight: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    stages = _BH4Stages(x, weight)
    inputs = [stages.x]  # recomputed: cheaper than keeping four activations a repeat from the forward pass
    for i in range(stages.stages - 1):
        inputs.append(stages.forward(i, inputs[-1]))
    tokens, n, b, repeats = x.shape[0], stages.n, stages.b, stages.repeats
    grad = F.pad(grad, (0, repeats * n * b - grad.shape[1])).to(x.dtype)
    grad = grad.view(tokens, repeats, n, b).permute(1, 2, 0, 3)  # (R, n, B, b)
    grad_x = grad.sum(0) * (1 - decay)
    grad = grad * decay
    grad_weight = torch.empty_like(weight)
    for i in reversed(range(stages.stages)):
        grad, grad_weight[:, i] = stages.backward(i, inputs[i], grad)
    grad_x = (grad_x + grad.sum(0)).transpose(0, 1).reshape(tokens, n * b)
    return grad_x[:, : x.shape[1]].contiguous(), grad_weight


@_bh4_backward.register_fake
def _(grad, x, weight, decay):
    return torch.empty_like(x), torch.empty_like(weight)


def _bh4_setup(ctx, inputs, output):
    x, weight, ctx.decay, _ = inputs
    ctx.save_for_backward(x, weight)


def _bh4_grad(ctx, grad):
    return *_bh4_backward(grad, *ctx.saved_tensors, ctx.decay), None, None


_bh4.register_autograd(_bh4_grad, setup_context=_bh4_setup)


def bh4(x: Tensor, weight: Tensor, decay: float, out_features: int) -> Tensor:
    """BH4 projection, equal to ``reference.bh4``: ``x (B, D)`` to ``(B, out_features)``, in float32 or better.

    ``weight (R, stages, n, b, b)``, 4 stages in the paper, ``n b = D'``, powers of two, in the floating-point dtype of
    ``x``. The result is float64 for float64 and else float32. Differentiable in ``x`` and ``weight``.

    Raises:
        ValueError: shapes or dtypes do not fit each other; the message names them.
    """
    if x.dim() != 2 or weight.dim() != 5 or weight.shape[3] != weight.shape[4]:
        raise ValueError(
            f"bh4 needs x (B, D) and weight (R, stages, n, b, b), not {list(x.shape)}, {list(weight.shape)}"
        )
    for size in weight.shape[2:4]:
        if size < 1 or size & (size - 1):
            raise ValueError(f"bh4: n and b must be powers of two in weight (R, stages, n, b, b), {list(weight.shape)}")
    width = weight.shape[2] * weight.shape[3]
    fits = x.shape[1] <= width and 0 < out_features <= weight.shape[0] * width
    if not fits or x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(
            f"bh4: x {x.dtype} of width {x.shape[1]} and {out_features} outputs do not fit weight {weight.dtype} "
            f"{list(weight.shape)}, which takes up to {width} inputs and gives up to {weight.shape[0] * width}"
        )
    return call(_bh4, x, weight, decay, out_features)


# ---- Hash ----------------------------------------------------------------------------------------------------------


def _bit_value(z: Tensor) -> Tensor:
    """What each bit adds to a code, ``2**(tau - 1 - j)``: int32 ``(tau,)``."""
    return 1 << torch.arange(z.shape[-1] - 1, -1, -1, dtype=torch.int32, device=z.device)


def _kernels_hash(z: Tensor) -> bool:
    return z.device.type == "cpu" and z.dtype == torch.float32 and _have_kernels()


@torch.library.custom_op("lookupffn::hash_codes", mutates_args=())
def _hash_codes(z: Tensor, reads: int) -> tuple[Tensor, Tensor]:
    if _kernels_hash(z):
        return torch.ops.lookupffn.native_hash_codes(z, reads, "")
    m, bit_value = z.abs(), _bit_value(z)
    code = ((z > 0) * bit_value).sum(-1, dtype=torch.int32)
    total, probability = m.sum(-1), torch.sigmoid(2 * m).prod(-1)  # of the sign pattern; flips only lower them

    # Flipping the set F of bits lowers <z, S> by 2 sum_F m. With m_1 <= m_2 <= m_3 the smallest magnitudes, the
    # cheapest sets are {}, {1}, {2} and then {3} or {1, 2}. Ties go to the bit that comes first.
    costs, flips = [torch.zeros_like(total)], [torch.zeros_like(code)]
    left = m
    for _ in range(reads - 1):
        cost, position = left.min(-1)
        costs.append(cost)
        flips.append(bit_value[position])
        left = left.scatter(-1, position[..., None], torch.inf)
    if reads == MAX_READS:
        pair = costs[1] + costs[2]
        flips[3] = torch.where(costs[3] < pair, flips[3], flips[1] | flips[2])
        costs[3] = torch.minimum(costs[3], pair)
    cost = torch.stack(costs, -1)
    codes = code[..., None] ^ torch.stack(flips, -1)
    scores = (total[..., None] - 2 * cost) * (probability[..., None] * torch.exp(-2 * cost))
    return codes, scores


@_hash_codes.register_fake
def _(z, reads):
    shape = (*z.shape[:-1], reads)
    return z.new_empty(shape, dtype=torch.int32), z.new_empty(shape)


@torch.library.custom_op("lookupffn::hash_codes_backward", mutates_args=())
def _hash_codes_backward(grad: Tensor, z: Tensor, codes: Tensor) -> Tensor:
    if _kernels_hash(z):
        return torch.ops.lookupffn.native_hash_codes_backward(grad, z, codes, "")
    # A pattern that flips the set F has inner = sum m - 2 sum_F m and probability p; with score = inner p,
    # d score / dm_j = p + 2 score q_j with q_j = sigmoid(-2 m_j), less 2 p + 2 score where j is in F.
    m = z.abs()
    q = torch.sigmoid(-2 * m)
    total, probability = m.sum(-1), (1 - q).prod(-1)
    p = grad[..., 0] * probability  # here and below p and score carry the gradient that comes in
    score = p * total
    constant, slope = p, 2 * score
    correction: Tensor | int = 0
    for n in range(1, codes.shape[-1]):
        flipped = ((codes[..., n, None] ^ codes[..., :1]) & _bit_value(z) != 0).to(z.dtype)  # (B, T, tau)
        cost = (flipped * m).sum(-1)
        p = grad[..., n] * probability * torch.exp(-2 * cost)
        score = p * (total - 2 * cost)
        constant, slope = constant + p, slope + 2 * score
        correction = correction + flipped * (2 * (p + score))[..., None]
    return (q * slope[..., None] + constant[..., None] - correction) * z.sign()


@_hash_codes_backward.register_fake
def _(grad, z, codes):
    return torch.empty_like(z)


def _hash_codes_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])
    ctx.mark_non_differentiable(output[0])


def _hash_codes_grad(ctx, _, grad):
    return _hash_codes_backward(grad, *ctx.saved_tensors), None


_hash_codes.register_autograd(_hash_codes_grad, setup_context=_hash_codes_setup)


def hash_codes(z: Tensor, reads: int = 1) -> tuple[Tensor, Tensor]:
    """Multi-probe hashing: the ``reads`` nearest buckets of each table and their scores.

    Equal to ``reference.nearest_buckets`` but for the order of ties.

    ``z (B, T, tau)`` float32 or float64 to codes int32 and scores, both ``(B, T, reads)``, nearest bucket first: it is
    the sign pattern, ``code = sum_j [z_j > 0] 2**(tau-1-j)``, ``score = (sum_j |z_j|) prod_j sigmoid(2 |z_j|)``.
    Differentiable in ``z`` through the scores alone; codes are constants (paper, section 3).

    Raises:
        ValueError: ``z`` has more than 16 bits a code or a narrow dtype, or fewer buckets than ``reads``.
    """
    if z.dtype not in (torch.float32, torch.float64) or z.dim() != 3 or not 1 <= z.shape[-1] <= 16:
        raise ValueError(f"hash_codes needs z (B, T, 1 to 16) in float32 or float64, not {list(z.shape)} {z.dtype}")
    if not 1 <= reads <= min(MAX_READS, 2 ** z.shape[-1]):
        raise ValueError(f"reads must be 1 to {min(MAX_READS, 2 ** z.shape[-1])} with {z.shape[-1]} bits, not {reads}")
    return call(_hash_codes, z, reads)


# ---- Gather --------------------------------------------------------------------------------------------------------
# Without the kernels, PyTorch's embedding_bag with weights: it is exactly this sum and never forms the (B, T, N, E)
# rows, neither forward nor backward; a loop over tables is 2 to 5 times slower (benchmarked while this was written).


def _kernels_gather(tables: Tensor, codes: Tensor, scores: Tensor) -> bool:
    fits = tables.device.type == "cpu" and tables.numel() > 0 and codes.shape[2] > 0
    fits = fits and tables.dtype in (torch.float32, torch.bfloat16)
    return fits and codes.dtype == torch.int32 and scores.dtype == torch.float32 and _have_kernels()


def _bags(tables: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The flat view of the tables ``(T K, E)``, the rows read ``(B T N)``, and the bag offsets ``(B)``."""
    num_tables, num_rows, _ = tables.shape
    first_row = torch.arange(num_tables, device=tables.device)[:, None] * num_rows
    rows = (codes + first_row).flatten(1)  # (B, T N), int64
    offsets = torch.arange(rows.shape[0], device=tables.device) * rows.shape[1]
    return tables.flatten(0, 1), rows.flatten(), offsets


@torch.library.custom_op("lookupffn::gather", mutates_args=())
def _gather(tables: Tensor, codes: Tensor, scores: Tensor) -> Tensor:
    if _kernels_gather(tables, codes, scores):
        return torch.ops.lookupffn.native_gather(tables, codes, scores, "")
    flat, rows, offsets = _bags(tables, codes)
    weights = scores.to(tables.dtype).flatten()
    return F.embedding_bag(rows, flat, offsets, mode="sum", per_sample_weights=weights)


@_gather.register_fake
def _(tables, codes, scores):
    return tables.new_empty(codes.shape[0], tables.shape[2])


@torch.library.custom_op("lookupffn::gather_backward", mutates_args=())
def _gather_backward(grad: Tensor, tables: Tensor, codes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    if _kernels_gather(tables, codes, scores):
        return torch.ops.lookupffn.native_gather_backward(grad, tables, codes, scores, "")
    flat, rows, offsets = _bags(tables, codes)
    weights = scores.to(tables.dtype).flatten()
    bag = torch.arange(codes.shape[0], device=tables.device).repeat_interleave(codes.shape[1] * codes.shape[2])
    grad = grad.contiguous()
    grad_tables = torch.ops.aten._embedding_bag_dense_backward(
        grad, rows, bag, offsets, offsets, len(flat), False, 0, weights, -1
    )  # bag sizes and maxima (given offsets as placeholders) are read in the mean and max modes only; 0 is sum
    grad_scores = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, flat, rows, offsets, bag, 0)
    return grad_tables.view_as(tables), grad_scores.view_as(scores).to(scores.dtype)


@_gather_backward.register_fake
def _(grad, tables, codes, scores):
    return torch.empty_like(tables), torch.empty_like(scores)


def _gather_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gather_grad(ctx, grad):
    grad_tables, grad_scores = _gather_backward(grad, *ctx.saved_tensors)
    return grad_tables, None, grad_scores


_gather.register_autograd(_gather_grad, setup_context=_gather_setup)


def gather(tables: Tensor, codes: Tensor, scores: Tensor) -> Tensor:
    """Weighted sum of table rows, equal to ``reference.gather``, with every index checked.

    ``y[b] = sum_t sum_n scores[b, t, n] tables[t, codes[b, t, n]]``: ``tables (T, K, E)``, ``codes`` int32 and
    ``scores`` both ``(B, T, N)``, to ``(B, E)`` in the dtype of the tables. Differentiable in tables and scores.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
        IndexError: a code lies outside ``[0, K)``.
    """
    refuse_forward_mode(tables, scores)
    if tables.dim() != 3 or codes.dim() != 3 or codes.shape != scores.shape or codes.shape[1] != tables.shape[0]:
        raise ValueError(
            f"gather needs tables (T, K, E), codes and scores (B, T, N), not {list(tables.shape)}, "
            f"{list(codes.shape)} and {list(scores.shape)}"
        )
    if codes.dtype != torch.int32 or not tables.is_floating_point() or not scores.is_floating_point():
        raise ValueError(
            f"gather needs codes in int32, tables and scores in floating point, not codes {codes.dtype}, tables "
            f"{tables.dtype} and scores {scores.dtype}"
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < tables.shape[1]:
        raise IndexError(f"codes from {int(codes.min())} to {int(codes.max())} for tables of {tables.shape[1]} rows")
    return _gather(tables, codes, scores)


# ---- Floating-point operations ---------------------------------------------------------------------------------------
# Two a multiply-add, products with blocks and rows only: Hadamards are additions, and code and score cost O(T tau).


def bh4_flops(tokens: int, weight_shape: Sequence[int]) -> int:
    """``2 B R 4 D' b`` floating-point operations of the BH4 projection of ``tokens`` tokens."""
    repeats, stages, n, b, _ = weight_shape
    return 2 * tokens * repeats * stages * n * b * b


def gather_flops(tokens: int, tables_shape: Sequence[int], reads: int) -> int:
    """``2 B T N E`` floating-point operations of the gather of ``tokens`` tokens."""
    num_tables, _, out_features = tables_shape
    return 2 * tokens * num_tables * reads * out_features


@register_flop_formula(torch.ops.lookupffn.bh4)
def _(x_shape, weight_shape, *args, **kwargs):
    return bh4_flops(x_shape[0], weight_shape)


@register_flop_formula(torch.ops.lookupffn.bh4_backward)
def _(grad_shape, x_shape, weight_shape, *args, **kwargs):
    return 3 * bh4_flops(x_shape[0], weight_shape) - bh4_flops(x_shape[0], weight_shape) // weight_shape[1]


@register_flop_formula(torch.ops.lookupffn.gather)
def _(tables_shape, codes_shape, *args, **kwargs):
    return gather_flops(codes_shape[0], tables_shape, codes_shape[2])


@register_flop_formula(torch.ops.lookupffn.gather_backward)
def _(grad_shape, tables_shape, codes_shape, *args, **kwargs):
    return 2 * gather_flops(codes_shape[0], tables_shape, codes_shape[2])
