"""The bytes of a packed model: one record a part, all in one safetensors file (docs/format.md, version 2).

Differs from the model in three ways, none of which a float32 record rounds: widths are padded with zeros to multiples
of 64 and heads to 16, queries are scaled by ``1 / sqrt(head_dim)``, and query, key and value are one product.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lookupffn.errors import InputError
from lookupffn.layer import LookupFFN
from lookupffn.runtime.format import (
    LANES,
    MAGIC,
    PROJECTION_DTYPES,
    TABLE_TYPES,
    encode,
    flush,
    panels,
    quantised_weights,
    round_up,
)
from lookupffn.runtime.graph import ACTIVATIONS, Dense, Graph, Layer, Norm

VERSION = 2
KINDS = {"linear": 2, "norm": 3, "embedding": 4, "model": 5}
LINEAR_TYPES = {"float32": 0, "int8": 2}
POOLINGS = {"none": 0, "mean": 1, "cls": 2}
PADDING = 64
SIZES = 10
CONFIG_BYTES = 128
RECORD = np.dtype([("magic", "S8"), ("version", "<u4"), ("kind", "<u4"), ("total", "<u8"), ("size", "<i4", (SIZES,))])
FILE_FORMAT = "lookupffn-model"


def _record(kind: str, sizes: list[int], sections: list[Tensor]) -> Tensor:
    """A header and sections, each from a multiple of 64 bytes on."""
    parts = []
    for section in sections:
        data = section.detach().contiguous().flatten().view(torch.uint8)
        parts.append(F.pad(data, (0, -data.numel() % 64)))
    header = np.zeros((), RECORD)
    header["magic"], header["version"], header["kind"] = MAGIC, VERSION, KINDS[kind]
    header["size"][: len(sizes)] = sizes
    header["total"] = RECORD.itemsize + sum(part.numel() for part in parts)
    return torch.cat([torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8), *parts])


def _padded(values: Tensor, width: int) -> Tensor:
    return F.pad(values, (0, width - values.shape[-1]))


def linear_record(weight: Tensor, bias: Tensor | None, dtype: str, activation: int = 0) -> Tensor:
    """``y = activation(x W^T + bias)``, ``weight (out, in)`` float64."""
    out, inputs = weight.shape
    block_out, block_in = round_up(out, PADDING), round_up(inputs, PADDING)
    blocks = F.pad(weight, (0, block_in - inputs, 0, block_out - out))[None, None, None]
    bias = weight.new_zeros(out) if bias is None else bias
    sections = []
    if dtype == "int8":
        values, scales, _ = quantised_weights(blocks, "int8")
        sections = [scales.float(), values.sum(-1, dtype=torch.int32) * -128]
    else:
        values = flush(blocks)
    sections = [panels(values), *sections, _padded(flush(bias), block_out)]
    sizes = [inputs, out, block_in, block_out, LINEAR_TYPES[dtype], activation]
    return _record("linear", sizes, sections)


def norm_record(norm: Norm) -> Tensor:
    width = len(norm.weight)
    padded = round_up(width, PADDING)
    epsilon = struct.unpack("<i", struct.pack("<f", norm.epsilon))[0]
    return _record(
        "norm",
        [width, padded, int(norm.rms), epsilon],
        [_padded(flush(norm.weight), padded), _padded(flush(norm.bias), padded)],
    )


def embedding_record(values: Tensor) -> Tensor:
    rows, width = values.shape
    padded = round_up(width, PADDING)
    return _record("embedding", [rows, width, padded], [_padded(flush(values), padded)])


def records_of(graph: Graph, linears: str, tables: str) -> Iterator[tuple[str, Tensor]]:
    """The records of a model in the order of its graph, each with its name; that of the model itself is made last."""
    yield "words", embedding_record(graph.words)
    yield "positions", embedding_record(graph.positions)
    if graph.types is not None:
        yield "types", embedding_record(graph.types)
    if graph.embedding_norm:
        yield "embedding_norm", norm_record(graph.embedding_norm)
    for i, layer in enumerate(graph.layers):
        for name, record in _layer_records(graph, layer, linears, tables):
            yield f"layers.{i}.{name}", record
    if graph.final_norm:
        yield "final_norm", norm_record(graph.final_norm)
    for i, (linear, activation) in enumerate(graph.head):
        number = ACTIVATIONS[activation] if activation else 0
        yield f"head.{i}", linear_record(linear.weight.double(), linear.bias, linears, number)


def _layer_records(graph: Graph, layer: Layer, linears: str, tables: str) -> Iterator[tuple[str, Tensor]]:
    heads = graph.heads
    head_dim = layer.query[0].shape[0] // heads
    pad = round_up(head_dim, LANES) - head_dim
    weights, biases = [], []
    for (weight, bias), scale in zip(
        (layer.query, layer.key, layer.value), (1 / math.sqrt(head_dim), 1.0, 1.0), strict=True
    ):
        weights.append(F.pad(weight.double().unflatten(0, (heads, -1)) * scale, (0, 0, 0, pad)).flatten(0, 1))
        biases.append(F.pad(bias.double().unflatten(0, (heads, -1)) * scale, (0, pad)).flatten())
    qkv = torch.cat(weights)
    yield "attention_norm", norm_record(layer.attention_norm)
    yield (
        "query_key_value",
        linear_record(qkv, torch.cat(biases), linears),
    )
    output = F.pad(layer.output.weight.double().unflatten(1, (heads, -1)), (0, pad)).flatten(1)
    yield "output", linear_record(output, layer.output.bias, linears)
    yield "ffn_norm", norm_record(layer.ffn_norm)
    if isinstance(layer.ffn, Dense):
        up, down = layer.ffn.up, layer.ffn.down
        weight = up.weight.double()
        yield (
            "up",
            linear_record(weight, up.bias, linears, ACTIVATIONS[layer.ffn.activation]),
        )
        yield "down", linear_record(down.weight.double(), down.bias, linears)
    else:
        assert isinstance(layer.ffn, LookupFFN)
        yield "lookup", encode(layer.ffn, tables, PROJECTION_DTYPES.get(tables, "int8"))


def model_record(graph: Graph, records: dict[str, Tensor]) -> Tensor:
    """The first record: the numbers of ``EncoderConfig`` (csrc/model/encoder.h), then place and size of the others."""
    head_dim = graph.layers[0].query[0].shape[0] // graph.heads if graph.layers else LANES
    numbers = [
        graph.words.shape[0],
        graph.width,
        round_up(graph.width, PADDING),
        len(graph.layers),
        graph.heads,
        round_up(head_dim, LANES),
        graph.positions.shape[0],
        0 if graph.types is None else graph.types.shape[0],
        int(graph.pre_norm),
        int(graph.embedding_norm is not None),
        int(graph.final_norm is not None),
        int(graph.causal),
        POOLINGS[graph.pooling],
        int(graph.normalised),
        graph.first_position,
        len(graph.head),
    ]
    config = F.pad(torch.tensor(numbers, dtype=torch.int32), (0, CONFIG_BYTES // 4 - len(numbers)))
    own = RECORD.itemsize + CONFIG_BYTES + round_up(16 * len(records), 64)
    places, position = [], own
    for record in records.values():
        places.append((position, record.numel()))
        position += record.numel()
    return _record("model", [len(records)], [config, torch.tensor(places, dtype=torch.int64)])


def _check_finite(graph: Graph, parts: dict[str, Tensor | None]) -> None:
    for name, values in parts.items():
        if values is not None and not values.isfinite().all():
            raise InputError(f"{name} holds values that are not finite: this {graph.family} cannot be exported")


def _weights(graph: Graph) -> dict[str, Tensor | None]:
    """Every weight of a model but those of lookups, which look at their own."""
    found = {"words": graph.words, "positions": graph.positions, "types": graph.types}
    norms = {"embedding_norm": graph.embedding_norm, "final_norm": graph.final_norm}
    for i, layer in enumerate(graph.layers):
        norms |= {f"layers.{i}.attention_norm": layer.attention_norm, f"layers.{i}.ffn_norm": layer.ffn_norm}
        pairs = {"query": layer.query, "key": layer.key, "value": layer.value}
        pairs["output"] = (layer.output.weight, layer.output.bias)
        if isinstance(layer.ffn, Dense):
            pairs |= {
                "up": (layer.ffn.up.weight, layer.ffn.up.bias),
                "down": (layer.ffn.down.weight, layer.ffn.down.bias),
            }
        for name, (weight, bias) in pairs.items():
            found |= {f"layers.{i}.{name}": weight, f"layers.{i}.{name} bias": bias}
    for i, (linear, _) in enumerate(graph.head):
        found |= {f"head.{i}": linear.weight, f"head.{i} bias": linear.bias}
    for name, norm in norms.items():
        if norm:
            found |= {name: norm.weight, f"{name} bias": norm.bias}
    return found


def model_bytes(graph: Graph, linears: str, tables: str) -> list[bytes | memoryview]:
    """A safetensors file of the model's records, in parts: its data and every record begin at a multiple of 64 bytes.

    Raises:
        InputError: a type that is not known, or a weight that is not finite; the message names it.
    """
    if linears not in LINEAR_TYPES:
        raise InputError(f"linears must be one of {', '.join(LINEAR_TYPES)}, not {linears!r}")
    if tables not in TABLE_TYPES:
        raise InputError(f"tables must be one of {', '.join(TABLE_TYPES)}, not {tables!r}")
    _check_finite(graph, _weights(graph))
    records = {}
    with torch.no_grad():
        for name, record in records_of(graph, linears, tables):
            records[name] = record
    records = {"model": model_record(graph, records)} | records
    tensors, position = {}, 0
    for name, record in records.items():
        tensors[name] = {"dtype": "U8", "shape": [len(record)], "data_offsets": [position, position + len(record)]}
        position += len(record)
    described = {
        "format": FILE_FORMAT,
        "version": str(VERSION),
        "family": graph.family,
        "linears": linears,
        "tables": tables,
        "position_rule": graph.position_rule,
        "pad_token_id": str(graph.pad_token_id),
        "labels": json.dumps(graph.labels),
        "max_length": str(min(graph.max_length, graph.positions.shape[0] - graph.first_position)),
    }
    header = json.dumps({"__metadata__": described, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)
    return [struct.pack("<Q", len(header)) + header, *(record.numpy().data for record in records.values())]


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a packed model says in words. Raises InputError where the file is no such."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(os.path.getsize(path), 1 << 24):
                raise ValueError(f"a header of {length} bytes")
            metadata = json.loads(file.read(length))["__metadata__"]
        if metadata["format"] != FILE_FORMAT or metadata["version"] != str(VERSION):
            raise ValueError(f"format {metadata['format']!r}, version {metadata['version']!r}")
        if not isinstance(json.loads(metadata.get("labels", "[]")), list):
            raise ValueError(f"labels {metadata['labels']!r}")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{path} is damaged or no packed model: {error}") from None
    return metadata
