"""Text for distillation: documents cut to sentences and passages, as a model meets them, in batches of one length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHORTEST = 3  # words
PASSAGE_SHARE = 0.2  # of the texts: several sentences in a row
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
    """Ids of texts, one after another, and batches of them by length."""

    def __init__(self, tokenizer: Any, texts: Iterable[str], max_length: int, most_tokens: int | None = None):
        rows, self.texts, total = [], [], 0
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            rows.append(np.asarray(ids, np.int32))
            self.texts.append(text)
            total += len(ids)
            if most_tokens is not None and total >= most_tokens:
                break
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self.pad = tokenizer.pad_token_id or 0

    def __len__(self) -> int:
        return len(self.texts)

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
        found, group = [], []
        for text in order[::-1]:
            longest = self.lengths[group[0]] if group else self.lengths[text]
            if group and (len(group) + 1) * longest > tokens:
                found.append(np.array(group))
                group = []
            group.append(text)
        if group:
            found.append(np.array(group))
        generator.shuffle(found)
        return found
