"""The quality lab: the same data, seeds, steps and evaluation for any number of feed-forward layers, in one table.

Every run is a ``lookupffn pretrain`` in a process of its own, with its own folder, so a comparison that was killed
goes on where it stopped, run by run and inside a run, and several runs share the machine (``jobs``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from lookupffn import ffns, machine, native
from lookupffn.bench.engines import DENSE_ENGINES
from lookupffn.bench.timing import time_interleaved
from lookupffn.errors import InputError
from lookupffn.ffns.dense import DenseFFN
from lookupffn.files import atomic_write, check_writable, make_folder, write_json_lines
from lookupffn.hf import LookupRobertaForCausalLM, LookupRobertaForMaskedLM, LookupRobertaModel
from lookupffn.lab.report.comparison import markdown, plot, show
from lookupffn.layer import LookupFFN
from lookupffn.runtime.export import export
from lookupffn.runtime.packed import pack
from lookupffn.runtime.session import MODEL_FILE, Session
from lookupffn.train.config import PretrainConfig
from lookupffn.train.data import PretrainingData
from lookupffn.train.pretrain import curve, datasets, evaluate, log_perplexity, loss_sums, read_metrics

TIMED_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a comparison: a recipe at one seed and one number of steps."""

    recipe: str
    config: PretrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        """Whether results lie there that these settings and this data gave."""
        try:
            written = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return not self.config.changes(written) and written.get("tokens") == _data(self.config).summary["tokens"]

    def steps_done(self) -> int:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0


