"""Inference on the CPU: ``pack`` turns trained lookup layers into their packed, quantised, fast form.

A packed layer holds one vector of bytes (``format.py``) and calls one operator on it, ``lookupffn::packed_forward``,
which the compiled kernels in ``csrc/`` provide. Without them the same arithmetic runs in plain torch (``portable.py``),
slowly, and says so.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import forward_ad

from lookupffn import native, ops
from lookupffn.errors import PackedError, check
from lookupffn.files import atomic_replace
from lookupffn.layer import BH4, DenseProjection, LookupConfig, LookupFFN
from lookupffn.memory import aligned_bytes
from lookupffn.runtime.format import (
    PROJECTION_DTYPES,
    TABLE_TYPES,
    WEIGHT_TYPES,
    checked_header,
    decode,
    encode,
    read_header,
)
from lookupffn.runtime.portable import packed_forward
from lookupffn.runtime.tuning import Tiling, default_tiling, timed_tiling

FILE_FORMAT = "lookupffn-packed"
FILE_VERSION = "1"
NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of activations
_HAVE_KERNELS = native.available()

if _HAVE_KERNELS:

    @torch.library.register_fake("lookupffn::packed_forward")
    def _(x, packed, out_features, tile_tokens, groups_per_block, prefetch_distance, serial_tokens):
        torch._check(x.is_meta or not packed.is_meta, lambda: "the layer is on the meta device, the input is not")
        return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("lookupffn::no_backward", mutates_args=())
def _no_backward(grad: Tensor, in_features: int) -> Tensor:
    raise RuntimeError(
        "a packed layer has no backward pass: train the layer that it was packed from, or run this one under "
        "torch.no_grad()"
    )


@_no_backward.register_fake
def _(grad, in_features):  # compilers trace a backward pass that may never run
    return grad.new_empty(*grad.shape[:-1], in_features)


class _NoBackward(torch.autograd.Function):
    """Stands between a packed layer and a backward pass; registered with the operator it would cost a call 6 µs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.in_features = x.shape[-1]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _no_backward(grad, ctx.in_features), None


