"""The demo: a dense and a lookup twin trained on Python's own standard library, compared in one report."""

from __future__ import annotations

import dataclasses
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lookupffn import machine, native
from lookupffn.bench.timing import time_interleaved
from lookupffn.diagnostics import HashMonitor
from lookupffn.errors import InputError
from lookupffn.hf import LookupRobertaForMaskedLM, LookupRobertaModel
from lookupffn.lab.report import verdict, write_report
from lookupffn.runtime.packed import PackedLookupFFN, pack
from lookupffn.train.config import PretrainConfig
from lookupffn.train.data import PretrainingData
from lookupffn.train.masking import MaskedBlocks, unigram_entropy
from lookupffn.train.pretrain import PretrainResult, evaluate, log_perplexity, parameter_groups, pretrain

TWINS = ("dense", "lookup")
TIMED_TOKENS = (1, 512)
CALIBRATION_SECONDS = 8.0  # a twin; a shorter look at a noisy machine misjudged a run by 15 %
TRAINER_OVERHEAD = 1.13  # a step with the Trainer's own work and its share of the evaluations, against a bare step
EVALUATIONS = 8
SECONDS_A_TIMING = 3.0

# Small vocabulary and short blocks: a masked LM must leave the plateau of unigram guessing within a few minutes.
RECIPE = PretrainConfig(
    preset="small",
    data="stdlib",
    sequence_length=64,
    batch_size=32,
    learning_rate=3e-3,
    validation_fraction=0.05,
    mask_probability=0.3,
    evaluation_sequences=512,
    save_every=0,
)

SENTENCES = (
    "    def __init__(<mask>, name):\n        self.name = name\n",
    "        if value is not <mask>:\n            return value\n",
    "    for key, value <mask> self.items():\n        print(key, value)\n",
    "        raise <mask>Error('expected a string')\n",
    "        <mask> isinstance(value, str):\n            return True\n",
    "from os <mask> path\n",
)


