"""What is converted: the encoder in a SentenceTransformer, a CrossEncoder or a model of transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from lookupffn.errors import InputError
from lookupffn.hf.classifier import longest_text
from lookupffn.hf.slots import slots_of


@dataclass(frozen=True)
class Parts:
    """Of a model: its encoder (with a head, if it has one), and how it reads texts; ``paired`` two at a time."""

    encoder: Any
    tokenizer: Any
    pooling: str
    max_length: int
    paired: bool


def parts_of(model: Any, tokenizer: Any, pooling: str, max_length: int, in_pairs: bool | None) -> Parts:
    """What is given holds where the model does not say it itself; ``max_length`` as far as it has positions.

    Raises:
        InputError: there is no tokenizer, or a pooling that cannot be matched.
    """
    kind, paired = type(model).__name__, bool(in_pairs)
    if kind == "SentenceTransformer":
        for module in list(model)[1:]:
            if type(module).__name__ == "Pooling":
                pooling = (
                    module.get_pooling_mode_str() if hasattr(module, "get_pooling_mode_str") else module.pooling_mode
                )
        encoder, tokenizer, paired = model[0].auto_model, model.tokenizer, False
        max_length = min(max_length, model.max_seq_length or max_length)
    elif kind == "CrossEncoder":
        encoder, tokenizer, paired = model.model, model.tokenizer, True
    else:
        encoder = model
    if tokenizer is None:
        raise InputError(f"{kind} comes without a tokenizer: give one, or a SentenceTransformer")
    if pooling not in ("mean", "cls"):
        raise InputError(f"pooling {pooling!r} cannot be matched: mean and cls can")
    return Parts(encoder, tokenizer, pooling, min(max_length, longest_text(encoder)), paired)


def with_encoder(model: Any, student: Any) -> Any:
    """What ``model`` is, with another encoder: a SentenceTransformer keeps its other modules.

    A CrossEncoder's settings lie in its model's config, and it loads a folder of transformers.
    """
    if type(model).__name__ != "SentenceTransformer":
        return student
    found = copy.copy(model)
    found._modules = dict(model._modules)
    first = next(iter(found._modules))
    found._modules[first] = copy.copy(model[0])
    parts = found._modules[first]._modules = dict(model[0]._modules)
    (name,) = (name for name, part in parts.items() if part is model[0].auto_model)
    parts[name] = student
    return found


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights."""
    digest = blake2b(digest_size=8)
    for parameter in model.state_dict().values():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def costs(model: Any) -> dict[str, Any]:
    """Multiply-adds of a token in all feed-forward layers, and the model's parameters in bytes of float32."""
    total = sum(m.flops(1) // 2 if hasattr(m := s.last, "flops") else s.parameters for s in slots_of(model))
    return {"ffn_multiply_adds": total, "parameter_bytes": sum(p.numel() * 4 for p in model.parameters())}
