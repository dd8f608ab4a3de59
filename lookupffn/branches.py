"""What may stand beside a lookup's tables: a linear path of low rank, and rows addressed by the tokens' ids.

Conversion needs both (docs/convert.md): a low rank for what of a dense layer is linear, rows by ids for what depends on
the token alone. Rows are chosen by what is known when a text is tokenised, not by a hash of the hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lookupffn.errors import check
from lookupffn.layer import LookupConfig, LookupFFN

MULTIPLIER = 2654435769  # 2^32 over the golden ratio, odd
MOST_NEIGHBOURS = 8
MOST_TOKEN_ROWS = 16  # tables of rows in a layer, as the runtime has it
MOST = 2**31 - 1  # of rows, and of a rank: 32 bits in files


def token_rows_of(ids: Tensor, mask: Tensor | None, before: int, after: int, rows: int, vocab_size: int) -> Tensor:
    """The row of each token, ``(batch, length)`` int64, from its id and those of its neighbours.

    Without neighbours, and with at least as many rows as ids, the id itself. Else ``h = 0``; for each of ``before``
    tokens before to ``after`` behind, ``h = (h + u) * 2654435769 mod 2**32``, ``h = h ^ (h >> 15)``, where ``u`` is the
    id + 1, or 0 outside of the text; the row is ``h rows / 2**32``. Where ``mask`` is 0 there is no token, and those on
    both sides are neighbours.
    """
    if before + after == 0 and rows >= vocab_size:
        return ids.long()
    numbers, length, places = ids.long() + 1, ids.shape[-1], None
    if mask is not None:
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        last = numbers.new_zeros(*ids.shape[:-1], length + 1)  # the last one takes what is no token
        numbers = last.scatter(-1, torch.where(mask.bool(), places, length), numbers)[..., :length]
    padded = nn.functional.pad(numbers, (before, after))
    h = torch.zeros_like(numbers)
    for offset in range(before + after + 1):
        h = ((h + padded[..., offset : offset + length]) * MULTIPLIER) & 0xFFFFFFFF
        h = h ^ (h >> 15)
    found = (h * rows) >> 32
    return found if places is None else found.gather(-1, places)


@dataclass
class TokenContext:
    """The ids of the batch that a model is running on, which a hook of the model sets before its layers run."""

    ids: Tensor | None = None
    mask: Tensor | None = None


def watch_ids(model: nn.Module, context: TokenContext) -> None:
    """Has ``context`` hold the ids and the mask that ``model`` is called with, while its layers run."""

    def before(_: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        context.ids = args[0] if args else given.get("input_ids")
        context.mask = args[1] if len(args) > 1 else given.get("attention_mask")

    model.register_forward_pre_hook(before, with_kwargs=True)


class LowRank(nn.Module):
    """``y = x A^T B^T``, ``A (rank, in_features)``, ``B (out_features, rank)``: ``rank (in + out)`` multiply-adds."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        check(type(rank) is int and 1 <= rank <= MOST, "rank", rank, f"an int, 1 to {MOST}")
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x))


class TokenRows(nn.Module):
    """``y[b, i] = rows[token_rows_of(ids)[b, i]]``, ``rows (R, out_features)``, by the ids in ``context``."""

    row_parameters = ("rows",)

    def __init__(
        self, rows: int, out_features: int, vocab_size: int, context: TokenContext, *, before: int = 0, after: int = 0
    ):
        super().__init__()
        for name, value in (("before", before), ("after", after)):
            fits = type(value) is int and 0 <= value <= MOST_NEIGHBOURS
            check(fits, name, value, f"an int, 0 to {MOST_NEIGHBOURS}")
        check(type(rows) is int and 1 <= rows <= MOST, "rows", rows, f"an int, 1 to {MOST}")
        self.before, self.after, self.vocab_size, self.context = before, after, vocab_size, context
        self.rows = nn.Parameter(torch.zeros(rows, out_features))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], out_features: int, vocab_size: int, context: TokenContext
    ) -> TokenRows:
        """Rows of a config as :meth:`config` gives it. Raises ValueError for a field that is missing or unknown."""
        _check_fields("token_rows", config, "rows", "before", "after")
        own = {"before": config["before"], "after": config["after"]}
        return cls(config["rows"], out_features, vocab_size, context, **own)

    def config(self) -> dict[str, int]:
        return {"rows": len(self.rows), "before": self.before, "after": self.after}

    @torch.no_grad()
    def init_parameters(self, std: float) -> None:
        """Rows start at 0, whatever the rest of the model starts at."""
        nn.init.zeros_(self.rows)

    def forward(self, x: Tensor) -> Tensor:
        ids, mask = self.context.ids, self.context.mask
        if ids is None or ids.shape != x.shape[:-1]:
            shape = None if ids is None else list(ids.shape)
            raise ValueError(f"the model's hook gave ids of shape {shape} for hidden states {list(x.shape)}")
        at = token_rows_of(ids, mask, self.before, self.after, len(self.rows), self.vocab_size)
        return nn.functional.embedding(at, self.rows).to(x.dtype)


