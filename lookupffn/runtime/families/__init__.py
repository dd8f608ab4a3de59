"""Model families that the runtime knows: one file each, which finds the parts of a model by its attributes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module

from torch import nn

from lookupffn.errors import InputError
from lookupffn.runtime.graph import Graph

# By transformers' `model_type`: the module here whose `graph` knows it.
FAMILIES = {
    "albert": "albert",
    "bert": "bert",
    "deberta-v2": "deberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "lookup_roberta": "lookup_roberta",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
}


def graph_of(model: nn.Module) -> Graph:
    """The parts of a model. Raises InputError for a family or an option that the runtime does not have."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{type(model).__name__} of model_type {kind!r} cannot be exported; known are {known}")
    adapters = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if adapters:  # whose part would be lost
        raise InputError(f"{adapters[0]} is wrapped by another library: merge it first (PEFT: merge_and_unload())")
    find: Callable[[nn.Module], Graph] = import_module(f"{__name__}.{FAMILIES[kind]}").graph
    graph = find(model)
    if "For" in type(model).__name__ and not graph.head:
        warnings.warn(f"the head of {type(model).__name__} is left out: hidden states are exported", stacklevel=3)
    return graph
