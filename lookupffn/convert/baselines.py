"""What a user would pick instead of lookups: the model without feed-forward layers, or with half of its layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lookupffn.convert.slots import slots_of
from lookupffn.errors import InputError


class NoFFN(nn.Module):
    """An output of 0: what stays of a layer is its attention and the residual."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def without_ffns(model: Any) -> nn.Module:
    """A copy of the model without feed-forward layers."""
    found = copy.deepcopy(model).eval()
    for slot in slots_of(found):
        slot.replace(NoFFN())
    return found


def half_the_layers(model: Any) -> tuple[nn.Module, list[int]]:
    """A copy with every second layer, and which of the model's hidden states its layers are to match.

    Of pairs of layers the first is kept; it learns the state behind both.
    """
    found = copy.deepcopy(model).eval()
    body = getattr(found, found.base_model_prefix, found)
    for path in ("encoder.layer", "transformer.layer", "layers"):
        parent, _, name = path.rpartition(".")
        holder = getattr(body, parent, None) if parent else body
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList):
            setattr(holder, name, nn.ModuleList(list(layers)[::2]))
            return found, [min(i + 2, len(layers)) for i in range(0, len(layers), 2)]
    raise InputError(f"{type(model).__name__} has no list of layers that could be halved")
