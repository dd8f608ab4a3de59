"""A pretrained encoder converted, measured beside what else a user would pick, and written where tools load it."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lookupffn import machine
from lookupffn.convert import quality
from lookupffn.convert.baselines import half_the_layers, without_ffns
from lookupffn.convert.distil import STEP_TOKENS, Progress, converted, distil
from lookupffn.convert.slots import slots_of
from lookupffn.convert.start import Shape
from lookupffn.convert.texts import Tokens, passages
from lookupffn.errors import InputError
from lookupffn.files import atomic_write, make_folder
from lookupffn.runtime.export import export
from lookupffn.runtime.families import graph_of
from lookupffn.runtime.session import Session

MOST_TOKENS = 20_000_000  # that are tokenised where the budget is in minutes
TIMED_TOKENS = 8 * STEP_TOKENS
HELD_OUT = 1500  # texts, at most, and a tenth of all
LEAST_TEXTS = 20
QUICK = 200  # texts


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with a score of their similarity, to measure on."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


@dataclass
class Conversion:
    """The converted model, its folder and what was measured (``report.json``)."""

    model: nn.Module
    folder: Path
    report: dict[str, Any]


def convert(
    model: Any,
    documents: Iterable[str],
    output: str | os.PathLike,
    *,
    tokens: int | None = None,
    minutes: float = 10.0,
    tokenizer: Any = None,
    shape: Shape | None = None,
    pooling: str = "mean",
    max_length: int = 128,
    pairs: Iterable[Pairs] = (),
    baselines: bool = True,
    tables: str = "int4",
    seed: int = 0,
    say: Callable[[str, Progress], None] | None = None,
) -> Conversion:
    """Replaces the feed-forward layers of a pretrained encoder by lookups that are distilled from it.

    ``model`` is a SentenceTransformer, or a Hugging Face encoder with ``tokenizer``; it is not changed. ``documents``
    are cut to sentences and passages; a tenth of them, 1,500 at most, are held out to measure on. ``tokens`` is the
    budget of distillation, of the model and of each baseline: the model without feed-forward layers, and with half of
    its layers; without it as many as fit into ``minutes`` for all of them, by the time of a few steps. ``output``
    receives ``packed/``, which :class:`lookupffn.Session` runs, and ``report.json``.

    Raises:
        InputError: a family that is not known, too little text, a folder that cannot be written.
    """
    shape = shape or Shape()
    encoder, tokenizer, pooling, max_length = _parts(model, tokenizer, pooling, max_length)
    teacher = copy.deepcopy(encoder).eval()
    slots = slots_of(teacher)
    graph_of(teacher)  # what the runtime cannot run is refused before anything is trained
    folder = Path(output)
    make_folder(folder)
    texts = list(passages(documents, max_length * 2 // 3, seed))
    if len(texts) < LEAST_TEXTS:
        raise InputError(f"the documents hold {len(texts)} sentences, at least {LEAST_TEXTS} are needed")
    generator = np.random.default_rng(seed)
    generator.shuffle(texts)
    held = min(HELD_OUT, len(texts) // 10)
    data = Tokens(tokenizer, texts[held:], max_length, tokens or MOST_TOKENS)

    torch.manual_seed(seed)
    students: dict[str, tuple[nn.Module, list[int] | None]] = {
        "student": (converted(teacher, shape, data, generator), None)
    }
    if tokens is None:
        seconds = _seconds_a_token(students["student"][0], teacher, data, pooling)
        tokens = max(1, int(minutes * 60 / seconds / (3 if baselines else 1)))
    if baselines:
        students["no feed-forward layers"] = (without_ffns(teacher), None)
        students["half of the layers"] = half_the_layers(teacher)
    evaluate = _Evaluation(teacher, tokenizer, texts[:held], list(pairs), pooling, max_length)
    report: dict[str, Any] = {
        "what": "conversion",
        "model": getattr(encoder.config, "_name_or_path", ""),
        "family": encoder.config.model_type,
        "shape": asdict(shape),
        "layers": len(slots),
        "tokens": tokens,
        "texts": {"distilled on": len(data), "of tokens": data.total, "held out": held},
        "seed": seed,
        "machine": machine.describe(),
        "teacher": evaluate(teacher) | _costs(teacher, slots),
    }
    for name, (student, states) in students.items():
        start = time.perf_counter()
        untrained = evaluate.cosine(student)
        distil(
            student,
            teacher,
            data,
            budget=tokens,
            pooling=pooling,
            states=states,
            seed=seed,
            say=None if say is None else lambda p, name=name: say(name, p),
        )
        found = evaluate(student) | {
            "minutes": (time.perf_counter() - start) / 60,
            "cosine_untrained": untrained,
        }
        if name == "student":
            report["student"] = found | _costs(student, slots_of(student))
            export(
                _with_encoder(model, student), folder / "packed", tables=tables, tokenizer=tokenizer, pooling=pooling
            )
            report["packed"] = evaluate.of(_embed_packed(folder / "packed")) | {
                "tables": tables,
                "bytes": sum(path.stat().st_size for path in (folder / "packed").iterdir()),
            }
        else:
            report.setdefault("baselines", {})[name] = found
    atomic_write(folder / "report.json", json.dumps(report, indent=1) + "\n")
    return Conversion(students["student"][0], folder, report)


def _seconds_a_token(student: nn.Module, teacher: nn.Module, data: Tokens, pooling: str) -> float:
    start = time.perf_counter()
    distil(copy.deepcopy(student), teacher, data, budget=TIMED_TOKENS, pooling=pooling)
    return (time.perf_counter() - start) / TIMED_TOKENS


def _parts(model: Any, tokenizer: Any, pooling: str, max_length: int) -> tuple[Any, Any, str, int]:
    if type(model).__name__ == "SentenceTransformer":
        for module in list(model)[1:]:
            if type(module).__name__ == "Pooling":
                mode = module.get_pooling_mode_str() if hasattr(module, "get_pooling_mode_str") else module.pooling_mode
                pooling = mode
        longest = min(max_length, model.max_seq_length or max_length)
        return model[0].auto_model, model.tokenizer, pooling, longest
    if tokenizer is None:
        raise InputError(f"{type(model).__name__} comes without a tokenizer: give one, or a SentenceTransformer")
    return model, tokenizer, pooling, max_length


def _with_encoder(model: Any, student: nn.Module) -> Any:
    """What ``model`` is, with another encoder: a SentenceTransformer keeps its other modules."""
    if type(model).__name__ != "SentenceTransformer":
        return student
    found = copy.copy(model)
    found._modules = dict(model._modules)
    first = next(iter(found._modules))
    found._modules[first] = copy.copy(model[0])
    parts = found._modules[first]._modules = dict(model[0]._modules)
    (name,) = (name for name, part in parts.items() if part is model[0].auto_model)
    parts[name] = student
    return found


def _embed_packed(folder: Path) -> quality.Embed:
    session = Session(folder)

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = session.embed(texts)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return embed


class _Evaluation:
    """Measures a model against its teacher, on texts that neither was distilled on and on pairs with scores."""

    def __init__(
        self, teacher: nn.Module, tokenizer: Any, texts: list[str], pairs: list[Pairs], pooling: str, max_length: int
    ):
        self.tokenizer, self.texts, self.pairs = tokenizer, texts, pairs
        self.pooling, self.max_length = pooling, max_length
        self.vectors = quality.embed(teacher, tokenizer, texts, pooling, max_length)

    def cosine(self, model: nn.Module) -> float:
        """The mean cosine alone, on some of the texts: where nothing was trained yet."""
        texts = self.texts[:QUICK]
        vectors = quality.embed(model, self.tokenizer, texts, self.pooling, self.max_length)
        return float(quality.cosine(vectors, self.vectors[:QUICK]).mean())

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        return self.of(lambda texts: quality.embed(model, self.tokenizer, texts, self.pooling, self.max_length))

    def of(self, embed: quality.Embed) -> dict[str, Any]:
        vectors = embed(self.texts)
        cosines = quality.cosine(vectors, self.vectors)
        worst = np.argsort(cosines)[:5]
        return {
            "cosine": float(cosines.mean()),
            "retrieval": quality.retrieval(vectors, self.vectors),
            "spearman": {p.name: quality.similarity(embed, p.first, p.second, p.scores) for p in self.pairs},
            "worst": [{"text": self.texts[i][:200], "cosine": float(cosines[i])} for i in worst],
        }


def _costs(model: nn.Module, slots: list) -> dict[str, Any]:
    """Multiply-adds of a token in all feed-forward layers, and the model's parameters in bytes of float32."""
    total = sum(m.flops(1) // 2 if hasattr(m := slot.last, "flops") else slot.parameters for slot in slots)
    return {"ffn_multiply_adds": total, "parameter_bytes": sum(p.numel() * 4 for p in model.parameters())}
