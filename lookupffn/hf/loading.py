"""A model by its folder or name, as the commands take it; never remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from lookupffn.errors import InputError


def load_encoder(name: str, *, head: bool = False) -> tuple[Any, Any]:
    """A model as its folder describes it, and its tokenizer: None where it has none, or keeps it itself.

    A SentenceTransformer is loaded as such; any other model, a CrossEncoder too, by the first class in
    ``config.architectures`` that transformers has a task for. Without ``head``, and where none is named, it is the
    encoder alone.

    Raises:
        InputError: there is no model of this name, none that can be read, or one that lacks weights.
    """
    try:
        if _kind(name) == "SentenceTransformer":
            from sentence_transformers import SentenceTransformer

            options = {"device": "cpu", "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
            return SentenceTransformer(name, **options), None
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        task = _task(config) if head else AutoModel
        options = {"config": config, "trust_remote_code": False, "use_safetensors": True}
        model, report = task.from_pretrained(name, **options, output_loading_info=True)
        # An encoder's pooler is a head, which others than BERT's classifier have no use for.
        missing = [key for key in sorted(report["missing_keys"]) if task is not AutoModel or "pooler." not in key]
        if missing:  # they would be random
            raise ValueError(f"its weights lack {', '.join(missing)}")
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name!r} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return model, _tokenizer(name)


def _kind(name: str) -> str:
    """The class of sentence-transformers that saved the folder; ``""`` where it is as transformers saves a model."""
    modules = _json(name, "modules.json")
    if modules is None:
        return ""
    for module in modules:
        if not module["type"].startswith("sentence_transformers."):  # version 5 would run a local folder's code
            raise ValueError(f"its module {module['type']} is none of sentence-transformers")
    kind = (_json(name, "config_sentence_transformers.json") or {}).get("model_type", "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder") or (kind == "CrossEncoder" and len(modules) > 1):
        raise ValueError(f"it is a {kind} of {len(modules)} modules, which is not known here")
    return kind


def _json(name: str, file: str) -> Any:
    """The contents of a JSON file in the folder, or in the repository of that name; None where there is none."""
    try:
        path = cached_file(name, file)
    except OSError:
        return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


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
    except (OSError, ValueError):
        return None
    # Where a folder has no files of one, transformers makes one that knows special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
