"""RoBERTa and XLM-R: BERT's modules, with positions that count the ids other than padding, from its id + 1 on."""

from __future__ import annotations

from typing import Any

from lookupffn.runtime.families import bert
from lookupffn.runtime.graph import Graph, classifier, is_classifier


def graph(model: Any) -> Graph:
    head = {}
    if is_classifier(model):
        head = classifier(model, (model.classifier.dense, "tanh"), (model.classifier.out_proj, None))
    return bert.graph(model, position_rule="ids", first_position=model.config.pad_token_id + 1, **head)
