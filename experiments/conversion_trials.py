"""Changes to the recipe of `lookupffn convert`, each at a small budget: one JSON line a trial.

    python experiments/conversion_trials.py MODEL text.parquet ../shared/data TRIAL >> conversion-trials.jsonl

MODEL is a folder of all-MiniLM-L6-v2, text.parquet of conversion_text.py. The line has the mean cosine to the teacher
on held-out texts and on SICK's, and Spearman's correlation as a share of the teacher's: SICK's 500 pairs of validation
with the first 1,500 of train, 1,000 pairs of STS 2014 and of 2015.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer

from lookupffn import machine
from lookupffn.conversion import distil, quality, texts
from lookupffn.conversion.answers import answer_of, hidden_of, pooled
from lookupffn.conversion.start import Shape, converted
from lookupffn.hf.slots import slots_of

HELD_OUT, START_TOKENS, LENGTH = 400, 40_000, 128


class Trial:
    """The recipe; a subclass changes what its methods say."""

    shape, spans, settings = Shape(), 0.5, {}

    def texts(self, given):
        texts.SPAN_SHARE = self.spans
        return texts.in_spans(given)

    def model(self, student, teacher):
        pass

    def batch(self, found, generator):
        return found

    def loss(self, student, teacher, cosine):
        """Of vectors of length 1, beside the recipe's own 1 - cosine."""
        return cosine

    def step(self, done):
        """Before each step, with the share of them that is done."""


class WholeTexts(Trial):
    spans = 0.0


class SpansAlone(Trial):
    spans = 1.0


class RandomWords(Trial):
    """30 % of the words of half of the texts are others of the vocabulary."""

    def batch(self, found, generator):
        ids, mask = found["input_ids"], found["attention_mask"]
        inner = F.pad((mask[:, 1:-1] & mask[:, 2:]).bool(), (1, 1))
        chosen = torch.from_numpy((generator.random(len(ids)) < 0.5)[:, None] & (generator.random(ids.shape) < 0.3))
        words = torch.from_numpy(generator.integers(1996, 29612, tuple(ids.shape)))  # whole words of BERT's vocabulary
        return found | {"input_ids": torch.where(chosen & inner, words, ids)}


class CosinesOfABatch(Trial):
    """5 times the mean squared error of the cosines among a batch's vectors."""

    def loss(self, student, teacher, cosine):
        return cosine + 5 * (student @ student.T - teacher @ teacher.T).square().mean()


class NearPairs(Trial):
    """Each text beside itself with a word from another and, in half, two words swapped; their difference is matched."""

    def batch(self, found, generator):
        count = len(found["input_ids"]) // 2
        if count == 0:
            return found
        found = {name: values[:count] for name, values in found.items()}
        ids, mask = found["input_ids"].clone(), found["attention_mask"]
        others = ids[:, 1:-1][(mask[:, 1:-1] & mask[:, 2:]).bool()]
        for row in ids:
            length = int((row != 0).sum()) - 2
            if length > 2 and len(others):
                row[1 + generator.integers(length)] = others[generator.integers(len(others))]
                if generator.random() < 0.5:
                    at = 1 + int(generator.integers(length - 1))
                    row[at : at + 2] = row[at : at + 2].flip(0)
        return {n: torch.cat([values, ids if n == "input_ids" else values]) for n, values in found.items()}

    def loss(self, student, teacher, cosine):
        half = len(student) // 2
        s, t = (v[:half] - v[half : 2 * half] for v in (student, teacher))
        return cosine + 0.1 * (s - t).square().sum() / t.square().sum().clamp_min(1e-6)


class Annealed(Trial):
    """The dense layers go on beside the lookups and fade away over the first half of the steps."""

    share = 1.0

    def model(self, student, teacher):
        trial = self

        class Both(nn.Module):
            def __init__(self, lookup, first, last):
                super().__init__()
                self.lookup, self.dense = lookup, [first, last]  # no parameters of the student's

            def forward(self, x):
                y = self.lookup(x)
                return y + trial.share * self.dense[1](self.dense[0](x)) if trial.share > 0 else y

        for own, dense in zip(slots_of(student), slots_of(teacher), strict=True):
            own.replace(Both(own.last, dense.first, dense.last))

    def step(self, done):
        self.share = max(0.0, 1 - 2 * done)


