"""The bytes of a packed model: one record a part, all in one safetensors file (docs/format.md, version 2).

Differs from the model in three ways, none of which a float32 record rounds: widths are padded with zeros to multiples
of 64 and heads to 16 (halves of heads, where they are rotated), queries are scaled by ``1 / sqrt(head_dim)``, and
query, key and value are one product.
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

from lookupffn.branches import BranchedLookupFFN, NoFFN, TokenRows
from lookupffn.errors import InputError
from lookupffn.runtime.format import (
    LANES,
    LEVELS,
    MAGIC,
    PROJECTION_DTYPES,
    TABLE_TYPES,
    encode,
    flush,
    least_squares_scales,
    panels,
    quantised_weights,
    round_up,
)
from lookupffn.runtime.graph import ACTIVATIONS, POSITIONS, Dense, Graph, Layer, Linear, Norm, Product

VERSION = 2
KINDS = {"linear": 2, "norm": 3, "embedding": 4, "model": 5, "branches": 6, "token_rows": 7}
LINEAR_TYPES = {"float32": 0, "int8": 2, "bfloat16": 3}
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "tokens": 3}
PADDING = 64
SIZES = 10
CONFIG_BYTES = 128
RECORD = np.dtype([("magic", "S8"), ("version", "<u4"), ("kind", "<u4"), ("total", "<u8"), ("size", "<i4", (SIZES,))])
FILE_FORMAT = "lookupffn-model"


def _record(kind: str, sizes: list[int], sections: list[Tensor]) -> Tensor:
    """A header and sections, each from a multiple of 64 bytes on."""
    parts = []
    for section in sections:
        data = section.detach().cpu().contiguous().flatten().view(torch.uint8)
        parts.append(F.pad(data, (0, -data.numel() % 64)))
    header = np.zeros((), RECORD)
    header["magic"], header["version"], header["kind"] = MAGIC, VERSION, KINDS[kind]
    header["size"][: len(sizes)] = sizes
    header["total"] = RECORD.itemsize + sum(part.numel() for part in parts)
    return torch.cat([torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8), *parts])


def _padded(values: Tensor, width: int) -> Tensor:
    return F.pad(values, (0, width - values.shape[-1]))


def linear_record(linear: Product, dtype: str, activation: str | None = None) -> Tensor:
    """``y = activation(x W^T + bias)``."""
    weight, bias = linear.weight.double(), linear.bias
    out, inputs = weight.shape
    block_out, block_in = round_up(out, PADDING), round_up(inputs, PADDING)
    blocks = F.pad(weight, (0, block_in - inputs, 0, block_out - out))[None, None, None]
    bias = weight.new_zeros(out) if bias is None else bias
    sections = []
    if dtype == "int8":
        values, scales, _ = quantised_weights(blocks, "int8")
        sections = [scales.float(), values.sum(-1, dtype=torch.int32) * -128]
    else:
        values = flush(blocks).to(getattr(torch, dtype))
    sections = [panels(values), *sections, _padded(flush(bias), block_out)]
    sizes = [inputs, out, block_in, block_out, LINEAR_TYPES[dtype], ACTIVATIONS[activation] if activation else 0]
    return _record("linear", sizes, sections)


def norm_record(norm: Norm) -> Tensor:
    width = len(norm.weight)
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    padded = round_up(width, PADDING)
    epsilon = struct.unpack("<i", struct.pack("<f", norm.epsilon))[0]
    return _record(
        "norm",
        [width, padded, int(norm.rms), epsilon],
        [_padded(flush(norm.weight), padded), _padded(flush(bias), padded)],
    )


def embedding_record(values: Tensor) -> Tensor:
    rows, width = values.shape
    padded = round_up(width, PADDING)
    return _record("embedding", [rows, width, padded], [_padded(flush(values), padded)])


def token_rows_record(rows: TokenRows, tables: str, vocab_size: int) -> Tensor:
    if rows.vocab_size != vocab_size:
        raise InputError(f"rows by ids were made for {rows.vocab_size} ids, the model has {vocab_size}")
    return rows_record(rows.rows, tables if tables in LEVELS else "float32", rows.before, rows.after)


def rows_record(rows: Tensor, dtype: str, before: int = 0, after: int = 0) -> Tensor:
    """Rows by ids as integers with a scale a row (of int4 that of the least squared error), or in float32."""
    count, width = rows.shape
    padded = round_up(width, 2 * PADDING if dtype == "int4" else PADDING)
    values, sections = _padded(flush(rows), padded), []
    if most := LEVELS.get(dtype):
        scales = values.abs().amax(1) / most
        if dtype == "int4":
            scales = least_squares_scales(values[:, None], most)
        scales = flush(scales)
        integers = (values / scales[:, None]).nan_to_num(0.0, 0.0, 0.0).round().clamp(-most, most).to(torch.int8)
        lines = integers.unflatten(1, (-1, 4, LANES)).transpose(2, 3).flatten(1)  # byte k of word l: output 16 k + l
        if dtype == "int4":
            low, high = lines.unflatten(1, (-1, 2, 64)).unbind(2)
            lines = (low & 15) | (high << 4)
        values, sections = lines, [scales]
    sizes = [count, width, padded, TABLE_TYPES[dtype], before, after]
    return _record("token_rows", sizes, [values, *sections])


def records_of(graph: Graph, linears: str, tables: str) -> Iterator[tuple[str, Tensor]]:
    """The records of a model in the order of its graph, each with its name; that of the model itself is made last.

    Those of a layer that is shared come again wherever it stands, under the names of its first place.
    """
    yield "words", rows_record(graph.words, "int8") if linears == "int8" else embedding_record(graph.words)
    if graph.positions is not None:
        yield "positions", embedding_record(graph.positions)
    for i, angles in enumerate(graph.rotations):
        yield f"rotations.{i}", embedding_record(_padded_halves(angles, 1, graph.head_dim).flatten(1))
    if graph.relative is not None:  # and zeros for what a vector reads behind the last distance
        yield "relative", embedding_record(F.pad(graph.relative, (0, LANES - 1)))
    if graph.distance_buckets is not None:
        yield "distance_buckets", embedding_record(graph.distance_buckets[None].float())
    if graph.types is not None:
        yield "types", embedding_record(graph.types)
    if graph.embedding_norm:
        yield "embedding_norm", norm_record(graph.embedding_norm)
    if graph.embedding_projection:
        yield "embedding_projection", linear_record(graph.embedding_projection, linears)
    made: dict[int, list[tuple[str, Tensor]]] = {}  # by the layer's id
    for i, layer in enumerate(graph.layers):
        if id(layer) not in made:
            named = _layer_records(graph, layer, linears, tables)
            made[id(layer)] = [(f"layers.{i}.{name}", record) for name, record in named]
        yield from made[id(layer)]
    if graph.final_norm:
        yield "final_norm", norm_record(graph.final_norm)
    for i, (linear, activation) in enumerate(graph.head):
        yield f"head.{i}", linear_record(linear, linears, activation)
        if i == 0 and graph.head_norm:
            yield "head_norm", norm_record(graph.head_norm)


def _padded_buckets(graph: Graph) -> int:
    positions = graph.layers[0].position_keys if graph.layers else None
    return 0 if positions is None else round_up(len(positions), PADDING)


def _padded_head_dim(graph: Graph) -> int:
    return round_up(graph.head_dim, 2 * LANES if graph.rotations else LANES)


def _padded_halves(values: Tensor, dim: int, head_dim: int) -> Tensor:
    """The two halves of each head along ``dim``, each padded to a multiple of 16, on two dimensions."""
    halves = values.unflatten(dim, (2, head_dim // 2))
    return F.pad(halves, (*(0, 0) * (halves.dim() - dim - 2), 0, -(head_dim // 2) % LANES))


def _score_scale(graph: Graph) -> float:
    return 1 / math.sqrt(graph.score_terms * graph.head_dim)


def _by_bucket(graph: Graph, positions: Tensor, scale: float = 1.0) -> Linear:
    """From a head's dimensions to its products with positions ``(buckets, attention width)``, of all heads."""
    rows = positions.double().unflatten(1, (graph.heads, -1)).transpose(0, 1) * scale  # (heads, buckets, head_dim)
    pad = _padded_head_dim(graph) - graph.head_dim
    return Linear(F.pad(rows, (0, pad, 0, -rows.shape[1] % PADDING)).flatten(0, 1), None)


