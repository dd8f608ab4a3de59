"""The packed form of a layer: one vector of bytes that describes itself, quantised and laid out for the kernels.

``encode`` makes it from a trained layer, ``decode`` reads it back. The bytes are the same on every machine;
``docs/format.md`` is their specification.

Differs from the textbook in four ways. The Hadamard of size ``D'`` is ``H_n (x) H_b``: ``H_b`` is multiplied into the
blocks here, once, and only ``H_n`` is left for run time. Blocks smaller than 16 are merged to blocks of 16, which
that makes exact. Weights and tables are integers with a scale. Tables are cut into slices of outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn import native, ops
from lookupffn.errors import PackedError
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.memory import aligned_bytes
from lookupffn.reference import STAGES, bh4_matrix, hadamard_matrix

FORMAT_VERSION = 1
LANES = 16
WEIGHT_TYPES = {"float32": 0, "int16": 1, "int8": 2}
TABLE_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
LEVELS = {"int8": 127, "int4": 7}  # the largest integer of a row
PROJECTION_DTYPES = {
    "int4": "int8",
    "int8": "int8",
    "bfloat16": "int16",
    "float32": "float32",
}  # by default, with tables of each dtype
_WEIGHT_DTYPES = (torch.float32, torch.int16, torch.int8)
_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
SECTIONS = ("weights", "weight_scales", "weight_offsets", "levels", "code_bias", "tables", "table_scales", "bias")
_INTS = (
    "in_features", "out_features", "num_tables", "code_bits", "reads", "stages", "repeats", "blocks", "block_in",
    "block_out", "table_rows", "weight_type", "table_type", "slice", "reserved",
)  # fmt: skip
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4")]
    + [(name, "<i4") for name in _INTS]
    + [("scale", "<f4"), ("residual", "<f4"), ("total_bytes", "<u8"), ("offset", "<u8", (len(SECTIONS),))]
)
MAGIC = b"LOOKUPFF"
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def encode(layer: LookupFFN, tables: str = "int8", projection: str = "int8") -> Tensor:
    """The packed bytes of ``layer``, a uint8 vector in aligned memory.

    ``tables`` is ``"int8"`` (one scale a table, ``max |table| / 127``: each entry within half a scale of its value),
    ``"int4"`` (one scale a table, that of the least sum of squared errors: each entry within half a scale of its value,
    or 7 scales where it is larger than these), ``"bfloat16"`` or ``"float32"``. ``projection`` is ``"int8"`` or
    ``"int16"`` (one scale an output of a block; activations are quantised a token and a stage at a time, by their
    largest magnitude) or ``"float32"``.

    Raises:
        ValueError: an unknown type, or parameters that are not finite; the message names them.
    """
    if tables not in TABLE_TYPES or projection not in WEIGHT_TYPES:
        raise ValueError(
            f"tables must be one of {', '.join(TABLE_TYPES)} and projection one of {', '.join(WEIGHT_TYPES)}, "
            f"not {tables!r} and {projection!r}"
        )
    h = layout(layer.config, tables, projection)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not parameter.float().isfinite().all():
                raise ValueError(f"{name} holds values that are not finite: this layer cannot be packed")
        return _assemble(h, _projection(layer, h) | _tables(layer, h))


def layout(config: LookupConfig, tables: str, projection: str) -> dict:
    """The header of a layer that :func:`encode` packs, as :func:`read_header` gives it; the layer need not exist."""
    c = config
    stages, repeats, blocks, block_in, block_out, scale, residual = 0, 1, 1, 0, 0, 1.0, 0.0
    if c.projection == "none":
        projection = "float32"
    elif c.projection == "dense" or c.padded_features < LANES:  # one stage of one block
        stages, block_in, block_out = 1, round_up(c.in_features, LANES), round_up(c.code_features, 64)
    else:
        block_in = block_out = max(c.block_size, LANES)
        stages, repeats, blocks = STAGES, c.repeats, c.padded_features // block_in
        scale, residual = c.decay, 1 - c.decay
    # The only codes whose scores may be negative: they read a negated row.
    negated = tables in LEVELS and c.reads > 1 and c.code_bits < 3
    h = {name: getattr(c, name) for name in ("in_features", "out_features", "num_tables", "code_bits", "reads")} | {
        "stages": stages, "repeats": repeats, "blocks": blocks, "block_in": block_in, "block_out": block_out,
        "table_rows": c.num_rows * (1 + negated), "slice": slice_width(c.out_features, tables), "reserved": 0,
        "weight_type": WEIGHT_TYPES[projection], "weight_dtype": projection,
        "table_type": TABLE_TYPES[tables], "table_dtype": tables, "scale": scale, "residual": residual,
    }  # fmt: skip
    h["section_shape"] = _section_shapes(h)
    h["section_bytes"] = _section_bytes(h)
    h["offset"], position = {}, round_up(HEADER.itemsize, 64)
    for name in SECTIONS:
        h["offset"][name] = position
        position += round_up(h["section_bytes"].get(name, 0), 64)
    return h | {"magic": MAGIC, "version": FORMAT_VERSION, "total_bytes": position}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def flush(t: Tensor) -> Tensor:
    """Float32 without denormals: they would cost some processors a hundred cycles each."""
    t = t.float()
    return t.where(t.abs() >= SMALLEST_NORMAL, 0.0)


# ---- Projection ------------------------------------------------------------------------------------------------------


def _projection(layer: LookupFFN, h: dict) -> dict[str, Tensor]:
    c, kind = layer.config, h["weight_dtype"]
    if isinstance(layer.projection, nn.Identity):
        return {}
    weight = layer.projection.weight.double()
    if c.projection == "bh4" and c.padded_features < LANES:  # narrower than a vector: the product, as a dense matrix
        eye = torch.eye(c.padded_features, dtype=weight.dtype)
        weight = torch.cat([c.decay * bh4_matrix(factors) + (1 - c.decay) * eye for factors in weight])
        weight = weight[: c.code_features, : c.in_features]
    if weight.dim() == 2:  # one stage of one block
        blocks = F.pad(weight, (0, h["block_in"] - c.in_features, 0, h["block_out"] - c.code_features))
        blocks = blocks[None, None, None]
    else:
        blocks = _folded_blocks(weight)
    bias = layer.projection.bias.float()
    sections = {"code_bias": F.pad(bias, (0, h["repeats"] * h["blocks"] * h["block_out"] - c.code_features))}
    if kind == "float32":
        values = flush(blocks)
    else:
        values, sections["weight_scales"], sections["levels"] = quantised_weights(blocks, kind)
        if kind == "int8":
            sections["weight_offsets"] = values.sum(-1, dtype=torch.int32) * -128  # activations come as q + 128
    sections["weights"] = panels(values)
    return sections


def panels(values: Tensor) -> Tensor:
    """``(R, stages, n, block_out, block_in)`` as words: four bytes of inputs for 16 outputs each, four panels in turn.

    To ``(R, stages, n, groups, words, panels of a group, 16, inputs a word)``.
    """
    word = 4 // values.element_size()
    group = min(4, values.shape[3] // LANES)
    return values.unflatten(4, (-1, word)).unflatten(3, (-1, group, LANES)).permute(0, 1, 2, 3, 6, 4, 5, 7)


def _folded_blocks(weight: Tensor) -> Tensor:
    """``H_b W / sqrt(n)`` for every block: with an unnormalised ``H_n`` across blocks a whole stage of BH4."""
    repeats, stages, n, b, _ = weight.shape
    merge = min(n, max(1, LANES // b))
    merged = weight.new_zeros(repeats, stages, n // merge, merge, b, merge, b)
    for i in range(merge):
        merged[:, :, :, i, :, i, :] = weight[:, :, i::merge]
    n, b = n // merge, b * merge
    return hadamard_matrix(b, dtype=weight.dtype) @ merged.reshape(repeats, stages, n, b, b) / n**0.5


def quantised_weights(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Integer weights, the scale of each output (R, stages, n, block_out), the activation levels (R, stages).

    With 16 bits the sum of a block's products must stay below 2**31: weights and activations share what is left.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    most = 127.0
    if kind == "int16":
        ratio = (blocks.abs().sum(-1, keepdim=True) / largest).nan_to_num(1.0).max().clamp(min=1.0).item()
        most = float(min(32767, int((2**31 / (2 * ratio)) ** 0.5)))
    # Scales are rounded to float32 first, so that the integers fit the numbers that the kernels multiply by.
    scales = flush(largest / most)
    values = (blocks / scales.double()).nan_to_num(0.0, 0.0, 0.0).round_()
    levels = torch.full(blocks.shape[:2], 127.0)
    if kind == "int16":
        sums = values.abs().sum(-1).flatten(2).amax(-1)
        levels = ((2**31 - 1) / sums.clamp(min=1.0)).floor().clamp(max=32767.0).float()
    return values.to(torch.int8 if kind == "int8" else torch.int16), scales.squeeze(-1), levels


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _tables(layer: LookupFFN, h: dict) -> dict[str, Tensor]:
    c, width = layer.config, h["slice"]
    slices = -(-c.out_features // width)
    pad = slices * width - c.out_features
    sections = {"bias": F.pad(layer.bias.float(), (0, pad))}
    tables = flush(layer.tables)
    if most := LEVELS.get(h["table_dtype"]):
        scales = flush(tables.abs().amax((1, 2)) / most if most == 127 else least_squares_scales(tables, most))
        tables = (tables / scales[:, None, None]).nan_to_num(0.0, 0.0, 0.0).round().clamp(-most, most).to(torch.int8)
        sections["table_scales"] = F.pad(scales, (0, -c.num_tables % LANES))
        if h["table_rows"] == 2 * c.num_rows:
            tables = torch.cat([tables, -tables], 1)
    elif h["table_dtype"] == "bfloat16":
        tables = tables.bfloat16()
    rows = F.pad(tables, (0, pad)).view(c.num_tables, tables.shape[1], slices, width)
    sections["tables"] = _interleave(rows.permute(2, 0, 1, 3))  # (slices, T, rows, width)
    if h["table_dtype"] == "int4":
        sections["tables"] = _halves(sections["tables"])
    return sections


SCALED_AT_ONCE = 1 << 17  # entries, so that what is computed of them stays in a cache


def least_squares_scales(tables: Tensor, most: int) -> Tensor:
    """``(T,)`` scales at which integers of ``-most`` to ``most`` are nearest to ``tables (T, K, E)``, float64.

    Of 36 shares of the largest entry, 1 to 0.3, each table takes that of the least sum of squared errors: with few
    integers a finer step for most entries is worth more than the few that are cut off.
    """
    some = max(1, SCALED_AT_ONCE // tables[0].numel())
    return torch.cat([_least_squares_scales(part.double(), most) for part in tables.split(some)])


def _least_squares_scales(values: Tensor, most: int) -> Tensor:
    largest = values.abs().amax((1, 2)) / most
    best, least = largest, torch.full_like(largest, math.inf)
    for share in torch.linspace(1.0, 0.3, 36, dtype=torch.float64):
        scales = (largest * share)[:, None, None]
        rounded = (values / scales).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-most, most).mul_(scales)
        error = rounded.sub_(values).square_().sum((1, 2))
        best, least = torch.where(error < least, largest * share, best), torch.minimum(error, least)
    return best


def slice_width(out_features: int, tables: str) -> int:
    """Outputs of a slice: as many as two cache lines hold of an integer row, or one where two would pad by a sixth."""
    wide = 256 if tables == "int4" else 128
    return wide if round_up(out_features, wide) * 6 < out_features * 7 else wide // 2


def _interleave(rows: Tensor) -> Tensor:
    """Runs of 64 outputs in the order in which kernels take them apart.

    int8: byte ``16 L + 4 j + d`` is output ``16 j + 4 L + d``, because four rows are interleaved within 128-bit lanes.
    bfloat16: the even ones of 32 numbers are outputs 0 to 15, the odd ones 16 to 31. float32: as they are.
    """
    if rows.dtype == torch.int8:
        return rows.unflatten(-1, (-1, 4, 4, 4)).transpose(-3, -2).flatten(-4)  # (j, L, d) -> (L, j, d)
    if rows.dtype == torch.bfloat16:
        return rows.unflatten(-1, (-1, 2, 16)).transpose(-2, -1).flatten(-3)
    return rows


def _halves(rows: Tensor) -> Tensor:
    """int8 numbers of -8 to 7 as int4: byte ``i`` of a line has number ``i`` in its low half, ``64 + i`` above it."""
    low, high = rows.view(torch.uint8).unflatten(-1, (-1, 2, 64)).unbind(-2)
    return (low & 15 | high << 4).flatten(-2)


def _numbers(halves: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    both = torch.stack([halves << 4, halves & 0xF0], -1).view(torch.int8) >> 4
    return both.unflatten(-2, (-1, 64)).transpose(-2, -1).flatten(-3)


def _deinterleave(rows: Tensor) -> Tensor:
    if rows.dtype == torch.bfloat16:
        return rows.unflatten(-1, (-1, 16, 2)).transpose(-2, -1).flatten(-3)
    return _interleave(rows)  # its own inverse for int8


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def _assemble(h: dict, sections: dict[str, Tensor]) -> Tensor:
    packed = aligned_bytes(h["total_bytes"]).zero_()  # between sections too: the same layer is the same bytes
    packed[: HEADER.itemsize] = header_bytes(h)
    for name, section in sections.items():
        start = h["offset"][name]
        packed[start : start + section.nbytes].view(section.dtype).view(section.shape).copy_(section)
    return packed


def header_bytes(h: dict) -> Tensor:
    """The first bytes of a packed layer, uint8, whose header is ``h`` (:func:`layout`)."""
    header = np.zeros((), HEADER)
    header["magic"], header["version"] = MAGIC, FORMAT_VERSION
    for name in (*_INTS, "scale", "residual", "total_bytes"):
        header[name] = h[name]
    header["offset"] = [h["offset"][name] for name in SECTIONS]
    return torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8)


def read_header(packed: Tensor) -> dict:
    """The header's fields as numbers, with the shapes, dtypes and bytes of its sections.

    Raises PackedError for bytes that do not begin with this version's header, or whose sizes do not fit each other.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER.itemsize:
        raise PackedError(
            f"a packed layer is a vector of at least {HEADER.itemsize} bytes, not {list(packed.shape)} {packed.dtype}"
        )
    header = packed[: HEADER.itemsize].numpy().view(HEADER)[0]
    if header["magic"] != MAGIC:
        found = packed[: len(MAGIC)].numpy().tobytes()
        raise PackedError(f"it begins with {found!r}, not with {MAGIC!r}: these bytes are no packed layer")
    if (version := int(header["version"])) != FORMAT_VERSION:
        remedy = "upgrade it" if version > FORMAT_VERSION else "pack the model again"
        raise PackedError(f"its format version is {version}, this lookupffn reads {FORMAT_VERSION}: {remedy}")
    h = {name: header[name].item() for name in HEADER.names or () if name != "offset"}
    for name, types in (("weight_type", WEIGHT_TYPES), ("table_type", TABLE_TYPES)):
        if not 0 <= h[name] < len(types):
            raise PackedError(f"its {name} is {h[name]}, not 0 to {len(types) - 1}")
        h[name.replace("type", "dtype")] = list(types)[h[name]]
    if min(h[name] for name in _INTS[:5]) < 1 or min(h[name] for name in _INTS) < 0 or h["code_bits"] > 16:
        raise PackedError(f"its sizes are out of range: {', '.join(f'{name} {h[name]}' for name in _INTS)}")
    if h["total_bytes"] != packed.numel():
        raise PackedError(f"its header says {h['total_bytes']} bytes, but it has {packed.numel()}")
    if wrong := [name for name, fits in _rules(h).items() if not fits]:
        raise PackedError(f"its sizes do not fit each other: {', '.join(f'{name} is {h[name]}' for name in wrong)}")
    h["offset"] = dict(zip(SECTIONS, header["offset"].tolist(), strict=True))
    h["section_shape"] = _section_shapes(h)
    h["section_bytes"] = _section_bytes(h)
    position = round_up(HEADER.itemsize, 64)
    for name in SECTIONS:
        start, size = h["offset"][name], h["section_bytes"].get(name, 0)
        if start != position or position + size > packed.numel():
            raise PackedError(
                f"its section {name}, {size} bytes from byte {start}, should begin at {position} and end within its "
                f"{packed.numel()} bytes"
            )
        position += round_up(size, 64)
    if position != packed.numel():
        raise PackedError(f"its sections end at byte {position}, but it has {packed.numel()}")
    if "levels" in h["section_bytes"]:
        start, most = h["offset"]["levels"], 127 if h["weight_dtype"] == "int8" else 32767
        levels = packed[start : start + h["section_bytes"]["levels"]].clone().view(torch.float32)
        if not ((levels >= 1) & (levels <= most)).all():
            raise PackedError(f"its activation levels lie outside 1 to {most}")
    return h


