"""A model by its folder or name, as the commands take it; never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer

from lookupffn.errors import InputError


def load_encoder(name: str) -> tuple[Any, Any]:
    """A sentence transformer, or else a Hugging Face encoder and its tokenizer (None where it has none).

    Raises:
        InputError: there is no model of this name, or none that can be read.
    """
    try:
        if (Path(name) / "modules.json").is_file():
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(name, device="cpu"), None
        model = AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name!r} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    try:
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return model, None
