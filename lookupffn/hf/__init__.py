"""Hugging Face models with a choice of feed-forward layer; importing this registers them with the Auto classes."""

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
except ModuleNotFoundError:
    from lookupffn.extras import require

    require("hf", "lookupffn.hf")
    raise

from lookupffn.hf.configuration import PRESETS, LookupRobertaConfig
from lookupffn.hf.heads import (
    LookupRobertaForMultipleChoice,
    LookupRobertaForQuestionAnswering,
    LookupRobertaForSequenceClassification,
    LookupRobertaForTokenClassification,
)
from lookupffn.hf.packed import PackedConfig
from lookupffn.hf.roberta import LookupRobertaForCausalLM, LookupRobertaForMaskedLM, LookupRobertaModel

AutoConfig.register(LookupRobertaConfig.model_type, LookupRobertaConfig)
AutoModel.register(LookupRobertaConfig, LookupRobertaModel)
AutoModelForCausalLM.register(LookupRobertaConfig, LookupRobertaForCausalLM)
AutoModelForMaskedLM.register(LookupRobertaConfig, LookupRobertaForMaskedLM)
AutoModelForMultipleChoice.register(LookupRobertaConfig, LookupRobertaForMultipleChoice)
AutoModelForQuestionAnswering.register(LookupRobertaConfig, LookupRobertaForQuestionAnswering)
AutoModelForSequenceClassification.register(LookupRobertaConfig, LookupRobertaForSequenceClassification)
AutoModelForTokenClassification.register(LookupRobertaConfig, LookupRobertaForTokenClassification)

__all__ = [
    "PRESETS",
    "LookupRobertaConfig",
    "LookupRobertaForCausalLM",
    "LookupRobertaForMaskedLM",
    "LookupRobertaForMultipleChoice",
    "LookupRobertaForQuestionAnswering",
    "LookupRobertaForSequenceClassification",
    "LookupRobertaForTokenClassification",
    "LookupRobertaModel",
    "PackedConfig",
]
