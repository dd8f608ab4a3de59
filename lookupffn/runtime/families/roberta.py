"""RoBERTa and XLM-R: BERT's modules, with positions that count the ids other than padding, from its id + 1 on."""

from __future__ import annotations

from typing import Any

from lookupffn.runtime.families import bert
from lookupffn.runtime.graph import Graph, classifier, is_classifier, is_language_model, language_model


def graph(model: Any) -> Graph:
    fields = {"position_rule": "ids", "first_position": model.config.pad_token_id + 1} | head_of(model)
    return bert.body_graph(model, bert.layers_of(model), **fields)


def head_of(model: Any) -> dict[str, Any]:
    if is_classifier(model):
        return classifier(model, (model.classifier.dense, "tanh"), (model.classifier.out_proj, None))
    if is_language_model(model):
        return language_model(model.lm_head.dense, "gelu", model.lm_head.layer_norm, model.lm_head.decoder)
    return {}
