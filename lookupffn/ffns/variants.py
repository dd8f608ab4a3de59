"""LookupFFN with the changes that have been proposed to it, each one option; the layer of the quality lab.

Every option at its default is the paper's layer to the bit. What has proved itself moves to ``layer.py`` and the
engine; docs/quality.md says what each was found to bring. Only training and PyTorch inference are here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn import ops
from lookupffn.errors import check
from lookupffn.ffns.dense import DenseFFN
from lookupffn.layer import BH4, LookupConfig, LookupFFN
from lookupffn.reference import STAGES


class LookupVariantFFN(LookupFFN):
    """LookupFFN, ``y = sum_t sum_n s[t, n] tables[t, code[t, n]] + bias``, with options over its :class:`LookupConfig`.

    ``x (..., hidden_size)`` to the same. Fields of ``LookupConfig`` are options too. With ``z = P(x) (B, T, tau)`` and
    ``score`` as in the paper:

    Args:
        stages: block-diagonal factors of BH4, at least 1; the paper has 4.
        z_std: standard deviation of the projection's last factor over the law's: ``z`` starts about that many times
            larger, its bits as many times surer.
        table_std: tables start as N(0, table_std^2); the authors have 0.02.
        temperature: codes and scores are those of ``exp(theta_t) z_t``, ``theta (T)`` learned from 0.
        scale: ``s = a_t score``, ``a (T)`` learned from 1.
        offset: ``s = score + c_t``, ``c (T)`` learned from 0; with ``scale`` ``s = a_t score + c_t``.
        centred: ``z`` loses its mean over the batch in training, a running mean (of momentum 0.01) in evaluation.
        differences: bits are signs of differences, ``(z_j - z_{j+1}) / sqrt(2)``, the last one's with the first.
        shared: so many tables read the same rows, table ``t`` those of ``t mod T / shared``; 1: each has its own.
        table_dropout: probability with which training drops a table, each token by itself; the rest is scaled up.
        smoothness: the loss has ``smoothness * mean over t, k, j of |tables[t, k] - tables[t, k ^ 2^j]|^2``.
        row_size: rows have this width, and their sum goes through a matrix ``(hidden_size, row_size)``; 0: full rows.
        dense_size: width of a dense FFN beside the tables, ``y + W_2 gelu(W_1 x + b_1) + b_2``; 0: none.

    Raises:
        ValueError, TypeError: as of ``LookupConfig`` and ``LookupFFN``, or one of these is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        stages: int = STAGES,
        z_std: float = 1.0,
        table_std: float = 0.02,
        temperature: bool = False,
        scale: bool = False,
        offset: bool = False,
        centred: bool = False,
        differences: bool = False,
        shared: int = 1,
        table_dropout: float = 0.0,
        smoothness: float = 0.0,
        row_size: int = 0,
        dense_size: int = 0,
        device=None,
        dtype=None,
        **config,
    ):
        check(stages >= 1, "stages", stages, "at least 1")
        check(z_std > 0, "z_std", z_std, "more than 0")
        check(table_std > 0, "table_std", table_std, "more than 0")
        check(0 <= table_dropout < 1, "table_dropout", table_dropout, "at least 0 and less than 1")
        check(smoothness >= 0, "smoothness", smoothness, "at least 0")
        check(0 <= row_size <= hidden_size, "row_size", row_size, f"0 to {hidden_size} (hidden_size)")
        check(dense_size >= 0, "dense_size", dense_size, "at least 0")
        lookup, where = LookupConfig(hidden_size, row_size or hidden_size, **config), {"device": device, "dtype": dtype}
        super().__init__(lookup, **where)
        check(
            shared >= 1 and lookup.num_tables % shared == 0,
            "shared",
            shared,
            f"a divisor of {lookup.num_tables} tables",
        )
        if shared > 1:
            self.tables = nn.Parameter(self.tables.new_empty(lookup.num_tables // shared, *self.tables.shape[1:]))
        self.differences, self.shared = differences, shared
        self.z_std, self.table_std, self.table_dropout, self.smoothness = z_std, table_std, table_dropout, smoothness
        if lookup.projection == "bh4" and stages != STAGES:
            self.projection = BH4(hidden_size, lookup.code_features, lookup.block_size, lookup.decay, stages, **where)

        def number_a_table(wanted):
            return nn.Parameter(torch.empty(lookup.num_tables, **where)) if wanted else None

        self.log_temperature, self.scale, self.offset = map(number_a_table, (temperature, scale, offset))
        self.register_buffer("mean", torch.zeros(lookup.code_features, **where) if centred else None)
        self.row_output = nn.Linear(row_size, hidden_size, bias=False, **where) if row_size else None
        self.dense = DenseFFN(hidden_size, dense_size, **where) if dense_size else None
        self.auxiliary_loss: Tensor | None = None
        self.init_parameters()

    def forward(self, x: Tensor) -> Tensor:
        c, z = self.config, self.project(x)  # (B, T, tau)
        if self.mean is not None:
            z = self._centre(z)
        if self.differences:
            z = (z - z.roll(-1, -1)) * 0.5**0.5
        if self.log_temperature is not None:
            z = z * self.log_temperature.exp()[:, None]
        codes, scores = ops.call(torch.ops.lookupffn.hash_codes, z, c.reads)  # (B, T, N)
        if self.scale is not None:
            scores = scores * self.scale[:, None]
        if self.offset is not None:
            scores = scores + self.offset[:, None]
        if self.training and self.table_dropout:
            scores = scores * F.dropout(scores.new_ones(*scores.shape[:2], 1), self.table_dropout)
        y = ops.call(torch.ops.lookupffn.gather, self._all_tables(), codes, scores) + self.bias
        y = y.to(x.dtype).reshape(*x.shape[:-1], c.out_features)
        if self.row_output is not None:
            y = self.row_output(y)
        if self.dense is not None:
            y = y + self.dense(x)
        self.auxiliary_loss = self.smoothness * self.roughness() if self.training and self.smoothness else None
        return y

    def _all_tables(self) -> Tensor:
        return self.tables.repeat(self.shared, 1, 1) if self.shared > 1 else self.tables

    def _centre(self, z: Tensor) -> Tensor:
        if not self.training or not len(z):
            return z - self.mean.view(z.shape[1:])
        mean = z.mean(0)
        with torch.no_grad():
            self.mean.lerp_(mean.flatten().to(self.mean.dtype), 0.01)
        return z - mean

    def roughness(self) -> Tensor:
        """Mean over tables, rows and bits of the squared distance between two rows one bit apart: a scalar."""
        bits, tables, width = self.config.code_bits, len(self.tables), self.config.out_features
        total = self.tables.new_zeros(())
        for bit in range(bits):
            halves = self.tables.view(tables, 2**bit, 2, -1, width)
            total = total + (halves[:, :, 0] - halves[:, :, 1]).square().sum()
        return total / (bits * tables * self.config.num_rows / 2)

    @torch.no_grad()
    def for_inference(self) -> LookupFFN:
        """A plain LookupFFN with the same outputs: ``scale`` and ``shared`` go into the tables, ``centred``
        into the bias of ``z``.

        Raises:
            ValueError: an option is set that changes more than parameters, so that no plain layer is its equal.
        """
        stays = {"temperature": self.log_temperature, "offset": self.offset, "row_size": self.row_output}
        stays |= {"dense_size": self.dense, "centred": self.mean if self.config.projection == "none" else None}
        used = [name for name, value in stays.items() if value is not None]
        used += ["differences"] if self.differences else []
        used += ["stages"] if getattr(self.projection, "stages", STAGES) != STAGES else []
        if used:
            raise ValueError(f"no plain LookupFFN equals one with {', '.join(used)}: it runs in PyTorch only")
        layer = LookupFFN(self.config, device="meta", dtype=self.tables.dtype)
        values = {name: value for name, value in self.state_dict().items() if name not in ("scale", "mean")}
        values["tables"] = self._all_tables()
        if self.scale is not None:
            values["tables"] = values["tables"] * self.scale[:, None, None]
        if self.mean is not None:
            values["projection.bias"] = values["projection.bias"] - self.mean
        layer.load_state_dict(values, assign=True)
        return layer

    @torch.no_grad()
    def init_parameters(self, std: float | None = None) -> None:
        """As :meth:`LookupFFN.init_parameters`, but for ``z_std`` and ``table_std``; scale 1, all else 0."""
        super().init_parameters(std)
        if not hasattr(self, "table_std"):  # the parent's constructor, before anything of this class is there
            return
        if self.config.projection == "bh4":
            nn.init.normal_(self.projection.weight[:, -1], 0.0, self.z_std * self.config.block_size**-0.5)
        elif self.config.projection == "dense":
            nn.init.normal_(self.projection.weight, 0.0, self.z_std * self.config.in_features**-0.5)
        nn.init.normal_(self.tables, 0.0, self.table_std)
        for values, start in ((self.log_temperature, 0.0), (self.scale, 1.0), (self.offset, 0.0), (self.mean, 0.0)):
            if values is not None:
                nn.init.constant_(values, start)

    def flops(self, tokens: int) -> int:
        """As :meth:`LookupFFN.flops`, with the products of ``row_output`` and ``dense``."""
        extra = 0 if self.row_output is None else 2 * tokens * self.row_output.weight.numel()
        return super().flops(tokens) + extra + (self.dense.flops(tokens) if self.dense else 0)

    def bytes_read(self, tokens: int) -> int:
        """As :meth:`LookupFFN.bytes_read`, with everything else once."""
        counted = {id(p) for p in (self.tables, self.bias, *self.projection.parameters())}
        rest = sum(p.numel() * p.element_size() for p in self.parameters() if id(p) not in counted)
        return super().bytes_read(tokens) + rest
