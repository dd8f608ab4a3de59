"""Time of a converted model in the runtime beside its teacher and its baselines there, and in other dense engines."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lookupffn.bench import dense_models
from lookupffn.bench.dense_models import Run, Source
from lookupffn.bench.models import RAGGED, Shape, build_dense, lengths_of, shape_name
from lookupffn.bench.timing import time_interleaved
from lookupffn.runtime.export import export
from lookupffn.runtime.session import Session

SHAPES: tuple[Shape, ...] = ((1, 32), RAGGED)  # one short text, and a batch
SECONDS = 0.3  # an engine and shape
ENGINES = ("ONNX Runtime", "OpenVINO")  # of those at hand; PyTorch's compile for minutes


def times(
    teacher: Any,
    packed: Path,
    baselines: Mapping[str, Any],
    threads: int = 1,
    shapes: Sequence[Shape] = SHAPES,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Microseconds a token of texts with random ids, median, by shape and model; from ids to hidden states.

    All of the runtime's models have int8 linears. What is not installed is left out and named.
    """
    runs: dict[str, Run] = {"lookups, packed": Session(packed, threads)}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in {"teacher": teacher, **baselines}.items():
            runs[name] = Session(export(model, folder / name.replace(" ", "-"), pooling="none"), threads)
        names = [e.name for e in dense_models.ENGINES if e.name.startswith(ENGINES)]
        source = Source(teacher, folder, threads, 0)
        runs |= {name: built.run for name, built in build_dense(names, source, left_out).items()}
        generator, found = np.random.default_rng(0), {}
        for shape in shapes:
            lengths = lengths_of(shape, generator)
            mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
            ids = generator.integers(0, teacher.config.vocab_size, mask.shape) * mask
            calls = {name: (lambda run=run, ids=ids, mask=mask: run(ids, mask)) for name, run in runs.items()}
            for call in calls.values():
                call()
            taken = time_interleaved(calls, seconds * len(calls))
            found[shape_name(shape)] = {name: t.median / int(lengths.sum()) * 1e6 for name, t in taken.items()}
    return {"threads": threads, "us_per_token": found, "left_out": left_out}
