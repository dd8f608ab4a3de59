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
        str | None, typer.Option(help="instead of layers: a whole encoder by its folder, in the runtime and in engines")
    ] = None,
):
    """Times packed lookup layers, or a whole encoder, beside every dense engine that is installed, on this machine."""
    if min(*hidden_size, *tokens, *(threads or [1])) < 1 or not seconds > 0:
        raise InputError("hidden sizes, tokens, threads and seconds must be positive")
    require("bench", "lookupffn bench")  # before anything is measured
    if model is not None:
        return _bench_model(model, threads or [1], seconds, seed, Path(json))
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


def _bench_model(name: str, threads: list[int], seconds: float, seed: int, path: Path) -> None:
    require("hf", "lookupffn bench --model")
    from lookupffn.bench.models import bench_model
    from lookupffn.hf.loading import load_encoder

    check_writable(path)
    model, _ = load_encoder(name)
    encoder = model[0].auto_model if hasattr(model, "encode") else model
    console, records = Console(soft_wrap=True), []
    for count in threads:
        table = Table(title=f"{name}, {count} thread(s): microseconds a token", box=box.SIMPLE)
        rows: dict[str, dict[str, float]] = {}
        for record in bench_model(name, encoder.eval(), count, seconds, seed):
            records.append(record)
            if record["what"] == "model":
                rows.setdefault(record["engine"], {})[record["shape"]] = record["us_per_token"]
            else:
                for engine, reason in record["engines"].items():
                    console.print(f"left out: {engine}, {reason}")
        for heading in ("engine", *next(iter(rows.values()))):
            table.add_column(heading, justify="left" if heading == "engine" else "right")
        for engine, times in rows.items():
            table.add_row(engine, *(f"{us:.1f}" for us in times.values()))
        console.print(table)
        write_json_lines(path, records)
    console.print(f"measurements in [bold]{path}[/]")
