"""The tasks of GLUE by name: their columns, what is predicted, their metrics, and where their files are.

Scores are measured on the validation files: labels of GLUE's test files are with its server alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lookupffn.errors import InputError

REPOSITORY = "nyu-mll/glue"


class Task(NamedTuple):
    """``files`` are those that are measured on: a suffix of metrics' names to the name of a split."""

    text_column: str
    metrics: tuple[str, ...] = ("accuracy",)
    problem_type: str = "single_label_classification"
    files: dict[str, str] = {"": "validation"}


TASKS = {
    "cola": Task("sentence", ("matthews_correlation",)),
    "sst2": Task("sentence"),
    "mrpc": Task("sentence1,sentence2", ("f1", "accuracy")),
    "stsb": Task("sentence1,sentence2", ("pearson", "spearman"), "regression"),
    "qqp": Task("question1,question2", ("f1", "accuracy")),
    "mnli": Task(
        "premise,hypothesis", files={"_matched": "validation_matched", "_mismatched": "validation_mismatched"}
    ),
    "qnli": Task("question,sentence"),
    "rte": Task("sentence1,sentence2"),
    "wnli": Task("sentence1,sentence2"),
}


def task_files(name: str, data: str | None) -> tuple[str, dict[str, str]]:
    """The file of a task to train on, and those to measure on by the suffix of their metrics.

    They are ``train.parquet`` and ``validation.parquet`` in the folder ``data``, or named as the hub has them
    (``train-00000-of-00001.parquet``); without a folder they are fetched from the hub.

    Raises:
        InputError: the folder lacks one, or the hub cannot be reached; the message says what to do.
    """
    find = _download if data is None else _find
    return find(name, data, "train"), {suffix: find(name, data, split) for suffix, split in TASKS[name].files.items()}


def _find(name: str, data: str, split: str) -> str:
    folder = Path(data)
    found = [path for path in (folder / f"{split}.parquet",) if path.is_file()]
    found = found or sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in folder.glob("*.parquet"))) or "no .parquet"
        raise InputError(f"data {data!r} must be a folder with one {split}.parquet for task {name}; it has {there}")
    return str(found[0])


def _download(name: str, data: None, split: str) -> str:
    from huggingface_hub import hf_hub_download

    file = f"{name}/{split}-00000-of-00001.parquet"
    try:
        return hf_hub_download(REPOSITORY, file, repo_type="dataset")
    except Exception as error:  # a dozen types, from the network to the cache
        raise InputError(
            f"task {name}: {file} cannot be fetched from {REPOSITORY} ({type(error).__name__}): give the folder of its "
            "train and validation .parquet as data"
        ) from None
