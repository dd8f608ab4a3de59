"""Masked-LM pretraining on transformers' Trainer: one process, torchrun on several, CPU or CUDA, by the same call.

Differs from a plain Trainer run in four things: data order and masks are a function of (seed, index), so they do not
depend on batch size, ranks or restarts; tables have their own learning rate; evaluation is one fixed set with fixed
masks, its result a mean over masked tokens; and a checkpoint counts only when it is whole (``checkpoint.py``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, default_data_collator, set_seed
from transformers.integrations import TensorBoardCallback

from lookupffn import machine
from lookupffn.diagnostics import HashMonitor
from lookupffn.files import atomic_write, writing
from lookupffn.hf import LookupRobertaForCausalLM, LookupRobertaForMaskedLM
from lookupffn.train import checkpoint
from lookupffn.train.config import PretrainConfig
from lookupffn.train.data import EMBEDDED, PretrainingData, in_words
from lookupffn.train.masking import CausalBlocks, MaskedBlocks, unigram_entropy
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


@torch.no_grad()
def evaluate(model: nn.Module, dataset: MaskedBlocks, batch_size: int = 32, rank: int = 0, ranks: int = 1) -> Tensor:
    """Sums over the masked tokens of every ``ranks``-th block of ``dataset``: float64 ``(3,)`` on the model's device.

    Number of tokens, sum of their negative log-likelihoods in nats, and sum of its squares; :func:`log_perplexity`
    turns the total of all ranks into a result, which does not depend on ``batch_size`` or ``ranks`` but for rounding.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    indices = range(rank, len(dataset), ranks)
    for start in range(0, len(indices), batch_size):
        items = [dataset[i] for i in indices[start : start + batch_size]]
        batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
        logits = model(**batch).logits.float()
        labels = model.targets(batch["labels"])
        if logits.dim() == 3:
            logits = logits[labels != -100]
        sums += loss_sums(logits, labels[labels != -100])
    model.train(was_training)
    return sums


