"""Fine-tuning of a pretrained encoder as a classifier, on transformers' Trainer.

The same settings fit every feed-forward layer, so that a lookup model and its matched dense baseline are
compared by one recipe; accuracy is of all test texts.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from transformers import DataCollatorWithPadding, PrinterCallback, TrainingArguments, set_seed

from lookupffn import machine
from lookupffn.errors import InputError
from lookupffn.files import atomic_write
from lookupffn.hf import LookupRobertaForSequenceClassification
from lookupffn.train.checkpoint import mark_complete
from lookupffn.train.config import FinetuneConfig
from lookupffn.train.data import load_tokenizer
from lookupffn.train.pretrain import GroupedTrainer, Progress

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}


def finetune(config: FinetuneConfig) -> dict:
    """Trains a classifier from ``config.model`` on ``config.train`` and measures it on ``config.test``.

    Writes ``model/`` (``save_pretrained``, with the tokenizer) and ``results.json`` to ``output_dir`` and returns what
    is in the latter: ``accuracy`` in [0, 1], its standard error over texts, and what gave it.

    Raises:
        InputError: files, columns, classes or model do not fit; the message names them. Nothing is written then.
    """
    tokenizer = load_tokenizer(config.model)
    columns = [column.strip() for column in config.text_column.split(",")]
    train, test = (_read(path, columns, config.label_column) for path in (config.train, config.test))
    classes = sorted(set(train["label"]))
    if unknown := sorted(set(test["label"]) - set(classes)):
        raise InputError(
            f"{config.test}: classes {unknown[:5]} do not occur in {config.train}, which has {classes[:20]}"
        )
    if len(classes) < 2:
        raise InputError(f"{config.train}: column {config.label_column!r} holds one class only, {classes}")

    set_seed(config.seed)  # of the head, before it is initialised
    model = _classifier(config, classes)

    def encode(rows):
        encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=config.max_length)
        return {"input_ids": encoded["input_ids"], "labels": [classes.index(label) for label in rows["label"]]}

    train, test = (d.map(encode, batched=True, remove_columns=d.column_names) for d in (train, test))
    trainer = GroupedTrainer(
        config=config,
        model=model,
        args=_arguments(config),
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows it
    trainer.add_callback(Progress(f"{model.config.ffn} classifier"))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    accuracy = trainer.evaluate()["eval_accuracy"]
    results = {
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / len(test)) ** 0.5,
        "texts_tested": len(test),
        "texts_trained": len(train),
        "classes": classes,
        "training_seconds": seconds,
        "ffn": model.config.ffn,
        **dataclasses.asdict(config),
        "machine": machine.describe() | {"device": str(model.device)},
    }
    if trainer.is_world_process_zero():
        _save(Path(config.output_dir), model, tokenizer, results)
    return results


def _read(path: str, columns: list[str], label_column: str):
    """The rows of a file that have a label, as a ``datasets.Dataset`` with the text columns and ``label``."""
    import datasets

    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None or not Path(path).is_file():
        raise InputError(f"{path}: give an existing file that ends in {', '.join(FORMATS)}")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(kind, data_files=path, split="train")
    except Exception as error:  # whatever a foreign file brings
        raise InputError(f"{path}: cannot be read as {kind} ({' '.join(str(error).split())[:200]})") from None
    if missing := [column for column in (*columns, label_column) if column not in rows.column_names]:
        raise InputError(f"{path}: no column {', '.join(missing)}; there are {', '.join(rows.column_names)}")
    rows = rows.select_columns([*columns, label_column])
    rows = rows if label_column == "label" else rows.rename_column(label_column, "label")
    kinds = {type(label) for label in rows["label"]}
    if not kinds or (not kinds <= {int, bool} and not kinds <= {str}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no row"
        raise InputError(f"{path}: column {label_column!r} must hold whole numbers or words only, not {found}")
    return rows


def _classifier(config: FinetuneConfig, classes: list) -> LookupRobertaForSequenceClassification:
    fields = {
        "classifier_pooling": config.pooling,
        "id2label": {i: str(c) for i, c in enumerate(classes)},
        "label2id": {str(c): i for i, c in enumerate(classes)},
    }
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


def _arguments(config: FinetuneConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        train_sampling_strategy="group_by_length",  # less padding
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_fraction,  # less than 1: a share
        max_grad_norm=config.max_grad_norm,
        logging_steps=50,
        save_strategy="no",
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )


def _save(output_dir: Path, model, tokenizer, results: dict) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    folder, temporary = output_dir / "model", output_dir / ".model"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    mark_complete(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    atomic_write(output_dir / "results.json", json.dumps(results, indent=1) + "\n")
