"""Fine-tuning of a pretrained encoder on labelled texts: classes, several labels a text, or a number; by the Trainer.

The same settings fit every feed-forward layer, so that a lookup model and its matched dense baseline are compared by
one recipe. Metrics are of all test texts (``metrics.py``), tasks of GLUE by name have its own (``glue.py``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from lookupffn import machine
from lookupffn.errors import InputError
from lookupffn.files import weight_fingerprints, writing
from lookupffn.hf.classifier import ffn_of, load_classifier, longest_text
from lookupffn.hf.loading import transformer_folder
from lookupffn.train import checkpoint
from lookupffn.train.config import FinetuneConfig
from lookupffn.train.data import in_words, load_tokenizer
from lookupffn.train.glue import TASKS, task_files
from lookupffn.train.labelled import LabelledTexts, read_labelled
from lookupffn.train.metrics import METRICS, SCORES, measured
from lookupffn.train.seeds import summarised
from lookupffn.train.trainer import (
    Checkpoints,
    GroupedTrainer,
    Progress,
    claim,
    micro_batch_of,
    save_final,
    training_arguments,
)

logger = logging.getLogger(__name__)

OWN_RATE, RATE = 3e-4, 5e-5  # of our own models, pretrained for hours, and of those pretrained for weeks


def finetune(config: FinetuneConfig) -> dict:
    """Trains a model from ``config.model`` on labelled texts and measures it on others; with ``seeds`` once for each.

    Goes on from the latest complete checkpoint in ``output_dir`` where there is one; a run that is finished is not
    repeated. Writes ``config.json``, ``checkpoint-N/``, and at the end ``model/`` (``save_pretrained``, with the
    tokenizer) and ``results.json`` there, and returns what is in the latter: the metrics of
    :func:`lookupffn.train.metrics.measured`, or those of the task, and all that is needed to repeat them. With
    ``patience`` the model is the best checkpoint by the mean of the task's metrics. With ``seeds`` each run is in
    ``output_dir/seed-N``, and what is written and returned is of :func:`lookupffn.train.seeds.summarised`.

    Raises:
        InputError: files, columns, classes or model do not fit, or ``output_dir`` holds a run with other settings or
            data; the message names them. Nothing is written then.
    """
    if runs := config.each_seed():
        return summarised(config, [_run(run) for run in runs])
    return _run(config)


def _run(config: FinetuneConfig) -> dict:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = micro_batch_of(config, ranks)
    folder = transformer_folder(config.model)
    tokenizer = load_tokenizer(folder)
    train, tests = _read(config)
    classes = _classes(config, train, tests)
    set_seed(config.seed)  # of the head, before it is initialised
    model = _model(config, folder, classes)
    if config.learning_rate is None:
        own = model.config.model_type == "lookup_roberta"
        config = dataclasses.replace(config, learning_rate=OWN_RATE if own else RATE)
    output_dir = Path(config.output_dir)
    data = _fingerprint(train, *tests.values())
    claim(output_dir, config, data_fingerprint=data)  # only now, when nothing can be refused any more
    if (output_dir / "results.json").exists():
        return json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    for file in (train, *tests.values()):
        if file.skipped:
            logger.warning("%s: %d texts are used; skipped: %s", file.path, len(file.texts), in_words(file.skipped))
    examples = {suffix: _examples(config, tokenizer, test, classes) for suffix, test in tests.items()}
    first = next(iter(examples.values()))
    trainer = _FinetuningTrainer(
        config=config,
        model=model,
        args=training_arguments(
            config,
            ranks,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=micro_batch,
            per_device_eval_batch_size=micro_batch,
            lr_scheduler_type="linear",
            warmup_steps=config.warmup_fraction,  # less than 1: a share
            logging_steps=50,
            **_evaluations(config),
        ),
        train_dataset=_examples(config, tokenizer, train, classes),
        eval_dataset=first,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: _metrics(config, p.predictions, p.label_ids),
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows it
    shown = {"score": "eval_score"} if config.patience else {}
    title = f"{ffn_of(model)} {config.task or config.problem_type.split('_')[-1]}"
    for callback in (Checkpoints(), Progress(title, **shown)):
        trainer.add_callback(callback)
    if config.patience:
        trainer.add_callback(EarlyStopping(config.patience))
    if trainer.is_world_process_zero():
        checkpoint.keep_latest(output_dir, keep=2)  # a damaged one would be written into, its marker still there
    trainer.accelerator.wait_for_everyone()
    latest = checkpoint.latest_complete(output_dir)
    start = time.perf_counter()
    if not (config.patience and without_gain(checkpoint.trainer_state(latest)) >= config.patience):  # stopped before
        with writing(output_dir):
            trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    seconds = time.perf_counter() - start
    state = checkpoint.trainer_state(checkpoint.latest_complete(output_dir)) if config.patience else {}
    if best := state.get("best_global_step"):
        load_model(model, output_dir / f"checkpoint-{best}" / "model.safetensors", device=str(model.device))
    metrics = {}
    for suffix, dataset in examples.items():
        found = trainer.evaluate(dataset)
        metrics |= {f"{name}{suffix}": found[f"eval_{name}"] for name in METRICS if f"eval_{name}" in found}
    results = {
        **{name: None if value != value else value for name, value in metrics.items()},
        "texts_tested": sum(len(test.texts) for test in tests.values()),
        "texts_trained": len(train.texts),
        "skipped": {"train": train.skipped} | {f"test{suffix}": test.skipped for suffix, test in tests.items()},
        "classes": classes,
        "training_seconds": seconds,
        "resumed_from": latest.name if latest else None,
        "best_step": best,
        "evaluations": [
            {name: line[f"{prefix}{name}"] for prefix, name in (("", "step"), ("", "epoch"), ("eval_", "score"))}
            for line in _evaluated(state)
        ],
        "ffn": ffn_of(model),
        **dataclasses.asdict(config),
        "files": {"train": train.path} | {f"test{suffix}": test.path for suffix, test in tests.items()},
        "data_fingerprint": data,
        "weights": weight_fingerprints(config.model),
        "revision": getattr(model.config, "_commit_hash", None),
        "command": machine.command(),
        "machine": machine.describe("tokenizers", "accelerate", "scikit-learn", "scipy")
        | {"device": str(model.device), "processes": ranks},
    }
    if trainer.is_world_process_zero():
        save_final(output_dir, model, tokenizer, results)
    return results


# ---- Evaluations, and when to stop -----------------------------------------------------------------------------------


def _metrics(config: FinetuneConfig, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What is measured, or of it what the task has, and ``score``, the mean of what decides."""
    found = measured(config.problem_type, logits, labels)
    names = TASKS[config.task].metrics if config.task else SCORES[config.problem_type]
    kept = {name: found[name] for name in names} if config.task else found
    return kept | {"score": float(np.mean([found[name] for name in names]))}