class PackedLookupFFN(nn.Module):
    """A lookup layer ready for inference on the CPU: ``x (..., in_features)`` to ``(..., out_features)``.

    The function of the :class:`LookupFFN` that it was packed from, up to the rounding of the chosen types: int8 tables
    keep every entry within half a scale of its value, ``max |table| / 254``; int4 tables within half of the scale that
    has the least squared error, larger entries cut off at 7 scales. Both weigh rows by scores of seven bits, whose
    scale is a 127th of the token's largest; codes differ only where ``|z|`` is below the error of the quantised
    projection. The result for a token does not depend on the rest of the batch, on the number of threads or, with
    integer tables and projection, on the processor's instruction set: bit for bit. Input in float32 or bfloat16, output
    in the same; float64 and float16 pass through float32. No backward pass.

    Buffers: ``packed``, uint8: self-describing bytes (docs/format.md). Made by :func:`pack` or :func:`load_packed`.

    Raises:
        PackedError: ``packed`` is damaged, or not the form of a layer with this ``config``.
        ValueError: the last dimension of an input is not ``in_features``.
    """

    packed: Tensor

    def __init__(self, config: LookupConfig, packed: Tensor, tiling: Tiling | None = None):
        super().__init__()
        header = _header_of(config, packed)
        self.config = config
        self.register_buffer("packed", packed)
        self.tiling = tiling or default_tiling(header)
        t = self.tiling
        self._arguments = (config.out_features, t.tile_tokens, t.groups_per_block, t.prefetch_distance, t.serial_tokens)
        native.implementation()  # a wrong LOOKUPFFN_ISA is an error here, not in the middle of a model
        native.warn_if_absent()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Checked before they replace what is here; torch collects the errors of all modules, the last of `rest`, and
        # raises them whether or not it is strict.
        if f"{prefix}tables" in state_dict:
            rest[-1].append(f"{prefix}tables: of a layer that is not packed; load it into the model, then pack that")
            return
        if (packed := state_dict.get(f"{prefix}packed")) is not None:
            try:
                _header_of(self.config, packed)
            except PackedError as error:
                rest[-1].append(f"{prefix}packed: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def weight_dtype(self) -> str:
        """Of the projection: ``"int8"``, ``"int16"`` or ``"float32"``."""
        return read_header(self.packed)["weight_dtype"]

    @property
    def table_dtype(self) -> str:
        """Of the tables: ``"int4"``, ``"int8"``, ``"bfloat16"`` or ``"float32"``."""
        return read_header(self.packed)["table_dtype"]

    def forward(self, x: Tensor) -> Tensor:
        # Lean, because at one token a microsecond of Python is a tenth of the layer. So is the buffer's way past
        # Module.__getattr__.
        if not x.dim() or x.shape[-1] != self.config.in_features:
            width = self.config.in_features
            raise ValueError(f"the last dimension of x must be in_features = {width}; x is {list(x.shape)}")
        if forward_ad._current_level >= 0:
            ops.refuse_forward_mode(x)
        grad = x.requires_grad and torch.is_grad_enabled()
        rows = x if x.dtype in NATIVE_DTYPES and not grad else self._rows(x)
        if _HAVE_KERNELS:
            y = torch.ops.lookupffn.packed_forward(rows, self._buffers["packed"], *self._arguments)
        else:
            y = packed_forward(decode(self.packed), rows.reshape(-1, x.shape[-1]).float())
            y = y.reshape(*x.shape[:-1], self.config.out_features)
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        return _NoBackward.apply(x, y) if grad else y

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        """What the kernels take for ``x``: float32 or bfloat16, cut off from the graph that it came from."""
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}: a packed layer takes floating-point numbers")
        return (x if x.dtype in NATIVE_DTYPES else x.float()).detach()

    def flops(self, tokens: int) -> int:
        """Operations of a forward pass, two a multiply-add, as :meth:`LookupFFN.flops` counts them."""
        c, h = self.config, read_header(self.packed)
        projection = h["repeats"] * h["stages"] * h["blocks"] * h["block_in"] * h["block_out"]
        return 2 * tokens * projection + ops.gather_flops(tokens, (c.num_tables, c.num_rows, c.out_features), c.reads)

    def bytes_read(self, tokens: int) -> int:
        """Bytes of parameters that a forward pass over ``tokens`` tokens reads: all but the tables once, then rows."""
        c, h = self.config, read_header(self.packed)
        rows = h["num_tables"] * h["table_rows"]
        row_bytes = h["section_bytes"]["tables"] // rows
        return h["total_bytes"] - h["section_bytes"]["tables"] + tokens * c.num_tables * c.reads * row_bytes

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.in_features}, {c.out_features}, num_tables={c.num_tables}, code_bits={c.code_bits}, reads={c.reads}, "
            f"tables={self.table_dtype}, projection={self.weight_dtype}"
        )


