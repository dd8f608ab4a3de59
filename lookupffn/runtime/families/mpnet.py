"""MPNet: RoBERTa's positions, and a bias on the attention scores by distance, the same in all layers."""

from __future__ import annotations

from typing import Any

import torch

from lookupffn.runtime.families.bert import feed_forward
from lookupffn.runtime.families.roberta import head_of
from lookupffn.runtime.graph import Graph, Layer, Norm

PADDING = 1  # whatever the configuration says


def graph(model: Any) -> Graph:
    config, body = model.config, getattr(model, "mpnet", model)
    e, encoder = body.embeddings, body.encoder
    max_positions = len(e.position_embeddings.weight)
    distances = torch.arange(1 - max_positions, max_positions)
    buckets = encoder.relative_position_bucket(distances)  # 32 of them, whatever the configuration says
    return Graph(
        family="mpnet",
        heads=config.num_attention_heads,
        words=e.word_embeddings.weight,
        positions=e.position_embeddings.weight,
        types=None,
        embedding_norm=Norm.of(e.LayerNorm),
        layers=[_layer(layer, config, number) for number, layer in enumerate(encoder.layer)],
        final_norm=None,
        pre_norm=False,
        max_positions=max_positions,
        relative=encoder.relative_attention_bias.weight[buckets].T,
        position_rule="ids",
        first_position=PADDING + 1,
        pad_token_id=PADDING,
        **head_of(model),
    )


def _layer(layer: Any, config: Any, number: int) -> Layer:
    attention = layer.attention.attn
    return Layer(
        attention_norm=Norm.of(layer.attention.LayerNorm),
        query=attention.q,
        key=attention.k,
        value=attention.v,
        output=attention.o,
        ffn_norm=Norm.of(layer.output.LayerNorm),
        ffn=feed_forward(layer, config, number),
    )