def plan(
    recipes: dict[str, dict],
    common: dict,
    names: Sequence[str],
    seeds: Sequence[int],
    steps: Sequence[int],
    output_dir: str | Path,
) -> list[Run]:
    """The runs of a comparison, all horizons and seeds of each name in turn; every setting is checked here.

    A name is one of ``recipes`` (settings of :class:`PretrainConfig` over ``common``) or an FFN with its defaults.

    Raises:
        InputError: a name is neither, or a setting is refused.
    """
    runs = []
    for name in names:
        if name not in recipes and name not in ffns.names():
            known = ", ".join([*recipes, *(ffn for ffn in ffns.names() if ffn not in recipes)])
            raise InputError(f"ffn {name!r} is neither a recipe nor a feed-forward layer; there are {known}")
        settings = common | recipes.get(name, {"ffn": name})
        for number in steps:
            for seed in seeds:
                folder = Path(output_dir) / f"{name}-{number}-s{seed}"
                own = {"steps": number, "seed": seed, "output_dir": str(folder)}
                if "evaluate_every" not in settings:  # in the middle and at the end, whatever the horizon
                    every = settings.get("log_every", PretrainConfig.log_every)
                    own["evaluate_every"] = max(every, number // 2 // every * every)
                try:
                    config = PretrainConfig(**settings | own)
                except TypeError as error:  # a setting that does not exist
                    raise InputError(f"recipe {name!r}: {str(error).partition(') ')[2] or error}") from None
                config.model_config()
                runs.append(Run(name, config))
    return runs


def compare(runs: Sequence[Run], output_dir: str | Path, *, jobs: int, seconds: float) -> list[dict]:
    """Trains what is not finished, measures all, writes ``compare.jsonl``, ``compare.md`` and ``compare.png``.

    Returns one record a run. A run that fails does not stop the others.

    Raises:
        InputError: some runs failed; the message names them and their logs. What was finished is reported first.
    """
    console, output_dir = Console(soft_wrap=True), Path(output_dir)
    check_writable(output_dir / "compare.jsonl")
    failed = _train(runs, jobs, console)
    finished = [run for run in runs if run.finished]
    if finished:
        console.print(f"measuring {len(finished)} models")
        records = _records(finished, seconds)
        write_json_lines(output_dir / "compare.jsonl", records)
        atomic_write(output_dir / "compare.md", markdown(records))
        plot(records, output_dir / "compare.png")
        show(records, console)
        console.print(f"lines, table and plot: [bold]{output_dir}/compare.jsonl, .md, .png[/]")
    if failed:
        logs = ", ".join(f"{run.folder}.log" for run in failed)
        raise InputError(f"{len(failed)} of {len(runs)} runs failed; the reason is at the end of {logs}")
    return records


def _data(config: PretrainConfig) -> PretrainingData:
    """The blocks that ``config`` trains on, tokenised or mapped once for all runs that share them."""
    names = ("preset", "ffn", "ffn_options", "model", "data", "text_column", "tokenizer", "sequence_length")
    return _load_data(json.dumps({name: getattr(config, name) for name in (*names, "validation_fraction")}))


@functools.lru_cache
def _load_data(settings: str) -> PretrainingData:
    return PretrainConfig(**json.loads(settings)).load_data()


# ---- Training --------------------------------------------------------------------------------------------------------


def _train(runs: Sequence[Run], jobs: int, console: Console) -> list[Run]:
    """Runs what is not finished, ``jobs`` at a time; returns those that failed."""
    waiting = [run for run in runs if not run.finished]
    console.print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before")
    for run in waiting:
        _data(run.config)  # tokenised here, with its progress shown, and not in every run at the same time
    threads = max(1, torch.get_num_threads() // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: dict[int, tuple[Run, subprocess.Popen]] = {}
    failed, columns = [], (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bars = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    process = _start(run, environment)
                    running[process.pid] = run, process
                    bars[process.pid] = progress.add_task(run.folder.name, total=run.config.steps)
                time.sleep(1)
                for pid, (run, process) in list(running.items()):
                    progress.update(bars[pid], completed=run.steps_done())
                    if process.poll() is not None:
                        del running[pid]
                        progress.remove_task(bars[pid])
                        failed += [] if run.finished else [run]
                        progress.print(f"{run.folder.name}: {_outcome(run)}")
        finally:
            for _, process in running.values():  # stopped: each goes on from its checkpoint next time
                process.terminate()
    return failed


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen:
    make_folder(run.folder.parent)
    settings = Path(f"{run.folder}.yaml")
    atomic_write(settings, yaml.safe_dump(dataclasses.asdict(run.config), sort_keys=False))
    command = [sys.executable, "-m", "lookupffn", "pretrain", "--config", str(settings)]
    with Path(f"{run.folder}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _outcome(run: Run) -> str:
    return f"log perplexity {_results(run)['log_perplexity']:.4f}" if run.finished else "[red]failed[/]"


def _results(run: Run) -> dict:
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))


# ---- Measuring -------------------------------------------------------------------------------------------------------


def _records(runs: Sequence[Run], seconds: float) -> list[dict]:
    """One record a run: what its training left, its quality in the engine's int8, and its recipe's speed here."""
    longest = {run.recipe: run for run in sorted(runs, key=lambda run: (run.config.steps, -run.config.seed))}
    timings = _time_ffns({recipe: _load(run) for recipe, run in longest.items()}, seconds)
    records = []
    for run in runs:
        results, config = _results(run), run.config
        records.append(
            {
                "ffn": config.ffn,
                "recipe": run.recipe,
                "seed": config.seed,
                "tokens": results["tokens_trained"],
                **{k: results[k] for k in ("log_perplexity", "log_perplexity_standard_error", "tokens_evaluated")},
                "log_perplexity_int8": _packed_quality(run),
                **_deployed(run),
                **{k: results[k] for k in ("unigram_entropy", "ffn_macs_per_token", "model_macs_per_token")},
                "ffn_bytes_per_token": _ffn_bytes(run),
                "parameters": results["parameters"],
                "training_tokens_per_second": results["tokens_trained"] / results["training_seconds"],
                **timings[run.recipe],
                **{k: getattr(config, k) for k in ("objective", "preset", "ffn_options", "learning_rate")},
                "table_learning_rate_multiplier": config.table_learning_rate_multiplier,
                "curve": curve(run.folder),
                **_end_of_training(run),
                "dtype": results["dtype"],
                "machine": results["machine"],
                "machine_timed": machine.describe(),
            }
        )
    return records


def _ffn_bytes(run: Run) -> int:
    with torch.device("meta"):
        return LookupRobertaModel(run.config.model_config()).layers[0].ffn_bytes_read(1)


def _end_of_training(run: Run) -> dict:
    """Training loss over the last twentieth of the run, and the use of buckets in its last log, layer by layer."""
    logs = [line for line in read_metrics(run.folder / "metrics.jsonl") if "loss" in line]
    last = [line["loss"] for line in logs if line["step"] > 0.95 * run.config.steps]
    return {"train_loss": statistics.mean(last) if last else None, "buckets": logs[-1]["buckets"] if logs else []}


def _load(run: Run) -> LookupRobertaForMaskedLM:
    kind = LookupRobertaForCausalLM if run.config.objective == "causal" else LookupRobertaForMaskedLM
    return kind.from_pretrained(run.folder / "model").eval()


@torch.no_grad()
def _packed_quality(run: Run) -> float | None:
    """Log perplexity with every FFN in the engine's int8, on the run's own evaluation; None where it has no such form.

    Kept in the run's folder, so that a comparison that grows measures only what is new.
    """
    kept = run.folder / "packed.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))["log_perplexity"]
    model = _load(run)
    if not isinstance(model.encoder.layers[0].ffn, LookupFFN) or not native.available():
        return None
    try:
        packed = pack(model)
    except ValueError:  # a variant that the engine does not have
        return None
    validation = datasets(run.config, _data(run.config))[1]
    result = log_perplexity(evaluate(packed, validation, run.config.batch_size))
    atomic_write(kept, json.dumps(result) + "\n")
    return result["log_perplexity"]


@torch.no_grad()
def _deployed(run: Run) -> dict:
    """The whole model in the runtime, linears in int8 and rows in int4: its log perplexity on the run's own evaluation,
    and its file's bytes; None where the runtime does not have its layers. Kept in the run's folder."""
    kept = run.folder / "deployed.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = {"log_perplexity_deployed": None, "deployed_bytes": None}
    if not native.available():
        return found
    model, dataset = _load(run), datasets(run.config, _data(run.config))[1]
    with tempfile.TemporaryDirectory() as folder:
        try:
            session = Session(export(model, folder, tables="int4"), torch.get_num_threads())
        except InputError:  # a layer of the literature
            return found
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(dataset), run.config.batch_size):
            items = [dataset[i] for i in range(start, min(start + run.config.batch_size, len(dataset)))]
            labels = model.targets(torch.stack([item["labels"] for item in items]))
            ids = torch.stack([item["input_ids"] for item in items])
            logits = torch.from_numpy(session.logits(ids, places=labels != -100))
            sums += loss_sums(logits, labels[labels != -100])
        bytes_of_file = (Path(folder) / MODEL_FILE).stat().st_size
    found = {"log_perplexity_deployed": log_perplexity(sums)["log_perplexity"], "deployed_bytes": bytes_of_file}
    atomic_write(kept, json.dumps(found) + "\n")
    return found


@torch.no_grad()
def _time_ffns(models: dict[str, LookupRobertaForMaskedLM], seconds: float) -> dict[str, dict]:
    """The first layer's FFN of each model at TIMED_TOKENS random tokens, in the fastest form at hand, interleaved."""
    forms: dict[tuple[str, str, str], object] = {}
    for recipe, model in models.items():
        ffn = model.encoder.layers[0].ffn
        x = torch.randn(TIMED_TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        forms[recipe, "PyTorch eager", "float32"] = lambda ffn=ffn, x=x: ffn(x)
        if isinstance(ffn, DenseFFN):
            chain = nn.Sequential(ffn.up, nn.GELU(), ffn.down)
            for engine in DENSE_ENGINES:
                if engine.available and not engine.compiled and (engine.name, engine.dtype) != ("PyTorch", "float32"):
                    forms[recipe, engine.name, engine.dtype] = engine.build(chain, x, torch.get_num_threads())
        elif isinstance(ffn, LookupFFN) and native.available():
            try:
                fast = pack(ffn)
            except ValueError:
                continue
            forms[recipe, f"lookupffn ({native.implementation()})", "int8"] = lambda fast=fast, x=x: fast(x)
    times = time_interleaved(forms, seconds * len(forms))
    fastest: dict[str, dict] = {}
    for (recipe, engine, dtype), time_a_call in sorted(times.items(), key=lambda item: -item[1].median):
        fastest[recipe] = {
            "ffn_us_per_token": time_a_call.median * 1e6 / TIMED_TOKENS,
            "ffn_engine": engine,
            "ffn_dtype": dtype,
            "tokens_timed": TIMED_TOKENS,
            "threads_timed": torch.get_num_threads(),
        }
    return fastest
