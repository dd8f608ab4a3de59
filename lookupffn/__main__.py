"""The command line: the commands of every install here, those of the extras in their folders' ``commands.py``."""

import dataclasses
import os
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from typer.core import TyperGroup
except ModuleNotFoundError as error:  # an extra, and this is a program: one line and no traceback
    print(f"lookupffn: the command line needs {error.name}: pip install 'lookupffn[cli]'", file=sys.stderr)
    sys.exit(2)

from lookupffn import __version__, machine, native
from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.files import atomic_replace, check_writable

FOLDERS = {  # whose `commands` have them
    "bench": "bench", "convert": "conversion", "evaluate": "conversion", "pretrain": "train", "finetune": "train",
    "compare": "lab", "demo": "lab", "advise": "lab", "hardware": "lab",
}  # fmt: skip


class Commands(TyperGroup):
    """The commands below, and those of FOLDERS, imported when one of them is asked for."""

    def list_commands(self, ctx) -> list[str]:
        return [*super().list_commands(ctx), *FOLDERS]

    def get_command(self, ctx, cmd_name: str):
        if cmd_name not in FOLDERS:
            return super().get_command(ctx, cmd_name)
        commands = import_module(f"lookupffn.{FOLDERS[cmd_name]}.commands")
        return typer.main.get_group(commands.app).commands[cmd_name]


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LookupFFN: feed-forward layers as hashing and table lookup; their costs, times, training and packed form.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lookupffn {__version__}, {native.implementation()} kernels, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    machine.respect_cpu_quota()


@app.command()
def flops(
    hidden_size: Annotated[int, typer.Option(help="width of the layer, D = E")] = 512,
    intermediate_size: Annotated[int, typer.Option(help="width inside the dense FFN")] = 2048,
    num_tables: Annotated[list[int], typer.Option(help="tables T; repeat for more rows")] = [64, 128],
    code_bits: Annotated[int, typer.Option(help="bits of a code, tau")] = 8,
    block_size: Annotated[int | None, typer.Option(help="edge of a BH4 block, b [64, or the padded width]")] = None,
    reads: Annotated[int, typer.Option(help="buckets probed in a table, N")] = 1,
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
def tune(
    files: Annotated[list[Path] | None, typer.Argument(help="files that save_packed wrote")] = None,
    hidden_size: Annotated[int, typer.Option(help="without files: width of the layer, D = E")] = 768,
    num_tables: Annotated[int, typer.Option(help="tables T")] = 128,
    code_bits: Annotated[int, typer.Option(help="bits of a code, tau")] = 8,
    block_size: Annotated[int | None, typer.Option(help="edge of a BH4 block, b [64, or the padded width]")] = None,
    reads: Annotated[int, typer.Option(help="buckets probed in a table, N")] = 1,
    dtype: Annotated[str, typer.Option(help="of the tables: int8, bfloat16 or float32")] = "int8",
    tokens: Annotated[list[int], typer.Option(help="tokens a call; repeat for more")] = [8, 256],
    seconds: Annotated[float, typer.Option(help="time for each comparison")] = 0.5,
):
    """Times loop sizes for the layers in packed files, or for one shape, and keeps them for pack(..., tune=True)."""
    from lookupffn.bench.timing import time_interleaved
    from lookupffn.layer import LookupConfig, LookupFFN
    from lookupffn.runtime.packed import PackedLookupFFN, pack, read_layers
    from lookupffn.runtime.tuning import cache_file, timed_tiling

    if min(tokens) < 1 or not seconds > 0:
        raise InputError(f"tokens and seconds must be positive, not {min(tokens)} and {seconds}")
    if reason := native.load():
        raise InputError(f"without the compiled kernels there are no loops to tune: {reason}")
    shape = {"num_tables": num_tables, "code_bits": code_bits, "block_size": block_size, "reads": reads}
    layers = {}
    try:
        for file in files or []:
            layers |= {f"{file} {name}".strip(): layer for name, layer in read_layers(file).items()}
        if not files:
            layers["random weights"] = pack(LookupFFN(LookupConfig(hidden_size, hidden_size, **shape)), dtype)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from None
    alike: dict[tuple, list[str]] = {}  # layers of one shape and type share their loop sizes
    for name, layer in layers.items():
        alike.setdefault((layer.config, layer.table_dtype, layer.weight_dtype), []).append(name)

    console = Console(soft_wrap=True)
    for names in alike.values():
        label, layer = names[0] + (f" and {len(names) - 1} alike" if names[1:] else ""), layers[names[0]]
        with console.status(f"timing {label}"), torch.no_grad():
            timed = PackedLookupFFN(layer.config, layer.packed, timed_tiling(layer.config, layer.packed, refresh=True))
            us = []  # a token: by the formula, timed
            for n in tokens:
                x = torch.randn(n, layer.config.in_features)
                times = time_interleaved({"formula": partial(layer, x), "timed": partial(timed, x)}, seconds)
                us.append([times[which].median / n * 1e6 for which in ("formula", "timed")])
        console.print(
            f"[bold]{escape(label)}[/], {native.implementation()}, {torch.get_num_threads()} thread(s), µs a token"
        )
        table = Table(box=box.SIMPLE)
        table.add_column("loop sizes", no_wrap=True)
        for heading in ("tile", "block", "prefetch", "serial", *(f"{n:,} tokens" for n in tokens)):
            table.add_column(heading, justify="right", no_wrap=True)  # first the fields of Tiling, in their order
        table.add_row("formula", *_sizes(layer), *(f"{formula:.2f}" for formula, _ in us))
        table.add_row("timed", *_sizes(timed), *(f"{best:.2f} ({best / formula:.2f}x)" for formula, best in us))
        console.print(table)
    console.print(f"kept in [bold]{cache_file()}[/]; pack and load_packed use it with tune=True")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="folder or name of a model of transformers or sentence-transformers")],
    output: Annotated[Path, typer.Option(help="folder for the packed model")],
    linears: Annotated[str, typer.Option(help="of dense products: int8, bfloat16 or float32")] = "int8",
    tables: Annotated[str, typer.Option(help="of lookup tables: int4, int8, bfloat16 or float32")] = "int8",
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls or none, of the encoder alone, without its head [as the model says]")
    ] = None,
):
    """Writes a model as one file that `embed`, `classify` and lookupffn.Session run in one native call."""
    require("hf", "lookupffn export")
    from lookupffn.train.commands import quiet

    quiet()
    from lookupffn.hf.loading import load_encoder
    from lookupffn.runtime.export import export as run

    encoder, tokenizer = load_encoder(model, head=pooling is None)
    folder = run(encoder, output, linears=linears, tables=tables, tokenizer=tokenizer, pooling=pooling)
    size = sum(path.stat().st_size for path in folder.iterdir())
    Console(soft_wrap=True).print(f"{size / 2**20:,.1f} MiB in [bold]{folder}[/]")


