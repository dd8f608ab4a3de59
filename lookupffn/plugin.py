"""Has transformers know ``quant_method: lookupffn`` once both are imported, whichever comes first.

``from_pretrained`` of a converted or packed model so needs ``import lookupffn`` and nothing more. Transformers is
imported by whoever wants it, never by this package: its import is watched, and what is registered is imported when it
is used, since transformers' own modules import one another in circles.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

METHOD = "lookupffn"
WATCHED = "transformers.quantizers.auto"


class _Later:
    """A class of ``lookupffn.hf.packed``, imported when it is called or looked into."""

    def __init__(self, name: str):
        self._name = name

    def _found(self) -> Any:
        return getattr(importlib.import_module("lookupffn.hf.packed"), self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)


class _Then(Loader):
    """Another loader, and the registration behind it."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


class _Watch(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)  # once is enough
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def _register(auto: Any) -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Later("PackedConfig")
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _Later("PackedQuantizer")


def watch() -> None:
    """Registers the method with transformers, now or when that is imported; called once, on import."""
    if WATCHED in sys.modules:
        _register(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _Watch())
