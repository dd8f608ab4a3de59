"""Where a lookup layer starts from, by inputs and outputs of the dense layer that it replaces: closed forms.

Its output is 0: a model whose layers begin so is twice as near to its teacher after 150,000 tokens as one that begins
with the best linear map of this rank (docs/convert.md). The linear path looks where that map would look (reduced-rank
ridge regression: Izenman 1975), and the projection's bias centres every bit of a code, so that buckets fill evenly.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lookupffn.branches import BranchedLookupFFN, LowRank, TokenContext, TokenRows, watch_ids
from lookupffn.hf.slots import Slot, slots_of
from lookupffn.layer import LookupConfig, LookupFFN

RIDGE = 1e-3  # of the mean of the inputs' variances
PAIR_ROWS = 1 << 16


@dataclass(frozen=True)
class Shape:
    """Of the layers that conversion makes; their cost at inference follows from these.

    ``token_rows`` is how many tables of rows by ids stand beside: one by a token's own id, another by it and the one
    before it.
    """

    num_tables: int = 64
    code_bits: int = 8
    reads: int = 3
    block_size: int = 32
    rank: int = 64
    token_rows: int = 0
    projection: str = "bh4"

    def config(self, width: int) -> LookupConfig:
        block = min(self.block_size, 1 << (width - 1).bit_length())
        sizes = {"num_tables": self.num_tables, "code_bits": self.code_bits, "reads": self.reads}
        return LookupConfig(width, width, projection=self.projection, block_size=block, **sizes)

    def layer(self, width: int, vocab_size: int, context: TokenContext) -> BranchedLookupFFN:
        """A layer of this shape, whose output is 0; the rows by ids of several tokens are ``PAIR_ROWS``."""
        lookup = LookupFFN(self.config(width))
        nn.init.zeros_(lookup.tables)
        rows = [
            TokenRows(vocab_size if before == 0 else PAIR_ROWS, width, vocab_size, context, before=before)
            for before in range(self.token_rows)
        ]
        rank = min(self.rank, width)
        return BranchedLookupFFN(lookup, LowRank(width, width, rank) if rank else None, rows)


@torch.no_grad()
def converted(model: nn.Module, shape: Shape, batches: list, layers: Container[int] | None = None) -> nn.Module:
    """A copy of ``model`` whose feed-forward layers, or those of these numbers, are lookups with an output of 0.

    ``batches`` (:meth:`Tokens.batch`) are what their closed forms see.
    """
    student, context = copy.deepcopy(model).eval(), TokenContext()
    slots = [slot for i, slot in enumerate(slots_of(student)) if layers is None or i in layers]
    found = collect(student, slots, batches)
    for slot, (x, y) in zip(slots, found, strict=True):
        layer = shape.layer(x.shape[1], model.config.vocab_size, context)
        start(layer, x, y)
        slot.replace(layer)
    if shape.token_rows:
        watch_ids(student, context)
    return student


def collect(model: nn.Module, slots: list[Slot], batches: Any) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs ``(tokens, width)`` of each slot's dense layer over ``batches``."""
    found: list[tuple[list, list]] = [([], []) for _ in slots]
    here: dict[str, Tensor] = {}
    hooks = []
    for (inputs, outputs), slot in zip(found, slots, strict=True):
        hooks.append(
            slot.first.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0][here["mask"]]))
        )
        hooks.append(slot.last.register_forward_hook(lambda _, args, out, kept=outputs: kept.append(out[here["mask"]])))
    try:
        with torch.no_grad():
            for batch in batches:
                here["mask"] = batch["attention_mask"].bool()
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [(torch.cat(inputs), torch.cat(outputs)) for inputs, outputs in found]


@torch.no_grad()
def start(layer: BranchedLookupFFN, x: Tensor, y: Tensor) -> None:
    """Sets what ``layer`` looks at by inputs ``x`` and outputs ``y``, ``(tokens, width)`` each; its output stays 0."""
    lookup, low_rank = layer.lookup, layer.low_rank
    if low_rank is not None:
        xc, yc = (values.double() - values.double().mean(0) for values in (x, y))
        gram = xc.T @ xc
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram + ridge, xc.T @ yc)  # (in, out), of full rank
        _, basis = torch.linalg.eigh(weight.T @ gram @ weight)  # of what it predicts
        low_rank.reduce.weight.copy_((weight @ basis[:, -low_rank.reduce.out_features :]).T)
    projection: Any = lookup.projection
    if not isinstance(projection, nn.Identity):
        projection.bias.sub_(projection(x.float()).mean(0))