def pack(
    module: nn.Module,
    tables: str | torch.dtype = "int8",
    *,
    projection: str | torch.dtype | None = None,
    inplace: bool = False,
    tune: bool = False,
) -> nn.Module:
    """The fast form of a trained :class:`LookupFFN`, or of a model with every lookup layer in it packed.

    ``tables`` is their dtype: ``"int4"`` (half the bytes of int8), ``"int8"``, ``"bfloat16"`` or ``"float32"``, or
    torch's own. ``projection`` is ``"int8"``, ``"int16"`` (twice the bytes and time of int8, a tenth of its error) or
    ``"float32"``; by default int8 with int4 and int8 tables, int16 with bfloat16 and float32 with float32. With
    ``inplace`` the model's layers are replaced, without it the model is copied, all but its lookup layers. Loop sizes
    come from the sizes of the caches; ``tune`` times a few on this machine, a tenth of a second the first time a shape
    is met, and keeps the choice (``tuning.cache_file``); results do not depend on it.

    Raises:
        ValueError: no lookup layer in ``module``, an unknown dtype, parameters that are not finite, or a layer that
            another library has wrapped, or whose projection it has replaced.
    """
    of_tables = _dtype_name(tables)
    check(of_tables in TABLE_TYPES, "tables", of_tables, f"one of {', '.join(TABLE_TYPES)}")
    of_projection = PROJECTION_DTYPES[of_tables] if projection is None else _dtype_name(projection)
    check(of_projection in WEIGHT_TYPES, "projection", of_projection, f"one of {', '.join(WEIGHT_TYPES)}")

    def packed(layer: LookupFFN) -> PackedLookupFFN:
        if layer.tables.device.type != "cpu":
            raise ValueError(
                f"the layer is on {layer.tables.device}: a packed layer runs on the CPU, move the model there"
            )
        whole = layer.for_inference()
        if type(whole.projection) not in (BH4, DenseProjection, nn.Identity):
            raise ValueError(
                f"the layer's projection is a {type(whole.projection).__name__}, put there by another library: undo "
                "that first (PEFT: merge_and_unload()), or pack before it"
            )
        return _packed_layer(layer.config, encode(whole, of_tables, of_projection), tune)

    for name, layer in lookup_layers(module):
        parent = module.get_submodule(name.rpartition(".")[0])
        if getattr(parent, "base_layer", None) is layer:
            raise ValueError(
                f"layer {name!r} is wrapped by {type(parent).__name__}, whose part of it would be lost: merge it first "
                "(PEFT: merge_and_unload())"
            )
    return _replace_layers(module, {name: packed for name, _ in lookup_layers(module)}, inplace)


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _packed_layer(config: LookupConfig, packed: Tensor, tune: bool) -> PackedLookupFFN:
    _header_of(config, packed)  # every check comes before a kernel runs on these bytes
    return PackedLookupFFN(config, packed, timed_tiling(config, packed) if tune else None)


def _header_of(config: LookupConfig, packed: Tensor) -> dict:
    """The header of ``packed``; raises PackedError where it is not that of a layer with this ``config``."""
    header = checked_header(packed)
    for name in ("in_features", "out_features", "num_tables", "code_bits", "reads"):
        if header[name] != getattr(config, name):
            raise PackedError(f"{name} is {header[name]} in the packed layer and {getattr(config, name)} in its config")
    return header


def lookup_layers(module: nn.Module) -> list[tuple[str, LookupFFN]]:
    """Names and lookup layers in ``module``; the name is ``""`` for ``module`` itself. Raises ValueError if none."""
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LookupFFN)]
    if not found:
        raise ValueError(
            f"{type(module).__name__} holds no LookupFFN layer (one that is packed already does not count)"
        )
    return found


def _replace_layers(module: nn.Module, make: dict, inplace: bool) -> nn.Module:
    replacements = {}
    for name, layer in lookup_layers(module):
        replacements[name] = make[name](layer).train(layer.training)
        _keep_hooks(name, layer, replacements[name])
    if "" in replacements:
        return replacements[""]
    if not inplace:  # the copy takes the new layers where the old ones were, so their tables are never copied
        memo = {id(module.get_submodule(name)): layer for name, layer in replacements.items()}
        return copy.deepcopy(module, memo)
    return replace_modules(module, replacements)


def _keep_hooks(name: str, layer: LookupFFN, packed: PackedLookupFFN) -> None:
    """Hands the layer's forward hooks on; says how many its parts had, which have no place in a packed layer."""
    hooks = [key for key in vars(layer) if key.startswith("_forward_") and isinstance(vars(layer)[key], dict)]
    for key in hooks:
        getattr(packed, key).update(getattr(layer, key))
    parts = [part for part in layer.modules() if part is not layer]
    lost = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)
    if lost:
        warnings.warn(
            f"layer {name!r}: {lost} forward hooks of its projection are not called in its packed form, which has none",
            stacklevel=4,
        )