def loss_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits ``(tokens, vocab_size)``: the number of tokens, the sum of their losses in nats, and of its squares."""
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    return torch.stack([torch.tensor(len(losses), device=losses.device), losses.sum(), losses.square().sum()])


def log_perplexity(sums: Tensor) -> dict[str, float | int]:
    """Mean negative log-likelihood of masked tokens in nats, its standard error over tokens, and their number."""
    tokens, total, squares = sums.tolist()
    mean = total / tokens
    variance = max(squares / tokens - mean**2, 0.0)
    return {
        "log_perplexity": mean,
        "log_perplexity_standard_error": (variance / tokens) ** 0.5,
        "tokens_evaluated": int(tokens),
    }


def build_model(config: PretrainConfig, tokenizer) -> LookupRobertaForMaskedLM:
    """The model before its first step: each module initialised from a seed made of ``config.seed`` and its name.

    So a model and its matched dense baseline start from the same embeddings, attention and head, to the bit.
    """
    kind = LookupRobertaForCausalLM if config.objective == "causal" else LookupRobertaForMaskedLM
    model = kind(config.model_config(tokenizer))
    for name, module in reversed(list(model.named_modules())):  # children first: a lookup layer draws its projection
        digest = hashlib.blake2b(f"{config.seed} {name}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "big"))
        model._init_weights(module)
    return model


def datasets(config: PretrainConfig, data: PretrainingData) -> tuple[MaskedBlocks, MaskedBlocks]:
    """What a run trains on, in its order, and the fixed set that it is evaluated on."""
    masks = {"tokenizer": data.tokenizer, "mask_probability": config.mask_probability}
    blocks = CausalBlocks if config.objective == "causal" else MaskedBlocks
    train = blocks(data.train, seed=config.seed, length=config.steps * config.batch_size, shuffle=True, **masks)
    # Seed 0 whatever config.seed is: the evaluation is the same for all runs on the same data.
    every = max(1, len(data.validation) // (config.evaluation_sequences or len(data.validation)))
    return train, blocks(data.validation[::every][: config.evaluation_sequences or None], seed=0, **masks)


class _PretrainingTrainer(GroupedTrainer):
    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Linear warm-up for all; then linear to 0, but for tables where ``table_schedule`` is constant."""
        optimizer = self.optimizer if optimizer is None else optimizer
        warmup = self.config.warmup_steps

        def linear(step: int) -> float:
            left = (num_training_steps - step) / max(1, num_training_steps - warmup)
            return step / warmup if step < warmup else max(0.0, left)

        def constant(step: int) -> float:
            return min(1.0, step / max(1, warmup))

        tables = constant if self.config.table_schedule == "constant" else linear
        schedules = [tables if group["tables"] else linear for group in optimizer.param_groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.accelerator.autocast():
            sums = evaluate(
                self.accelerator.unwrap_model(self.model),
                self.eval_dataset,
                self.config.batch_size,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )
        metrics = {f"eval_{k}": v for k, v in log_perplexity(self.accelerator.reduce(sums, "sum")).items()}
        self.log(dict(metrics))  # a copy: the Trainer adds to it
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def read_metrics(path: Path) -> list[dict]:
    """The lines of a ``metrics.jsonl``, without what a kill has torn off the last one."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class _Metrics(TrainerCallback):
    """Appends every log of the Trainer to ``metrics.jsonl``, with tokens and seconds so far and the use of buckets."""

    def __init__(self, config: PretrainConfig, monitor: HashMonitor):
        self.config, self.monitor = config, monitor
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:  # lines after the checkpoint that this run starts from are written again
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.start = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)

    def seconds(self) -> float:
        """Seconds that this run has trained for, those before its checkpoint included."""
        return time.perf_counter() - self.start

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        tokens = state.global_step * self.config.batch_size * self.config.sequence_length
        line = {"step": state.global_step, "tokens": tokens, "seconds": self.seconds(), **logs}
        if "loss" in logs:
            line["buckets"] = self.monitor.summary()
            self.monitor.reset()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_evaluate(self, args, state, control, **kwargs):
        self.monitor.reset()  # what it has just seen was not training


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """A finished run: the model, what was measured, and the data it saw."""

    model: LookupRobertaForMaskedLM
    data: PretrainingData
    validation: MaskedBlocks
    metrics: dict  # written to results.json
    output_dir: Path
    curve: list[dict]  # {"step", "tokens", "log_perplexity"} of every evaluation


def pretrain(config: PretrainConfig, data: PretrainingData | None = None) -> PretrainResult:
    """Trains one model by ``config``, from its latest complete checkpoint where there is one.

    Writes to ``output_dir``: ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoint-N/``, and at the end
    ``model/`` (``save_pretrained``, with the tokenizer) and ``results.json``.

    Raises:
        InputError: settings and data do not fit, or ``output_dir`` holds a run with other settings or data.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = micro_batch_of(config, ranks, config.accumulation)
    output_dir = Path(config.output_dir)
    data = data or config.load_data()
    train, validation = datasets(config, data)
    model = build_model(config, data.tokenizer)
    claim(
        output_dir, config, tokens=data.summary["tokens"]
    )  # only now, when nothing of the input can be refused any more
    set_seed(config.seed)  # of dropout
    trainer = _PretrainingTrainer(
        config=config,
        model=model,
        args=training_arguments(
            config,
            ranks,
            max_steps=config.steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=config.accumulation,
            train_sampling_strategy="sequential",  # MaskedBlocks shuffles
            eval_strategy="steps",
            eval_steps=config.evaluate_every,
            logging_steps=config.log_every,
        ),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,  # blocks are of one length: nothing to pad
    )
    with HashMonitor(model) as monitor:
        trainer.remove_callback(PrinterCallback)  # the progress bar shows it, metrics.jsonl keeps it
        tensorboard = TensorBoardCallback()
        tensorboard.logging_dir = str(output_dir / "tensorboard")
        written = _Metrics(config, monitor)
        for callback in (Checkpoints(), written, Progress(config.ffn, validation="eval_log_perplexity"), tensorboard):
            trainer.add_callback(callback)
        if trainer.is_world_process_zero():
            checkpoint.keep_latest(output_dir, keep=2)  # a damaged one would be written into, its marker still there
            _say_what_was_skipped(data.summary)
        trainer.accelerator.wait_for_everyone()
        latest = checkpoint.latest_complete(output_dir)
        with writing(output_dir):
            trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        seconds = written.seconds()
    evaluations = [entry for entry in trainer.state.log_history if "eval_log_perplexity" in entry]
    if not evaluations or evaluations[-1]["step"] != config.steps:  # or the last step has evaluated already
        evaluations = [trainer.evaluate()]
    metrics = {
        **{name.removeprefix("eval_"): evaluations[-1][name] for name in evaluations[-1] if name.startswith("eval_")},
        "steps": config.steps,
        "tokens_trained": config.steps * config.batch_size * config.sequence_length,
        "training_seconds": seconds,
        "resumed_from": latest.name if latest else None,
        "ffn": config.ffn,
        "seed": config.seed,
        "unigram_entropy": unigram_entropy(validation),
        "ffn_macs_per_token": model.encoder.layers[0].ffn.flops(1) // 2,
        "model_macs_per_token": model.encoder.flops(1, config.sequence_length) // 2,
        "dtype": "bfloat16" if config.bf16 else "float32",
        "machine": machine.describe() | {"device": str(model.device), "processes": ranks},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": data.summary,
    }
    if trainer.is_world_process_zero():
        model.config.sparse_prediction = False  # whoever loads it expects logits of every token
        save_final(output_dir, model, data.tokenizer, metrics)
        model.config.sparse_prediction = True
    trainer.accelerator.wait_for_everyone()
    return PretrainResult(model, data, validation, metrics, output_dir, curve(output_dir))


def _say_what_was_skipped(summary: dict) -> None:
    """Once a run; ``results.json`` has the same. Of the embedded text nothing is the user's, and nothing is said."""
    if summary["skipped"] and not summary["source"].startswith(EMBEDDED):
        documents, examples = sum(summary["documents"].values()), "; ".join(summary["skipped_examples"])
        skipped = in_words(summary["skipped"])
        logger.warning(
            "%s: %s documents are used; skipped: %s (%s)", summary["source"], f"{documents:,}", skipped, examples
        )


def curve(output_dir: Path) -> list[dict]:
    """``{"step", "tokens", "log_perplexity"}`` of every evaluation in the ``metrics.jsonl`` of a run, once a step."""
    points = {
        line["step"]: {k: line[k] for k in ("step", "tokens")} | {"log_perplexity": line["eval_log_perplexity"]}
        for line in read_metrics(output_dir / "metrics.jsonl")
        if "eval_log_perplexity" in line
    }
    return list(points.values())
