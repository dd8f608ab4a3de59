"""A pretrained encoder with a head for sequence classification, as fine-tuning takes it; never remote code."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lookupffn.branches import BranchedLookupFFN
from lookupffn.errors import InputError
from lookupffn.hf.folders import check_folder, check_model
from lookupffn.hf.loading import reason_of


def load_classifier(name: str, pooling: str | None = None, **fields: Any) -> PreTrainedModel:
    """The model of this folder or name with a classification head, new where it has none of ``num_labels`` outputs.

    ``fields`` are of its config. ``pooling``, ``"mean"`` or ``"cls"``, is what the head looks at, by default the first,
    in models whose config has that choice (``classifier_pooling``). Weights are float32.

    Raises:
        InputError: no model with such a head can be loaded, it lacks weights, or it has no choice of ``pooling``.
    """
    try:
        check_folder(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **fields)
        check_model(config, AutoModelForSequenceClassification, name)
        if hasattr(config, "classifier_pooling"):
            config.classifier_pooling = pooling or "mean"
        elif pooling is not None:
            raise ValueError(f"its head looks at what {config.model_type} has it look at: leave pooling out")
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        inside = f"{model.base_model_prefix}."
        new = {key if isinstance(key, str) else key[0] for key in (*report["missing_keys"], *report["mismatched_keys"])}
        # A pooler is of the head: masked LMs come without one.
        if lacks := sorted(key for key in new if key.startswith(inside) and ".pooler." not in key):
            raise ValueError(f"its weights lack {', '.join(lacks)}")
    except Exception as error:  # whatever a foreign folder or the network brings
        raise InputError(f"{name!r} cannot be loaded for sequence classification ({reason_of(error)})") from None
    return model


def ffn_of(model: PreTrainedModel) -> str:
    """What the feed-forward layers are, as tables of results name it."""
    converted = any(isinstance(module, BranchedLookupFFN) for module in model.modules())
    return "converted" if converted else getattr(model.config, "ffn", "dense")


def longest_text(model: PreTrainedModel) -> int:
    """The most tokens that the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", 1 << 30)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1  # RoBERTa and its kin count from behind that of padding
    return positions
