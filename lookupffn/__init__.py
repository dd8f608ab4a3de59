"""LookupFFN: Transformer feed-forward layers as learned hashing and table lookup (ICML 2023), cheap on CPUs."""

from typing import Any

from lookupffn.diagnostics import HashMonitor
from lookupffn.errors import InputError, PackedError
from lookupffn.layer import BH4, LookupConfig, LookupFFN
from lookupffn.machine import respect_cpu_quota
from lookupffn.ops import bh4, gather, hash_codes
from lookupffn.plugin import watch as _watch
from lookupffn.runtime.export import export
from lookupffn.runtime.packed import PackedLookupFFN, load_packed, pack, save_packed
from lookupffn.runtime.session import Session

__version__ = "0.1.0"
__all__ = [
    "BH4",
    "HashMonitor",
    "InputError",
    "LookupConfig",
    "LookupFFN",
    "PackedError",
    "PackedLookupFFN",
    "Session",
    "__version__",
    "bh4",
    "convert",
    "export",
    "gather",
    "hash_codes",
    "load_packed",
    "pack",
    "respect_cpu_quota",
    "save_packed",
]

_watch()


def __getattr__(name: str) -> Any:
    if name == "convert":  # with all that trains, which needs the extra `train`
        from lookupffn.conversion.convert import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
