"""Where the feed-forward layers of each model family are, and how another layer takes their place.

A family is registered by one function that takes the model's body and yields a slot a layer. What is exported to the
runtime is found by ``runtime/families``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lookupffn.errors import InputError


@dataclass(frozen=True)
class Slot:
    """A feed-forward layer: the module that takes its input, the one that gives its output, the norm behind the sum.

    ``norm`` is None where norms stand before the layer. ``replace`` puts another module in its place.
    """

    name: str
    first: nn.Module
    last: nn.Module
    norm: nn.Module | None
    replace: Callable[[nn.Module], None]

    @property
    def parameters(self) -> int:
        """Multiply-adds of a token: the layer's weights."""
        modules = [self.first] if self.first is self.last else [self.first, self.last]
        return sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)


Family = Callable[[Any], Iterator[Slot]]
FAMILIES: dict[str, Family] = {}  # by transformers' model_type


def register(*model_types: str) -> Callable[[Family], Family]:
    """Registers the function that it decorates for models of these types."""

    def keep(family: Family) -> Family:
        FAMILIES.update(dict.fromkeys(model_types, family))
        return family

    return keep


def slots_of(model: Any) -> list[Slot]:
    """The feed-forward layers of a model, from its first layer on. Raises InputError for a family that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{type(model).__name__} of model_type {kind!r} cannot be converted; known are {known}. Register a "
            "function that yields its layers: lookupffn.hf.slots.register"
        )
    return list(FAMILIES[kind](getattr(model, model.base_model_prefix, model)))


def _set(parent: nn.Module, name: str) -> Callable[[nn.Module], None]:
    return lambda module: setattr(parent, name, module)


@register("bert", "roberta", "xlm-roberta", "mpnet", "electra", "deberta-v2")
def _bert(body: Any) -> Iterator[Slot]:
    """``LayerNorm(output.dense(intermediate(x)) + x)``."""
    for number, layer in enumerate(body.encoder.layer):

        def replace(module: nn.Module, layer: Any = layer) -> None:
            layer.intermediate, layer.output.dense = nn.Identity(), module

        yield Slot(f"encoder.layer.{number}", layer.intermediate, layer.output.dense, layer.output.LayerNorm, replace)


@register("distilbert")
def _distilbert(body: Any) -> Iterator[Slot]:
    for number, layer in enumerate(body.transformer.layer):
        yield Slot(f"transformer.layer.{number}", layer.ffn, layer.ffn, layer.output_layer_norm, _set(layer, "ffn"))


@register("modernbert")
def _modernbert(body: Any) -> Iterator[Slot]:
    for number, layer in enumerate(body.layers):
        yield Slot(f"layers.{number}", layer.mlp, layer.mlp, None, _set(layer, "mlp"))


@register("lookup_roberta")
def _lookup_roberta(body: Any) -> Iterator[Slot]:
    for number, layer in enumerate(body.layers):
        yield Slot(f"layers.{number}", layer.ffn, layer.ffn, None, _set(layer, "ffn"))


@register("albert")
def _albert(body: Any) -> Iterator[Slot]:
    """Layers are shared: a slot a group's layer, however often it runs."""
    for group_number, group in enumerate(body.encoder.albert_layer_groups):
        for number, layer in enumerate(group.albert_layers):

            def replace(module: nn.Module, layer: Any = layer) -> None:
                layer.ffn, layer.activation, layer.ffn_output = nn.Identity(), nn.Identity(), module

            name = f"encoder.albert_layer_groups.{group_number}.albert_layers.{number}"
            yield Slot(name, layer.ffn, layer.ffn_output, layer.full_layer_layer_norm, replace)
