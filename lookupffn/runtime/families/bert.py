"""BERT: norms behind the sums, absolute positions, token types (MiniLM, E5, BGE, GTE's first, mxbai and many more).

RoBERTa and XLM-R have the same modules (``roberta.py``).
"""

from __future__ import annotations

from typing import Any

from lookupffn.errors import InputError
from lookupffn.runtime.graph import Dense, Graph, Layer, Norm, activation_of, classifier, is_classifier


def graph(model: Any, **fields: Any) -> Graph:
    """``fields``: those of the graph in which a family differs from BERT."""
    config = model.config
    family, body = config.model_type, getattr(model, model.base_model_prefix, model)
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise InputError(f"{family} with {config.position_embedding_type!r} positions cannot be exported")
    if config.is_decoder:
        raise InputError(f"{family} as a decoder cannot be exported")
    e = body.embeddings
    if is_classifier(model) and family == "bert":
        fields |= classifier(model, (body.pooler.dense, "tanh"), (model.classifier, None))
    return Graph(
        family=family,
        heads=config.num_attention_heads,
        words=e.word_embeddings.weight,
        positions=e.position_embeddings.weight,
        types=e.token_type_embeddings.weight,
        embedding_norm=Norm.of(e.LayerNorm),
        layers=[_layer(layer, config, number) for number, layer in enumerate(body.encoder.layer)],
        final_norm=None,
        pre_norm=False,
        pad_token_id=config.pad_token_id or 0,
        **fields,
    )


def _layer(layer: Any, config: Any, number: int) -> Layer:
    attention = layer.attention
    products = (attention.self.query, attention.self.key, attention.self.value)
    query, key, value = ((p.weight, p.bias) for p in products)
    ffn: Any = getattr(layer, "ffn", None)  # a lookup that conversion put there
    if ffn is None:
        activation = activation_of(config.hidden_act, f"layer {number}")
        ffn = Dense(layer.intermediate.dense, layer.output.dense, activation)
    return Layer(
        attention_norm=Norm.of(attention.output.LayerNorm),
        query=query,
        key=key,
        value=value,
        output=attention.output.dense,
        ffn_norm=Norm.of(layer.output.LayerNorm),
        ffn=ffn,
    )
