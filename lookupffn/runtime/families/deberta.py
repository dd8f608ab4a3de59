"""DeBERTa v2 and v3: attention scores of content and position apart (He et al. 2021), no embedded positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lookupffn.errors import InputError
from lookupffn.runtime.families.bert import feed_forward
from lookupffn.runtime.graph import (
    Graph,
    Layer,
    Linear,
    Norm,
    activation_of,
    classifier,
    is_classifier,
    is_language_model,
    language_model,
)


def graph(model: Any) -> Graph:
    config, body = model.config, getattr(model, model.base_model_prefix, model)
    e, encoder = body.embeddings, body.encoder
    unknown = {
        "a convolution behind its first layer (conv_kernel_size)": encoder.conv is not None,
        "embedded positions (position_biased_input)": e.position_embeddings is not None,
        "no relative positions (relative_attention)": not encoder.relative_attention,
        "embeddings of another width (embedding_size)": e.embed_proj is not None,
    }
    for what, present in unknown.items():
        if present:
            raise InputError(f"DeBERTa with {what} cannot be exported")
    types = e.token_type_embeddings
    with torch.no_grad():
        positions = encoder.get_rel_embedding()
        layers = [_layer(layer, config, number, positions) for number, layer in enumerate(encoder.layer)]
    return Graph(
        family="deberta-v2",
        heads=config.num_attention_heads,
        words=e.word_embeddings.weight,
        positions=None,
        types=None if types is None else types.weight,
        embedding_norm=Norm.of(e.LayerNorm),
        layers=layers,
        final_norm=None,
        pre_norm=False,
        max_positions=config.max_position_embeddings,
        distance_buckets=_buckets(encoder, config.max_position_embeddings),
        score_terms=1 + sum(kind in config.pos_att_type for kind in ("c2p", "p2c")),
        pad_token_id=config.pad_token_id or 0,
        **_head(model),
    )


def _buckets(encoder: Any, max_positions: int) -> Tensor:
    """The row of the positions' embeddings for each distance of a key from its query."""
    (found,) = encoder.get_rel_pos(torch.empty(1, max_positions, 1))  # (query, key)
    span = len(encoder.rel_embeddings.weight) // 2
    return (torch.cat([found[:, 0].flip(0), found[0, 1:]]) + span).clamp(0, 2 * span - 1)


def _layer(layer: Any, config: Any, number: int, positions: Tensor) -> Layer:
    """Queries and keys of positions are the same for all texts, and made here; where a kind is unused they are 0."""
    attention = layer.attention.self
    keys = queries = torch.zeros(len(positions), attention.all_head_size)
    if "c2p" in attention.pos_att_type:
        keys = (attention.key_proj if attention.share_att_key else attention.pos_key_proj)(positions)
    if "p2c" in attention.pos_att_type:
        queries = (attention.query_proj if attention.share_att_key else attention.pos_query_proj)(positions)
    return Layer(
        attention_norm=Norm.of(layer.attention.output.LayerNorm),
        query=attention.query_proj,
        key=attention.key_proj,
        value=attention.value_proj,
        output=layer.attention.output.dense,
        ffn_norm=Norm.of(layer.output.LayerNorm),
        ffn=feed_forward(layer, config, number),
        position_keys=keys,
        position_queries=queries,
    )


def _head(model: Any) -> dict[str, Any]:
    config = model.config
    if is_classifier(model):
        pooler = (model.pooler.dense, activation_of(config.pooler_hidden_act, "pooler"))
        return classifier(model, pooler, (model.classifier, None))
    if not is_language_model(model):
        return {}
    activation = activation_of(config.hidden_act, "head")
    if model.legacy:
        transform = model.cls.predictions.transform
        return language_model(transform.dense, activation, transform.LayerNorm, model.cls.predictions.decoder)
    head = model.lm_predictions.lm_head
    decoder = Linear(model.deberta.embeddings.word_embeddings.weight, head.bias)
    return language_model(head.dense, activation, head.LayerNorm, decoder)
