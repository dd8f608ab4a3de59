"""ELECTRA: BERT whose embeddings may be narrower than its layers, with a linear between them."""

from __future__ import annotations

from typing import Any

from lookupffn.runtime.families import bert
from lookupffn.runtime.graph import Graph, classifier, is_classifier, is_language_model, language_model


def graph(model: Any) -> Graph:
    head = {}  # whose activation is GELU, whatever the configuration says
    if is_classifier(model):
        head = classifier(model, (model.classifier.dense, "gelu"), (model.classifier.out_proj, None))
    elif is_language_model(model):
        predictions = model.generator_predictions
        head = language_model(predictions.dense, "gelu", predictions.LayerNorm, model.generator_lm_head)
    body = getattr(model, "electra", model)
    projection = getattr(body, "embeddings_project", None)
    return bert.body_graph(model, bert.layers_of(model), embedding_projection=projection, **head)
