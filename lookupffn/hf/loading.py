"""A model by its folder or name, as the commands take it; never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lookupffn.errors import InputError, check
from lookupffn.hf.folders import TOKENIZERS, check_folder, check_model, check_modules, find, read_json


def load_encoder(name: str, *, head: bool = False) -> tuple[Any, Any]:
    """A model as its folder describes it, and its tokenizer: None where it has none, or keeps it itself.

    A SentenceTransformer is loaded as such; any other model, a CrossEncoder too, by the first class in
    ``config.architectures`` that transformers has a task for. Without ``head``, and where none is named, it is the
    encoder alone.

    Raises:
        InputError: there is no model of this name, none that can be read, or one that lacks weights.
    """
    try:
        modules = _modules(name)
        if modules:
            from sentence_transformers import SentenceTransformer

            for module in modules:
                check_folder(name, module["path"])
            _transformer(name, False, modules[0]["path"])  # for its checks, which a SentenceTransformer has not
            options = {"device": "cpu", "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
            return SentenceTransformer(name, **options), None
        return _transformer(name, head), _tokenizer(name)
    except Exception as error:  # whatever a foreign folder or the network brings
        raise InputError(f"{name!r} cannot be loaded ({reason_of(error)})") from None


def transformer_folder(name: str) -> str:
    """Where the Transformer of a SentenceTransformer's folder lies, in it or below; any other name as it is.

    Raises:
        InputError: its modules are damaged, not known, or outside of the folder.
    """
    try:
        modules = _modules(name)
    except Exception as error:  # whatever a foreign folder brings
        raise InputError(f"{name!r} cannot be loaded ({reason_of(error)})") from None
    return str(Path(name) / modules[0]["path"]) if modules else name


def reason_of(error: Exception) -> str:
    """What an error says, on one line, with its class where it may say no more than a key."""
    reason = " ".join(str(error).split())[:400] or "it gives no reason"
    bare = isinstance(error, AttributeError | LookupError | TypeError)
    return f"{type(error).__name__}: {reason}" if bare else reason


def _transformer(name: str, head: bool, part: str = "") -> Any:
    """The model of transformers in the folder, or in its part of that name, all of whose weights are there."""
    check_folder(name, part)
    options = {"trust_remote_code": False, "subfolder": part}
    config = AutoConfig.from_pretrained(name, **options)
    task = _task(config) if head else AutoModel
    check_model(config, task, name, part)
    options |= {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
    model, report = task.from_pretrained(name, **options, output_loading_info=True)
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"its weights have {key} of {list(found)}, its config.json asks for {list(wanted)}")
    # An encoder's pooler is a head, which others than BERT's classifier have no use for.
    missing = [key for key in sorted(report["missing_keys"]) if task is not AutoModel or "pooler." not in key]
    if missing:  # they would be random
        raise ValueError(f"its weights lack {', '.join(missing)}")
    return model


def is_cross_encoder(name: str) -> bool:
    """Whether the folder was saved by sentence-transformers' CrossEncoder, which reads texts two by two."""
    said = read_json(name, "config_sentence_transformers.json") or {}
    return said.get("model_type") == "CrossEncoder" or "sentence_transformers" in (read_json(name, "config.json") or {})


def _modules(name: str) -> list[dict]:
    """The modules of a SentenceTransformer; none where the folder is as transformers saves a model."""
    check_folder(name)
    modules = read_json(name, "modules.json", list)
    if modules is None:
        return []
    check(bool(modules), "its modules.json", modules, "a list of modules")
    check_modules(modules)
    said = read_json(name, "config_sentence_transformers.json") or {}
    kind = said.get("model_type", "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder") or (kind == "CrossEncoder" and len(modules) > 1):
        raise ValueError(f"it is a {kind} of {len(modules)} modules, which is not known here")
    return modules if kind == "SentenceTransformer" else []


def _task(config: Any) -> Any:
    """The Auto class with the head that the config names."""
    for architecture in config.architectures or ():
        _, found, task = architecture.rpartition("For")
        if found and hasattr(transformers, f"AutoModelFor{task}"):
            return getattr(transformers, f"AutoModelFor{task}")
    return AutoModel


def _tokenizer(name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if any(find(name, file) for file in TOKENIZERS):
            raise ValueError(f"its tokenizer is damaged or not known, {type(error).__name__}: {error}") from None
        return None
    # Where a folder has no files of one, transformers makes one that knows special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
