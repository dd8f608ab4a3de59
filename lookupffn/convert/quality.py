"""What a converted model kept of its teacher: cosine, retrieval, similarity of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lookupffn.convert.distil import pooled
from lookupffn.convert.texts import Tokens

NEAREST = 10
Embed = Callable[[Sequence[str]], np.ndarray]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], pooling: str, max_length: int) -> np.ndarray:
    """Vectors ``(texts, width)`` float32 of length 1, in the order of the texts."""
    tokens = Tokens(tokenizer, texts, max_length)
    vectors: np.ndarray | None = None
    for chosen in tokens.batches(4096, np.random.default_rng(0)):
        ids, mask = tokens.batch(chosen)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = nn.functional.normalize(pooled(hidden, mask, pooling)).numpy()
        if vectors is None:
            vectors = np.empty((len(texts), found.shape[1]), np.float32)
        vectors[chosen] = found
    assert vectors is not None
    return vectors


def cosine(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Of each text's two vectors, which have length 1."""
    return (student * teacher).sum(1)


def retrieval(student: np.ndarray, teacher: np.ndarray) -> float:
    """Share of texts whose nearest other text, by the teacher, is among the student's ten nearest."""
    kept, count = 0, len(teacher)
    for start in range(0, count, 512):
        rows = np.arange(start, min(start + 512, count))
        by_teacher, by_student = (vectors[rows] @ vectors.T for vectors in (teacher, student))
        by_teacher[np.arange(len(rows)), rows] = by_student[np.arange(len(rows)), rows] = -np.inf
        nearest = by_teacher.argmax(1)
        closer = by_student > by_student[np.arange(len(rows)), nearest][:, None]
        kept += int((closer.sum(1) < min(NEAREST, count - 1)).sum())
    return kept / count


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties by their mean rank; nan where one of them is constant."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    if any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def similarity(embed: Embed, first: Sequence[str], second: Sequence[str], scores: Sequence[float]) -> float:
    """Spearman's correlation of the cosines of pairs with their scores."""
    return spearman(cosine(embed(first), embed(second)), np.asarray(scores, float))
