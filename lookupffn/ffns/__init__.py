"""The feed-forward layers a model may choose from, by the name in ``config.ffn``.

An FFN is a module ``x (..., hidden_size)`` to ``(..., hidden_size)`` with ``flops(tokens)`` and ``bytes_read(tokens)``.
To add one: a file in this folder with the module, and an entry in ``FFNS`` that builds it from a model config.
"""

from collections.abc import Callable

from torch import nn

from lookupffn.ffns.dense import DenseFFN
from lookupffn.layer import LookupConfig, LookupFFN


def _dense(config) -> DenseFFN:
    return DenseFFN(config.hidden_size, config.intermediate_size)


def _lookup(config) -> LookupFFN:
    fields = ("num_tables", "code_bits", "projection", "block_size", "decay", "reads")
    choices = {name: getattr(config, name) for name in fields}
    return LookupFFN(LookupConfig(config.hidden_size, config.hidden_size, **choices))


FFNS: dict[str, Callable[..., nn.Module]] = {"dense": _dense, "lookup": _lookup}


def build_ffn(config) -> nn.Module:
    """The feed-forward layer that ``config.ffn`` names.

    Raises:
        ValueError: the name is not in ``FFNS``, or a size is out of range.
    """
    if config.ffn not in FFNS:
        raise ValueError(f"ffn must be one of {', '.join(FFNS)}, not {config.ffn!r}")
    return FFNS[config.ffn](config)
