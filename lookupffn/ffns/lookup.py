"""LookupFFN, with the fields of its config as options."""

from typing import Any

from lookupffn.layer import LookupConfig, LookupFFN


def lookup_ffn(hidden_size: int, intermediate_size: int, **options: Any) -> LookupFFN:
    """The layer of :class:`LookupConfig` with ``options``; ``intermediate_size`` has no part in it."""
    return LookupFFN(LookupConfig(hidden_size, hidden_size, **options))
