"""ALBERT: BERT with embeddings narrower than its layers, and groups of layers that run several times."""

from __future__ import annotations

from typing import Any

from lookupffn.branches import CONVERTED
from lookupffn.runtime.families import bert
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
    config, encoder = model.config, getattr(model, "albert", model).encoder
    groups = [[_layer(layer, config) for layer in group.albert_layers] for group in encoder.albert_layer_groups]
    runs = config.num_hidden_layers / config.num_hidden_groups  # of a group, as transformers divides
    layers = [layer for i in range(config.num_hidden_layers) for layer in groups[int(i / runs)]]
    head = {}
    if is_classifier(model):
        head = classifier(model, (model.albert.pooler, "tanh"), (model.classifier, None))
    elif is_language_model(model):
        predictions = model.predictions
        activation = activation_of(config.hidden_act, "head")
        head = language_model(predictions.dense, activation, predictions.LayerNorm, predictions.decoder)
    return bert.body_graph(model, layers, embedding_projection=encoder.embedding_hidden_mapping_in, **head)


def _layer(layer: Any, config: Any) -> Layer:
    attention = layer.attention
    return Layer(
        attention_norm=Norm.of(attention.LayerNorm),
        query=attention.query,
        key=attention.key,
        value=attention.value,
        output=attention.dense,
        ffn_norm=Norm.of(layer.full_layer_layer_norm),
        ffn=_feed_forward(layer, config),
    )


def _feed_forward(layer: Any, config: Any) -> Any:
    if type(layer.ffn_output) in CONVERTED:
        return layer.ffn_output
    return Dense(layer.ffn, layer.ffn_output, activation_of(config.hidden_act, "layers"))