def _fused(graph: Graph, layer: Layer) -> Linear:
    """Query, key and value as one product; queries are scaled."""
    heads, head_dim = graph.heads, graph.head_dim
    pad = _padded_head_dim(graph) - head_dim
    weights, biases = [], []
    for part, scale in ((layer.query, _score_scale(graph)), (layer.key, 1.0), (layer.value, 1.0)):
        bias = torch.zeros(len(part.weight)) if part.bias is None else part.bias
        rows = torch.cat([part.weight.double(), bias.double()[:, None]], 1).unflatten(0, (heads, head_dim)) * scale
        rotated = graph.rotations and part is not layer.value
        rows = _padded_halves(rows, 1, head_dim).flatten(1, 2) if rotated else F.pad(rows, (0, 0, 0, pad))
        weights.append(rows[..., :-1].flatten(0, 1))
        biases.append(rows[..., -1].flatten())
    return Linear(torch.cat(weights), torch.cat(biases))


def _layer_records(graph: Graph, layer: Layer, linears: str, tables: str) -> Iterator[tuple[str, Tensor]]:
    if layer.attention_norm:
        yield "attention_norm", norm_record(layer.attention_norm)
    yield "query_key_value", linear_record(_fused(graph, layer), linears)
    if layer.position_keys is not None and layer.position_queries is not None:
        yield "position_keys", linear_record(_by_bucket(graph, layer.position_keys), linears)
        yield "position_queries", linear_record(_by_bucket(graph, layer.position_queries, _score_scale(graph)), linears)
    pad = _padded_head_dim(graph) - graph.head_dim
    output = F.pad(layer.output.weight.double().unflatten(1, (graph.heads, -1)), (0, pad)).flatten(1)
    yield "output", linear_record(Linear(output, layer.output.bias), linears)
    yield "ffn_norm", norm_record(layer.ffn_norm)
    ffn = layer.ffn
    low_rank, token_rows = None, list(layer.token_rows)
    if isinstance(ffn, Dense):
        yield "up", linear_record(ffn.up, linears, ffn.activation)
        if ffn.gate:
            yield "gate", linear_record(ffn.gate, linears)
        yield "down", linear_record(ffn.down, linears)
    elif not isinstance(ffn, NoFFN):
        branched = ffn if isinstance(ffn, BranchedLookupFFN) else BranchedLookupFFN(ffn)
        yield "lookup", encode(branched.lookup, tables, PROJECTION_DTYPES.get(tables, "int8"))
        low_rank, token_rows = branched.low_rank, [*branched.token_rows, *token_rows]
    if low_rank is None and not token_rows and not isinstance(ffn, NoFFN):
        return
    yield "branches", _record("branches", [int(low_rank is not None), len(token_rows)], [])
    if low_rank is not None:
        yield "reduce", linear_record(low_rank.reduce, linears)
        yield "expand", linear_record(low_rank.expand, linears)
    for i, rows in enumerate(token_rows):
        yield f"token_rows.{i}", token_rows_record(rows, tables, len(graph.words))


