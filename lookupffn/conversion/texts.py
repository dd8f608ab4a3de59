"""Text for distillation: documents cut to sentences and passages, as a model meets them, in batches of one length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lookupffn.errors import InputError

SHORTEST = 3  # words
LEAST = 20  # texts
MOST_CHARACTERS = 400_000_000  # of text that is read
PASSAGE_SHARE = 0.2  # of the texts: several sentences in a row
SPAN_SHARE, SPAN = 0.5, (4, 15)  # of the texts that are longer; words
AT_ONCE = 1000  # texts that are tokenised
Text = str | tuple[str, str]  # one, or two that a cross-encoder reads together
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


def in_spans(texts: Sequence[str], seed: int = 0) -> list[str]:
    """Texts in random order, half of those of more than 15 words cut into spans of 4 to 15 words.

    A text's vector teaches as much whether its text is long or short: of as many tokens there are more of them.
    """
    generator, found = np.random.default_rng(seed), []
    for text in texts:
        words = text.split()
        if len(words) <= SPAN[1] or generator.random() >= SPAN_SHARE:
            found.append(text)
            continue
        while words:
            count = int(generator.integers(SPAN[0], SPAN[1] + 1))
            if len(words) - count < SHORTEST:
                count = len(words)
            found.append(" ".join(words[:count]))
            words = words[count:]
    generator.shuffle(found)  # type: ignore[arg-type]
    return found


def in_pairs(texts: Sequence[str], seed: int = 0) -> list[tuple[str, str]]:
    """Each text with the one behind it, which often has to do with it, or, as often, with any."""
    generator = np.random.default_rng(seed)
    others = np.where(generator.random(len(texts)) < 0.5, generator.integers(0, len(texts), len(texts)), -1)
    return [
        (text, texts[other if other >= 0 else (i + 1) % len(texts)])
        for i, (text, other) in enumerate(zip(texts, others, strict=True))
    ]


def read_texts(documents: Iterable[str], max_length: int, seed: int, paired: bool) -> tuple[list[Text], dict[str, Any]]:
    """Passages in random order, or pairs of them, and what tells them from others."""
    longest = max_length // 3 if paired else max_length * 2 // 3  # words
    texts, characters, digest, whole = [], 0, blake2b(digest_size=8), True
    for text in passages(documents, longest, seed):
        texts.append(text)
        characters += len(text)
        digest.update(text.encode("utf-8", "surrogatepass"))
        if characters > MOST_CHARACTERS:
            whole = False
            break
    if len(texts) < LEAST:
        raise InputError(f"the documents hold {len(texts)} sentences, at least {LEAST} are needed")
    found: list[Text] = list(in_pairs(texts, seed)) if paired else list(texts)
    np.random.default_rng(seed).shuffle(found)  # type: ignore[arg-type]
    return found, {
        "read": len(texts),
        "paired": paired,
        "characters": characters,
        "whole": whole,
        "fingerprint": digest.hexdigest(),
    }


class Tokens:
    """Ids of texts, one after another, and batches of them by length; of as many as have ``most_tokens``, or of all."""

    def __init__(self, tokenizer: Any, texts: Sequence[Text], max_length: int, most_tokens: int | None = None):
        rows: list[np.ndarray] = []
        types: list[np.ndarray] = []
        total = 0
        for start in range(0, len(texts), AT_ONCE):
            found = tokenizer(list(texts[start : start + AT_ONCE]), truncation=True, max_length=max_length)
            for i, ids in enumerate(found["input_ids"]):
                if most_tokens is None or total < most_tokens:
                    rows.append(np.asarray(ids, np.int32))
                    if "token_type_ids" in found:
                        types.append(np.asarray(found["token_type_ids"][i], np.int8))
                    total += len(ids)
            if most_tokens is not None and total >= most_tokens:
                break
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self.types = np.concatenate(types) if types else None
        self.pad, self.mask_token = tokenizer.pad_token_id or 0, tokenizer.mask_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    def batch(self, chosen: np.ndarray) -> dict[str, Tensor]:
        """What a model takes of these texts, ``(batch, length)`` int64 each, padded on the right."""
        mask = np.arange(self.lengths[chosen].max()) < self.lengths[chosen][:, None]
        found = {"input_ids": self._padded(self.ids, chosen, mask, self.pad), "attention_mask": mask.astype(np.int64)}
        if self.types is not None:
            found["token_type_ids"] = self._padded(self.types, chosen, mask, 0)
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def _padded(self, values: np.ndarray, chosen: np.ndarray, mask: np.ndarray, pad: int) -> np.ndarray:
        out = np.full(mask.shape, pad, np.int64)
        out[mask] = np.concatenate([values[self.starts[text] : self.starts[text + 1]] for text in chosen])
        return out

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
