"""The command line: ``lookupffn flops | info | bench | advise | hardware | pretrain | finetune | compare | demo``."""

import dataclasses
import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, get_type_hints

import torch
import typer
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lookupffn import __version__, machine, native
from lookupffn.errors import InputError
from lookupffn.lab.hardware import commands
from lookupffn.train.config import FinetuneConfig, Optimisation, PretrainConfig

CONFIGS = Path(__file__).parent / "train" / "recipes"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(commands.app, name="hardware")
app.command()(commands.advise)


@app.callback()
def _every_command() -> None:
    machine.respect_cpu_quota()


@app.command()
def flops(
    hidden_size: Annotated[int, typer.Option(help="width of the layer, D = E")] = 512,
    intermediate_size: Annotated[int, typer.Option(help="width inside the dense FFN")] = 2048,
    num_tables: Annotated[list[int], typer.Option(help="tables T; repeat for more rows")] = [64, 128],  # noqa: B006
    code_bits: Annotated[int, typer.Option(help="bits of a code, tau")] = 8,
    block_size: Annotated[int, typer.Option(help="edge of a BH4 block, b")] = 64,
    reads: Annotated[int, typer.Option(help="nearest cells read in a table, N")] = 1,
):
    """Multiply-adds, tables and bytes read a token: dense against lookup, float32."""
    from lookupffn.ffns.dense import DenseFFN
    from lookupffn.layer import LookupConfig, LookupFFN

    dense = DenseFFN(hidden_size, intermediate_size, device="meta")
    layers = {"dense FFN": dense}
    shape = {"code_bits": code_bits, "block_size": block_size, "reads": reads}
    for projection in ("bh4", "dense"):
        for tables in num_tables:
            try:
                config = LookupConfig(hidden_size, hidden_size, projection=projection, num_tables=tables, **shape)
            except ValueError as error:
                raise InputError(str(error)) from None
            name = f"T {tables}, {'BH4' if projection == 'bh4' else projection}"
            layers[name] = LookupFFN(config, device="meta")

    title = f"FFN {hidden_size}-{intermediate_size}-{hidden_size}, tau {code_bits}, {reads} read(s), float32"
    table = Table(title=title, box=box.SIMPLE, caption="Weights are read once a batch, rows of tables once a token.")
    for heading in ("config", "multiply-adds", "dense / it", "weights", "rows read", "tables"):
        table.add_column(heading, justify="left" if heading == "config" else "right", no_wrap=True)
    for name, layer in layers.items():
        weights = layer.bytes_read(0)
        row_bytes = layer.bytes_read(1) - weights
        table.add_row(
            name,
            f"{layer.flops(1) // 2:,}",
            f"{dense.flops(1) / layer.flops(1):.1f}",
            f"{weights / 2**10:,.0f} KiB",
            f"{row_bytes / 2**10:,.0f} KiB" if row_bytes else "-",
            f"{layer.tables.nbytes / 2**20:,.0f} MiB" if row_bytes else "-",
        )
    Console().print(table)


@app.command()
def info():
    """Prints what runs here and why: kernels, instruction sets, caches, threads."""
    forced = os.environ.get("LOOKUPFFN_ISA")
    if reason := native.load():
        why = reason
    else:
        why = "LOOKUPFFN_ISA asks for it" if forced else "the first of this build that runs here"
    try:
        implementation = native.implementation()
    except RuntimeError as error:
        raise InputError(str(error)) from None
    console, quota = Console(soft_wrap=True), machine.cgroup_quota()
    console.print(f"[bold]lookupffn {__version__}[/] on {machine.cpu_name()}")
    console.print(f"kernels: [bold]{implementation}[/] ({why})")
    table = Table("implementation", "runs here", "needs")
    for i in native.implementations():
        table.add_row(i["name"], "yes" if i["runs_here"] else "no", i["needs"])
    if table.row_count:
        console.print(table)
    for cache in machine.caches():
        console.print(
            f"L{cache['level']} cache: {cache['bytes'] // 2**10:,} KiB, shared by {cache['shared_by']} logical CPUs"
        )
    console.print(f"huge pages: {machine.huge_pages()}")
    console.print(f"threads: {torch.get_num_threads()}; CPU quota of the control group: {quota or 'none'}")