def replace_modules(module: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """``module`` with the modules of these names replaced, in place, under every name of one that has several."""
    new = {id(module.get_submodule(name)): other for name, other in replacements.items()}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return module


# ---- Files -----------------------------------------------------------------------------------------------------------


def save_packed(module: nn.Module, path: str | Path) -> None:
    """Writes every packed layer in ``module`` to one safetensors file, atomically (docs/format.md).

    Raises:
        ValueError: ``module`` holds no packed layer.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, PackedLookupFFN)}
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no packed layer: call pack first")
    configs = json.dumps({name: layer.config.to_dict() for name, layer in layers.items()})
    metadata = {"format": FILE_FORMAT, "version": FILE_VERSION, "configs": configs}
    tensors = {f"{name}.packed" if name else "packed": layer.packed for name, layer in layers.items()}
    with atomic_replace(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_packed(
    path: str | Path, module: nn.Module | None = None, *, inplace: bool = False, tune: bool = False
) -> nn.Module:
    """Reads what :func:`save_packed` wrote: into the lookup layers of ``module``, or a single layer without one.

    The layers of ``module`` are replaced; they may be on the meta device. Bytes are copied to aligned memory.
    ``inplace`` and ``tune`` are those of :func:`pack`. Names may differ by one prefix: a bare encoder takes the layers
    of the masked LM that it was part of, and the other way round.

    A file of layers does not know the rest of the model, by intent: it fits every model whose lookup layers have these
    names and configs, and that ``module`` is the one that they were trained in is for the caller to know. What
    ``save_pretrained`` writes (``lookupffn.hf``) keeps both together.

    Raises:
        OSError: the file cannot be read: FileNotFoundError, PermissionError, IsADirectoryError.
        PackedError: it is no such file, is damaged or of another version, or does not fit ``module``.
    """
    layers = read_layers(path, tune)
    if module is None:
        if set(layers) != {""}:
            raise PackedError(f"{path} holds the layers of a model ({', '.join(layers)}): pass the model as module")
        return layers[""]
    wanted = dict(lookup_layers(module))
    stored = _matched(wanted, layers)
    if not stored or any(layer.config != layers[stored[name]].config for name, layer in wanted.items()):
        raise PackedError(
            f"{path} holds the layers {sorted(layers)}, which are not those of the model, {sorted(wanted)}"
        )
    return _replace_layers(module, {name: lambda _, name=name: layers[stored[name]] for name in wanted}, inplace)


def _matched(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """For each name that is wanted the stored one, equal but for one prefix, ``"encoder."``, of all; empty if none."""
    wanted, stored = list(wanted), list(stored)
    for longer, shorter in ((stored, wanted), (wanted, stored)):
        for name in longer:
            if not name.endswith(shorter[0]):
                continue
            prefix = name.removesuffix(shorter[0])
            if prefix[-1:] in ("", ".") and {prefix + short for short in shorter} == set(longer):
                pairs = {prefix + short: short for short in shorter}
                return pairs if longer is wanted else {short: long for long, short in pairs.items()}
    return {}


def read_layers(path: str | Path, tune: bool = False) -> dict[str, PackedLookupFFN]:
    """The packed layers in a file, by their names in the model that they belong to; raises what load_packed raises."""
    with open(path, "rb"):  # what the system refuses, in its own words: safetensors would call a folder damaged
        pass
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT or metadata.get("version") != FILE_VERSION:
                found = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
                raise PackedError(f"{path}: {found}, where {FILE_FORMAT!r}, version {FILE_VERSION!r} is needed")
            configs = {name: LookupConfig(**fields) for name, fields in json.loads(metadata["configs"]).items()}
            return {name: _load_layer(file, name, config, path, tune) for name, config in configs.items()}
    except PackedError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PackedError(f"{path} is damaged or no file of packed layers: {error}") from error


def _load_layer(file: Any, name: str, config: LookupConfig, path: str | Path, tune: bool) -> PackedLookupFFN:
    stored = file.get_tensor(f"{name}.packed" if name else "packed")
    try:
        read_header(stored)
        return _packed_layer(config, aligned_bytes(stored.numel()).copy_(stored), tune)
    except PackedError as error:
        raise PackedError(f"{path}, layer {name!r}: {error}") from error
