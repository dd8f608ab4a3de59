"""The package's own encoder: norms before attention and FFN and one at the end, one fused projection."""

from __future__ import annotations

from typing import Any

from lookupffn.branches import CONVERTED
from lookupffn.errors import InputError
from lookupffn.runtime.graph import (
    Dense,
    Graph,
    Layer,
    Linear,
    Norm,
    classifier,
    is_classifier,
    is_language_model,
    language_model,
)


def graph(model: Any) -> Graph:
    config, encoder = model.config, getattr(model, "encoder", model)
    layers = []
    for number, layer in enumerate(encoder.layers):
        fused = layer.attention.query_key_value
        query, key, value = map(Linear, fused.weight.chunk(3), fused.bias.chunk(3))
        ffn: Any = layer.ffn
        if type(ffn).__name__ == "DenseFFN":
            ffn = Dense(ffn.up, ffn.down, "gelu")
        elif type(ffn) not in CONVERTED:
            raise InputError(f"layer {number}: a {type(ffn).__name__} cannot be exported; export before packing")
        layers.append(
            Layer(
                attention_norm=Norm.of(layer.attention_norm),
                query=query,
                key=key,
                value=value,
                output=layer.attention.output,
                ffn_norm=Norm.of(layer.ffn_norm),
                ffn=ffn,
                token_rows=list(layer.token_rows),
            )
        )
    head = {}
    if is_classifier(model):
        linears = ((model.classifier.dense, "tanh"), (model.classifier.out_proj, None))
        head = classifier(model, *linears, pooling=config.classifier_pooling)
    elif is_language_model(model):
        head = language_model(model.lm_head.dense, "gelu", model.lm_head.norm, model.lm_head.decoder)
    return Graph(
        family="lookup_roberta",
        heads=config.num_attention_heads,
        words=encoder.embeddings.word_embeddings.weight,
        positions=encoder.embeddings.position_embeddings.weight,
        types=None,
        embedding_norm=Norm.of(encoder.embeddings.LayerNorm),
        layers=layers,
        final_norm=Norm.of(encoder.final_norm),
        pre_norm=True,
        max_positions=len(encoder.embeddings.position_embeddings.weight),
        causal=config.is_decoder,
        position_rule="mask",
        pad_token_id=config.pad_token_id or 0,
        **head,
    )
