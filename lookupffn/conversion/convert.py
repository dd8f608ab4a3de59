"""A pretrained encoder converted, measured beside what else a user would pick, and written where tools load it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lookupffn import machine
from lookupffn.branches import NoFFN
from lookupffn.conversion import quality
from lookupffn.conversion.answers import Answer, answer_of
from lookupffn.conversion.baselines import half_the_layers, static_model, without_ffns
from lookupffn.conversion.distil import STEP_TOKENS, Distillation, distil
from lookupffn.conversion.models import Parts, costs, fingerprint, parts_of, with_encoder
from lookupffn.conversion.quality import Evaluation, Labelled, Pairs
from lookupffn.conversion.report import HALF, NO_FFN, PACKED, STATIC, STUDENT, write_report
from lookupffn.conversion.start import Shape, converted
from lookupffn.conversion.texts import Text, Tokens, coverage, in_spans, read_texts
from lookupffn.conversion.timing import times
from lookupffn.errors import InputError
from lookupffn.files import atomic_replace, atomic_write, make_folder, writing
from lookupffn.hf.packed import mark_converted
from lookupffn.hf.slots import slots_of
from lookupffn.runtime.export import export
from lookupffn.runtime.families import graph_of
from lookupffn.runtime.format import TABLE_TYPES
from lookupffn.runtime.session import Session

START_TOKENS = 40_000  # whose inputs and outputs the closed forms see
TIMED_TOKENS = (2 * STEP_TOKENS, 14 * STEP_TOKENS)
HELD_OUT_SHARE = 0.02  # of the tokens that are distilled on
HELD_OUT = (300, 20_000)  # texts that are measured on, at least and at most
LONGEST_WAIT = timedelta(days=1)  # of processes for the first, which measures alone


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
    keep: float | None = None,
    tokenizer: Any = None,
    shape: Shape | None = None,
    pooling: str = "mean",
    max_length: int = 128,
    in_pairs: bool | None = None,
    pairs: Sequence[Pairs] = (),
    labelled: Sequence[Labelled] = (),
    baselines: bool = True,
    tables: str = "int4",
    seed: int = 0,
) -> Conversion:
    """Replaces the feed-forward layers of a pretrained encoder by lookups that are distilled from it.

    ``model`` is a SentenceTransformer, or a Hugging Face encoder, sequence classifier or masked LM with
    ``tokenizer``; it is not changed. ``documents`` are cut to sentences and passages, of which some are held out to
    measure on; ``in_pairs`` puts two together, as a cross-encoder reads them (where it is the default). ``tokens`` is
    the budget of distillation; without it as many as fit into ``minutes``, by the time of a
    few steps. The baselines (the model without feed-forward layers, and with half of its layers) are distilled on as
    many tokens: about as long again. With ``keep`` as many layers are converted as keep this share of the teacher's
    quality, those that it needs least first; each try takes the budget.

    ``output`` receives the trained model as transformers and sentence-transformers load it, ``packed/``, which
    :class:`lookupffn.Session` runs (tables of the type ``tables``), ``report.html`` and ``report.json``. Called again
    after it was cut off, it goes on from its last checkpoint, to the same bits.

    Raises:
        InputError: a value out of its range, a family that is not known, too little text, a folder that holds something
            else.
        WriteError: the folder cannot be written.
    """
    if (tokens is not None and tokens < 1) or not minutes > 0:
        raise InputError(f"tokens and minutes must be positive, not {tokens} and {minutes}")
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"keep must be more than 0 and at most 1, not {keep}")
    if tables not in TABLE_TYPES:
        raise InputError(f"tables must be one of {', '.join(TABLE_TYPES)}, not {tables!r}")
    parts = parts_of(model, tokenizer, pooling, max_length, in_pairs)
    graph_of(parts.encoder)  # what the runtime cannot run is refused before anything is trained
    run = _Run(
        parts, model, Path(output), shape or Shape(), pairs, labelled, tables, seed, documents, tokens, minutes, keep
    )
    run.report |= {"teacher": run.teacher_found()}
    student = run.student()
    if baselines:
        run.baselines()
    run.write(student)
    return Conversion(student, run.folder, run.report)


class _Run:
    """One conversion: what all its models are trained and measured on, and the folder of what is done already."""

    def __init__(
        self,
        parts: Parts,
        model: Any,
        folder: Path,
        shape: Shape,
        pairs: Sequence[Pairs],
        labelled: Sequence[Labelled],
        tables: str,
        seed: int,
        documents: Iterable[str],
        tokens: int | None,
        minutes: float,
        keep: float | None,
    ):
        self.model, self.folder, self.shape, self.tables = model, folder, shape, tables
        self.seed, self.keep = seed, keep
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        self.tokenizer, self.pooling, self.max_length = parts.tokenizer, parts.pooling, parts.max_length
        self.teacher = copy.deepcopy(parts.encoder).eval()
        self.answer: Answer = answer_of(self.teacher, self.pooling)
        self.layers = len(slots_of(self.teacher))
        self.models: dict[str, Any] = {}  # the baselines
        self.work = folder / "distillation"
        if (folder / "report.json").exists() or ((folder / "config.json").exists() and not self.work.exists()):
            raise InputError(f"{folder} holds a model: choose another folder")
        make_folder(folder)

        texts, read = read_texts(documents, self.max_length, seed, parts.paired)
        settings = {
            "shape": asdict(shape), "seed": seed, "tables": tables, "keep": keep, "tokens": tokens,
            "minutes": None if tokens else minutes, "model": fingerprint(self.teacher), "texts": read,
            "pooling": self.pooling, "max_length": self.max_length, "measured": [p.name for p in (*pairs, *labelled)],
        }  # fmt: skip
        before = self._claim(settings)
        start = Tokens(self.tokenizer, texts[::-1], self.max_length, START_TOKENS)  # the first ones are held out
        mean = start.total / len(start)
        self.start = [start.batch(c) for c in start.batches(2 * STEP_TOKENS, np.random.default_rng(seed))]
        if tokens is None:
            tokens = before.get("budget") or self._fits(minutes, start)
        self.tokens: int = tokens
        held = int(np.clip(HELD_OUT_SHARE * tokens / mean, *HELD_OUT))
        held = min(held, len(texts) // 10)
        self.held, distilled = texts[:held], texts[held:]
        if self.answer.kind == "vectors":
            distilled = in_spans(cast(list[str], distilled), seed)
        self.data = Tokens(self.tokenizer, distilled, self.max_length, tokens)
        if self.state.is_main_process:
            atomic_write(self.work / "settings.json", json.dumps(settings | {"budget": tokens}, indent=1) + "\n")
        self.evaluation = Evaluation(
            self.teacher, self.tokenizer, self.held, self.answer, self.pooling, self.max_length, pairs, labelled
        )
        self.report: dict[str, Any] = {
            "what": "conversion",
            "model": getattr(self.teacher.config, "_name_or_path", ""),
            "family": self.teacher.config.model_type,
            "answer": self.answer.kind,
            "measure": self.answer.measure,
            "shape": asdict(shape),
            "layers": self.layers,
            "tables": tables,
            "tokens": tokens,
            "max_length": self.max_length,
            "texts": read | {"distilled_on": len(self.data), "of_tokens": self.data.total, "held_out": held},
            "coverage": self._coverage(pairs, labelled),
            "seed": seed,
            "machine": machine.describe() | {"processes": self.state.num_processes},
        }

    # ---- Steps -------------------------------------------------------------------------------------------------------

    def teacher_found(self) -> dict[str, Any]:
        return self._once("teacher", lambda: self.evaluation.of_model(self.teacher) | costs(self.teacher))

    def student(self) -> Any:
        """The converted model; with ``keep``, of the most layers that keep enough, found by bisection."""
        if self.keep is None:
            return self._student(list(range(self.layers)))
        sensitivity = self._once("sensitivity", lambda: {self.answer.measure: self._sensitivity()})[self.answer.measure]
        order = sorted(range(self.layers), key=lambda i: -sensitivity[i])
        low, high, best, tried = 0, self.layers, None, {}
        while low < high:  # `low` layers keep enough, more than `high` do not
            count = high if not tried else (low + high + 1) // 2
            student = self._student(sorted(order[:count]), f"lookups in {count}")
            tried[count] = quality.kept(self.report[STUDENT], self.report["teacher"], self.answer.measure)
            if tried[count] >= self.keep:
                low, best = count, (student, copy.deepcopy(self.report[STUDENT]))
            else:
                high = count - 1
        self.report["keep"] = {"asked": self.keep, "tried": tried, "sensitivity": sensitivity, "order": order}
        if best is None:
            raise InputError(
                f"no layer can be converted at {self.keep} of the quality with {self.tokens:,} tokens (with one layer "
                f"{tried.get(1, float('nan')):.4f} is kept): give more minutes, or ask for less"
            )
        student, self.report[STUDENT] = best
        return student

    def _student(self, layers: list[int], name: str = STUDENT) -> Any:
        torch.manual_seed(self.seed)
        student = converted(self.teacher, self.shape, self.start, layers)
        self.report[STUDENT] = self._distilled(name, student) | {"converted": layers} | costs(student)
        return student

    def baselines(self) -> None:
        half, states = half_the_layers(self.teacher)
        found = {}
        self.models = {NO_FFN: without_ffns(self.teacher), HALF: half}
        for name, model in self.models.items():
            found[name] = self._distilled(name, model, states if name == HALF else None) | costs(model)
        if self.answer.kind == "vectors":
            embed, reason = static_model(self.teacher, self.tokenizer)
            if embed:
                found[STATIC] = self._once(STATIC, lambda: self.evaluation.of_vectors(embed))
            else:
                self.report["left_out"] = {STATIC: reason}
        self.report["baselines"] = found

    def write(self, student: Any) -> None:
        """The folder's contents, the report last; what was kept to go on from is removed."""
        if not self.state.is_main_process:
            return
        mark_converted(student)
        with writing(self.folder):
            whole = with_encoder(self.model, student)
            if whole is student:
                student.save_pretrained(self.folder)
                self.tokenizer.save_pretrained(self.folder)
            else:
                whole.save_pretrained(str(self.folder), create_model_card=False)
        packed = self.folder / "packed"
        pooling = self.pooling if self.answer.kind == "vectors" else None
        export(whole, packed, tables=self.tables, tokenizer=self.tokenizer, pooling=pooling)
        self.report[PACKED] = self._packed(packed) | {"bytes": (packed / "model.safetensors").stat().st_size}
        self.report["timing"] = times(self.teacher, packed, self.models)
        write_report(self.report, self.folder)
        shutil.rmtree(self.work)

    # ---- Parts of these ----------------------------------------------------------------------------------------------

    def _claim(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What an earlier call wrote to the folder; InputError where it was another conversion."""
        path = self.work / "settings.json"
        if not path.exists():
            make_folder(self.work)
            return {}
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in settings.items() if before.get(name) != json.loads(json.dumps(value))]:
            raise InputError(f"{self.folder} holds a conversion of other {', '.join(changed)}: choose another folder")
        return before

    def _fits(self, minutes: float, tokens: Tokens) -> int:
        """Tokens that one model is distilled on in so many minutes: by the time of some steps over that of a few,
        since what surrounds the steps takes seconds."""
        student, seconds = converted(self.teacher, self.shape, self.start), []
        for count in TIMED_TOKENS:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                distil(student, self.teacher, tokens, Distillation(folder, count), self.answer, title="timing")
                seconds.append(time.perf_counter() - start)
        few, some = seconds
        a_token = max(some - few, some / 3) / (TIMED_TOKENS[1] - TIMED_TOKENS[0])
        found = [max(STEP_TOKENS, int(minutes * 60 / a_token))]
        return broadcast_object_list(found)[0] if self.state.num_processes > 1 else found[0]

    def _distilled(self, name: str, student: Any, states: list[int] | None = None) -> dict[str, Any]:
        """Trains a model, or loads it where that was done, and measures it."""
        folder = self.work / name.replace(" ", "-")
        final = folder / "final.safetensors"
        make_folder(folder)
        if final.exists():
            load_model(student, str(final))
        else:
            start = time.perf_counter()
            with writing(folder):
                distil(
                    student,
                    self.teacher,
                    self.data,
                    Distillation(str(folder), self.tokens, seed=self.seed),
                    self.answer,
                    states=states,
                    title=name,
                )
            if self.state.is_main_process:
                minutes = (time.perf_counter() - start) / 60
                atomic_write(folder / "minutes.json", json.dumps({"minutes": minutes}))
                with atomic_replace(final) as temporary:
                    save_model(student, str(temporary))
            self.state.wait_for_everyone()
        trained = json.loads((folder / "minutes.json").read_text())
        return self._once(name, lambda: self.evaluation.of_model(student, states) | trained)

    def _once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured, from the file of it where there is one; by the first process for all."""
        path = self.work / f"{name.replace(' ', '-')}.json"
        if self.state.is_main_process and not path.exists():
            atomic_write(path, json.dumps(measure(), indent=1) + "\n")
        self.state.wait_for_everyone()
        return json.loads(path.read_text(encoding="utf-8"))

    def _sensitivity(self) -> list[float]:
        """For each layer, what is kept of the answer where it alone has no feed-forward layer; untrained."""
        found = []
        texts = self.held[: HELD_OUT[0]]
        evaluation = Evaluation(self.teacher, self.tokenizer, texts, self.answer, self.pooling, self.max_length)
        for i in range(self.layers):
            model = copy.deepcopy(self.teacher)
            slots_of(model)[i].replace(NoFFN())
            measured = evaluation.of_model(model)
            found.append(measured[self.answer.measure])
        return found

    def _packed(self, folder: Path) -> dict[str, Any]:
        session = Session(folder)
        if self.answer.kind != "vectors":
            return self.evaluation.of_answers(_Outputs(session))

        def embed(texts: Sequence[str]) -> np.ndarray:
            vectors = session.embed(texts)
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

        return self.evaluation.of_vectors(embed)

    def _coverage(self, pairs: Sequence[Pairs], labelled: Sequence[Labelled]) -> dict[str, Any]:
        found = {}
        for given in (*pairs, *labelled):
            texts: list[Text] = [*given.first, *given.second] if isinstance(given, Pairs) else list(given.texts)
            tokens = Tokens(self.tokenizer, texts, self.max_length)
            found[given.name] = coverage(self.data, tokens, self.teacher.config.vocab_size)
        return found


class _Outputs:
    """A session that answers as a model of transformers with a head does."""

    def __init__(self, session: Session):
        self.session = session

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        given = input_ids, attention_mask, token_type_ids
        if self.session.labels:
            return SimpleNamespace(logits=torch.from_numpy(self.session.pool(*given)))
        places = attention_mask.bool()
        found = self.session.logits(*given, places=places)
        logits = torch.zeros(*input_ids.shape, found.shape[1])
        logits[places] = torch.as_tensor(found)
        return SimpleNamespace(logits=logits)
