"""What an encoder is made of, whatever its family: sizes, where norms stand, and the weights of each part.

A family (``families/``) finds these in a model; ``records.py`` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lookupffn.branches import BranchedLookupFFN, NoFFN, TokenRows
from lookupffn.errors import InputError
from lookupffn.layer import LookupFFN

ACTIVATIONS = {  # by transformers' names
    "gelu": 1, "gelu_python": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu_fast": 2, "silu": 3, "swish": 3,
    "relu": 4, "tanh": 5,
}  # fmt: skip
# Places in the row, or from the text's first token on; tokens of the mask, or ids other than padding, counted.
POSITIONS = ("index", "first", "mask", "ids")


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor | None
    epsilon: float
    rms: bool = False

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        return cls(norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Linear:
    """``x W^T + bias``, as an ``nn.Linear`` that is a part of a larger one."""

    weight: Tensor
    bias: Tensor | None


Product = nn.Linear | Linear


@dataclass(frozen=True)
class Dense:
    """A dense feed-forward layer, ``down(activation(up(x)))``, or gated: ``down(activation(up(x)) * gate(x))``."""

    up: Product
    down: Product
    activation: str
    gate: Product | None = None


@dataclass(frozen=True)
class Layer:
    attention_norm: Norm | None
    query: Product
    key: Product
    value: Product
    output: Product
    ffn_norm: Norm
    ffn: Dense | LookupFFN | BranchedLookupFFN | NoFFN
    token_rows: Sequence[TokenRows] = ()  # beside the feed-forward layer, whatever it is
    position_keys: Tensor | None = None  # (buckets, attention width), with `distance_buckets`
    position_queries: Tensor | None = None


@dataclass(frozen=True)
class Graph:
    """An encoder: ``words (+ positions) (+ types)``, normed or not, then layers, with norms before or behind sums.

    embedding_projection: behind the embeddings' norm, to the width of the layers where that is another.
    layers: a layer that stands here several times, as ALBERT's do, is stored once.
    rotations: of rotary positions, one ``(max_positions, head_dim)`` for all layers or one for global and one for local
        ones: cosines for the pairs ``(i, i + head_dim / 2)``, then sines.
    relative: added to attention scores, ``(heads, 2 max_positions - 1)`` by the key's distance from the query, from
        ``1 - max_positions`` on.
    distance_buckets: of disentangled attention (He et al. 2021), ``(2 max_positions - 1,)`` by the key's distance from
        the query: the row of a layer's ``position_keys`` and ``position_queries`` whose products with the query and the
        key are added to their score.
    score_terms: scores are divided by ``sqrt(score_terms head_dim)``.
    window: keys further away are not attended to, except in every ``global_every``-th layer, from layer 0 on.
    head: linears behind the pooling, and their activations; ``head_norm`` stands behind the first.
    """

    family: str
    heads: int
    words: Tensor
    positions: Tensor | None
    types: Tensor | None
    embedding_norm: Norm | None
    layers: list[Layer]
    final_norm: Norm | None
    pre_norm: bool
    max_positions: int
    causal: bool = False
    rotations: tuple[Tensor, ...] = ()
    relative: Tensor | None = None
    distance_buckets: Tensor | None = None
    score_terms: int = 1
    window: int = 0
    global_every: int = 0
    position_rule: str = "index"
    first_position: int = 0
    pad_token_id: int = 0
    pooling: str = "none"
    normalised: bool = False
    max_length: int = 1 << 30  # of a text, in tokens: the rest is cut off
    head: tuple[tuple[Product, str | None], ...] = ()
    head_norm: Norm | None = None
    labels: tuple[str, ...] = ()  # of the outputs of a classifier
    mask_token_id: int | None = None  # of a masked LM, where its tokenizer is known
    embedding_projection: Product | None = None

    @property
    def width(self) -> int:
        if self.embedding_projection is None:
            return self.words.shape[1]
        return self.embedding_projection.weight.shape[0]

    @property
    def head_dim(self) -> int:
        return self.layers[0].query.weight.shape[0] // self.heads if self.layers else 1


def classifier(model: Any, *linears: tuple[Product, str | None], pooling: str = "cls") -> dict[str, Any]:
    """The fields of the graph of a sequence classifier with this head."""
    labels = tuple(str(model.config.id2label[i]) for i in range(len(linears[-1][0].weight)))
    return {"head": linears, "labels": labels, "pooling": pooling}


def language_model(dense: Product, activation: str, norm: nn.LayerNorm, decoder: Product) -> dict[str, Any]:
    """The fields of the graph of a language model with this head, which answers for single tokens."""
    return {"head": ((dense, activation), (decoder, None)), "head_norm": Norm.of(norm), "pooling": "tokens"}


def is_classifier(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def is_language_model(model: Any) -> bool:
    return type(model).__name__.endswith(("ForMaskedLM", "ForCausalLM"))


def activation_of(name: object, where: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return str(name)