def demo(output_dir: str | Path, *, minutes: float, steps: int | None, seed: int) -> Path:
    """Trains both twins for about ``minutes`` in all (or ``steps`` each), measures them, writes ``report.html``.

    The twins differ in nothing but the FFN: same seed, batches, masks, steps. Returns the report's path.
    """
    output_dir, console = Path(output_dir), Console()
    start = time.perf_counter()
    console.print("[bold]1/4[/] preparing the text of Python's standard library")
    data = RECIPE.load_data()
    if steps is None:
        console.print("[bold]2/4[/] timing a few training steps of both models")
        a_step = TRAINER_OVERHEAD * sum(_seconds_a_step(ffn, data) for ffn in TWINS)
        steps = max(40, int(minutes * 60 / a_step))
    every = max(1, steps // (5 * EVALUATIONS))
    console.print(f"[bold]3/4[/] training dense and lookup, {steps:,} steps each; log perplexity in nats")
    results: dict[str, PretrainResult] = {}
    for ffn in TWINS:
        folder = output_dir / ffn
        if folder.exists() and not (folder / "config.json").exists():
            raise InputError(f"{folder} is there and holds no run of lookupffn: choose another --output-dir")
        shutil.rmtree(folder, ignore_errors=True)
        config = dataclasses.replace(
            RECIPE,
            output_dir=str(folder),
            ffn=ffn,
            seed=seed,
            steps=steps,
            warmup_steps=min(RECIPE.warmup_steps, steps // 10),
            log_every=every,
            evaluate_every=5 * every,
        )
        results[ffn] = pretrain(config, data)
    console.print("[bold]4/4[/] measuring speed and writing the report")
    report = _report(results, data, config, seed)
    path = write_report(report, output_dir)
    _print(console, report)
    console.print(f"\n{time.perf_counter() - start:.0f} s in all. Open [bold]{path}[/]", soft_wrap=True)
    return path


def _seconds_a_step(ffn: str, data: PretrainingData) -> float:
    """Seconds that one training step of this twin takes here: the mean of a few seconds after two to warm up."""
    config = dataclasses.replace(RECIPE, ffn=ffn)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as the Trainer chooses
    model = LookupRobertaForMaskedLM(config.model_config(data.tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    blocks = MaskedBlocks(data.train, data.tokenizer, seed=0, shuffle=True)
    seconds = []
    end = time.perf_counter() + CALIBRATION_SECONDS
    while (start := time.perf_counter()) < end or len(seconds) < 4:
        step = len(seconds)
        items = [blocks[(step * config.batch_size + i) % len(blocks)] for i in range(config.batch_size)]
        model(**{name: torch.stack([i[name] for i in items]).to(device) for name in items[0]}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()  # waits for the device
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return sum(seconds[2:]) / len(seconds[2:])


@torch.no_grad()
def _report(results: dict[str, PretrainResult], data: PretrainingData, config: PretrainConfig, seed: int) -> dict:
    models = {ffn: result.model.cpu().eval() for ffn, result in results.items()}  # speed is measured on the CPU
    batch = torch.stack(
        [results["dense"].validation[i]["input_ids"] for i in range(max(TIMED_TOKENS) // config.sequence_length)]
    )
    # The lookup model is timed as it would be used, packed for the CPU engine; its log perplexity so is given.
    packed = pack(models["lookup"]) if native.available() else models["lookup"]
    inputs = {ffn: _ffn_input(model.encoder, batch) for ffn, model in models.items()}  # (512, D)
    timings = _timings({"dense": models["dense"].encoder, "lookup": packed.encoder}, inputs, batch)
    reports = {ffn: _model_report(result, timings[ffn], batch) for ffn, result in results.items()}
    if native.available():
        reports["lookup"]["packed"] = {
            "dtype": packed.encoder.layers[0].ffn.table_dtype,
            "implementation": native.implementation(),
            **log_perplexity(evaluate(packed, results["lookup"].validation)),
        }
    recipe = dataclasses.asdict(config)
    for name in ("output_dir", "ffn", "data", "text_column", "preset", "model", "tokenizer"):
        recipe.pop(name)
    return {
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"lookupffn demo --steps {config.steps} --seed {seed}",
        "seed": seed,
        "machine": machine.describe() | {"device": "cpu", "dtype": "float32"},
        "data": data.summary,
        "training": recipe,
        "tokens_trained": results["dense"].metrics["tokens_trained"],
        "tokens_evaluated": results["dense"].metrics["tokens_evaluated"],
        "unigram_entropy": unigram_entropy(results["dense"].validation),
        "models": reports,
        "fills": [_fill(models, data.tokenizer, text) for text in SENTENCES],
    }


def _model_report(result: PretrainResult, timings: list[dict], batch: Tensor) -> dict:
    encoder = result.model.encoder
    ffns = [layer.ffn for layer in encoder.layers]
    with HashMonitor(encoder, tokens_per_call=batch.numel()) as monitor:
        for i in range(0, len(result.validation), len(batch)):
            items = range(i, min(i + len(batch), len(result.validation)))
            encoder(torch.stack([result.validation[j]["input_ids"] for j in items]))
    ffn_us = next(t["us_per_token"] for t in timings if t["what"] == "ffn" and t["tokens"] == max(TIMED_TOKENS))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = {name: getattr(encoder.config, name) for name in names}
    if encoder.config.ffn == "dense":
        sizes["intermediate_size"] = encoder.config.intermediate_size
    else:
        own = ("num_tables", "code_bits", "reads", "projection", "block_size", "decay")
        sizes |= {name: getattr(ffns[0].config, name) for name in own}
    return {
        "ffn": encoder.config.ffn,
        "config": sizes,
        **{k: result.metrics[k] for k in ("log_perplexity", "log_perplexity_standard_error", "training_seconds")},
        "parameters": result.metrics["parameters"],
        "ffn_parameters": sum(p.numel() for ffn in ffns for p in ffn.parameters()),
        "ffn_macs_per_token": ffns[0].flops(1) // 2,
        "model_macs_per_token": encoder.flops(1, batch.shape[1]) // 2,
        "ffn_bytes_per_token": ffns[0].bytes_read(1),
        "model_bytes_per_token": encoder.bytes_read(1),
        "ffn_us_per_token": ffn_us,
        "timings": timings,
        "curve": result.curve,
        "cells": monitor.summary(),
    }


def _timings(encoders: dict[str, nn.Module], inputs: dict[str, Tensor], batch: Tensor) -> dict[str, list[dict]]:
    """Both FFNs and both encoders at each size of TIMED_TOKENS, the twins interleaved.

    An FFN is timed on the activations that it meets in its trained model, layer 0; an encoder on validation blocks.
    """
    about = {ffn: {"engine": "PyTorch eager", "dtype": "float32"} for ffn in encoders}
    if isinstance(encoders["lookup"].layers[0].ffn, PackedLookupFFN):
        engine = f"lookupffn's CPU engine ({native.implementation()})"
        about["lookup"] = {"engine": engine, "dtype": f"{encoders['lookup'].layers[0].ffn.table_dtype} FFN"}
    timings: dict[str, list[dict]] = {ffn: [] for ffn in encoders}
    for tokens in TIMED_TOKENS:
        ids = batch if tokens > 1 else batch[:1, :1]
        calls = {
            "ffn": {f: (lambda f=f, x=inputs[f][:tokens]: encoders[f].layers[0].ffn(x)) for f in encoders},
            "model": {f: (lambda f=f, ids=ids: encoders[f](ids)) for f in encoders},
        }
        for what, by_ffn in calls.items():
            for ffn, t in time_interleaved(by_ffn, SECONDS_A_TIMING).items():
                scale = 1e6 / tokens
                timings[ffn].append(
                    {
                        "what": what,
                        "tokens": tokens,
                        "us_per_token": t.median * scale,
                        "us_per_token_low": t.low * scale,
                        "us_per_token_high": t.high * scale,
                        "runs": t.runs,
                        "threads": torch.get_num_threads(),
                    }
                    | about[ffn]
                )
    return timings


def _ffn_input(encoder: LookupRobertaModel, batch: Tensor) -> Tensor:
    seen = []
    hook = encoder.layers[0].ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    encoder(batch)
    hook.remove()
    return seen[0]


def _fill(models: dict[str, LookupRobertaForMaskedLM], tokenizer, text: str, best: int = 3) -> dict:
    """The most probable tokens of both models for the mask in ``text``."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    where = (ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]
    fill = {"text": text}
    for ffn, model in models.items():
        top = model(ids).logits[0, where].softmax(-1).topk(best)
        fill[ffn] = [
            {"token": tokenizer.decode([int(i)]), "probability": float(p)}
            for p, i in zip(top.values, top.indices, strict=True)
        ]
    return fill


def _print(console: Console, report: dict) -> None:
    dense, lookup = (report["models"][ffn] for ffn in TWINS)
    table = Table(
        title=f"{report['tokens_trained']:,} tokens trained, unigram entropy {report['unigram_entropy']:.3f} nats"
    )
    for heading in ("", *TWINS, "lookup / dense"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("log perplexity (nats)", "log_perplexity", ".3f"),
        ("parameters, with the head", "parameters", ",.0f"),
        ("FFN multiply-adds a token", "ffn_macs_per_token", ",.0f"),
        ("encoder multiply-adds a token", "model_macs_per_token", ",.0f"),
        ("FFN bytes a token", "ffn_bytes_per_token", ",.0f"),
    ]
    for label, key, form in rows:
        table.add_row(label, f"{dense[key]:{form}}", f"{lookup[key]:{form}}", f"{lookup[key] / dense[key]:.2f}")
    for a, b in zip(dense["timings"], lookup["timings"], strict=True):
        label = f"{'FFN' if a['what'] == 'ffn' else 'encoder'} µs a token, {a['tokens']} token(s)"
        a, b = a["us_per_token"], b["us_per_token"]
        table.add_row(label, f"{a:,.1f}", f"{b:,.1f}", f"{b / a:.2f}")
    console.print(table)
    for sentence in verdict(report):
        console.print(f"- {sentence}")
