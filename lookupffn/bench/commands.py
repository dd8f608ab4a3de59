"""``lookupffn bench``."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.files import check_writable, write_json_lines

app = typer.Typer()
WIDTHS = [512]
TOKENS = [1, 8, 64, 512, 4096, 32768]


@app.command()
def bench(
    hidden_size: Annotated[
        list[int], typer.Option(help="width; repeat for more; the dense FFN is 4 times as wide")
    ] = WIDTHS,
    tokens: Annotated[list[int], typer.Option(help="tokens a call; repeat for more")] = TOKENS,
    threads: Annotated[list[int] | None, typer.Option(help="threads; repeat for more [1 and all]")] = None,
    seconds: Annotated[float, typer.Option(help="time for each engine at each size")] = 0.5,
    json: Annotated[str, typer.Option(help="file for one JSON line a measurement")] = "runs/bench/bench.jsonl",
    plot: Annotated[str, typer.Option(help="file for the plot")] = "runs/bench/bench.png",
    training: Annotated[bool, typer.Option(help="time a training step of the layer as well")] = True,
    seed: Annotated[int, typer.Option(help="of weights and input")] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            help="instead of layers: a whole encoder by its folder, or minilm or bert-base with random weights"
        ),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="of --model: an engine, by its name's beginning; repeat for more [all]")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="of --model: texts x tokens, as 8x32, or ragged; repeat for more [six of them]"),
    ] = None,
):
    """Times packed lookup layers, or a whole encoder, beside every dense engine that is installed, on this machine."""
    if min(*hidden_size, *tokens, *(threads or [1])) < 1 or not seconds > 0:
        raise InputError("hidden sizes, tokens, threads and seconds must be positive")
    require("bench", "lookupffn bench")  # before anything is measured
    if model is not None:
        return _bench_model(model, threads or [1], seconds, seed, Path(json), engine or [], shape or [])
    if engine or shape:
        raise InputError(f"--{'engine' if engine else 'shape'} is for a whole encoder: give --model as well")
    from lookupffn.bench import benchmark as run
    from lookupffn.bench.timing import keep_freed_memory

    keep_freed_memory()
    console, counts = Console(soft_wrap=True), threads or sorted({1, torch.get_num_threads()})
    shapes = [(width, 4 * width) for width in hidden_size]
    for path in (json, plot):
        check_writable(Path(path))  # before anything is measured
    for records in run.bench(shapes, tokens, counts, seconds=seconds, seed=seed, training=training, console=console):
        write_json_lines(Path(json), records)  # after every shape: what was measured is kept if the rest is not
        run.plot(records, Path(plot))
    run.print_bandwidth(records, console)
    console.print(f"measurements in [bold]{json}[/], plot in [bold]{plot}[/]")


def _bench_model(
    name: str, threads: list[int], seconds: float, seed: int, path: Path, engines: list[str], shapes: list[str]
) -> None:
    require("hf", "lookupffn bench --model")
    from lookupffn.bench.encoders import encoder
    from lookupffn.bench.models import SHAPES, bench_model, chosen, parse_shape

    sizes = [parse_shape(text) for text in shapes] or list(SHAPES)
    chosen(engines)  # before anything is loaded
    check_writable(path)
    model = encoder(name, seed)
    console, records = Console(soft_wrap=True), []
    for count in threads:
        rows: dict[str, dict[str, float]] = {}
        with console.status("loading") as status:
            for record in bench_model(name, model, count, seconds, seed, sizes, engines, status.update):
                records.append(record)
                write_json_lines(path, records)  # what was measured is kept if the rest is not
                if record["what"] == "model":
                    rows.setdefault(record["engine"], {})[record["shape"]] = record["us_per_token"]
                elif record["what"] == "footprint":
                    console.print(_footprint(record))
                else:
                    for engine, reason in record["engines"].items():
                        console.print(f"left out: {engine}, {reason}")
        table = Table(title=f"{name}, {count} thread(s): microseconds a token", box=box.SIMPLE)
        headings = list(dict.fromkeys(shape for times in rows.values() for shape in times))
        for heading in ("engine", *headings):
            table.add_column(heading, justify="left" if heading == "engine" else "right")
        for engine, times in rows.items():
            table.add_row(engine, *(f"{times[shape]:.1f}" if shape in times else "" for shape in headings))
        console.print(table)
    console.print(f"measurements in [bold]{path}[/]")


def _footprint(record: dict) -> str:
    resident = record["resident_bytes"]
    memory = "not known, there is no /proc here" if resident is None else f"{resident / 2**20:.1f} MiB"
    file, opened = f"{record['bytes'] / 2**20:.1f} MiB", f"{record['open_seconds'] * 1e3:.1f} ms"
    return f"{record['engine']}, {record['shape']}: memory beside the file of {file}: {memory}; opened in {opened}"
