"""An embedding model measured on pairs, classes and retrieval, in PyTorch or in the runtime, with all to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from lookupffn import machine, native
from lookupffn.conversion import quality
from lookupffn.conversion.inputs import labelled_of, name_of, pairs_of, texts_of
from lookupffn.conversion.mteb_tasks import mteb_scores
from lookupffn.conversion.quality import Embed
from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.files import fingerprint, weight_fingerprints
from lookupffn.hf.classifier import longest_text
from lookupffn.hf.loading import load_encoder
from lookupffn.runtime.session import Session

SEED = 0
PACKAGES = ("sentence-transformers", "tokenizers", "scikit-learn", "scipy", "numpy", "mteb")


@dataclass(frozen=True)
class Embedder:
    """A model that gives vectors of length 1; ``facts`` say what it is, ``model`` is what was loaded.

    ``pooling`` is what the model itself says, None where it does not.
    """

    model: Any
    embed: Embed
    pooling: str | None
    facts: dict[str, Any]


def open_embedder(name: str, *, runtime: bool = False, pooling: str | None = None) -> Embedder:
    """A model by its folder or name: by PyTorch, or the packed form in the folder by the runtime.

    The runtime is asked for, or taken where a folder has nothing that transformers loads. ``pooling``, ``"mean"`` or
    ``"cls"``, is for encoders that do not say their own.

    Raises:
        InputError: there is no such model, it gives no vectors, or nobody says how it pools.
    """
    folder = Path(name)
    plain = any((folder / file).exists() for file in ("config.json", "modules.json"))
    packed = runtime or (folder.is_dir() and not plain)
    facts = {"name": name, "form": "runtime" if packed else "PyTorch", "weights": weight_fingerprints(name)}
    if packed:
        session = Session(folder, torch.get_num_threads())
        known, longest = session.pooling, int(session.metadata["max_length"])
        model, embed = session, lambda texts: _unit(session.embed(texts))
        facts["kernels"] = native.implementation()
    else:
        model, tokenizer = load_encoder(name)
        if type(model).__name__ == "SentenceTransformer":
            known, longest = _pooling(model), model.max_seq_length
            embed = lambda texts: _unit(model.encode(list(texts), show_progress_bar=False))  # noqa: E731
        elif tokenizer is None:
            raise InputError(f"{name!r} has no tokenizer: save it beside the model")
        elif pooling not in ("mean", "cls"):
            raise InputError(f"{name!r} does not say how it pools: give pooling mean or cls, not {pooling!r}")
        else:
            model.eval()
            known, longest = None, min(longest_text(model), tokenizer.model_max_length)
            embed = lambda texts: quality.embed(model, tokenizer, texts, pooling, longest)  # noqa: E731
            facts["revision"] = getattr(model.config, "_commit_hash", None)
    return Embedder(model, embed, known, facts | {"pooling": known or pooling, "max_length": longest})


def evaluate(
    name: str,
    *,
    pairs: Sequence[str] = (),
    labelled: Sequence[str] = (),
    texts: str | None = None,
    teacher: str | None = None,
    mteb: Sequence[str] = (),
    runtime: bool = False,
    pooling: str | None = None,
    encoding: str = "utf-8",
) -> dict[str, Any]:
    """Measures a model, and a teacher beside it, on files given as in :mod:`lookupffn.conversion.inputs`.

    ``measures`` of the result has one entry a measure and data: Spearman's correlation of cosines with the scores of
    ``pairs``; accuracy of logistic regression on the vectors of ``labelled``, the mean of five folds; on ``texts`` the
    share whose nearest other text by the teacher is among the model's ten nearest, and the mean cosine to the teacher's
    vectors where they are as long; the main scores of ``mteb``'s tasks. Beside it is what is needed to repeat them.

    Raises:
        InputError: nothing is asked for, a file or a model cannot be read, texts lack a teacher.
    """
    if not (pairs or labelled or texts or mteb):
        raise InputError("nothing to measure: give pairs, labelled, texts with a teacher, or mteb")
    if texts and not teacher:
        raise InputError(f"texts {texts!r} need a teacher: retrieval is measured against its nearest texts")
    if mteb:
        require("mteb", "lookupffn evaluate --mteb")
    scored = {argument: pairs_of(argument, encoding) for argument in pairs}
    classes = {argument: labelled_of(argument, encoding) for argument in labelled}
    nearest = texts_of(texts, encoding) if texts else []
    set_seed(SEED)
    models = {"model": open_embedder(name, runtime=runtime, pooling=pooling)}
    if teacher:
        models["teacher"] = open_embedder(teacher, pooling=pooling)
    if pooling and all(m.pooling for m in models.values()):
        said = ", ".join(f"{m.facts['name']!r} by {m.pooling}" for m in models.values())
        raise InputError(f"pooling {pooling!r} is for models that do not say their own ({said}): leave it out")

    measures: list[dict[str, Any]] = []

    def add(measure: str, data: str, count: int | None, **values: float) -> None:
        kept = {which: None if value != value else float(value) for which, value in values.items()}
        measures.append({"measure": measure, "data": data, "count": count} | kept)

    for given in scored.values():
        found = {which: quality.similarity(m.embed, given) for which, m in models.items()}
        add("spearman", given.name, len(given.scores), **found)
    for given in classes.values():
        found = {which: quality.classification(m.embed, given) for which, m in models.items()}
        add("classification", given.name, len(given.labels), **found)
    if texts:
        vectors = [m.embed(nearest) for m in models.values()]
        data = name_of(_path(texts))
        add("retrieval", data, len(nearest), model=quality.retrieval(*vectors))
        if vectors[0].shape == vectors[1].shape:
            add("cosine", data, len(nearest), model=quality.cosine(*vectors).mean())
    tasks = {which: mteb_scores(m.model, m.embed, mteb) for which, m in models.items()} if mteb else {}
    for task in tasks.get("model", {}):
        add("mteb", task, None, **{which: scores[task]["main_score"] for which, scores in tasks.items()})
    files = [*scored, *classes, *([texts] if texts else [])]
    return {
        "what": "evaluation",
        **{which: m.facts for which, m in models.items()},
        "measures": measures,
        "mteb": tasks,
        "files": {argument: fingerprint(Path(_path(argument))) for argument in files},
        "encoding": encoding,
        "seed": SEED,
        "command": machine.command(),
        "machine": machine.describe(*PACKAGES),
    }


def _pooling(model: Any) -> str:
    """How a SentenceTransformer pools."""
    found = [module for module in model if type(module).__name__ == "Pooling"]
    mode = [m.get_pooling_mode_str() if hasattr(m, "get_pooling_mode_str") else m.pooling_mode for m in found]
    return "+".join(map(str, mode)) or "as its modules do"


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _path(argument: str) -> str:
    return argument if Path(argument).is_file() else argument.rpartition(":")[0]
