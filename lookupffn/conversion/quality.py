"""What a model kept of its teacher, on texts that neither was distilled on and on what a user has to measure with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from lookupffn.conversion.answers import Answer, hidden_of, masked, pooled
from lookupffn.conversion.distil import layer_errors
from lookupffn.conversion.texts import Text, Tokens
from lookupffn.errors import InputError
from lookupffn.train.data import progress_bar

NEAREST = 10
BATCH_TOKENS = 4096
WORST = 5
Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with a score of their similarity."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Labelled:
    """Texts of classes, which a linear classifier is to tell apart by their vectors, or the classifier itself."""

    name: str
    texts: list[str]
    labels: list[Any]


def _batches(tokens: Tokens) -> Iterable[np.ndarray]:
    """With a bar where they take more than some seconds."""
    batches = tokens.batches(BATCH_TOKENS, np.random.default_rng(0))
    return progress_bar(iterable=batches, desc="measuring", unit="batch", leave=False, delay=3)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], pooling: str, max_length: int) -> np.ndarray:
    """Vectors ``(texts, width)`` float32 of length 1, in the order of the texts."""
    tokens = Tokens(tokenizer, texts, max_length)
    vectors: np.ndarray | None = None
    for chosen in _batches(tokens):
        batch = tokens.batch(chosen)
        hidden = hidden_of(model(**batch))
        found = F.normalize(pooled(hidden, batch["attention_mask"], pooling)).numpy()
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


def similarity(embed: Embed, pairs: Pairs) -> float:
    """Spearman's correlation of the cosines of pairs with their scores."""
    return rank_correlation(cosine(embed(pairs.first), embed(pairs.second)), pairs.scores)


def rank_correlation(found: np.ndarray, scores: Sequence[float]) -> float:
    """Spearman's; nan where one of them is constant."""
    if np.ptp(found) == 0 or np.ptp(scores) == 0:
        return float("nan")
    return float(spearmanr(found, scores).statistic)


def classification(embed: Embed, labelled: Labelled) -> float:
    """Accuracy of logistic regression on the vectors, the mean of five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    model = LogisticRegression(max_iter=1000)
    return float(cross_val_score(model, embed(labelled.texts), labelled.labels, cv=5).mean())


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: Sequence[Text], max_length: int) -> np.ndarray:
    """A classifier's ``(texts, labels)`` float32, in the order of the texts."""
    tokens = Tokens(tokenizer, texts, max_length)
    found: dict[int, np.ndarray] = {}
    for chosen in _batches(tokens):
        found |= zip(chosen.tolist(), model(**tokens.batch(chosen)).logits.numpy(), strict=True)
    return np.stack([found[i] for i in range(len(texts))])


@torch.no_grad()
def answers(student: Any, teacher: Any, tokens: Tokens, answer: Answer) -> dict[str, float]:
    """Of logits or tokens: the share that is kept, and of masked LMs both log perplexities of the masked tokens, in
    nats."""
    sums: dict[str, float] = {}
    weight = 0.0
    for number, chosen in enumerate(_batches(tokens)):
        batch = tokens.batch(chosen)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if answer.kind == "tokens":
            batch["input_ids"] = masked(batch, tokens.mask_token, number)
        outputs = [model(**batch) for model in (student, teacher)]
        found = {answer.measure: float(answer.kept(*outputs, mask))}
        count = float(mask.sum()) if answer.kind == "tokens" else float(len(chosen))
        if answer.kind == "tokens":
            places = batch["input_ids"] != ids
            count = float(places.sum())
            for name, output in zip(("log_perplexity", "teacher_log_perplexity"), outputs, strict=True):
                found[name] = float(F.cross_entropy(output.logits[places], ids[places])) if count else 0.0
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * count
        weight += count
    return {name: value / weight for name, value in sums.items()}


@torch.no_grad()
def errors_by_layer(student: Any, teacher: Any, tokens: Tokens, states: Sequence[int] | None = None) -> list[float]:
    """Of each layer, the squared error of hidden states over their variance, the mean of batches."""
    found = []
    for chosen in _batches(tokens):
        batch = tokens.batch(chosen)
        mask = batch["attention_mask"]
        s, t = (m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher))
        at = states or range(1, len(t))
        found.append([float(error) for error in layer_errors(s[1:], [t[i] for i in at], mask)])
    return np.mean(found, 0).tolist()


