"""What a user would pick instead of lookups: no feed-forward layers, half of the layers, or static vectors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import nn

from lookupffn.branches import NoFFN
from lookupffn.conversion.quality import Embed
from lookupffn.errors import InputError
from lookupffn.hf.slots import slots_of


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
    if found.config.model_type == "albert":  # whose layers are shared, and counted by the config alone
        count = found.config.num_hidden_layers
        found.config.num_hidden_layers = (count + 1) // 2
        return found, [min(i + 2, count) for i in range(0, count, 2)]
    for path in ("encoder.layer", "transformer.layer", "layers"):
        parent, _, name = path.rpartition(".")
        holder = getattr(body, parent, None) if parent else body
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList):
            setattr(holder, name, nn.ModuleList(list(layers)[::2]))
            found.config.num_hidden_layers = len(list(layers)[::2])
            return found, [min(i + 2, len(layers)) for i in range(0, len(layers), 2)]
    raise InputError(f"{type(model).__name__} has no list of layers that could be halved")


def static_model(model: Any, tokenizer: Any) -> tuple[Embed | None, str]:
    """Vectors that are means of a vector a token, by model2vec from the teacher's own; or None, and why."""
    if find_spec("model2vec") is None or find_spec("skeletoken") is None:
        return None, "model2vec[distill] is not installed"
    from model2vec.distill import distill_from_model

    try:
        static = distill_from_model(copy.deepcopy(model), tokenizer, device="cpu")
    except Exception as error:  # whatever another package raises about a family that it does not know
        return None, " ".join(f"model2vec: {error}".split())[:200]

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = np.asarray(static.encode(list(texts)), np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return embed, ""
