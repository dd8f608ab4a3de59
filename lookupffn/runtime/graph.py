"""What an encoder is made of, whatever its family: sizes, where norms stand, and the weights of each part.

A family (``families/``) finds these in a model; ``records.py`` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lookupffn.errors import InputError
from lookupffn.layer import LookupFFN

ACTIVATIONS = {  # by transformers' names
    "gelu": 1, "gelu_python": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu_fast": 2, "silu": 3, "swish": 3,
    "relu": 4, "tanh": 5,
}  # fmt: skip
POSITIONS = ("index", "mask", "ids")  # places in the row, tokens of the mask, or ids other than padding, counted


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor
    epsilon: float
    rms: bool = False

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        return cls(norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Dense:
    """A dense feed-forward layer, ``down(activation(up(x)))``."""

    up: nn.Linear
    down: nn.Linear
    activation: str


@dataclass(frozen=True)
class Layer:
    attention_norm: Norm
    query: tuple[Tensor, Tensor]  # weight (H d, D) and bias, as key and value have them
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    output: nn.Linear
    ffn_norm: Norm
    ffn: Dense | LookupFFN


@dataclass(frozen=True)
class Graph:
    """An encoder: ``words + positions (+ types)``, normed or not, then layers, with norms before or behind sums."""

    family: str
    heads: int
    words: Tensor
    positions: Tensor
    types: Tensor | None
    embedding_norm: Norm | None
    layers: list[Layer]
    final_norm: Norm | None
    pre_norm: bool
    causal: bool = False
    position_rule: str = "index"
    first_position: int = 0
    pad_token_id: int = 0
    pooling: str = "none"
    normalised: bool = False
    max_length: int = 1 << 30  # of a text, in tokens: the rest is cut off
    head: tuple[tuple[nn.Linear, str | None], ...] = ()  # linears behind the pooling, and their activations
    labels: tuple[str, ...] = ()  # of the head's outputs

    @property
    def width(self) -> int:
        return self.words.shape[1]


def classifier(model: Any, *linears: tuple[nn.Linear, str | None], pooling: str = "cls") -> dict[str, Any]:
    """The fields of the graph of a sequence classifier with this head."""
    labels = tuple(str(model.config.id2label[i]) for i in range(linears[-1][0].out_features))
    return {"head": linears, "labels": labels, "pooling": pooling}


def is_classifier(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def activation_of(name: object, where: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return str(name)