class NoFFN(nn.Module):
    """``y = 0``: what stays of a layer is its attention, and the norms."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass: none."""
        return 0

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: none."""
        return 0


class BranchedLookupFFN(nn.Module):
    """A lookup layer and what is added to it: ``y = lookup(x) + low_rank(x) + sum of rows by ids``."""

    def __init__(self, lookup: LookupFFN, low_rank: LowRank | None = None, token_rows: list[TokenRows] | None = None):
        super().__init__()
        self.lookup, self.low_rank = lookup, low_rank
        self.token_rows: Iterable[TokenRows] = nn.ModuleList(token_rows or [])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.lookup(x)
        if self.low_rank is not None:
            y = y + self.low_rank(x)
        for rows in self.token_rows:
            y = y + rows(x)
        return y

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` makes such a layer of, as JSON has it."""
        rows = [rows.config() for rows in self.token_rows]
        rank = 0 if self.low_rank is None else self.low_rank.reduce.out_features
        return {"lookup": self.lookup.config.to_dict(), "rank": rank, "token_rows": rows}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vocab_size: int, context: TokenContext) -> BranchedLookupFFN:
        """A layer of this config, its lookup initialised and its branches' outputs 0.

        Raises:
            ValueError, TypeError: a field is missing, unknown or out of its range.
        """
        _check_fields("the layer", config, "lookup", "rank", "token_rows")
        fields, rank, token_rows = config["lookup"], config["rank"], config["token_rows"]
        check(isinstance(fields, Mapping), "lookup", fields, "a map of the fields of LookupConfig")
        check(type(rank) is int and rank >= 0, "rank", rank, "an int, at least 0")
        fits = isinstance(token_rows, list) and len(token_rows) <= MOST_TOKEN_ROWS
        check(fits, "token_rows", token_rows, f"a list of at most {MOST_TOKEN_ROWS}")
        lookup = LookupFFN(LookupConfig(**fields))
        width, out = lookup.config.in_features, lookup.config.out_features
        rows = [TokenRows.from_config(row, out, vocab_size, context) for row in token_rows]
        return cls(lookup, LowRank(width, out, rank) if rank else None, rows)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass, two a multiply-add; a row by ids is one addition an output."""
        own = sum(math.prod(p.shape) for p in self.low_rank.parameters()) if self.low_rank is not None else 0
        rows = sum(r.rows.shape[1] for r in self.token_rows)
        return self.lookup.flops(tokens) + tokens * (2 * own + rows)

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass reads: those of the lookup, the low rank once, a row a token."""
        once = sum(p.numel() * p.element_size() for p in self.low_rank.parameters()) if self.low_rank is not None else 0
        rows = sum(r.rows.shape[1] * r.rows.element_size() for r in self.token_rows)
        return self.lookup.bytes_read(tokens) + once + tokens * rows


def _check_fields(name: str, config: Any, *fields: str) -> None:
    found = sorted(map(str, config)) if isinstance(config, Mapping) else config
    check(found == sorted(fields), name, found, f"a map of {', '.join(fields)}")


CONVERTED = (LookupFFN, BranchedLookupFFN, NoFFN)  # what stands where a dense layer was


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """A model's parameters by what their learning rate goes by: ``tables``, ``lookups``, ``model``.

    Tables are what a token reads rows of, the parameters that a module names in ``row_parameters``; lookups the rest of
    the layers that conversion made, empty in other models.
    """
    tables = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "row_parameters", ())}
    inside = {id(p) for m in model.modules() if isinstance(m, BranchedLookupFFN) for p in m.parameters()}
    kinds: dict[str, list[nn.Parameter]] = {"tables": [], "lookups": [], "model": []}
    for parameter in model.parameters():
        kind = "tables" if id(parameter) in tables else "lookups" if id(parameter) in inside else "model"
        kinds[kind].append(parameter)
    return kinds
