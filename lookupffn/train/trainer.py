"""What pretraining and fine-tuning share: transformers' Trainer with our optimizer, checkpoints and final files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from lookupffn.branches import parameters_by_kind
from lookupffn.errors import InputError
from lookupffn.files import atomic_write, make_folder, writing
from lookupffn.train import checkpoint
from lookupffn.train.config import FOLDERS, FinetuneConfig, PretrainConfig
from lookupffn.train.data import progress_bar


def parameter_groups(model: nn.Module, config: PretrainConfig | FinetuneConfig) -> list[dict]:
    """Groups for the optimizer: matrices (decayed), norms and biases (not), tables (not, own learning rate).

    The lookups of a converted model have a learning rate of their own too, which its tables' rate is a multiple of.
    """
    kinds = parameters_by_kind(model)
    rates = {"model": config.learning_rate, "lookups": config.learning_rate}
    if kinds["lookups"]:  # which no model that is pretrained here has
        rates["lookups"] *= config.lookup_learning_rate_multiplier
    groups = []
    for name, rate in rates.items():
        matrices = [p for p in kinds[name] if p.dim() >= 2]
        vectors = [p for p in kinds[name] if p.dim() < 2]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "lr": rate, "tables": False})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr": rate, "tables": False})
    rate = rates["lookups"] * config.table_learning_rate_multiplier
    groups.append({"params": kinds["tables"], "weight_decay": 0.0, "lr": rate, "tables": True})
    return [group for group in groups if group["params"]]


class GroupedTrainer(Trainer):
    """A Trainer whose AdamW has the groups of :func:`parameter_groups`, by the settings of ``config``."""

    def __init__(self, *, config: PretrainConfig | FinetuneConfig, **kwargs):
        self.config = config
        super().__init__(**kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        c = self.config
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model if model is None else model, c),
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            fused=True,
        )
        return self.optimizer


def micro_batch_of(config: PretrainConfig | FinetuneConfig, ranks: int, accumulation: int = 1) -> int:
    """Sequences that one process takes at once. Raises InputError where ``batch_size`` cannot be shared out evenly."""
    if config.batch_size % (ranks * accumulation):
        raise InputError(
            f"batch_size {config.batch_size} must be a multiple of processes x accumulation = {ranks} x {accumulation}"
        )
    return config.batch_size // (ranks * accumulation)


def training_arguments(config: PretrainConfig | FinetuneConfig, ranks: int, **settings) -> TrainingArguments:
    """The Trainer's arguments that both kinds of training share, with ``settings`` beside or over them."""
    shared = {
        "output_dir": config.output_dir,
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 1,
        "seed": config.seed,
        "bf16": config.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": "gloo" if ranks > 1 and not torch.cuda.is_available() else None,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**shared | settings)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs take torchrun; DataParallel would multiply the batch
    return arguments


class Checkpoints(TrainerCallback):
    """Makes the Trainer's checkpoints count only when whole, and removes old ones only after that."""

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank has written its random state
        if state.is_world_process_zero:
            output_dir = Path(args.output_dir)
            checkpoint.mark_complete(output_dir / f"checkpoint-{state.global_step}")
            checkpoint.keep_latest(output_dir, keep=2)


class Progress(TrainerCallback):
    """One progress bar: steps, the latest training loss, and each of ``shown``, a label for a metric's name."""

    def __init__(self, title: str, **shown: str):
        self.title, self.metrics, self.values = title, {"train": "loss"} | shown, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values |= {label: f"{logs[key]:.3f}" for label, key in self.metrics.items() if key in logs}
        if hasattr(self, "bar"):
            self.bar.set_postfix(self.values, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def claim(output_dir: Path, config: PretrainConfig | FinetuneConfig, **data) -> None:
    """Writes the settings to ``output_dir``, with what tells the ``data`` from others under the same name.

    Raises:
        InputError: a run with other settings or data lies there.
    """
    make_folder(output_dir)
    path, fields = output_dir / "config.json", dataclasses.asdict(config) | data
    for name in FOLDERS:
        fields.pop(name, None)
    if not path.exists():
        atomic_write(path, json.dumps(fields, indent=1) + "\n")
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    changed = config.changes(written)
    changed += [f"{k}: {written.get(k)!r} there, {v!r} asked" for k, v in data.items() if written.get(k) != v]
    if changed:
        raise InputError(f"{output_dir} holds a run with other settings ({'; '.join(changed)}): choose another folder")


def save_final(output_dir: Path, model: PreTrainedModel, tokenizer, results: dict) -> None:
    """``model/`` with the tokenizer, then ``results.json``, each whole or as it was before."""
    folder, temporary = output_dir / "model", output_dir / ".model"
    with writing(output_dir):
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        checkpoint.mark_complete(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        atomic_write(output_dir / "results.json", json.dumps(results, indent=1) + "\n")
