"""The encoder with a head for a task: sequence and token classification, multiple choice, question answering.

Heads are those of RoBERTa, each one module by the name that PEFT keeps whole: ``classifier``, ``qa_outputs``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from lookupffn.errors import check
from lookupffn.hf.configuration import LookupRobertaConfig
from lookupffn.hf.roberta import LookupRobertaModel, LookupRobertaPreTrainedModel


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector a text, without padding: ``hidden (B, L, D)`` and a mask ``(B, L)`` or none to ``(B, D)``.

    ``pooling`` is "cls", the first token (not of padding), or "mean", that of all tokens.
    """
    if attention_mask is None:
        return hidden[:, 0] if pooling == "cls" else hidden.mean(1)
    if pooling == "cls":
        first = attention_mask.int().argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
    weights = attention_mask.to(hidden.dtype)
    return torch.einsum("bsd,bs->bd", hidden, weights) / weights.sum(1, keepdim=True).clamp(min=1)


def _dropout(config: LookupRobertaConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class ClassificationHead(nn.Module):
    """RoBERTa's, ``out_proj(tanh(dense(x)))`` with dropout before both; one module, as PEFT wants the head to be."""

    def __init__(self, config: LookupRobertaConfig, num_labels: int):
        super().__init__()
        self.dropout = _dropout(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))


class _PooledModel(LookupRobertaPreTrainedModel):
    """The encoder with RoBERTa's classification head on the first token or the mean (`classifier_pooling`)."""

    def __init__(self, config: LookupRobertaConfig, outputs: int):
        super().__init__(config)
        pooling = config.classifier_pooling
        check(pooling in ("cls", "mean"), "classifier_pooling", pooling, "cls or mean")
        self.num_labels = config.num_labels
        self.encoder = LookupRobertaModel(config)
        self.classifier = ClassificationHead(config, outputs)
        self.post_init()

    def scores(self, attention_mask: Tensor | None, **inputs):
        """What the head says of each text ``(batch, outputs)``, and the encoder's outputs."""
        outputs = self.encoder(attention_mask=attention_mask, **inputs)
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.classifier_pooling)
        return self.classifier(pooled), outputs


class LookupRobertaForSequenceClassification(_PooledModel):
    """The encoder with RoBERTa's classification head on the first token or the mean (`classifier_pooling`)."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__(config, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """``labels (batch)``: classes, or float targets with ``num_labels == 1``, or ``(batch, num_labels)`` of 0.0 and
        1.0 for several labels; the loss follows ``config.problem_type`` as everywhere in transformers."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        logits, outputs = self.scores(attention_mask, **inputs, **kwargs)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            loss = loss + self.encoder.take_auxiliary_loss()
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LookupRobertaForMultipleChoice(_PooledModel):
    """The encoder with a head that scores each choice of a question; the softmax is over the choices."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__(config, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Ids, mask and positions ``(batch, choices, length)``; ``labels (batch)``: the number of the right choice."""
        given = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        choices = next(x.shape[1] for x in (input_ids, inputs_embeds) if x is not None)
        inputs = {name: None if x is None else x.flatten(0, 1) for name, x in given.items()}
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        scores, outputs = self.scores(mask, **inputs, **kwargs)
        logits, loss = scores.view(-1, choices), None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels) + self.encoder.take_auxiliary_loss()
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LookupRobertaForTokenClassification(LookupRobertaPreTrainedModel):
    """The encoder with a linear head on every token."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = LookupRobertaModel(config)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """``labels (batch, length)``: the class of each token, or -100 for one that is not judged."""
        outputs = self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        logits, loss = self.classifier(self.dropout(outputs.last_hidden_state)), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs) + self.encoder.take_auxiliary_loss()
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LookupRobertaForQuestionAnswering(LookupRobertaPreTrainedModel):
    """The encoder with a linear head that scores every token as start and as end of the answer."""

    def __init__(self, config: LookupRobertaConfig):
        super().__init__(config)
        self.encoder = LookupRobertaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """``start_positions, end_positions (batch)``: places of tokens; one outside of the text is left out of the
        loss, as everywhere in transformers."""
        outputs = self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        start, end, loss = start.contiguous(), end.contiguous(), None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions, **kwargs)
            loss = loss + self.encoder.take_auxiliary_loss()
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
