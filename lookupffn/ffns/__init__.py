"""The feed-forward layers a model may choose from, by the name in ``config.ffn``, with ``config.ffn_options``.

An FFN is a module ``x (..., hidden_size)`` to the same, with

- ``flops(tokens)`` and ``bytes_read(tokens)``: what an inference forward pass costs;
- ``init_parameters(std)``, where it has parameters of its own: draws them anew, ``std`` being the model's
  ``initializer_range``;
- ``auxiliary_loss``, where its method has one: set by ``forward`` in training, weighted, a mean over tokens;
- ``row_parameters``, where a token reads rows of some parameters: their names, for a learning rate of their own.

To add one: a file in this folder with the module, whose constructor takes ``(hidden_size, intermediate_size, *,
options)``, and an entry in ``FFNS``. The model reads what the options are from the constructor's signature.
"""

import dataclasses
import inspect
from collections.abc import Callable

from torch import nn

from lookupffn.ffns.block_diagonal import BlockDiagonalFFN
from lookupffn.ffns.dense import DenseFFN
from lookupffn.ffns.fast_feedforward import FastFeedForward
from lookupffn.ffns.low_rank import LowRankFFN
from lookupffn.ffns.memory_former import MemoryFormerFFN
from lookupffn.ffns.monarch import MonarchFFN
from lookupffn.ffns.mongoose import MongooseFFN
from lookupffn.ffns.product_key import ProductKeyFFN
from lookupffn.ffns.slide import SlideFFN
from lookupffn.ffns.switch import SwitchFFN
from lookupffn.ffns.variants import LookupVariantFFN
from lookupffn.ffns.yoso import YosoFFN
from lookupffn.layer import LookupConfig, LookupFFN


def _lookup(hidden_size: int, intermediate_size: int, **options) -> LookupFFN:
    return LookupFFN(LookupConfig(hidden_size, hidden_size, **options))


FFNS: dict[str, Callable[..., nn.Module]] = {
    "dense": DenseFFN,
    "lookup": _lookup,
    "lookup-variant": LookupVariantFFN,
    "slide": SlideFFN,
    "mongoose": MongooseFFN,
    "yoso": YosoFFN,
    "switch": SwitchFFN,
    "block-diagonal": BlockDiagonalFFN,
    "monarch": MonarchFFN,
    "low-rank": LowRankFFN,
    "product-key": ProductKeyFFN,
    "fast-feedforward": FastFeedForward,
    "memory-former": MemoryFormerFFN,
}


def known_options(ffn: str) -> list[str]:
    """Names of the options that the feed-forward layer ``ffn`` takes."""
    parameters = inspect.signature(FFNS[ffn]).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # the rest goes to a LookupConfig
        sizes = {"in_features", "out_features", "version"}
        own += [field.name for field in dataclasses.fields(LookupConfig) if field.name not in sizes]
    return own


def build_ffn(config) -> nn.Module:
    """The feed-forward layer that ``config.ffn`` and ``config.ffn_options`` describe.

    Raises:
        ValueError: the name is not in ``FFNS``, it has no such option, or an option is out of range.
        TypeError: an option has the wrong type.
    """
    if config.ffn not in FFNS:
        raise ValueError(f"ffn must be one of {', '.join(FFNS)}, not {config.ffn!r}")
    if unknown := sorted(config.ffn_options.keys() - set(known_options(config.ffn))):
        known = ", ".join(known_options(config.ffn)) or "none"
        raise ValueError(f"ffn_options of {config.ffn} cannot be {', '.join(unknown)}; known are {known}")
    return FFNS[config.ffn](config.hidden_size, config.intermediate_size, **config.ffn_options)
