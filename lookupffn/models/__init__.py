"""Hugging Face models with a choice of feed-forward layer; importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from lookupffn.models.configuration import PRESETS, LookupRobertaConfig
from lookupffn.models.modeling import (
    LookupRobertaForMaskedLM,
    LookupRobertaForSequenceClassification,
    LookupRobertaModel,
)

AutoConfig.register(LookupRobertaConfig.model_type, LookupRobertaConfig)
AutoModel.register(LookupRobertaConfig, LookupRobertaModel)
AutoModelForMaskedLM.register(LookupRobertaConfig, LookupRobertaForMaskedLM)
AutoModelForSequenceClassification.register(LookupRobertaConfig, LookupRobertaForSequenceClassification)

__all__ = [
    "PRESETS",
    "LookupRobertaConfig",
    "LookupRobertaForMaskedLM",
    "LookupRobertaForSequenceClassification",
    "LookupRobertaModel",
]
