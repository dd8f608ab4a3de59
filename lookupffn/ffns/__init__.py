"""The feed-forward layers a model may choose from, by the name in ``config.ffn``, with ``config.ffn_options``.

An FFN is a module ``x (..., hidden_size)`` to the same, with

- ``flops(tokens)`` and ``bytes_read(tokens)``: what an inference forward pass costs;
- ``init_parameters(std)``, where it has parameters of its own: re-initialises them, ``std`` being the model's
  ``initializer_range``;
- ``auxiliary_loss``, where its method has one: set by ``forward`` in training, weighted, a mean over tokens;
- ``row_parameters``, where a token reads rows of some parameters: their names, for a learning rate of their own.

Its constructor takes ``(hidden_size, intermediate_size, *, options)``; a model reads what the options are from the
constructor's signature. One of your own, in your own package::

    @lookupffn.ffns.register("mine")
    class MyFFN(nn.Module): ...

An FFN of this folder is imported when it is first used.
"""

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from lookupffn.errors import check
from lookupffn.layer import LookupConfig

_FILES = {
    "dense": "dense.DenseFFN",
    "lookup": "lookup.lookup_ffn",
    "lookup-variant": "variants.LookupVariantFFN",
    "none": "none.no_ffn",
    "slide": "slide.SlideFFN",
    "mongoose": "mongoose.MongooseFFN",
    "yoso": "yoso.YosoFFN",
    "switch": "switch.SwitchFFN",
    "block-diagonal": "block_diagonal.BlockDiagonalFFN",
    "monarch": "monarch.MonarchFFN",
    "low-rank": "low_rank.LowRankFFN",
    "product-key": "product_key.ProductKeyFFN",
    "fast-feedforward": "fast_feedforward.FastFeedForward",
    "memory-former": "memory_former.MemoryFormerFFN",
}
_registered: dict[str, Callable[..., nn.Module]] = {}


def names() -> list[str]:
    """Names of all feed-forward layers, those registered from outside last."""
    return list(dict.fromkeys([*_FILES, *_registered]))


def register(name: str) -> Callable:
    """Decorator: makes a class or function the feed-forward layer ``name``, for ``ffn=name`` in a model's config.

    Raises:
        ValueError: another layer has this name.
    """

    def add(constructor: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        check(name not in names(), "name", name, f"other than those that are taken ({', '.join(names())})")
        _registered[name] = constructor
        return constructor

    return add


def constructor(name: str) -> Callable[..., nn.Module]:
    """The constructor of the feed-forward layer ``name``. Raises ValueError where there is none."""
    check(name in names(), "ffn", name, f"one of {', '.join(names())}")
    if name in _registered:
        return _registered[name]
    file, _, attribute = _FILES[name].partition(".")
    return getattr(import_module(f"lookupffn.ffns.{file}"), attribute)


def known_options(ffn: str) -> list[str]:
    """Names of the options that the feed-forward layer ``ffn`` takes."""
    parameters = inspect.signature(constructor(ffn)).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # the rest goes to a LookupConfig
        sizes = {"in_features", "out_features", "version"}
        own += [field.name for field in dataclasses.fields(LookupConfig) if field.name not in sizes]
    return own


def build_ffn(config: Any) -> nn.Module:
    """The feed-forward layer that ``config.ffn`` and ``config.ffn_options`` describe.

    Raises:
        ValueError: there is no such layer, it has no such option, or an option is out of range.
        TypeError: an option has the wrong type.
    """
    build = constructor(config.ffn)
    if unknown := sorted(config.ffn_options.keys() - set(known_options(config.ffn))):
        known = ", ".join(known_options(config.ffn)) or "none"
        raise ValueError(f"ffn_options of {config.ffn} cannot be {', '.join(unknown)}; known are {known}")
    return build(config.hidden_size, config.intermediate_size, **config.ffn_options)
