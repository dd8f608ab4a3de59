"""ModernBERT: norms before the parts, rotary positions, gated FFNs, two layers of three that attend nearby only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lookupffn.branches import CONVERTED
from lookupffn.errors import InputError
from lookupffn.runtime.graph import (
    Dense,
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

KINDS = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # whose angles do not depend on the text's length


def graph(model: Any) -> Graph:
    config, body = model.config, getattr(model, "model", model)
    window, every = _locality(config)
    kinds = KINDS if window else KINDS[:1]
    for kind in kinds:
        if (rope := config.rope_parameters[kind]["rope_type"]) not in ROPE_TYPES:
            raise InputError(f"modernbert with rope_type {rope!r} cannot be exported: {', '.join(ROPE_TYPES)} can")
    return Graph(
        family="modernbert",
        heads=config.num_attention_heads,
        words=body.embeddings.tok_embeddings.weight,
        positions=None,
        types=None,
        embedding_norm=Norm.of(body.embeddings.norm),
        layers=[_layer(layer, config, number) for number, layer in enumerate(body.layers)],
        final_norm=Norm.of(body.final_norm),
        pre_norm=True,
        max_positions=config.max_position_embeddings,
        rotations=tuple(_rotations(body.rotary_emb, config, kind) for kind in kinds),
        window=window,
        global_every=every,
        position_rule="first",
        pad_token_id=config.pad_token_id or 0,
        **_head(model),
    )


def _locality(config: Any) -> tuple[int, int]:
    """The window of local layers and how often one is global; zeros where all are."""
    local = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(local):
        return 0, 0
    every = next((i for i in range(1, len(local)) if not local[i]), len(local))
    if local != [i % every != 0 for i in range(len(local))]:
        raise InputError(
            f"modernbert with layer_types {config.layer_types} cannot be exported: no layer in n is global"
        )
    if config.sliding_window < 1:
        raise InputError(f"modernbert with a window of {config.sliding_window} tokens cannot be exported")
    return min(config.sliding_window, config.max_position_embeddings), every


def _rotations(rotary: Any, config: Any, kind: str) -> Tensor:
    positions = torch.arange(config.max_position_embeddings)
    cosine, sine = rotary(torch.zeros(()), positions[None], kind)
    half = cosine.shape[-1] // 2
    return torch.cat([cosine[0, :, :half], sine[0, :, :half]], 1)


def _head(model: Any) -> dict[str, Any]:
    if not (is_classifier(model) or is_language_model(model)):
        return {}
    activation = activation_of(model.config.classifier_activation, "head")
    if is_language_model(model):
        return language_model(model.head.dense, activation, model.head.norm, model.decoder)
    linears = ((model.head.dense, activation), (model.classifier, None))
    return classifier(model, *linears, pooling=model.config.classifier_pooling) | {
        "head_norm": Norm.of(model.head.norm)
    }


def _layer(layer: Any, config: Any, number: int) -> Layer:
    fused = layer.attn.Wqkv
    query, key, value = (Linear(*part) for part in zip(fused.weight.chunk(3), _bias(fused, 3), strict=True))
    ffn: Any = layer.mlp
    if hasattr(ffn, "Wi"):
        up, gate = (Linear(*part) for part in zip(ffn.Wi.weight.chunk(2), _bias(ffn.Wi, 2), strict=True))
        ffn = Dense(up, ffn.Wo, activation_of(config.hidden_activation, f"layer {number}"), gate)
    elif type(ffn) not in CONVERTED:
        raise InputError(f"layer {number}: a {type(ffn).__name__} cannot be exported")
    return Layer(
        attention_norm=None if isinstance(layer.attn_norm, torch.nn.Identity) else Norm.of(layer.attn_norm),
        query=query,
        key=key,
        value=value,
        output=layer.attn.Wo,
        ffn_norm=Norm.of(layer.mlp_norm),
        ffn=ffn,
    )


def _bias(linear: Any, parts: int) -> tuple:
    return (None,) * parts if linear.bias is None else linear.bias.chunk(parts)
