"""Fine-tuning of a pretrained encoder on labelled texts: classes, several labels a text, or a number; by the Trainer.

The same settings fit every feed-forward layer, so that a lookup model and its matched dense baseline are compared by
one recipe. Metrics are of all test texts (``metrics.py``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, PrinterCallback, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from lookupffn import machine
from lookupffn.errors import InputError
from lookupffn.files import writing
from lookupffn.hf import LookupRobertaForSequenceClassification
from lookupffn.train import checkpoint
from lookupffn.train.config import FinetuneConfig
from lookupffn.train.data import in_words, load_tokenizer
from lookupffn.train.labelled import LabelledTexts, read_labelled
from lookupffn.train.metrics import METRICS, measured
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


def finetune(config: FinetuneConfig) -> dict:
    """Trains a model from ``config.model`` on ``config.train`` and measures it on ``config.test``.

    Goes on from the latest complete checkpoint in ``output_dir`` where there is one. Writes ``config.json``,
    ``checkpoint-N/``, and at the end ``model/`` (``save_pretrained``, with the tokenizer) and ``results.json`` there,
    and returns what is in the latter: the metrics of :func:`lookupffn.train.metrics.measured`, and what gave them.

    Raises:
        InputError: files, columns, classes or model do not fit, or ``output_dir`` holds a run with other settings or
            data; the message names them. Nothing is written then.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = micro_batch_of(config, ranks)
    tokenizer = load_tokenizer(config.model)
    columns = (config.text_column, config.label_column, config.problem_type)
    train, test = (
        read_labelled(path, *columns, encoding=config.encoding, skip_bad=config.skip_bad)
        for path in (config.train, config.test)
    )
    classes = _classes(config, train, test)
    set_seed(config.seed)  # of the head, before it is initialised
    model = _model(config, classes)
    output_dir = Path(config.output_dir)
    claim(output_dir, config, data=_fingerprint(train, test))  # only now, when nothing can be refused any more
    for path, file in ((config.train, train), (config.test, test)):
        if file.skipped:
            logger.warning("%s: %d texts are used; skipped: %s", path, len(file.texts), in_words(file.skipped))
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
        ),
        train_dataset=_examples(config, tokenizer, train, classes),
        eval_dataset=_examples(config, tokenizer, test, classes),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: measured(config.problem_type, p.predictions, p.label_ids),
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows it
    for callback in (Checkpoints(), Progress(f"{model.config.ffn} {config.problem_type.split('_')[-1]}")):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        checkpoint.keep_latest(output_dir, keep=2)  # a damaged one would be written into, its marker still there
    trainer.accelerator.wait_for_everyone()
    latest = checkpoint.latest_complete(output_dir)
    start = time.perf_counter()
    with writing(output_dir):
        trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    seconds = time.perf_counter() - start
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    results = {
        **{name: None if value != value else value for name, value in metrics.items() if name in METRICS},
        "texts_tested": len(test.texts),
        "texts_trained": len(train.texts),
        "skipped": {"train": train.skipped, "test": test.skipped},
        "classes": classes,
        "training_seconds": seconds,
        "resumed_from": latest.name if latest else None,
        "ffn": model.config.ffn,
        **dataclasses.asdict(config),
        "machine": machine.describe() | {"device": str(model.device)},
    }
    if trainer.is_world_process_zero():
        save_final(output_dir, model, tokenizer, results)
    return results


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


def _classes(config: FinetuneConfig, train: LabelledTexts, test: LabelledTexts) -> list:
    """What is to be told apart, in the order of the model's outputs; of a regression nothing."""
    if config.problem_type == "regression":
        return []
    several = config.problem_type == "multi_label_classification"
    known, asked = (
        {name for label in file.labels for name in (label if several else [label])} for file in (train, test)
    )
    classes = sorted(known, key=lambda name: (isinstance(name, str), name))
    if unknown := sorted(asked - known, key=str):
        raise InputError(
            f"{config.test}: classes {unknown[:5]} do not occur in {config.train}, which has {classes[:20]}"
        )
    if len(classes) < 2:
        raise InputError(f"{config.train}: column {config.label_column!r} holds one class only, {classes}")
    return classes


def _examples(config: FinetuneConfig, tokenizer, file: LabelledTexts, classes: list) -> list[dict]:
    """Token ids of each text, with its label as the model takes it."""
    columns = map(list, zip(*file.texts, strict=True))
    ids = tokenizer(*columns, truncation=True, max_length=config.max_length)["input_ids"]
    places = {name: i for i, name in enumerate(classes)}
    if config.problem_type == "single_label_classification":
        labels = [places[label] for label in file.labels]
    elif config.problem_type == "multi_label_classification":
        labels = [[float(name in label) for name in classes] for label in file.labels]
    else:
        labels = file.labels
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def _fingerprint(*files: LabelledTexts) -> str:
    """16 digits that other texts or labels under the same names would not have."""
    digest = blake2b(digest_size=8)
    for file in files:
        digest.update(json.dumps([file.texts, file.labels]).encode())
    return digest.hexdigest()


def _model(config: FinetuneConfig, classes: list) -> LookupRobertaForSequenceClassification:
    fields = {"classifier_pooling": config.pooling, "problem_type": config.problem_type}
    if classes:
        fields["id2label"] = {i: str(c) for i, c in enumerate(classes)}
        fields["label2id"] = {str(c): i for i, c in enumerate(classes)}
    else:
        fields["num_labels"] = 1
    try:
        model = LookupRobertaForSequenceClassification.from_pretrained(config.model, use_safetensors=True, **fields)
    except (OSError, ValueError) as error:
        raise InputError(f"{config.model}: no model of lookupffn ({' '.join(str(error).split())[:200]})") from None
    if config.max_length > model.config.max_position_embeddings:
        raise InputError(
            f"max_length {config.max_length} must be at most the model's max_position_embeddings, "
            f"{model.config.max_position_embeddings}"
        )
    return model