def _rules(h: dict) -> dict[str, bool]:
    """Whether each field of a header fits the others; the same rules as in csrc/model/layer.cpp."""
    rows, codes, outputs = 2 ** h["code_bits"], h["num_tables"] * h["code_bits"], h["blocks"] * h["block_out"]
    integers, line = h["table_dtype"] in LEVELS, 128 if h["table_dtype"] == "int4" else 64
    negated = integers and h["reads"] > 1 and h["code_bits"] < 3
    square = h["stages"] == 4 or h["blocks"] > 1 or h["residual"] != 0
    rules = {
        "reads": h["reads"] <= min(ops.MAX_READS, rows),
        "table_rows": h["table_rows"] == rows * (1 + negated),
        "slice": h["slice"] in (line, 2 * line),
        "reserved": h["reserved"] == 0,
        "num_tables": codes <= 1 << 28 and (not integers or h["num_tables"] * h["reads"] <= 66000),
        "stages": h["stages"] in (0, 1, 4),
        "scale": math.isfinite(h["scale"]),
        "residual": math.isfinite(h["residual"]),
    }
    if not h["stages"]:
        return rules | {
            "in_features": h["in_features"] == codes,
            "repeats": h["repeats"] == 1,
            "blocks": h["blocks"] == 1,
        }
    group = LANES * max(1, min(4, h["block_out"] // LANES))
    inputs = h["blocks"] * h["block_in"]
    return rules | {
        "repeats": h["repeats"] >= 1 and codes <= h["repeats"] * outputs <= 1 << 28,
        "blocks": h["blocks"] >= 1 and h["blocks"] & (h["blocks"] - 1) == 0 and max(inputs, outputs) <= 1 << 24,
        "in_features": h["in_features"] <= inputs,
        "block_in": h["block_in"] >= LANES
        and h["block_in"] % LANES == 0
        and (not square or h["block_in"] == h["block_out"])
        and (h["weight_dtype"] != "int8" or h["block_in"] <= 66000),
        "block_out": h["block_out"] >= LANES and h["block_out"] % group == 0,
    }


def _section_shapes(h: dict) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    stages, integer = (h["repeats"], h["stages"]), h["weight_type"] > 0
    outputs = (*stages, h["blocks"], h["block_out"])
    weight_dtype, table_dtype = _WEIGHT_DTYPES[h["weight_type"]], _TABLE_DTYPES[h["table_type"]]
    slices = -(-h["out_features"] // h["slice"])
    word = 4 // weight_dtype.itemsize
    shapes = {
        "tables": (table_dtype, (slices, h["num_tables"], h["table_rows"], h["slice"] // (1 + (h["table_type"] == 3)))),
        "bias": (torch.float32, (slices * h["slice"],)),
    }
    if h["stages"]:
        group = max(1, min(4, h["block_out"] // LANES))
        panels = (h["blocks"], h["block_out"] // LANES // group, h["block_in"] // word, group, LANES, word)
        shapes["weights"] = (weight_dtype, (*stages, *panels))
        shapes["code_bias"] = (torch.float32, (h["repeats"] * h["blocks"] * h["block_out"],))
        if integer:
            shapes |= {"weight_scales": (torch.float32, outputs), "levels": (torch.float32, stages)}
        if h["weight_dtype"] == "int8":
            shapes["weight_offsets"] = (torch.int32, outputs)
    if h["table_dtype"] in LEVELS:
        shapes["table_scales"] = (torch.float32, (round_up(h["num_tables"], LANES),))
    return shapes


def _section_bytes(h: dict) -> dict[str, int]:
    shapes = h["section_shape"].items()
    return {name: int(np.prod([*shape, dtype.itemsize], dtype=object)) for name, (dtype, shape) in shapes}


def checked_header(packed: Tensor) -> dict:
    """The header of ``packed``, after every check that can be made; raises PackedError with what is wrong."""
    header = read_header(packed)
    if native.available() and (wrong := torch.ops.lookupffn.check_packed(packed)):
        raise PackedError(wrong)
    return header


@dataclass(frozen=True)
class Decoded:
    """A packed layer as ordinary tensors: the numbers that the kernels compute with, in the reference's shapes."""

    header: dict
    blocks: Tensor | None  # (R, stages, n, block_out, block_in), integers or float32
    weight_scales: Tensor | None  # (R, stages, n, block_out)
    levels: Tensor | None  # (R, stages)
    code_bias: Tensor | None  # (R * n * block_out)
    tables: Tensor  # (T, rows, E), integers, bfloat16 or float32
    table_scales: Tensor | None  # (T)
    bias: Tensor  # (E)


def decode(packed: Tensor) -> Decoded:
    """The tensors in ``packed``. Raises PackedError where its sizes do not fit each other."""
    h = read_header(packed)
    sections = {}
    for name, (dtype, shape) in h["section_shape"].items():
        start = h["offset"][name]
        sections[name] = packed[start : start + h["section_bytes"][name]].view(dtype).view(shape)
    weights, table_scales, blocks = sections.get("weights"), sections.get("table_scales"), None
    rows = _numbers(sections["tables"]) if h["table_dtype"] == "int4" else sections["tables"]
    if weights is not None:
        blocks = weights.permute(0, 1, 2, 3, 5, 6, 4, 7).reshape(*weights.shape[:3], h["block_out"], h["block_in"])
    return Decoded(
        header=h,
        blocks=blocks,
        weight_scales=sections.get("weight_scales"),
        levels=sections.get("levels"),
        code_bias=sections.get("code_bias"),
        tables=_deinterleave(rows).permute(1, 2, 0, 3).flatten(2)[..., : h["out_features"]],
        table_scales=None if table_scales is None else table_scales[: h["num_tables"]],
        bias=sections["bias"][: h["out_features"]],
    )