@app.command()
def bench(
    hidden_size: Annotated[list[int], typer.Option(help="width; repeat for more; the dense FFN is 4 times as wide")] = [  # noqa: B006
        512
    ],
    tokens: Annotated[list[int], typer.Option(help="tokens a call; repeat for more")] = [1, 8, 64, 512, 4096, 32768],  # noqa: B006
    threads: Annotated[list[int] | None, typer.Option(help="threads; repeat for more [1 and all]")] = None,
    seconds: Annotated[float, typer.Option(help="time for each engine at each size")] = 0.5,
    json: Annotated[str, typer.Option(help="file for one JSON line a measurement")] = "runs/bench/bench.jsonl",
    plot: Annotated[str, typer.Option(help="file for the plot")] = "runs/bench/bench.png",
    training: Annotated[bool, typer.Option(help="time a training step of the layer as well")] = True,
    seed: Annotated[int, typer.Option(help="of weights and input")] = 0,
):
    """Times packed lookup layers beside every dense FFN engine that is installed, on this machine."""
    if min(*hidden_size, *tokens, *(threads or [1])) < 1 or not seconds > 0:
        raise InputError("hidden sizes, tokens, threads and seconds must be positive")
    from lookupffn.bench import benchmark as run

    console, counts = Console(soft_wrap=True), threads or sorted({1, torch.get_num_threads()})
    shapes = [(width, 4 * width) for width in hidden_size]
    for records in run.bench(shapes, tokens, counts, seconds=seconds, seed=seed, training=training, console=console):
        run.write_json(records, Path(json))  # after every shape: what was measured is kept if the rest is not
        run.plot(records, Path(plot))
    run.print_bandwidth(records, console)
    console.print(f"measurements in [bold]{json}[/], plot in [bold]{plot}[/]")


def pretrain(config: str | None, **flags) -> None:
    """Masked-LM pretraining of one model, dense or lookup; started again, it goes on from its last checkpoint.

    Settings come from flags, then from the YAML file of --config, then from the defaults. With several processes:
    torchrun --nproc-per-node 2 -m lookupffn pretrain ...
    """
    checked = _settings(PretrainConfig, config, flags)

    from lookupffn.train.pretrain import pretrain as run

    _quiet()
    result = run(checked)
    if int(os.environ.get("RANK", "0")):
        return  # the first process speaks for all
    table = Table("log perplexity", "standard error", "tokens evaluated", "tokens trained", "parameters", "seconds")
    m = result.metrics
    table.add_row(
        f"{m['log_perplexity']:.4f} nats",
        f"{m['log_perplexity_standard_error']:.4f}",
        f"{m['tokens_evaluated']:,}",
        f"{m['tokens_trained']:,}",
        f"{m['parameters']:,}",
        f"{m['training_seconds']:.0f}",
    )
    Console().print(table)
    Console().print(f"model and metrics in {result.output_dir}")


def finetune(config: str | None, **flags) -> None:
    """Fine-tunes a pretrained model as a classifier of texts and measures its accuracy on others."""
    checked = _settings(FinetuneConfig, config, flags)

    from lookupffn.train.finetune import finetune as run

    _quiet()
    r = run(checked)
    error = 100 * r["accuracy_standard_error"]
    Console().print(
        f"accuracy {100 * r['accuracy']:.2f} % (standard error {error:.2f}) of {r['texts_tested']:,} texts, "
        f"{r['training_seconds']:.0f} s of training; model in {checked.output_dir}"
    )


