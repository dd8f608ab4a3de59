"""Export of a model for the runtime: one file of records, with its tokenizer beside it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lookupffn.errors import InputError
from lookupffn.files import atomic_replace, make_folder
from lookupffn.runtime.families import graph_of
from lookupffn.runtime.records import POOLINGS, model_bytes
from lookupffn.runtime.session import MODEL_FILE


def export(
    model: Any,
    folder: str | os.PathLike,
    *,
    linears: str = "int8",
    tables: str = "int8",
    tokenizer: Any = None,
    pooling: str | None = None,
    normalise: bool | None = None,
) -> Path:
    """Writes ``model`` to ``folder`` for :class:`lookupffn.Session`; returns the folder.

    ``model`` is a Hugging Face encoder, sequence classifier or masked LM (``families.FAMILIES``), or a
    SentenceTransformer or CrossEncoder of sentence-transformers, whose tokenizer and pooling go along. ``linears`` is
    the type of dense products' weights, ``"int8"``, ``"bfloat16"`` or ``"float32"``, ``tables`` that of lookup tables.
    ``pooling`` is ``"mean"``, ``"cls"`` or ``"none"``; given for a model with a head, it leaves the head out.

    Raises:
        InputError: a family or an option that the runtime does not have; the message names it.
        WriteError: the folder cannot be written.
    """
    encoder, found = _parts(model)
    tokenizer = tokenizer or found.get("tokenizer")
    graph = graph_of(encoder)
    if pooling is not None and graph.head:
        graph = dataclasses.replace(graph, head=(), head_norm=None, labels=())
    pooling = found.get("pooling", graph.pooling) if pooling is None else pooling
    normalise = found.get("normalise", False) if normalise is None else normalise
    if pooling not in POOLINGS or (pooling == "tokens" and not graph.head):
        raise InputError(f"pooling must be one of none, mean, cls, not {pooling!r}")
    longest = found.get("max_length") or getattr(tokenizer, "model_max_length", None) or 1 << 30
    mask_token = getattr(tokenizer, "mask_token_id", None)
    if mask_token is not None and mask_token >= len(graph.words):
        raise InputError(f"the tokenizer's mask token is {mask_token}, the model has {len(graph.words)} ids")
    graph = dataclasses.replace(
        graph, pooling=pooling, normalised=normalise, max_length=int(longest), mask_token_id=mask_token
    )
    folder = Path(folder)
    if tokenizer is None and (folder / "tokenizer.json").exists():
        raise InputError(
            f"{folder} holds a tokenizer.json, perhaps another model's: give tokenizer=, or another folder"
        )
    contents = model_bytes(graph, linears, tables)  # before anything is written
    make_folder(folder)
    with atomic_replace(folder / MODEL_FILE) as temporary, open(temporary, "wb") as file:
        file.writelines(contents)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _parts(model: Any) -> tuple[Any, dict]:
    """The Transformer in what sentence-transformers has, and what its other modules say; another model as it is."""
    if type(model).__name__ == "CrossEncoder":
        if len(list(model.children())) > 1:
            kinds = ", ".join(type(module).__name__ for module in model.children())
            raise InputError(f"a CrossEncoder of several modules ({kinds}) cannot be exported")
        longest = (
            model.max_seq_length if hasattr(model, "max_seq_length") else model.max_length
        )  # sentence-transformers 5
        return model.model, {"tokenizer": model.tokenizer, "max_length": longest}
    if type(model).__name__ != "SentenceTransformer":
        return model, {}
    if prompt := getattr(model, "default_prompt_name", None):
        raise InputError(f"a SentenceTransformer with the default prompt {prompt!r} cannot be exported")
    if dimension := getattr(model, "truncate_dim", None):
        raise InputError(f"a SentenceTransformer with truncate_dim {dimension} cannot be exported: cut the vectors")
    if not hasattr(model[0], "auto_model"):
        raise InputError(f"a SentenceTransformer whose first module is a {type(model[0]).__name__} cannot be exported")
    found: dict[str, Any] = {"tokenizer": model.tokenizer, "max_length": model.max_seq_length}
    for module in list(model)[1:]:
        kind = type(module).__name__
        if kind == "Pooling":
            mode = module.get_pooling_mode_str() if hasattr(module, "get_pooling_mode_str") else module.pooling_mode
            if mode not in ("mean", "cls"):
                raise InputError(f"pooling {mode!r} cannot be exported; mean and cls can")
            found["pooling"] = mode
        elif kind == "Normalize":
            found["normalise"] = True
        else:
            raise InputError(f"a SentenceTransformer with a {kind} module cannot be exported")
    return model[0].auto_model, found
