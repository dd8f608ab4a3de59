"""``lookupffn compare | demo | advise | hardware``: what we study with."""

from pathlib import Path
from typing import Annotated

import typer

from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.lab.hardware import commands as hardware
from lookupffn.train.commands import quiet, read_config
from lookupffn.train.config import PretrainConfig

app = typer.Typer()
app.add_typer(hardware.app, name="hardware")
app.command()(hardware.advise)


@app.command()
def compare(
    ffn: Annotated[str, typer.Option(help="recipes of --config and names of feed-forward layers, with commas")],
    config: Annotated[
        str | None, typer.Option(help="YAML file with `common` settings of pretrain and named `recipes` over them")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="model size [small]")] = None,
    data: Annotated[str | None, typer.Option(help="text, as of pretrain [stdlib]")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="optimizer steps; repeat for more horizons [1000]")] = None,
    seed: Annotated[list[int], typer.Option(help="seed; repeat for more")] = [0],
    jobs: Annotated[int, typer.Option(help="runs at a time, the threads divided among them")] = 1,
    seconds: Annotated[float, typer.Option(help="time for each form of each layer when speed is measured")] = 1.0,
    output_dir: Annotated[str, typer.Option(help="folder of runs, table, lines and plot")] = "runs/compare",
):
    """Trains feed-forward layers on the same data, seeds and steps, and writes one table; resumed run by run."""
    settings = read_config(config) if config else {}
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
    require("lab", "lookupffn compare")
    quiet()
    from lookupffn.lab import compare as lab

    names = [name.strip() for name in ffn.split(",") if name.strip()]
    if not names:
        raise InputError(f"--ffn {ffn!r} names no feed-forward layer: give one or more, with commas, as dense,lookup")
    lab.compare(lab.plan(recipes, common, names, seed, steps, output_dir), output_dir, jobs=jobs, seconds=seconds)


demo_app = typer.Typer(invoke_without_command=True)
app.add_typer(demo_app, name="demo")


@demo_app.callback()
def demo(
    context: typer.Context,
    output_dir: Annotated[str, typer.Option(help="folder of model and report, replaced if it is there")] = "runs/demo",
    minutes: Annotated[float, typer.Option(help="of distillation; the baselines take about as long again")] = 1.5,
    tokens: Annotated[
        int | None, typer.Option(help="instead of minutes: tokens that each model is distilled on")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the split, the start and the order of texts")] = 0,
):
    """Converts a real model, all-MiniLM-L6-v2 of the extra minilm, reports what was kept, and searches with it.

    Without that extra it trains the twins instead.
    """
    if context.invoked_subcommand:
        return
    if not minutes > 0 or (tokens is not None and tokens < 1):
        raise InputError(f"minutes and tokens must be positive, not {minutes} and {tokens}")
    require("lab", "lookupffn demo")
    quiet()
    from lookupffn.lab.demo import demo as run
    from lookupffn.lab.demo import minilm

    if model := minilm():
        run(model, Path(output_dir), minutes=minutes, tokens=tokens, seed=seed)
        return
    print(
        "all-MiniLM-L6-v2 is not installed (pip install 'lookupffn[minilm]'): a model is trained instead of converted"
    )
    twins(output_dir=output_dir, seed=seed)


@demo_app.command()
def twins(
    output_dir: Annotated[str, typer.Option(help="folder of the report, replaced if it is there")] = "runs/twins",
    minutes: Annotated[
        float, typer.Option(help="time to train both models; the number of steps follows from it")
    ] = 5.5,
    steps: Annotated[int | None, typer.Option(help="optimizer steps of each model, instead of a time")] = None,
    seed: Annotated[int, typer.Option(help="of initialisation, data order and masks")] = 0,
):
    """Trains a dense and a lookup model on Python's own standard library and writes a report that compares them."""
    if not minutes > 0 or (steps is not None and steps < 1):
        raise InputError(f"minutes and steps must be positive, not {minutes} and {steps}")
    require("lab", "lookupffn demo twins")
    quiet()
    from lookupffn.lab.twins import twins as run

    run(output_dir, minutes=minutes, steps=steps, seed=seed)
