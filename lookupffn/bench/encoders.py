"""What is compared: an encoder by its folder or as random weights of a known shape, and what a token of it costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.runtime.graph import Dense, Graph, Layer

SHAPES = {  # layers, width, heads and width of the FFN, of BERT's kind and vocabulary
    "minilm": (6, 384, 12, 1536),
    "bert-base": (12, 768, 12, 3072),
}
READS, CODE_BITS = 3, 8


def encoder(name: str, seed: int) -> Any:
    """The encoder in the folder or of the name; for a name in ``SHAPES``, where no such folder is, random weights."""
    if name in SHAPES and not Path(name).exists():
        from transformers import BertConfig, BertModel

        layers, width, heads, ffn = SHAPES[name]
        config = BertConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=ffn
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BertModel(config, add_pooling_layer=False).eval()
    from lookupffn.hf.loading import load_encoder

    model, _ = load_encoder(name)
    return (model[0].auto_model if hasattr(model, "encode") else model).eval()


def with_lookups(graph: Graph, seed: int) -> Graph:
    """The encoder with random lookups for FFNs: the time of one that was trained so, and nothing else.

    Tables grow with the width, 64 at 384 and 128 at 768: 5.8 and 8.5 times fewer multiply-adds than the dense FFN.
    """
    config = LookupConfig(graph.width, graph.width, max(1, graph.width // 6), CODE_BITS, reads=READS)
    made: dict[int, Layer] = {}  # by the layer's id: one that is shared stays so
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in graph.layers:
            if id(layer) not in made:
                ffn = LookupFFN(config)
                nn.init.normal_(ffn.tables)
                made[id(layer)] = dataclasses.replace(layer, ffn=ffn)
    return dataclasses.replace(graph, layers=[made[id(layer)] for layer in graph.layers])


def longest(graph: Graph) -> int:
    """Tokens that a text may have."""
    return graph.max_positions - graph.first_position


def ffn_flops(graph: Graph) -> int:
    """Of a token through all FFNs, two a multiply-add, as ``LookupFFN.flops`` counts."""
    total = 0
    for layer in graph.layers:
        ffn = layer.ffn
        if isinstance(ffn, Dense):
            parts = [part for part in (ffn.up, ffn.gate, ffn.down) if part is not None]
            total += 2 * sum(part.weight.numel() for part in parts)
        else:
            total += ffn.flops(1)
    return total


def flops_per_token(graph: Graph, lengths: np.ndarray) -> int:
    """Two a multiply-add of the linears, of attention and of FFNs, for texts of these lengths without padding."""
    linears = attended = 0
    if graph.embedding_projection is not None:
        linears += 2 * graph.embedding_projection.weight.numel()
    for layer in graph.layers:
        parts = (layer.query.weight, layer.key.weight, layer.value.weight, layer.output.weight)
        linears += 2 * sum(weight.numel() for weight in parts)
        attended += 4 * len(layer.query.weight)  # scores and sums of values, for each token that is attended to
    return round(linears + ffn_flops(graph) + attended * (lengths**2).sum() / lengths.sum())