class Evaluation:
    """Measures models against one teacher, always on the same texts."""

    def __init__(
        self,
        teacher: nn.Module,
        tokenizer: Any,
        texts: Sequence[Any],
        answer: Answer,
        pooling: str,
        max_length: int,
        pairs: Sequence[Pairs] = (),
        labelled: Sequence[Labelled] = (),
    ):
        self.teacher, self.tokenizer, self.texts, self.answer = teacher, tokenizer, texts, answer
        self.pooling, self.max_length, self.pairs, self.labelled = pooling, max_length, pairs, labelled
        if answer.kind == "tokens" and (pairs or labelled):
            raise InputError("a masked LM is measured by its tokens: leave pairs and labelled texts out")
        if pairs and answer.kind == "logits" and teacher.config.num_labels != 1:
            raise InputError(f"{teacher.config.num_labels} logits are no score of a pair: leave the pairs out")
        self.tokens = Tokens(tokenizer, texts, max_length)
        self.vectors = self.embed(teacher)(texts) if answer.kind == "vectors" else np.zeros((0, 0), np.float32)

    def embed(self, model: Any) -> Embed:
        return lambda texts: embed(model, self.tokenizer, texts, self.pooling, self.max_length)

    def of_model(self, model: Any, states: Sequence[int] | None = None) -> dict[str, Any]:
        """Of a model of transformers; ``states`` as :func:`errors_by_layer` has them."""
        errors = {"errors_by_layer": errors_by_layer(model, self.teacher, self.tokens, states)}
        if self.answer.kind == "vectors":
            return self.of_vectors(self.embed(model)) | errors
        return self.of_answers(model) | errors

    def of_answers(self, model: Any) -> dict[str, Any]:
        """Of whatever gives logits as the teacher does."""
        found: dict[str, Any] = answers(model, self.teacher, self.tokens, self.answer)
        if self.answer.kind == "tokens":
            return found
        spearman, accuracy = {}, {}
        for p in self.pairs:
            texts = list(zip(p.first, p.second, strict=True))
            spearman[p.name] = rank_correlation(self.logits(model, texts)[:, 0], p.scores)
        for c in self.labelled:
            classes = [self.teacher.config.label2id.get(label, label) for label in c.labels]
            accuracy[c.name] = float((self.logits(model, c.texts).argmax(1) == np.array(classes)).mean())
        return found | {"spearman": spearman, "classification": accuracy}

    def logits(self, model: Any, texts: Sequence[Text]) -> np.ndarray:
        return logits(model, self.tokenizer, texts, self.max_length)

    def of_vectors(self, embed: Embed) -> dict[str, Any]:
        """Of whatever gives vectors of length 1."""
        vectors = embed(self.texts)
        found: dict[str, Any] = {}
        if vectors.shape == self.vectors.shape:  # a static model has vectors of another width, perhaps
            cosines = cosine(vectors, self.vectors)
            worst = np.argsort(cosines)[:WORST]
            found["cosine"] = float(cosines.mean())
            found["worst"] = [{"text": self.texts[i][:200], "cosine": float(cosines[i])} for i in worst]
        return found | {
            "retrieval": retrieval(vectors, self.vectors),
            "spearman": {p.name: similarity(embed, p) for p in self.pairs},
            "classification": {c.name: classification(embed, c) for c in self.labelled},
        }


def kept(found: dict[str, Any], teacher: dict[str, Any], measure: str) -> float:
    """One number of what a model kept, 1 being all: of pairs the mean of Spearman's correlations over the teacher's;
    without pairs its cosine, its agreement, or the teacher's log perplexity over its own."""
    if found.get("spearman"):
        return float(np.mean([value / teacher["spearman"][name] for name, value in found["spearman"].items()]))
    if "log_perplexity" in found:
        return found["teacher_log_perplexity"] / found["log_perplexity"]
    return found[measure]