class SmallSteps(Trial):
    settings = {"step_tokens": 256}


class LargeSteps(Trial):
    settings = {"step_tokens": 1024}


class TokenRows(Trial):
    shape = Shape(token_rows=1)


TRIALS = {
    "recipe": Trial, "whole texts": WholeTexts, "spans alone": SpansAlone, "random words": RandomWords,
    "cosines of a batch": CosinesOfABatch, "near pairs": NearPairs, "annealed": Annealed,
    "256 tokens a step": SmallSteps, "1,024 tokens a step": LargeSteps, "a row by id": TokenRows,
}  # fmt: skip


def patched(trial, answer):
    """The recipe's batches, steps and loss as the trial has them; returns its answer."""
    own_batch, own_loss = distil._Batches.__getitem__, distil._Distiller.compute_loss

    def batch(self, i):
        return trial.batch(own_batch(self, i), np.random.default_rng((7, i)))

    def compute_loss(self, *args, **kwargs):
        trial.step(self.state.global_step / self.state.max_steps)
        return own_loss(self, *args, **kwargs)

    def loss(student, teacher, mask):
        vectors = [F.normalize(pooled(hidden_of(out), mask, "mean"), dim=-1) for out in (student, teacher)]
        return trial.loss(*vectors, answer.loss(student, teacher, mask))

    distil._Batches.__getitem__, distil._Distiller.compute_loss = batch, compute_loss
    return replace(answer, loss=loss)


def measured(data):
    """Pairs by name."""
    sick = [pq.read_table(data / f"sick/{part}.parquet") for part in ("train", "validation")]
    tables = {"sick": [sick[0].slice(0, 1500), sick[1]]}
    tables |= {f"sts {year}": [pq.read_table(data / f"sts/{year}.parquet").slice(0, 1000)] for year in (2014, 2015)}
    columns = ("sentence1", "sentence2", "score")
    return {
        name: quality.Pairs(name, *([v for part in parts for v in part.column(c).to_pylist()] for c in columns))
        for name, parts in tables.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--tokens", type=int, default=100_000)
    given = parser.parse_args()

    trial, start = TRIALS[given.trial](), time.perf_counter()
    teacher, tokenizer = AutoModel.from_pretrained(given.model).eval(), AutoTokenizer.from_pretrained(given.model)
    found = list(texts.passages(pq.read_table(given.text).column("text").to_pylist(), 85))
    np.random.default_rng(0).shuffle(found)
    held, rest = found[:HELD_OUT], found[HELD_OUT:]
    first = texts.Tokens(tokenizer, rest[::-1], LENGTH, START_TOKENS)
    torch.manual_seed(0)
    batches = [first.batch(chosen) for chosen in first.batches(1024, np.random.default_rng(0))]
    student = converted(teacher, trial.shape, batches)
    trial.model(student, teacher)
    answer = patched(trial, answer_of(teacher, "mean"))
    data = texts.Tokens(tokenizer, trial.texts(rest), LENGTH, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        settings = distil.Distillation(folder, given.tokens, **trial.settings)
        distil.distil(student, teacher, data, settings, answer, title=given.trial)
    trial.step(1.0)

    def vectors(model, texts):
        return quality.embed(model, tokenizer, texts, "mean", LENGTH)

    def cosine(texts):
        return float(quality.cosine(vectors(student, texts), vectors(teacher, texts)).mean())

    pairs = measured(given.data)
    line = {"what": "conversion trial", "trial": given.trial, "tokens": given.tokens, "cosine": cosine(held)}
    line["cosine_of_sick_texts"] = cosine(pairs["sick"].first[:400])
    for name, p in pairs.items():
        ours, theirs = (quality.similarity(lambda t, m=m: vectors(m, t), p) for m in (student, teacher))
        line[name] = ours / theirs
    minutes = (time.perf_counter() - start) / 60
    print(json.dumps(line | {"minutes": minutes, "seed": 0, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
