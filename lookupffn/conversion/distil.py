"""Distillation of a student from its teacher, end to end, on transformers' Trainer.

Checkpoints, resume to the same bits and several processes (torchrun) are the Trainer's. What differs from a plain run:
batches hold texts of nearly one length and about as many tokens each; the order is a function of the seed alone; there
is no dropout, since the teacher's answers are no labels to overfit.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer

from lookupffn.branches import parameters_by_kind
from lookupffn.conversion.answers import Answer, masked
from lookupffn.conversion.texts import Tokens
from lookupffn.errors import InputError
from lookupffn.train import checkpoint
from lookupffn.train.trainer import Checkpoints, Progress, training_arguments

STEP_TOKENS = 512
LOGS = 100  # of a run


@dataclass(frozen=True)
class Distillation:
    """Settings of a run; the learning rates are those at their peak, after 2 % of the steps, then linear to 0."""

    output_dir: str
    tokens: int
    seed: int = 0
    step_tokens: int = STEP_TOKENS
    table_learning_rate: float = 3e-3
    learning_rate: float = 1e-3  # of the rest of the lookups
    model_learning_rate: float = 3e-4
    max_grad_norm: float = 5.0
    save_every: int = 500
    bf16: bool = False


class _Batches(Dataset):
    """``count`` batches, epoch after epoch in other orders; an item is a whole batch."""

    def __init__(self, tokens: Tokens, budget: int, step_tokens: int, seed: int, mask_token: int | None):
        self.tokens, self.seed, self.mask_token = tokens, seed, mask_token
        self.chosen: list[np.ndarray] = []
        seen = epoch = 0
        while seen < budget:
            for texts in tokens.batches(step_tokens, np.random.default_rng((seed, epoch))):
                self.chosen.append(texts)
                seen += int(tokens.lengths[texts].sum())
                if seen >= budget:
                    break
            epoch += 1

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        found = self.tokens.batch(self.chosen[i])
        if self.mask_token is not None:
            found["input_ids"] = masked(found, self.mask_token, (self.seed << 32) + i)
        return found


def layer_errors(student: Any, teacher: Any, mask: Tensor) -> list[Tensor]:
    """Of each layer, the squared error of hidden states ``(batch, length, width)`` over their variance."""
    at = mask.bool()
    return [(s[at] - t[at]).square().mean() / t[at].var() for s, t in zip(student, teacher, strict=True)]


class _Distiller(Trainer):
    def __init__(
        self, config: Distillation, teacher: nn.Module, answer: Answer, states: list[int] | None, **given: Any
    ):
        self.config, self.teacher, self.answer, self.states = config, teacher, answer, states
        self.kept: list[float] = []
        super().__init__(**given)
        self.teacher = teacher.to(self.args.device).eval()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        c = self.config
        rates = {"tables": c.table_learning_rate, "lookups": c.learning_rate, "model": c.model_learning_rate}
        groups = [
            {"params": [p for p in parameters if p.requires_grad], "lr": rates[name]}
            for name, parameters in parameters_by_kind(self.model if model is None else model).items()
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model.eval()  # no dropout; the Trainer turned it on
        with torch.no_grad():
            wanted = self.teacher(**inputs, output_hidden_states=True)
        found, mask = model(**inputs, output_hidden_states=True), inputs["attention_mask"]
        states = self.states or range(1, len(wanted.hidden_states))
        errors = layer_errors(found.hidden_states[1:], [wanted.hidden_states[i] for i in states], mask)
        loss = torch.stack(errors).mean() + self.answer.weight * self.answer.loss(found, wanted, mask)
        with torch.no_grad():
            self.kept.append(float(self.answer.kept(found, wanted, mask)))
        return (loss, found) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.kept:
            logs["kept"] = float(np.mean(self.kept))
            self.kept.clear()
        super().log(logs, *args, **kwargs)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Tokens,
    config: Distillation,
    answer: Answer,
    *,
    states: list[int] | None = None,
    title: str = "distillation",
) -> list[dict[str, float]]:
    """Trains ``student`` in place; returns what was logged. Goes on from the latest complete checkpoint there is.

    The loss is the mean over layers of ``|h - h_teacher|^2 / var(h_teacher)`` plus that of the :class:`Answer`.
    ``states`` says which of the teacher's hidden states each layer is to match: by default its own. Embeddings, and a
    head without which the answer comes, are frozen. Several processes share each step's tokens (torchrun).
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    frozen = {id(p) for p in embeddings_of(student).parameters()}
    if answer.kind == "vectors" and getattr(student, "pooler", None) is not None:
        frozen |= {id(p) for p in student.pooler.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    mask_token = tokens.mask_token if answer.kind == "tokens" else None
    if answer.kind == "tokens" and mask_token is None:
        raise InputError("a masked LM is matched on masked tokens, and its tokenizer has no mask token")
    batches = _Batches(tokens, config.tokens, max(1, config.step_tokens // ranks), config.seed, mask_token)
    steps = max(1, len(batches) // ranks)
    trainer = _Distiller(
        config,
        teacher,
        answer,
        states,
        model=student,
        args=training_arguments(
            config,
            ranks,
            max_steps=steps,
            per_device_train_batch_size=1,  # of whole batches
            train_sampling_strategy="sequential",
            lr_scheduler_type="linear",
            warmup_steps=0.02,  # a share
            logging_steps=max(1, steps // LOGS),
            remove_unused_columns=False,
        ),
        train_dataset=batches,
        data_collator=lambda items: items[0],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows it
    for callback in (Checkpoints(), Progress(title, kept="kept")):
        trainer.add_callback(callback)
    folder = Path(config.output_dir)
    if trainer.is_world_process_zero():
        checkpoint.keep_latest(folder, keep=2)
    trainer.accelerator.wait_for_everyone()
    latest = checkpoint.latest_complete(folder)
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in checkpoint.checkpoints(folder):
            shutil.rmtree(path)
    student.to("cpu").eval()
    teacher.to("cpu")
    return [line for line in trainer.state.log_history if "loss" in line]


def embeddings_of(model: Any) -> nn.Module:
    body = getattr(model, model.base_model_prefix, model)
    return body.embeddings
