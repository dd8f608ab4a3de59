"""Hugging Face models with a choice of feed-forward layer; importing this registers them with the Auto classes."""

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )
except ModuleNotFoundError:
    from lookupffn.extras import require

    require("hf", "lookupffn.hf")
    raise

from lookupffn.hf.configuration import PRESETS, LookupRobertaConfig
from lookupffn.hf.packed import PackedConfig
from lookupffn.hf.roberta import (
    LookupRobertaForCausalLM,
    LookupRobertaForMaskedLM,
    LookupRobertaForSequenceClassification,
    LookupRobertaModel,
)

AutoConfig.register(LookupRobertaConfig.model_type, LookupRobertaConfig)
AutoModel.register(LookupRobertaConfig, LookupRobertaModel)
AutoModelForCausalLM.register(LookupRobertaConfig, LookupRobertaForCausalLM)
AutoModelForMaskedLM.register(LookupRobertaConfig, LookupRobertaForMaskedLM)
AutoModelForSequenceClassification.register(LookupRobertaConfig, LookupRobertaForSequenceClassification)

__all__ = [
    "PRESETS",
    "LookupRobertaConfig",
    "LookupRobertaForCausalLM",
    "LookupRobertaForMaskedLM",
    "LookupRobertaForSequenceClassification",
    "LookupRobertaModel",
    "PackedConfig",
]