@app.command()
def embed(
    folder: Annotated[Path, typer.Argument(help="folder that `export` wrote")],
    file: Annotated[Path, typer.Argument(help="texts, one a line, in UTF-8")],
    output: Annotated[Path, typer.Option(help="file for the vectors, a numpy array (texts, hidden_size)")],
    threads: Annotated[int, typer.Option(help="threads")] = 1,
):
    """Embeds the lines of a file by a packed model."""
    from lookupffn.runtime.session import Session

    check_writable(output)
    session, texts = Session(folder, threads), _lines(file)
    start = time.perf_counter()
    vectors = session.embed(texts, progress=True)
    _save(output, vectors, "vectors", time.perf_counter() - start)


@app.command()
def classify(
    folder: Annotated[Path, typer.Argument(help="folder that `export` wrote")],
    file: Annotated[Path, typer.Argument(help="texts, one a line, in UTF-8; in a .tsv pairs, with a tab between")],
    output: Annotated[
        Path | None, typer.Option(help="file for the logits, a numpy array (texts, labels) [prints each best label]")
    ] = None,
    threads: Annotated[int, typer.Option(help="threads")] = 1,
):
    """Classifies the lines of a file by a packed classifier; prints the best label of each and its logit."""
    from lookupffn.runtime.session import Session

    if output is not None:
        check_writable(output)
    session, texts, pairs = Session(folder, threads), _lines(file), None
    if file.suffix.lower() == ".tsv":
        rows = [line.split("\t") for line in texts]
        for number, row in enumerate(rows, 1):
            if len(row) != 2:
                raise InputError(f"{file}:{number} has {len(row)} column(s): a .tsv holds pairs of texts")
        texts, pairs = [first for first, _ in rows], [second for _, second in rows]
    start = time.perf_counter()
    logits = session.classify(texts, pairs, progress=output is not None)
    if output is not None:
        _save(output, logits, f"logits of {', '.join(session.labels)}", time.perf_counter() - start)
        return
    for row in logits:
        best = int(row.argmax())
        typer.echo(f"{session.labels[best]}\t{row[best]:.4f}")


def _lines(file: Path) -> list[str]:
    """The lines of a file, those without text too; other characters at which Unicode breaks lines are text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from None
    return lines if lines[-1] else lines[:-1]


def _save(output: Path, values: np.ndarray, what: str, seconds: float) -> None:
    with atomic_replace(output) as temporary, open(temporary, "wb") as stream:
        np.save(stream, values)
    said = f"{len(values):,} texts in {seconds:.1f} s, {escape(what)} in [bold]{escape(str(output))}[/]"
    Console(soft_wrap=True).print(said)


def _sizes(layer) -> list[str]:
    return [str(size) for size in dataclasses.astuple(layer.tiling)]


def main() -> None:
    try:
        app()
    except InputError as error:  # refused input: one line that says why; anything else keeps its traceback
        message = f"[bold red]lookupffn:[/] {escape(str(error))}"
        Console(stderr=True, soft_wrap=True).print(message, highlight=False)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