def _evaluations(config: FinetuneConfig) -> dict:
    """The Trainer's arguments for evaluations during training, each with a checkpoint."""
    if not config.patience:
        return {}
    when = "steps" if config.evaluate_every else "epoch"
    every = {"eval_steps": config.evaluate_every or 1, "save_steps": config.evaluate_every or 1}
    best = {"metric_for_best_model": "score", "greater_is_better": True}
    return {"eval_strategy": when, "save_strategy": when} | every | best


def _evaluated(state: dict) -> list[dict]:
    return [line for line in state.get("log_history", ()) if "eval_score" in line]


def without_gain(state: dict) -> int:
    """How many evaluations, by a Trainer's state, came after the best one, the first of equals; 0 before any."""
    scores = [line["eval_score"] for line in _evaluated(state)]
    return len(scores) - 1 - int(np.argmax(np.nan_to_num(scores, nan=-np.inf))) if scores else 0


class EarlyStopping(TrainerCallback):
    """Ends training after ``patience`` evaluations without a gain; counted in the history, which checkpoints keep."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":  # the last may be the best
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args, state, control, **kwargs):
        if without_gain({"log_history": state.log_history}) >= self.patience:
            control.should_training_stop = True


# ---- Order, labels, model --------------------------------------------------------------------------------------------


class _GroupedByLength(Sampler):
    """All examples, those of about one length in one batch; the order is a function of seed and epoch alone.

    The Trainer's own order, for which ``get_length_grouped_indices`` is, follows the global random state, so that a
    run which goes on in the middle of an epoch would see some texts twice and others not at all.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class _FinetuningTrainer(GroupedTrainer):
    def _get_train_sampler(self, train_dataset: list[dict] | None = None) -> Sampler:
        lengths = [len(example["input_ids"]) for example in train_dataset or self.train_dataset]
        return _GroupedByLength(lengths, self.config.batch_size, self.config.seed)