def _settings(record: type, config: str | None, flags: dict):
    """The record of settings: flags over the YAML file ``config`` over defaults."""
    settings = _read_config(config) if config else {}
    known = {field.name for field in dataclasses.fields(record)}
    if unknown := set(settings) - known:
        raise InputError(
            f"{config}: unknown setting {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    for name, value in flags.items():
        if isinstance(value, list):  # further entries of a dict of settings
            settings[name] = (settings.get(name) or {}) | dict(_assignment(name, text) for text in value)
        elif value is not None:
            settings[name] = value
    return record(**settings)


def _quiet() -> None:
    """Leaves the terminal to our own progress bars and errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _read_config(name: str) -> dict:
    path = CONFIGS / f"{name}.yaml" if not Path(name).exists() else Path(name)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        shipped = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise InputError(f"config {name!r} is neither a file nor one of the shipped ones ({shipped})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold settings as 'name: value', not {type(settings).__name__}")
    return settings


def _assignment(setting: str, text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--{setting.replace('_', '-')} takes NAME=VALUE, not {text!r}")
    return name, yaml.safe_load(value)


def _flags(record: type) -> inspect.Signature:
    """A flag for every field of the record, unset by default, so that its definition stands in one place."""
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    flags = {"config": Annotated[str | None, typer.Option(help=f"YAML file, or a shipped recipe: {shipped}")]}
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):
        kind = list[str] if hints[field.name] is dict else hints[field.name]
        default = "" if field.default in (dataclasses.MISSING, None) else f" [{field.default}]"
        panel = "AdamW" if field in dataclasses.fields(Optimisation) else None
        option = typer.Option(help=field.metadata["help"] + default, show_default=False, rich_help_panel=panel)
        flags[field.name] = Annotated[kind | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(n, keyword, default=None, annotation=a) for n, a in flags.items()])


pretrain.__signature__, finetune.__signature__ = _flags(PretrainConfig), _flags(FinetuneConfig)
app.command()(pretrain)
app.command()(finetune)


@app.command()
def compare(
    ffn: Annotated[str, typer.Option(help="recipes of --config and names of feed-forward layers, with commas")],
    config: Annotated[
        str | None, typer.Option(help="YAML file with `common` settings of pretrain and named `recipes` over them")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="model size [small]")] = None,
    data: Annotated[str | None, typer.Option(help="text, as of pretrain [stdlib]")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="optimizer steps; repeat for more horizons [1000]")] = None,
    seed: Annotated[list[int], typer.Option(help="seed; repeat for more")] = [0],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="runs at a time, the threads divided among them")] = 1,
    seconds: Annotated[float, typer.Option(help="time for each form of each layer when speed is measured")] = 1.0,
    output_dir: Annotated[str, typer.Option(help="folder of runs, table, lines and plot")] = "runs/compare",
):
    """Trains feed-forward layers on the same data, seeds and steps, and writes one table; resumed run by run."""
    settings = _read_config(config) if config else {}
    if unknown := settings.keys() - {"common", "recipes"}:
        raise InputError(f"{config}: unknown entry {', '.join(sorted(unknown))}; known are common and recipes")
    common, recipes = settings.get("common") or {}, settings.get("recipes") or {}
    for name, entry in {"common": common, "recipes": recipes, **recipes}.items():
        if not isinstance(entry, dict):
            raise InputError(f"{config}: {name} must hold settings as 'name: value', not {entry!r}")
    common |= {name: value for name, value in (("preset", preset), ("data", data)) if value is not None}
    steps = steps or [common.get("steps", PretrainConfig.steps)]
    if jobs < 1 or not seconds > 0:
        raise InputError(f"jobs and seconds must be positive, not {jobs} and {seconds}")
    from lookupffn.lab import compare as lab

    _quiet()
    names = [name.strip() for name in ffn.split(",") if name.strip()]
    lab.compare(lab.plan(recipes, common, names, seed, steps, output_dir), output_dir, jobs=jobs, seconds=seconds)


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="folder of the report, replaced if it is there")] = "runs/demo",
    minutes: Annotated[
        float, typer.Option(help="time to train both models; the number of steps follows from it")
    ] = 7.5,
    steps: Annotated[int | None, typer.Option(help="optimizer steps of each model, instead of a time")] = None,
    seed: Annotated[int, typer.Option(help="of initialisation, data order and masks")] = 0,
):
    """Trains a dense and a lookup twin on Python's own standard library and writes a report that compares them."""
    if not minutes > 0 or (steps is not None and steps < 1):
        raise InputError(f"minutes and steps must be positive, not {minutes} and {steps}")
    from lookupffn.lab.demo import demo as run

    _quiet()
    run(output_dir, minutes=minutes, steps=steps, seed=seed)


def main() -> None:
    try:
        app()
    except InputError as error:  # refused input: one line that says why; anything else keeps its traceback
        Console(stderr=True).print(f"[bold red]lookupffn:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
