"""Text for distillation: documents cut to sentences and passages, as a model meets them, in batches of one length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHORTEST = 3  # words
PASSAGE_SHARE = 0.2  # of the texts: several sentences in a row
AT_ONCE = 1000  # texts that are tokenised
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n|<br\s*/?>")


def passages(documents: Iterable[str], longest: int, seed: int = 0) -> Iterator[str]:
    """Sentences of documents, each once, and passages of several of up to ``longest`` words for a fifth of them."""
    generator, seen = np.random.default_rng(seed), set()
    for document in documents:
        sentences = [" ".join(part.split()) for part in _SENTENCE.split(document)]
        sentences = [part for part in sentences if part.count(" ") + 1 >= SHORTEST]
        at = 0
        while at < len(sentences):
            text, at = sentences[at], at + 1
            if generator.random() < PASSAGE_SHARE:
                words = int(generator.integers(20, max(21, longest)))
                while at < len(sentences) and text.count(" ") + sentences[at].count(" ") + 2 <= words:
                    text, at = f"{text} {sentences[at]}", at + 1
            if text not in seen:
                seen.add(text)
                yield text


class Tokens:
    """Ids of texts, one after another, and batches of them by length; of as many as have ``most_tokens``, or of all."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], max_length: int, most_tokens: int | None = None):
        rows: list[np.ndarray] = []
        total = 0
        for start in range(0, len(texts), AT_ONCE):
            found = tokenizer(list(texts[start : start + AT_ONCE]), truncation=True, max_length=max_length)["input_ids"]
            for ids in found:
                if most_tokens is None or total < most_tokens:
                    rows.append(np.asarray(ids, np.int32))
                    total += len(ids)
            if most_tokens is not None and total >= most_tokens:
                break
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self.pad, self.mask_token = tokenizer.pad_token_id or 0, tokenizer.mask_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    def batch(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and mask ``(batch, length)`` int64 of these texts, padded on the right."""
        longest = int(self.lengths[chosen].max())
        ids = np.full((len(chosen), longest), self.pad, np.int64)
        for row, text in enumerate(chosen):
            ids[row, : self.lengths[text]] = self.ids[self.starts[text] : self.starts[text + 1]]
        mask = np.arange(longest) < self.lengths[chosen][:, None]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def batches(self, tokens: int, generator: np.random.Generator) -> list[np.ndarray]:
        """Every text once, in batches of texts of nearly one length of up to ``tokens`` tokens, in random order."""
        order = np.argsort(self.lengths + generator.random(len(self.lengths)), kind="stable")
        found: list[np.ndarray] = []
        group: list[int] = []
        for text in order[::-1]:
            longest = self.lengths[group[0]] if group else self.lengths[text]
            if group and (len(group) + 1) * longest > tokens:
                found.append(np.array(group))
                group = []
            group.append(text)
        if group:
            found.append(np.array(group))
        generator.shuffle(found)  # type: ignore[arg-type]
        return found


def coverage(distilled: Tokens, evaluated: Tokens, vocab_size: int) -> dict[str, float]:
    """How the text that was distilled on meets what is evaluated: lengths, and tokens that it has less than 5 times.

    The commonest failure of distillation is text of another domain.
    """
    counts = np.bincount(distilled.ids, minlength=vocab_size)
    rare = counts[evaluated.ids] < 5
    return {
        "median_length_distilled": float(np.median(distilled.lengths)),
        "median_length_evaluated": float(np.median(evaluated.lengths)),
        "rare_tokens": float(rare.mean()),
    }