def model_record(graph: Graph, names: list[str], records: dict[str, Tensor]) -> Tensor:
    """The first record: the numbers of ``EncoderConfig`` (csrc/model/encoder.h), then place and size of the others.

    ``names`` are those of the records in the order of the graph, ``records`` what is stored.
    """
    numbers = [
        graph.words.shape[0],
        graph.width,
        round_up(graph.width, PADDING),
        len(graph.layers),
        graph.heads,
        _padded_head_dim(graph),
        graph.max_positions,
        0 if graph.types is None else graph.types.shape[0],
        int(graph.pre_norm),
        int(graph.embedding_norm is not None),
        int(graph.final_norm is not None),
        int(graph.causal),
        POOLINGS[graph.pooling],
        int(graph.normalised),
        graph.first_position,
        len(graph.head),
        int(graph.head_norm is not None),
        int(bool(graph.layers) and graph.layers[0].attention_norm is None),
        int(any(isinstance(layer.ffn, Dense) and layer.ffn.gate is not None for layer in graph.layers)),
        int(bool(graph.rotations)),
        int(graph.relative is not None),
        graph.window,
        graph.global_every,
        0 if graph.embedding_projection is None else graph.words.shape[1],
        _padded_buckets(graph),
    ]
    config = F.pad(torch.tensor(numbers, dtype=torch.int32), (0, CONFIG_BYTES // 4 - len(numbers)))
    position = RECORD.itemsize + CONFIG_BYTES + round_up(16 * len(names), 64)
    places = {}
    for name, record in records.items():
        places[name] = position, record.numel()
        position += record.numel()
    listed = torch.tensor([places[name] for name in names], dtype=torch.int64)
    return _record("model", [len(names)], [config, listed])


def _check_finite(graph: Graph, parts: dict[str, Tensor | None]) -> None:
    for name, values in parts.items():
        if values is not None and not values.isfinite().all():
            raise InputError(f"{name} holds values that are not finite: this {graph.family} cannot be exported")


def _weights(graph: Graph) -> dict[str, Tensor | None]:
    """Every weight of a model but those of lookups, which look at their own."""
    found = {"words": graph.words, "positions": graph.positions, "types": graph.types, "relative": graph.relative}
    parts: dict[str, Product | Norm | None] = {
        name: getattr(graph, name) for name in ("embedding_norm", "embedding_projection", "final_norm")
    }
    for i, layer in enumerate(graph.layers):
        named = {
            name: getattr(layer, name) for name in ("attention_norm", "query", "key", "value", "output", "ffn_norm")
        }
        found |= {f"layers.{i}.{name}": getattr(layer, name) for name in ("position_keys", "position_queries")}
        found |= {f"layers.{i}.token_rows.{j}": rows.rows for j, rows in enumerate(layer.token_rows)}
        if isinstance(layer.ffn, Dense):
            named |= {"up": layer.ffn.up, "gate": layer.ffn.gate, "down": layer.ffn.down}
        elif isinstance(layer.ffn, BranchedLookupFFN):
            found |= {f"layers.{i}.{name}": p for name, p in layer.ffn.named_parameters()}
        parts |= {f"layers.{i}.{name}": part for name, part in named.items()}
    parts |= {f"head.{i}": linear for i, (linear, _) in enumerate(graph.head)} | {"head_norm": graph.head_norm}
    for name, part in parts.items():
        if part is not None:
            found |= {name: part.weight, f"{name} bias": part.bias}
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
    with torch.no_grad():
        listed = list(records_of(graph, linears, tables))
        records = dict(listed)
        records = {"model": model_record(graph, [name for name, _ in listed], records)} | records
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
        "max_length": str(min(graph.max_length, graph.max_positions - graph.first_position)),
    }
    if graph.mask_token_id is not None:
        described["mask_token_id"] = str(graph.mask_token_id)
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
        if metadata["format"] != FILE_FORMAT:
            raise ValueError(f"format {metadata['format']!r}")
        version = str(metadata["version"])
        if version == str(VERSION):
            _check_words(metadata)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, struct.error) as error:
        raise InputError(f"{path} is damaged or no packed model: {error}") from None
    if version != str(VERSION):
        remedy = "upgrade it" if version.isdecimal() and int(version) > VERSION else "export the model again"
        raise InputError(f"{path} is of format version {version}, this lookupffn reads {VERSION}: {remedy}")
    return metadata


def _check_words(metadata: dict[str, str]) -> None:
    if not isinstance(json.loads(metadata.get("labels", "[]")), list):
        raise ValueError(f"labels {metadata['labels']!r}")
    if metadata["position_rule"] not in POSITIONS:
        raise ValueError(f"position_rule {metadata['position_rule']!r}")
    for name in ("pad_token_id", "max_length"):
        int(metadata[name])
    int(metadata.get("mask_token_id", 0))
