"""Twins: a lookup model and its matched dense baseline, trained and compared in one report.

The two are trained on Python's own standard library and differ in nothing but their FFN.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lookupffn import machine, native
from lookupffn.diagnostics import HashMonitor
from lookupffn.errors import InputError
from lookupffn.files import check_writable
from lookupffn.hf import LookupRobertaForMaskedLM
from lookupffn.lab.report import verdict, words, write_report
from lookupffn.lab.speed import TIMED_TOKENS, time_models
from lookupffn.runtime.packed import pack
from lookupffn.train.config import PretrainConfig
from lookupffn.train.data import PretrainingData
from lookupffn.train.masking import MaskedBlocks, unigram_entropy
from lookupffn.train.pretrain import PretrainResult, datasets, evaluate, log_perplexity, pretrain
from lookupffn.train.trainer import parameter_groups

MODELS = ("dense", "lookup")
CALIBRATION_SECONDS = 8.0  # a model; a shorter look at a noisy machine misjudged a run by 15 %
TRAINER_OVERHEAD = 1.13  # a step with the Trainer's own work and its share of the evaluations, against a bare step
EVALUATIONS = 8

# Small vocabulary and short blocks: a masked LM must leave the plateau of unigram guessing within a few minutes. The
# curve is evaluated on 512 sequences, the models at the end on the whole validation set: some 76,000 masked tokens.
RECIPE = PretrainConfig(
    preset="small",
    data="stdlib",
    sequence_length=64,
    batch_size=32,
    learning_rate=3e-3,
    validation_fraction=0.08,
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


def twins(output_dir: str | Path, *, minutes: float, steps: int | None, seed: int) -> Path:
    """Trains both models for about ``minutes`` in all (or ``steps`` each), measures them, writes ``report.html``.

    They differ in nothing but the FFN: same seed, batches, masks, steps. Returns the report's path.
    """
    output_dir, console = Path(output_dir), Console()
    check_writable(output_dir / "report.html")
    start = time.perf_counter()
    console.print("[bold]1/4[/] preparing the text of Python's standard library")
    data = RECIPE.load_data()
    if steps is None:
        console.print("[bold]2/4[/] timing a few training steps of both models")
        a_step = TRAINER_OVERHEAD * sum(_seconds_a_step(ffn, data) for ffn in MODELS)
        steps = max(40, int(minutes * 60 / a_step))
    every = max(1, steps // (5 * EVALUATIONS))
    console.print(f"[bold]3/4[/] training dense and lookup, {steps:,} steps each; log perplexity in nats")
    results: dict[str, PretrainResult] = {}
    for ffn in MODELS:
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
    """Seconds that one training step of this model takes here: the mean of a few seconds after two to warm up."""
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
    _, validation = datasets(dataclasses.replace(config, evaluation_sequences=0), data)  # all of it
    batch = torch.stack([validation[i]["input_ids"] for i in range(max(TIMED_TOKENS) // config.sequence_length)])
    # The lookup model is timed as it would be used, packed for the CPU engine; its log perplexity so is given.
    packed = pack(models["lookup"]) if native.available() else models["lookup"]
    timings, left_out = time_models({"dense": models["dense"].encoder, "lookup": packed.encoder}, batch)
    reports = {ffn: _model_report(result, validation, timings[ffn], batch) for ffn, result in results.items()}
    if native.available():
        reports["lookup"]["packed"] = {
            "dtype": packed.encoder.layers[0].ffn.table_dtype,
            "implementation": native.implementation(),
            **log_perplexity(evaluate(packed, validation)),
        }
    recipe = dataclasses.asdict(config)
    for name in ("output_dir", "ffn", "data", "text_column", "preset", "model", "tokenizer"):
        recipe.pop(name)
    return {
        "format_version": 2,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"lookupffn demo twins --steps {config.steps} --seed {seed}",
        "seed": seed,
        "machine": machine.describe() | {"device": "cpu"},
        "data": data.summary,
        "training": recipe,
        "tokens_trained": results["dense"].metrics["tokens_trained"],
        "tokens_evaluated": reports["dense"]["tokens_evaluated"],
        "unigram_entropy": unigram_entropy(validation),
        "models": reports,
        "engines_left_out": left_out,
        "fills": [_fill(models, data.tokenizer, text) for text in SENTENCES],
    }


def _model_report(result: PretrainResult, validation: MaskedBlocks, timings: list[dict], batch: Tensor) -> dict:
    encoder = result.model.encoder
    ffns = [layer.ffn for layer in encoder.layers]
    with HashMonitor(encoder, tokens_per_call=validation.blocks.size) as monitor:
        quality = log_perplexity(evaluate(result.model, validation))
    wanted = {"what": "ffn", "tokens": max(TIMED_TOKENS), "fastest": True}
    (ffn_us,) = (t["us_per_token"] for t in timings if t.items() >= wanted.items())
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
        **quality,
        "training_seconds": result.metrics["training_seconds"],
        "parameters": result.metrics["parameters"],
        "ffn_parameters": sum(p.numel() for ffn in ffns for p in ffn.parameters()),
        "ffn_macs_per_token": ffns[0].flops(1) // 2,
        "model_macs_per_token": encoder.flops(1, batch.shape[1]) // 2,
        "ffn_bytes_per_token": ffns[0].bytes_read(1),
        "model_bytes_per_token": encoder.bytes_read(1),
        "ffn_us_per_token": ffn_us,
        "timings": timings,
        "curve": result.curve,
        "buckets": monitor.summary(),
    }


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
    dense, lookup = (report["models"][ffn] for ffn in MODELS)
    table = Table(
        title=f"{report['tokens_trained']:,} tokens trained, unigram entropy {report['unigram_entropy']:.3f} nats"
    )
    for heading in ("", *MODELS, "lookup / dense"):
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
    for what, name in (("ffn", "FFN"), ("model", "encoder")):
        for tokens in TIMED_TOKENS:
            pair = [words.timing(model, what, tokens) for model in (dense, lookup)]
            a, b = (t["us_per_token"] for t in pair)
            cells = (f"{t['us_per_token']:,.1f}\n[dim]{escape(t['engine'])}, {t['dtype']}[/]" for t in pair)
            table.add_row(f"{name} µs a token, {tokens} token(s)", *cells, f"{b / a:.2f}")
    console.print(table)
    for sentence in verdict(report):
        console.print(f"- {sentence}")
