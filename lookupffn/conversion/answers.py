"""What a model answers, by its head, and so what its converted form is matched on: vectors, logits or tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lookupffn.errors import InputError
from lookupffn.runtime.graph import is_classifier, is_language_model

MASKED = 0.15  # of the tokens, in what a masked LM is matched on


@dataclass(frozen=True)
class Answer:
    """How answers of a student are matched to those of its teacher.

    loss: of two outputs of transformers' models and a mask ``(batch, length)``; 0 where they agree.
    weight: of that loss beside the mean of the layers' errors.
    kept: what a person reads of how near they are, 1 where they agree; ``measure`` is its name.
    """

    kind: str
    measure: str
    weight: float
    loss: Callable[[Any, Any, Tensor], Tensor]
    kept: Callable[[Any, Any, Tensor], Tensor]


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Vectors ``(batch, width)`` of hidden states, by ``"mean"`` over the mask or ``"cls"``."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def answer_of(model: Any, pooling: str) -> Answer:
    """What ``model`` answers: an encoder a vector by its ``pooling``, a classifier logits, a masked LM tokens."""
    if is_language_model(model):
        if type(model).__name__.endswith("ForCausalLM"):
            raise InputError(f"{type(model).__name__}: causal language models cannot be converted")
        return Answer("tokens", "agreement", 1.0, _divergence, _same_token)
    if is_classifier(model):
        one = model.config.num_labels == 1
        return Answer("logits", "1 - error" if one else "agreement", 1.0, _error, _explained if one else _same_class)
    if type(model).__name__.rpartition("For")[1]:
        raise InputError(f"{type(model).__name__} cannot be converted: encoders, classifiers and masked LMs can")

    def cosine(student: Any, teacher: Any, mask: Tensor) -> Tensor:
        vectors = (pooled(hidden_of(out), mask, pooling) for out in (student, teacher))
        return F.cosine_similarity(*vectors).mean()

    return Answer("vectors", "cosine", 10.0, lambda *given: 1 - cosine(*given), cosine)


def hidden_of(output: Any) -> Tensor:
    """The last hidden states, of a model with or without a head."""
    return output.hidden_states[-1] if output.hidden_states is not None else output.last_hidden_state


def _error(student: Any, teacher: Any, mask: Tensor) -> Tensor:
    """The squared error of logits over the teacher's mean square about their mean."""
    wanted = teacher.logits - teacher.logits.mean(0)
    return (student.logits - teacher.logits).square().mean() / wanted.square().mean().clamp_min(1e-6)


def _explained(student: Any, teacher: Any, mask: Tensor) -> Tensor:
    return 1 - _error(student, teacher, mask)


def _same_class(student: Any, teacher: Any, mask: Tensor) -> Tensor:
    return (student.logits.argmax(-1) == teacher.logits.argmax(-1)).float().mean()


def _divergence(student: Any, teacher: Any, mask: Tensor) -> Tensor:
    """Of the teacher's distributions from the student's, in nats a token (Kullback-Leibler)."""
    s, t = (F.log_softmax(out.logits[mask.bool()], -1) for out in (student, teacher))
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def _same_token(student: Any, teacher: Any, mask: Tensor) -> Tensor:
    at = mask.bool()
    return (student.logits[at].argmax(-1) == teacher.logits[at].argmax(-1)).float().mean()


def masked(batch: dict[str, Tensor], mask_token: int, seed: int) -> Tensor:
    """A batch's ids, a share of 0.15 replaced by the mask token, other ones for each ``seed``; not the first, nor the
    last."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < MASKED
    inner = torch.zeros_like(chosen)
    inner[:, 1:-1] = (mask[:, 1:-1] & mask[:, 2:]).bool()
    return torch.where(chosen & inner, torch.full_like(ids, mask_token), ids)
