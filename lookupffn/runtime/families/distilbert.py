"""DistilBERT: BERT without token types, under other names."""

from __future__ import annotations

from typing import Any

from lookupffn.branches import CONVERTED
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
    config, body = model.config, getattr(model, "distilbert", model)
    layers = []
    for number, layer in enumerate(body.transformer.layer):
        attention = layer.attention
        layers.append(
            Layer(
                attention_norm=Norm.of(layer.sa_layer_norm),
                query=attention.q_lin,
                key=attention.k_lin,
                value=attention.v_lin,
                output=attention.out_lin,
                ffn_norm=Norm.of(layer.output_layer_norm),
                ffn=_feed_forward(layer.ffn, config, number),
            )
        )
    head = {}
    if is_classifier(model):
        head = classifier(model, (model.pre_classifier, "relu"), (model.classifier, None))
    elif is_language_model(model):
        activation = activation_of(config.activation, "head")
        head = language_model(model.vocab_transform, activation, model.vocab_layer_norm, model.vocab_projector)
    return Graph(
        family="distilbert",
        heads=config.n_heads,
        words=body.embeddings.word_embeddings.weight,
        positions=body.embeddings.position_embeddings.weight,
        types=None,
        embedding_norm=Norm.of(body.embeddings.LayerNorm),
        layers=layers,
        final_norm=None,
        pre_norm=False,
        max_positions=len(body.embeddings.position_embeddings.weight),
        pad_token_id=config.pad_token_id or 0,
        **head,
    )


def _feed_forward(ffn: Any, config: Any, number: int) -> Any:
    if type(ffn) in CONVERTED:
        return ffn
    return Dense(ffn.lin1, ffn.lin2, activation_of(config.activation, f"layer {number}"))
