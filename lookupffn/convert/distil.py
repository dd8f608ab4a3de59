"""Distillation of a converted model from the one that it was: layer by layer from a closed form, then end to end."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookupffn.convert.slots import slots_of
from lookupffn.convert.start import Shape, collect, split, start
from lookupffn.convert.texts import Tokens

STEP_TOKENS = 2048
START_TOKENS = 40_000  # whose inputs and outputs the closed forms see
LEARNING_RATES = {"tables": 3e-3, "lookups": 1e-3, "model": 3e-4}
WARM_UP = 0.02  # of the steps
VECTOR_WEIGHT = 10.0  # of 1 - cosine, beside the mean of the layers' errors


@dataclass
class Progress:
    """What is said after some steps: tokens so far and in all, means of the losses since the last time."""

    tokens: int
    of: int
    loss: float
    cosine: float
    seconds: float


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Vectors ``(batch, width)`` of hidden states, by ``"mean"`` over the mask or ``"cls"``."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def converted(model: nn.Module, shape: Shape, tokens: Tokens, generator: np.random.Generator) -> nn.Module:
    """A copy of ``model`` whose feed-forward layers are lookups of this shape, each from its closed form."""
    student = copy.deepcopy(model).eval()
    batches, seen = [], 0
    for chosen in tokens.batches(STEP_TOKENS, generator):
        batches.append(tokens.batch(chosen))
        seen += int(batches[-1][1].sum())
        if seen >= START_TOKENS:
            break
    slots = slots_of(student)
    found = collect(student, slots, batches)
    for slot, (x, y) in zip(slots, found, strict=True):
        layer = shape.layer(x.shape[1])
        start(layer, x, y)
        slot.replace(layer)
    return student


def layer_losses(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> Tensor:
    """The mean over layers of the squared error of hidden states over their variance."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        s, t = s[mask], t[mask]
        losses.append((s - t).square().mean() / t.var())
    return torch.stack(losses).mean()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Tokens,
    *,
    budget: int,
    pooling: str,
    states: list[int] | None = None,
    seed: int = 0,
    say: Callable[[Progress], None] | None = None,
    every: int = 50,
) -> None:
    """Trains ``student`` in place on ``budget`` tokens: AdamW, the learning rate rising, then falling to 0.

    The loss is the mean over layers of ``|h - h_teacher|^2 / var(h_teacher)`` plus 10 times ``1 - cosine`` of the
    pooled vectors. ``states`` says which of the teacher's hidden states each layer is to match: by default its own.
    Embeddings are frozen.
    """
    frozen = {id(p) for p in embeddings_of(student).parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    groups = [
        {"params": [p for p in parameters if p.requires_grad], "lr": LEARNING_RATES[name]}
        for name, parameters in split(student).items()
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator, seen, step = np.random.default_rng(seed), 0, 0
    sums, began = np.zeros(3), time.perf_counter()
    while seen < budget:
        for chosen in tokens.batches(STEP_TOKENS, generator):
            share = seen / budget
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(share / WARM_UP + 0.02, 1.0) * (1 - share)
            ids, mask = tokens.batch(chosen)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            found = student(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            layers = layer_losses(found[1:], [wanted[i] for i in states or range(1, len(wanted))], mask.bool())
            cosine = F.cosine_similarity(*(pooled(h[-1], mask, pooling) for h in (found, wanted))).mean()
            loss = layers + VECTOR_WEIGHT * (1 - cosine)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 5.0)
            optimizer.step()
            seen += int(mask.sum())
            step += 1
            sums += (loss.item(), cosine.item(), 1)
            if say and step % every == 0:
                say(Progress(seen, budget, sums[0] / sums[2], sums[1] / sums[2], time.perf_counter() - began))
                sums[:] = 0
            if seen >= budget:
                break


def embeddings_of(model: Any) -> nn.Module:
    body = getattr(model, model.base_model_prefix, model)
    return body.embeddings