def _read(config: FinetuneConfig) -> tuple[LabelledTexts, dict[str, LabelledTexts]]:
    """What is trained on, and what is measured on by the suffix of its metrics."""
    train, tests = task_files(config.task, config.data) if config.task else (config.train, {"": config.test})
    columns = (config.text_column, config.label_column, config.problem_type)

    def read(path: str) -> LabelledTexts:
        return read_labelled(path, *columns, encoding=config.encoding, skip_bad=config.skip_bad)

    return read(train), {suffix: read(path) for suffix, path in tests.items()}


def _classes(config: FinetuneConfig, train: LabelledTexts, tests: dict[str, LabelledTexts]) -> list:
    """What is to be told apart, in the order of the model's outputs; of a regression nothing."""
    if config.problem_type == "regression":
        return []
    several = config.problem_type == "multi_label_classification"

    def names(labels: Sequence) -> set:
        return {name for label in labels for name in (label if several else [label])}

    known = names(train.labels)
    classes = sorted(known, key=lambda name: (isinstance(name, str), name))
    for test in tests.values():
        if unknown := sorted(names(test.labels) - known, key=str):
            raise InputError(
                f"{test.path}: classes {unknown[:5]} do not occur in {train.path}, which has {classes[:20]}"
            )
    if len(classes) < 2:
        raise InputError(f"{train.path}: column {config.label_column!r} holds one class only, {classes}")
    return classes


def _examples(config: FinetuneConfig, tokenizer, file: LabelledTexts, classes: list) -> list[dict]:
    """Token ids of each text, with its label as the model takes it."""
    columns = map(list, zip(*file.texts, strict=True))
    tokens = tokenizer(*columns, truncation=True, max_length=config.max_length)
    inputs = [name for name in ("input_ids", "token_type_ids") if name in tokens]  # the mask is of padding alone
    places = {name: i for i, name in enumerate(classes)}
    if config.problem_type == "single_label_classification":
        labels = [places[label] for label in file.labels]
    elif config.problem_type == "multi_label_classification":
        labels = [[float(name in label) for name in classes] for label in file.labels]
    else:
        labels = file.labels
    rows = zip(*(tokens[name] for name in inputs), labels, strict=True)
    return [dict(zip((*inputs, "labels"), row, strict=True)) for row in rows]


def _fingerprint(*files: LabelledTexts) -> str:
    """16 digits that other texts or labels under the same names would not have."""
    digest = blake2b(digest_size=8)
    for file in files:
        digest.update(json.dumps([file.texts, file.labels]).encode())
    return digest.hexdigest()


def _model(config: FinetuneConfig, folder: str, classes: list) -> PreTrainedModel:
    fields = {"problem_type": config.problem_type}
    if classes:
        fields["id2label"] = {i: str(c) for i, c in enumerate(classes)}
        fields["label2id"] = {str(c): i for i, c in enumerate(classes)}
    else:
        fields["num_labels"] = 1
    model = load_classifier(folder, config.pooling, **fields)
    if config.max_length > (longest := longest_text(model)):
        raise InputError(
            f"max_length {config.max_length} must be at most the model's max_position_embeddings, {longest}"
        )
    return model
