"""Where a lookup layer starts from, by inputs and outputs of the dense layer that it replaces: closed forms.

The linear path is the regression of the outputs on the inputs with the rank that it may have (reduced-rank ridge
regression: Izenman 1975); the projection's bias centres every bit of a code, so that buckets fill evenly; tables are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lookupffn.branches import BranchedLookupFFN, LowRank
from lookupffn.convert.slots import Slot
from lookupffn.layer import LookupConfig, LookupFFN

RIDGE = 1e-3  # of the mean of the inputs' variances


@dataclass(frozen=True)
class Shape:
    """Of the layers that conversion makes; the tables' cost at inference follows from these."""

    num_tables: int = 64
    code_bits: int = 8
    reads: int = 3
    block_size: int = 32
    rank: int = 64
    projection: str = "bh4"

    def config(self, width: int) -> LookupConfig:
        block = min(self.block_size, 1 << (width - 1).bit_length())
        sizes = {"num_tables": self.num_tables, "code_bits": self.code_bits, "reads": self.reads}
        return LookupConfig(width, width, projection=self.projection, block_size=block, **sizes)

    def layer(self, width: int) -> BranchedLookupFFN:
        """A layer of this shape, whose output is 0."""
        lookup = LookupFFN(self.config(width))
        nn.init.zeros_(lookup.tables)
        return BranchedLookupFFN(lookup, LowRank(width, width, self.rank) if self.rank else None)


def collect(model: nn.Module, slots: list[Slot], batches: Any) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs ``(tokens, width)`` of each slot's dense layer over batches of ``(ids, mask)``."""
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
            for ids, mask in batches:
                here["mask"] = mask.bool()
                model(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return [(torch.cat(inputs), torch.cat(outputs)) for inputs, outputs in found]


@torch.no_grad()
def start(layer: BranchedLookupFFN, x: Tensor, y: Tensor) -> None:
    """Sets low rank, bias and projection of ``layer`` from inputs ``x`` and outputs ``y``, ``(tokens, width)`` each."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    xc, yc = x - mean_x, y - mean_y
    lookup = layer.lookup
    lookup.bias.copy_(mean_y)
    if layer.low_rank is not None:
        gram = xc.T @ xc
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram + ridge, xc.T @ yc)  # (in, out), of full rank
        _, basis = torch.linalg.eigh(weight.T @ gram @ weight)  # of what it predicts
        rank = layer.low_rank.reduce.out_features
        basis = basis[:, -rank:]
        layer.low_rank.reduce.weight.copy_((weight @ basis).T)
        layer.low_rank.expand.weight.copy_(basis)
        lookup.bias.copy_(mean_y - mean_x @ (weight @ basis) @ basis.T)
    projection: Any = lookup.projection
    if not isinstance(projection, nn.Identity):
        z = projection(x.float())
        projection.bias.sub_(z.mean(0))


def split(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """A converted model's parameters by what they are: tables, the rest of the lookups, the rest of the model."""
    groups: dict[str, list[nn.Parameter]] = {"tables": [], "lookups": [], "model": []}
    inside = {id(p) for m in model.modules() if isinstance(m, BranchedLookupFFN) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            groups["model"].append(parameter)
        else:
            groups["tables" if name.endswith((".tables", ".rows")) else "lookups"].append(parameter)
    return groups
