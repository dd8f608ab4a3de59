"""Runs of one recipe with several seeds: the mean and the standard deviation of what each measured."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

from lookupffn.files import atomic_write
from lookupffn.train.config import FinetuneConfig
from lookupffn.train.metrics import METRICS

ALIKE = (  # in all runs: what is needed to repeat them, beside the seeds
    "ffn", "classes", "texts_trained", "texts_tested", "skipped", "learning_rate", "files", "data_fingerprint",
    "weights", "revision", "machine",
)  # fmt: skip


def summarised(config: FinetuneConfig, runs: list[dict]) -> dict:
    """``mean``, ``standard_deviation`` (of a sample) and ``runs`` by metric, and what is needed to repeat them.

    Written to ``output_dir/results.json``. A metric that is not defined in some run has no mean.
    """
    found = {name: [run[name] for run in runs] for name in METRICS if name in runs[0]}
    whole = {name: values for name, values in found.items() if None not in values}
    results = {
        "mean": {name: statistics.fmean(values) for name, values in whole.items()},
        "standard_deviation": {
            name: statistics.stdev(values) if len(values) > 1 else None for name, values in whole.items()
        },
        "runs": [
            {name: run[name] for name in ("seed", *found, "best_step", "training_seconds", "output_dir", "command")}
            for run in runs
        ],
        "settings": {name: runs[0][name] for name in vars(config) if name not in ("seed", "seeds", "output_dir")},
        "seeds": config.seeds,
        **{name: runs[0][name] for name in ALIKE},
    }
    if not int(os.environ.get("RANK", "0")):
        atomic_write(Path(config.output_dir) / "results.json", json.dumps(results, indent=1) + "\n")
    return results
