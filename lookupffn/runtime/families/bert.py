"""BERT: norms behind the sums, absolute positions, token types (MiniLM, E5, BGE, GTE's first, mxbai and many more)."""

from __future__ import annotations

from typing import Any

from lookupffn.branches import CONVERTED
from lookupffn.errors import InputError
from lookupffn.runtime.graph import (
    Dense,
    Graph,
    Layer,
    Norm,
    activation_of,
    classifier,
    is_classifier,
    is_language_model,
    language_model,
)


def graph(model: Any) -> Graph:
    head = {}
    if is_classifier(model):
        head = classifier(model, (model.bert.pooler.dense, "tanh"), (model.classifier, None))
    elif is_language_model(model):
        predictions = model.cls.predictions
        activation = activation_of(model.config.hidden_act, "head")
        transform = predictions.transform
        head = language_model(transform.dense, activation, transform.LayerNorm, predictions.decoder)
    return body_graph(model, layers_of(model), **head)


def layers_of(model: Any) -> list[Layer]:
    body = getattr(model, model.base_model_prefix, model)
    return [_layer(layer, model.config, number) for number, layer in enumerate(body.encoder.layer)]


def body_graph(model: Any, layers: list[Layer], **fields: Any) -> Graph:
    """Of the embeddings that BERT's kin share; ``fields`` are those in which a family or a head differs."""
    config = model.config
    family, body = config.model_type, getattr(model, model.base_model_prefix, model)
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise InputError(f"{family} with {config.position_embedding_type!r} positions cannot be exported")
    if getattr(config, "is_decoder", False):  # ALBERT's has none
        raise InputError(f"{family} as a decoder cannot be exported")
    e = body.embeddings
    return Graph(
        family=family,
        heads=config.num_attention_heads,
        words=e.word_embeddings.weight,
        positions=e.position_embeddings.weight,
        types=e.token_type_embeddings.weight,
        embedding_norm=Norm.of(e.LayerNorm),
        layers=layers,
        final_norm=None,
        pre_norm=False,
        max_positions=len(e.position_embeddings.weight),
        pad_token_id=config.pad_token_id or 0,
        **fields,
    )


def _layer(layer: Any, config: Any, number: int) -> Layer:
    attention = layer.attention
    return Layer(
        attention_norm=Norm.of(attention.output.LayerNorm),
        query=attention.self.query,
        key=attention.self.key,
        value=attention.self.value,
        output=attention.output.dense,
        ffn_norm=Norm.of(layer.output.LayerNorm),
        ffn=feed_forward(layer, config, number),
    )


def feed_forward(layer: Any, config: Any, number: int) -> Any:
    """The dense FFN of a layer, or the lookup that conversion put in the place of its second linear."""
    if type(layer.output.dense) in CONVERTED:
        return layer.output.dense
    return Dense(layer.intermediate.dense, layer.output.dense, activation_of(config.hidden_act, f"layer {number}"))
