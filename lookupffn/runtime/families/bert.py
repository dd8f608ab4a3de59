"""BERT: norms behind the sums, absolute positions, token types (MiniLM, E5, BGE, GTE's first, mxbai and many more)."""

from __future__ import annotations

from typing import Any

from lookupffn.errors import InputError
from lookupffn.runtime.graph import Dense, Graph, Layer, Norm, activation_of


def graph(model: Any) -> Graph:
    config, bert = model.config, getattr(model, "bert", model)
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise InputError(f"BERT with {config.position_embedding_type!r} positions cannot be exported")
    if config.is_decoder:
        raise InputError("BERT as a decoder cannot be exported")
    e = bert.embeddings
    layers = []
    for number, layer in enumerate(bert.encoder.layer):
        attention = layer.attention
        query, key, value = (
            (p.weight, p.bias) for p in (attention.self.query, attention.self.key, attention.self.value)
        )
        ffn: Any = getattr(layer, "ffn", None)  # a lookup that conversion put there
        if ffn is None:
            activation = activation_of(config.hidden_act, f"layer {number}")
            ffn = Dense(layer.intermediate.dense, layer.output.dense, activation)
        layers.append(
            Layer(
                attention_norm=Norm.of(attention.output.LayerNorm),
                query=query,
                key=key,
                value=value,
                output=attention.output.dense,
                ffn_norm=Norm.of(layer.output.LayerNorm),
                ffn=ffn,
            )
        )
    return Graph(
        family="bert",
        heads=config.num_attention_heads,
        words=e.word_embeddings.weight,
        positions=e.position_embeddings.weight,
        types=e.token_type_embeddings.weight,
        embedding_norm=Norm.of(e.LayerNorm),
        layers=layers,
        final_norm=None,
        pre_norm=False,
        pad_token_id=config.pad_token_id or 0,
    )
