"""``lookupffn pretrain | finetune``: their flags, made from the records of settings, and their YAML files."""

import dataclasses
import inspect
import logging
import os
from pathlib import Path
from typing import Annotated, get_type_hints

import typer
import yaml
from rich.console import Console
from rich.table import Table

from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.train.config import FinetuneConfig, Optimisation, PretrainConfig

CONFIGS = Path(__file__).parent / "recipes"

app = typer.Typer()


def pretrain(config: str | None, **flags) -> None:
    """Masked-LM pretraining of one model, dense or lookup; started again, it goes on from its last checkpoint.

    Settings come from flags, then from the YAML file of --config, then from the defaults. With several processes:
    torchrun --nproc-per-node 2 -m lookupffn pretrain ...
    """
    checked = _settings(PretrainConfig, config, flags)
    require("train", "lookupffn pretrain")

    quiet()
    from lookupffn.train.pretrain import pretrain as run

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
    """Fine-tunes a pretrained encoder on labelled texts and measures it on others; started again, it goes on.

    --task takes a task of GLUE as it is defined; else --problem-type says what is learnt: one class a text, several
    labels, or a number. --seeds 0,1,2 trains once a seed.
    """
    checked = _settings(FinetuneConfig, config, flags)
    require("train", "lookupffn finetune")

    quiet()
    from lookupffn.train.finetune import finetune as train
    from lookupffn.train.metrics import METRICS

    r = train(checked)
    if int(os.environ.get("RANK", "0")):
        return  # the first process speaks for all
    runs = r.get("runs", [r])
    found = [name for name in METRICS if name in runs[0]]
    table = Table("seed", *(METRICS[name] for name in found), "seconds")
    for run in runs:
        cells = ("not defined" if run[name] is None else f"{run[name]:.4f}" for name in found)
        table.add_row(str(run["seed"]), *cells, f"{run['training_seconds']:.0f}")
    if len(runs) > 1:
        spread = r["standard_deviation"]
        means = (f"{r['mean'][n]:.4f} ± {spread[n]:.4f}" if n in spread else "not defined" for n in found)
        table.add_row("mean", *means, "")
    Console().print(table)
    best = ", each the best checkpoint on the texts that it is measured on" if checked.patience else ""
    tested = f"{r['texts_tested']:,} texts tested, {r['texts_trained']:,} trained"
    Console().print(f"{tested}; model and metrics in {checked.output_dir}{best}")


def quiet() -> None:
    """Leaves the terminal to our own progress bars and errors; to be called before what it quiets is imported."""
    for name in ("torchao", "torch.utils._pytree"):  # its libraries for other devices, and a name that it still uses
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


# ---- Settings --------------------------------------------------------------------------------------------------------


def _settings(record: type, config: str | None, flags: dict):
    """The record of settings: flags over the YAML file ``config`` over defaults."""
    settings = read_config(config) if config else {}
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


def read_config(name: str) -> dict:
    """The settings in a YAML file, or in the shipped recipe of that name. Raises InputError where there are none."""
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
