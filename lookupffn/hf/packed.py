"""Packed and converted models as transformers saves and loads them: ``save_pretrained``, ``from_pretrained``.

To transformers both are quantised models: ``config.json`` says under ``quantization_config`` which layers are packed,
in which dtypes, with weights that hold their bytes, and which feed-forward layers are lookups that can be trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lookupffn.branches import BranchedLookupFFN, TokenContext, watch_ids
from lookupffn.errors import PackedError, check
from lookupffn.files import check_inside
from lookupffn.hf.folders import check_sizes, stored_shapes
from lookupffn.hf.slots import slots_of
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.memory import aligned_bytes
from lookupffn.plugin import METHOD
from lookupffn.runtime.format import PROJECTION_DTYPES, TABLE_TYPES, WEIGHT_TYPES, layout
from lookupffn.runtime.packed import PackedLookupFFN, pack, replace_modules


class PackedConfig(QuantizationConfigMixin):
    """Which lookup layers of a model are packed, and how: ``quantization_config`` in ``config.json``.

    Given to ``from_pretrained`` for a model that is not packed, it packs the model as it is loaded.

    Args:
        tables: their dtype, ``"int4"``, ``"int8"``, ``"bfloat16"`` or ``"float32"``, as in :func:`lookupffn.pack`.
        projection: dtype of the projections, by default the one that goes with ``tables``.
        layers: where layers differ, ``{name in the base model: [tables, projection]}``; by default all are alike.
        lookups: of a converted model, ``{name of a slot: config of its layer}`` (``hf/slots.py``, ``branches.py``).

    Raises:
        ValueError: an unknown dtype or field.
    """

    def __init__(
        self,
        tables: str = "int8",
        projection: str | None = None,
        layers: dict[str, list[str]] | None = None,
        lookups: dict[str, dict[str, Any]] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        check(quant_method == METHOD, "quant_method", quant_method, repr(METHOD))
        check(
            not unknown, "quantization_config", sorted(unknown), "of the fields tables, projection, layers and lookups"
        )
        check(_among(tables, TABLE_TYPES), "tables", tables, f"one of {', '.join(TABLE_TYPES)}")
        self.quant_method, self.tables = METHOD, tables
        self.projection = PROJECTION_DTYPES[tables] if projection is None else projection
        self.layers, self.lookups = layers, lookups
        for field, value in (("layers", layers), ("lookups", lookups)):
            check(value is None or isinstance(value, dict), field, value, "a map by the names of layers")
        for name, kinds in (layers or {}).items():
            fits = isinstance(kinds, list) and len(kinds) == 2
            fits = fits and _among(kinds[0], TABLE_TYPES) and _among(kinds[1], WEIGHT_TYPES)
            check(fits, f"layers[{name!r}]", kinds, "[dtype of tables, dtype of projection]")
        check(_among(self.projection, WEIGHT_TYPES), "projection", projection, f"one of {', '.join(WEIGHT_TYPES)}")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "lookups" or value is not None}

    def of_layer(self, name: str) -> list[str] | None:
        """``[tables, projection]`` of the layer of this name in the base model; None where it is not packed."""
        return [self.tables, self.projection] if self.layers is None else self.layers.get(name)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> PackedConfig | None:
        """What ``model`` holds; None where nothing in it is packed."""
        kinds = {
            _base_name(model, name): [layer.table_dtype, layer.weight_dtype]
            for name, layer in model.named_modules()
            if isinstance(layer, PackedLookupFFN)
        }
        if not kinds:
            return None
        first = next(iter(kinds.values()))
        others = any(isinstance(module, LookupFFN) for module in model.modules())
        alike = not others and all(kind == first for kind in kinds.values())
        return cls(*first, layers=None if alike else kinds)


def _among(value: Any, names: Iterable[str]) -> bool:
    return isinstance(value, str) and value in names  # a list would not be hashable


def _base_name(model: PreTrainedModel, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


class _Bytes(nn.Module):
    """Stands where a packed layer will be until its bytes are there."""

    def __init__(self, config: LookupConfig, size: int):
        super().__init__()
        self.config = config
        self.register_buffer("packed", torch.empty(size, dtype=torch.uint8, device="meta"))


class PackedQuantizer(HfQuantizer):
    """What transformers asks of a quantisation: layers that wait for bytes before weights are loaded, packed after."""

    quantization_config: PackedConfig

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.layers == {}  # nothing is packed

    @property
    def is_qat_trainable(self) -> bool:  # without which the Trainer refuses to train without adapters
        return self.is_trainable

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if self.quantization_config.lookups:
            _replace_slots(model, self.quantization_config.lookups)
        waiting = {}
        found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LookupFFN)}
        unknown = sorted(set(self.quantization_config.layers or ()) - {_base_name(model, name) for name in found})
        check(not unknown, "layers", unknown, f"of the lookup layers {', '.join(found)}")
        for name, layer in found.items():
            if kinds := self.quantization_config.of_layer(_base_name(model, name)):
                waiting[name] = _Bytes(layer.config, layout(layer.config, *kinds)["total_bytes"])
        replace_modules(model, waiting)
        if checkpoint_files:
            _check_stored(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            c = self.quantization_config
            check(not c.layers, "layers", c.layers, "left out where the model is not packed yet")
            pack(model, c.tables, projection=c.projection, inplace=True)
            return
        ready = {}
        for name, waiting in model.named_modules():
            if isinstance(waiting, _Bytes):
                try:
                    packed = aligned_bytes(waiting.packed.numel()).copy_(waiting.packed)
                    ready[name] = PackedLookupFFN(waiting.config, packed).train(waiting.training)
                except PackedError as error:
                    raise PackedError(f"{model.config._name_or_path}, layer {name!r}: {error}") from None
        replace_modules(model, ready)


def _check_stored(model: PreTrainedModel, files: list[str]) -> None:
    """Refuses lookups of other sizes than the files hold, or without weights, before there is memory for them."""
    folder = model.config._name_or_path
    try:
        for file in files if Path(folder).is_dir() else ():
            check_inside(Path(file), Path(folder))
        shapes = stored_shapes(files)
    except ValueError as error:
        raise PackedError(f"{folder}: {error}") from None
    stored = {_base_name(model, key): shape for key, shape in shapes.items()}
    for name, layer in model.named_modules():
        if isinstance(layer, BranchedLookupFFN | _Bytes):
            for key, tensor in layer.state_dict().items():
                found = stored.get(f"{_base_name(model, name)}.{key}")
                if found != list(tensor.shape):
                    held = "lack it" if found is None else f"hold {found}"
                    by = f"{key} is {list(tensor.shape)} by config.json, and the files {held}"
                    raise PackedError(f"{folder}, layer {name!r}: {by}: save the model again")
    check_sizes(model, shapes)


def _replace_slots(model: PreTrainedModel, lookups: dict[str, dict[str, Any]]) -> None:
    """Puts lookups without weights where the feed-forward layers of a converted model were."""
    slots = {slot.name: slot for slot in slots_of(model)}
    unknown = sorted(set(lookups) - set(slots))
    check(not unknown, "lookups", unknown, f"of the layers {', '.join(slots)}")
    context = TokenContext()
    for name, config in lookups.items():
        try:
            with torch.device("meta"):
                layer = BranchedLookupFFN.from_config(config, model.config.vocab_size, context)
            width, own = model.config.hidden_size, layer.lookup.config
            check(own.in_features == width, "in_features", own.in_features, f"the model's width, {width}")
            check(own.out_features == width, "out_features", own.out_features, f"the model's width, {width}")
        except (TypeError, ValueError, RuntimeError) as error:  # torch's words on sizes too large go on for lines
            raise ValueError(f"lookups[{name!r}]: {str(error).splitlines()[0]}") from None
        slots[name].replace(layer)
    if any(config["token_rows"] for config in lookups.values()):
        watch_ids(model, context)


def mark_converted(model: PreTrainedModel) -> None:
    """Has ``model.config`` say which of its feed-forward layers are lookups, so that it is saved and loaded so."""
    lookups = {slot.name: slot.last.config() for slot in slots_of(model) if isinstance(slot.last, BranchedLookupFFN)}
    config = PackedConfig(layers={}, lookups=lookups)
    model.config.quantization_config, model.hf_quantizer = config, PackedQuantizer(config, pre_quantized=True)


def mark_packed(model: PreTrainedModel) -> None:
    """Has ``model.config`` say what is packed in the model, so that it is saved, and nothing where nothing is.

    Raises:
        ValueError: the config names another quantisation beside packed layers.
    """
    config, found = getattr(model.config, "quantization_config", None), PackedConfig.of_model(model)
    ours = config is None or isinstance(config, PackedConfig)
    if found:
        check(ours, "quantization_config", config, "lookupffn's alone where layers are packed")
        model.config.quantization_config, model.hf_quantizer = found, PackedQuantizer(found)
    elif config is not None and ours:
        PackedQuantizer(config).remove_quantization_config(model)
