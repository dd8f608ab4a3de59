"""LookupFFN: Transformer feed-forward layers as learned hashing and table lookup (ICML 2023), cheap on CPUs."""

from lookupffn.diagnostics import HashMonitor
from lookupffn.engine import PreparedLookupFFN, load_packed, prepare, save_packed
from lookupffn.layer import BH4, LookupConfig, LookupFFN
from lookupffn.ops import bh4, gather, hash_codes
from lookupffn.packed import PackedError

__version__ = "0.1.0"
__all__ = [
    "BH4",
    "HashMonitor",
    "LookupConfig",
    "LookupFFN",
    "PackedError",
    "PreparedLookupFFN",
    "__version__",
    "bh4",
    "gather",
    "hash_codes",
    "load_packed",
    "prepare",
    "save_packed",
]
