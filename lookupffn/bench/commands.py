"""``lookupffn bench``."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

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
):
    """Times packed lookup layers beside every dense FFN engine that is installed, on this machine."""
    if min(*hidden_size, *tokens, *(threads or [1])) < 1 or not seconds > 0:
        raise InputError("hidden sizes, tokens, threads and seconds must be positive")
    require("bench", "lookupffn bench")  # before anything is measured
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
