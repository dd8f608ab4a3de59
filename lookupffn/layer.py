"""The layer: its configuration, the BH4 projection, and LookupFFN itself.

Differs from the paper in what it accepts (any width, any number of tables, one to four reads) and in an orthonormal
Hadamard; `from_reference` and `to_reference` convert to and from the authors' scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lookupffn import ops
from lookupffn.errors import check
from lookupffn.reference import STAGES, next_power_of_two

PROJECTIONS = ("bh4", "dense", "none")
BLOCK_SIZE = 64  # by default, of layers that are wide enough


@dataclasses.dataclass(frozen=True)
class LookupConfig:
    """Shape of one LookupFFN layer: ``T = num_tables`` tables of ``2**code_bits`` rows of ``out_features`` numbers.

    Attributes:
        in_features: ``D``, width of the input.
        out_features: ``E``, width of the output and of a table row.
        num_tables: ``T``.
        code_bits: ``tau``, 1 to 16; a table has ``K = 2**tau`` rows.
        projection: ``"bh4"`` (block-diagonal and Hadamard factors), ``"dense"`` (one matrix) or ``"none"``
            (``x`` itself is ``z``, so ``in_features == num_tables * code_bits``).
        block_size: ``b``, edge of a BH4 block; a power of two, at most ``D'``, the next power of two of
            ``in_features``; by default ``min(64, D')``.
        decay: weight of the BH4 product against its input, ``z = decay * M x + (1 - decay) * x``, in [0, 1].
        reads: ``N``, buckets probed in each table (multi-probe), nearest first, 1 to 4.
        version: version of this record, 1.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names field, value and range.
    """

    in_features: int
    out_features: int
    num_tables: int = 64
    code_bits: int = 8
    projection: str = "bh4"
    block_size: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    decay: float = 0.7
    reads: int = 1
    version: int = 1

    def __post_init__(self) -> None:
        block_size: Any = self.block_size
        if block_size is None and type(self.in_features) is int and self.in_features >= 1:
            fits = min(BLOCK_SIZE, self.padded_features) if self.projection == "bh4" else BLOCK_SIZE
            object.__setattr__(self, "block_size", fits)
        for name in ("in_features", "out_features", "num_tables", "code_bits", "reads", "version"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, not {getattr(self, name)!r}")
        for name in ("in_features", "out_features", "num_tables"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
            check(getattr(self, name) < 2**31, name, getattr(self, name), "less than 2**31, as it has 32 bits in files")
        if type(self.block_size) is not int:
            raise TypeError(f"block_size must be an int, not {self.block_size!r}")
        check(self.version == 1, "version", self.version, "1, the only version that this lookupffn reads")
        check(1 <= self.code_bits <= 16, "code_bits", self.code_bits, "1 to 16")
        check(self.projection in PROJECTIONS, "projection", self.projection, f"one of {', '.join(PROJECTIONS)}")
        most = min(ops.MAX_READS, 2**self.code_bits)
        check(1 <= self.reads <= most, "reads", self.reads, f"1 to {most} with code_bits {self.code_bits}")
        if not isinstance(self.decay, (int, float)) or isinstance(self.decay, bool):
            raise TypeError(f"decay must be a number, not {self.decay!r}")
        check(0 <= self.decay <= 1, "decay", self.decay, "0 to 1")
        if self.projection == "bh4":
            fits = self.block_size >= 1 and next_power_of_two(self.block_size) == self.block_size
            fits = fits and self.block_size <= self.padded_features
            most = f"{self.padded_features} (in_features, padded)"
            check(fits, "block_size", self.block_size, f"a power of two, 1 to {most}")
        if self.projection == "none":
            needed = self.code_features
            fits = self.in_features == needed
            check(fits, "in_features", self.in_features, f"num_tables * code_bits = {needed} without projection")

    @property
    def num_rows(self) -> int:
        """``K = 2**tau``, rows of one table."""
        return 2**self.code_bits

    @property
    def code_features(self) -> int:
        """``T * tau``, width of ``z``."""
        return self.num_tables * self.code_bits

    @property
    def padded_features(self) -> int:
        """``D'``, the next power of two of ``in_features``."""
        return next_power_of_two(self.in_features)

    @property
    def repeats(self) -> int:
        """``R = ceil(T tau / D')``, BH4 products that are concatenated."""
        return -(-self.code_features // self.padded_features)

    def to_dict(self) -> dict:
        """All fields as a plain dict; ``LookupConfig(**config.to_dict()) == config``."""
        return dataclasses.asdict(self)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks of matrix products on ``device``, or None where it is off or unknown."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class BH4(nn.Module):
    """BH4 projection, ``z_r = decay * M_r x + (1 - decay) * x`` with ``M_r = H W_4 H W_3 H W_2 H W_1``, plus a bias.

    ``x (..., in_features)`` to ``z (..., out_features)`` in float32, or float64 for a float64 input. ``H`` is the
    orthonormal Walsh-Hadamard matrix of size ``D'``, ``W_i`` block-diagonal; inputs are zero-padded to ``D'``, the
    ``R`` repeats are concatenated and cut. Equal to ``reference.bh4`` plus bias (paper, section 4.2). ``stages`` other
    than the 4 of the paper make a longer or shorter product.

    Shapes: weight ``(R, stages, D'/b, b, b)``, rows of a block are outputs; bias ``(out_features)``.
    Under autocast ``x`` and the products are in the autocast dtype, the last sum and the bias in float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int,
        decay: float,
        stages: int = STAGES,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        self.decay, self.stages = decay, stages
        width = next_power_of_two(in_features)
        shape = (math.ceil(out_features / width), stages, width // block_size, block_size, block_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype == torch.float64 else _autocast_dtype(x.device) or x.dtype
        flat = x.reshape(-1, self.in_features).to(dtype)
        z = ops.call(torch.ops.lookupffn.bh4, flat, self.weight.to(dtype), self.decay, self.out_features)
        return z.reshape(*x.shape[:-1], self.out_features) + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, block_size={self.block_size}, decay={self.decay}"


class DenseProjection(nn.Linear):
    """The dense projection ``z = W x + b``: ``x (..., in_features)`` to ``(..., out_features)``.

    Autocast does not reach it: a product rounded to bfloat16 would move ``z``, whose signs are the codes, across zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _autocast_dtype(x.device) is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class LookupFFN(nn.Module):
    """Feed-forward layer by hashing and lookup, ``y = sum_t sum_n score[t, n] tables[t, code[t, n]] + bias``.

    ``x (..., in_features)`` to ``(..., out_features)``, any leading shape, in the dtype of ``x``: ``z = P(x)`` gives
    ``T`` codes of ``tau`` bits, ``code = sum_j [z_j > 0] 2**(tau-1-j)``, each read with the weight
    ``score = (sum_j |z_j|) prod_j sigmoid(2 |z_j|)``; with ``reads > 1`` (multi-probe) the next most probable buckets
    are read too, each weighted in the same way. Codes and scores are computed in float32 or better. Gradient reaches
    ``z`` through the scores only, and a table row only where it was read (paper, section 3; ``reference.py`` has each
    equation).

    Parameters: ``projection.weight`` and ``projection.bias`` (none with ``projection="none"``), ``tables (T, K, E)``,
    ``bias (E)``. Their initial distribution is in :meth:`init_parameters`.

    Raises:
        ValueError: the last dimension of the input is not ``in_features``.
        TypeError: the input's dtype is not that of the parameters (and autocast is off).
    """

    row_parameters = ("tables",)

    def __init__(
        self,
        config: LookupConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        c = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection: BH4 | DenseProjection | nn.Identity
        if c.projection == "bh4":
            self.projection = BH4(c.in_features, c.code_features, c.block_size, c.decay, **where)
        elif c.projection == "dense":
            self.projection = DenseProjection(c.in_features, c.code_features, **where)
        else:
            self.projection = nn.Identity()
        self.tables = nn.Parameter(torch.empty(c.num_tables, c.num_rows, c.out_features, **where))
        self.bias = nn.Parameter(torch.empty(c.out_features, **where))
        self.init_parameters()

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        codes, scores = ops.call(torch.ops.lookupffn.hash_codes, self.project(x), c.reads)  # (B, T, N)
        y = ops.call(torch.ops.lookupffn.gather, self.tables, codes, scores) + self.bias  # (B, E)
        return y.to(x.dtype).reshape(*x.shape[:-1], c.out_features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # An error whether or not torch is strict: the last of `rest` is its list of them.
        if f"{prefix}packed" in state_dict:
            rest[-1].append(f"{prefix}packed: of a packed layer; pack the model first, or use load_packed")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def project(self, x: Tensor) -> Tensor:
        """``z = P(x)``: ``x (..., in_features)`` to ``(B, T, tau)`` in float32 or better, ``B`` all leading sizes."""
        c = self.config
        if x.dim() < 1 or x.shape[-1] != c.in_features:
            raise ValueError(f"the last dimension of x must be in_features = {c.in_features}; x is {list(x.shape)}")
        if x.dtype != self.tables.dtype and not _autocast_dtype(x.device):
            raise TypeError(f"x is {x.dtype}, the layer's parameters are {self.tables.dtype}: convert one of them")
        z = self.projection(x)  # (..., T tau)
        return z.to(ops.at_least_float32(z.dtype)).reshape(-1, c.num_tables, c.code_bits)

    @torch.no_grad()
    def init_parameters(self, std: float | None = None) -> None:
        """Re-initialises all parameters, in place, through ``torch.nn.init`` (so that transformers can guard it).

        ================================  =============  ==========================================================
        parameter                         distribution   why
        ================================  =============  ==========================================================
        ``projection.weight``, BH4        N(0, 1 / b)    with an orthonormal H every stage keeps the variance of x
        ``projection.weight``, dense      N(0, 1 / D)    the same
        ``projection.bias``               0
        ``tables``                        N(0, 0.02^2)   the authors', whatever ``std`` the model's matrices have
        ``bias``                          0
        ================================  =============  ==========================================================

        Near-identity blocks would be wrong: ``H^4 = I`` brings zero padding straight back, and those bits are dead.
        """
        if not isinstance(self.projection, nn.Identity):
            fan_in = self.projection.weight.shape[-1]  # b or D
            nn.init.normal_(self.projection.weight, 0.0, fan_in**-0.5)
            nn.init.zeros_(self.projection.bias)
        nn.init.normal_(self.tables, 0.0, 0.02)
        nn.init.zeros_(self.bias)

    def for_inference(self) -> LookupFFN:
        """The layer that gives the same outputs in evaluation and is nothing but a LookupFFN: this one."""
        return self

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over ``tokens`` tokens, two a multiply-add.

        Products with projection weights and table rows; additions of the Hadamard and the ``O(T tau)`` of code and
        score are left out, as in the paper. PyTorch's ``FlopCounterMode`` gives the same number.
        """
        c = self.config
        gather = ops.gather_flops(tokens, (c.num_tables, c.num_rows, c.out_features), c.reads)
        if isinstance(self.projection, BH4):
            return ops.bh4_flops(tokens, self.projection.weight.shape) + gather
        return gather + (2 * tokens * c.in_features * c.code_features if c.projection == "dense" else 0)

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass over ``tokens`` tokens reads.

        Projection and bias once, and ``T N`` table rows a token, whether or not a cache holds them already.
        """
        c = self.config
        once = sum(p.numel() * p.element_size() for p in (*self.projection.parameters(), self.bias))
        return once + tokens * c.num_tables * c.reads * c.out_features * self.tables.element_size()

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.in_features}, {c.out_features}, num_tables={c.num_tables}, code_bits={c.code_bits}, reads={c.reads}"

    @classmethod
    def from_reference(
        cls,
        state_dict: Mapping[str, Tensor],
        in_features: int,
        prefix: str = "",
        *,
        reads: int = 1,
        decay: float = 0.7,
    ) -> LookupFFN:
        """The layer that the authors' code trained, from its parameters (names after ``prefix``).

        ``tables (T, K, E)``, ``bias (E)``, ``hash.projection.weight`` (BH4 ``(R, 4, D'/b, b, b)`` or dense
        ``(T tau, D)``) and ``hash.projection.bias``. Their Hadamard is unnormalised, ``sqrt(D')`` times ours, so BH4
        blocks are multiplied by ``sqrt(D')``. Their layer norm stays outside, in the block around this layer.

        Raises:
            KeyError: a parameter is missing.
            ValueError: shapes do not belong together, or do not fit ``in_features``.
        """
        names = ("tables", "bias", "hash.projection.weight", "hash.projection.bias")
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if missing:
            raise KeyError(f"missing from the state dict: {', '.join(missing)}; it has {', '.join(state_dict)}")
        tables, bias, weight, code_bias = (state_dict[prefix + name] for name in names)
        if tables.dim() != 3 or next_power_of_two(tables.shape[1]) != tables.shape[1]:
            raise ValueError(f"{prefix}tables must be (T, a power of two, E), not {list(tables.shape)}")
        config = LookupConfig(
            in_features,
            tables.shape[2],
            num_tables=tables.shape[0],
            code_bits=tables.shape[1].bit_length() - 1,
            projection="dense" if weight.dim() == 2 else "bh4",
            block_size=weight.shape[-1] if weight.dim() == 5 else 1,
            decay=decay,
            reads=reads,
        )
        layer = cls(config, device="meta", dtype=tables.dtype)
        scale = config.padded_features**0.5 if config.projection == "bh4" else 1
        values = dict(zip(layer.state_dict(), (tables, bias, weight * scale, code_bias), strict=True))
        for name, parameter in layer.named_parameters():
            if parameter.shape != values[name].shape:
                raise ValueError(
                    f"{name} would be {list(parameter.shape)} for {config}, but the state dict has "
                    f"{list(values[name].shape)}"
                )
        layer.load_state_dict({name: value.detach().clone() for name, value in values.items()}, assign=True)
        return layer

    def to_reference(self, prefix: str = "") -> dict[str, Tensor]:
        """The parameters under the authors' names and scale, the inverse of :meth:`from_reference`.

        Raises:
            ValueError: the layer has no projection, which the authors' code does not know.
        """
        if isinstance(self.projection, nn.Identity):
            raise ValueError('the authors\' code has no layer with projection "none"')
        scale = self.config.padded_features**-0.5 if self.config.projection == "bh4" else 1
        values = (self.tables, self.bias, self.projection.weight * scale, self.projection.bias)
        names = ("tables", "bias", "hash.projection.weight", "hash.projection.bias")
        return {prefix + name: value.detach().clone() for name, value in zip(names, values, strict=True)}
