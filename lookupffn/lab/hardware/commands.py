"""``lookupffn hardware ...``: the hardware study on the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.files import check_writable, write_json_lines
from lookupffn.lab.hardware.options import (
    BlockSize,
    CodeBits,
    Dtype,
    HiddenSize,
    IntermediateSize,
    Layers,
    MachineOption,
    NumTables,
    Reads,
    Refresh,
    Threads,
    Tokens,
    cache_of,
    check_dtypes,
    check_positive,
    config_of,
    machine_of,
    probed,
    read_lines,
    shown,
)
from lookupffn.lab.hardware.tables import print_advice, print_operations, print_probe, print_validation

app = typer.Typer(no_args_is_help=True, help="What this machine gives, and what the layer takes on it and on others.")


@app.command()
def probe(json_file: Annotated[str, typer.Option("--json", help="file of the record")] = "runs/hardware/probe.json"):
    """Measures this machine in under a minute: instructions, caches, memory, pages, products; table and JSON."""
    console = Console(soft_wrap=True)
    check_writable(Path(json_file))
    with shown("probing", console) as progress:
        record = probed(progress)
    write_json_lines(Path(json_file), [record])
    print_probe(record, console)
    console.print(f"the record is in [bold]{json_file}[/]")


@app.command()
def machines():
    """The described processors: what is known of each, and where from."""
    from lookupffn.lab.hardware.described import descriptions

    console = Console(soft_wrap=True)
    for name, d in descriptions().items():
        console.print(f"[bold]{name}[/]: {d['name']}, {d['kind']}, {d['cores']} cores at {d['clock_ghz']} GHz")
        for source in d["sources"]:
            console.print(f"  {', '.join(source['figures'])}: {source['title']}, {source['where']}", style="dim")


@app.command()
def predict(
    machine: MachineOption = "here",
    hidden_size: HiddenSize = 768,
    intermediate_size: IntermediateSize = None,
    num_tables: NumTables = 128,
    code_bits: CodeBits = 8,
    reads: Reads = 3,
    block_size: BlockSize = 8,
    dtype: Dtype = "int8",
    layers: Layers = 12,
    tokens: Tokens = [1, 64, 4096],
    threads: Threads = 1,
    operations: Annotated[
        str | None, typer.Option(help="file of `count`, for an install without the library that counts")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="file for one JSON line a number of tokens")] = None,
    refresh: Refresh = False,
):
    """What a layer takes on a machine, loop by loop, what each is bound by, and dense beside it."""
    from lookupffn.lab.hardware import counting, model
    from lookupffn.lab.hardware.case import DTYPES, Case

    inner, console = intermediate_size or 4 * hidden_size, Console(soft_wrap=True)
    check_positive(hidden_size=hidden_size, intermediate_size=inner, layers=layers, tokens=min(tokens), threads=threads)
    check_dtypes([dtype])
    config = config_of(hidden_size, num_tables, code_bits, reads, block_size)
    if operations:
        counting.add_known(read_lines(operations))
    m, records = machine_of(machine, console, refresh), []
    for n in tokens:
        found = model.predict(model.tuned(Case(config, dtype, n, threads, layers), m), m)
        table = Table(title=f"{n:,} token(s) a call, {threads} thread(s): ns a token on {m.name}", box=box.SIMPLE)
        for heading in ("stage", "loop", "ns", "bound by"):
            table.add_column(heading, justify="right" if heading == "ns" else "left")
        for stage, bounds in found.stages.items():
            for b in bounds:
                table.add_row(stage, b.loop, f"{b.ns:,.1f}", b.bound_by)
        table.add_row("call", "", f"{found.overhead_ns:,.1f}", "")
        table.add_row("[bold]all[/]", "", f"[bold]{found.ns:,.1f}[/]", "")
        dense = {d: model.dense_ns(hidden_size, inner, m, d, n, threads, layers) for d in DTYPES}
        for d, ns in dense.items():
            table.add_row(f"dense {d}", "at least", f"{ns:,.1f}" if ns < float("inf") else "no such product", "")
        console.print(table)
        records.append(
            {
                "what": "prediction", "machine": m.name, "hidden_size": hidden_size, "intermediate_size": inner,
                **{name: getattr(config, name) for name in ("num_tables", "code_bits", "reads", "block_size")},
                "dtype": dtype, "layers": layers, "tokens": n, "threads": threads, "predicted_us": found.ns / 1e3,
                "predicted_stages_us": {s: sum(b.ns for b in bounds) / 1e3 for s, bounds in found.stages.items()},
                "dense_us": {d: ns / 1e3 for d, ns in dense.items() if ns < float("inf")},
            }
        )  # fmt: skip
    if json_file:
        write_json_lines(Path(json_file), records)
        console.print(f"the lines are in [bold]{json_file}[/]")


@app.command()
def count(
    hidden_size: HiddenSize = 768,
    num_tables: NumTables = 128,
    code_bits: CodeBits = 8,
    reads: Reads = 3,
    block_size: BlockSize = 8,
    dtype: Dtype = "int8",
    tokens: Tokens = [1, 64, 4096],
    threads: Threads = 1,
    json_file: Annotated[str, typer.Option("--json", help="file of the lines")] = "runs/hardware/operations.jsonl",
):
    """Operations of each loop for a token, by running the kernels on a vector shim that counts; table and lines."""
    from lookupffn.lab.hardware import counting
    from lookupffn.lab.hardware.case import Case
    from lookupffn.runtime.tuning import Tiling, block_sizes

    check_positive(hidden_size=hidden_size, tokens=min(tokens), threads=threads)
    check_dtypes([dtype])
    config = config_of(hidden_size, num_tables, code_bits, reads, block_size)
    console, records = Console(soft_wrap=True), []
    for n in tokens:
        # All that `predict` chooses from; the first has all tables in one block.
        tilings = [Tiling(groups_per_block=groups) for groups in block_sizes(num_tables)]
        cases = [Case(config, dtype, n, threads, tiling=tiling) for tiling in tilings]
        records += (counting.record(case) for case in cases)
        print_operations(counting.count(cases[0]), f"{n:,} token(s) a call: operations a token", console)
    write_json_lines(Path(json_file), records)
    console.print(f"the lines are in [bold]{json_file}[/]")


@app.command()
def validate(
    cases: Annotated[int, typer.Option(help="layers and calls, a random sample")] = 24,
    steps: Annotated[int, typer.Option(help="training steps, a random sample")] = 4,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    passes: Annotated[int, typer.Option(help="measurements of everything in turn; the median of each counts")] = 12,
    seconds: Annotated[float, typer.Option(help="time for each measurement")] = 0.2,
    json_file: Annotated[str, typer.Option("--json", help="file of the lines")] = "runs/hardware/validate.jsonl",
):
    """Predictions beside measurements on this machine: how far the model is to be trusted here."""
    import torch

    from lookupffn.bench.timing import keep_freed_memory
    from lookupffn.lab.hardware import validate as run

    check_positive(cases=cases, passes=passes, seconds=seconds)
    check_writable(Path(json_file))
    console = Console(soft_wrap=True)
    samples = run.sample_cases(cases, seed, torch.get_num_threads()), run.sample_steps(steps, seed)
    keep_freed_memory()
    with shown("validating", console) as progress:

        def probe_once():
            return probed(lambda what: progress(f"probing {what}"), passes=1)

        records = run.validate(*samples, probe_once, passes, seconds, progress)
    summaries = run.summaries(records)
    print_validation(records, summaries, console)
    write_json_lines(Path(json_file), [*records, *summaries])
    console.print(f"the lines are in [bold]{json_file}[/]")


@app.command()
def simulate(
    caches: Annotated[
        list[str], typer.Option(help="KiB/ways of a level, from L1 outwards; repeat for more [those of this machine]")
    ] = [],
    hidden_size: HiddenSize = 512,
    num_tables: NumTables = 128,
    code_bits: CodeBits = 8,
    reads: Reads = 1,
    dtype: Dtype = "int8",
    tokens: Annotated[int, typer.Option(help="tokens a call")] = 512,
    entropy: Annotated[
        float | None, typer.Option(help="bits of the nearest rows' codes in a table; code_bits is uniform [code_bits]")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="file for one JSON line an order")] = None,
):
    """Lines that the gather misses in each cache: token by token, table by table, and as the engine has it."""
    from lookupffn import machine
    from lookupffn.lab.hardware import gather_stream

    check_positive(hidden_size=hidden_size, tokens=tokens)
    console = Console(soft_wrap=True)
    try:
        levels = [gather_stream.Cache(*cache_of(text)) for text in caches] or [
            gather_stream.Cache(c["bytes"], c["ways"]) for c in machine.caches() if "ways" in c
        ]
        if not levels:
            raise InputError("this system does not describe its caches; give them: --caches 32/8 --caches 1024/16")
        uniform = entropy is None or entropy == code_bits
        codes = gather_stream.skewed_codes(
            tokens, num_tables, code_bits, reads, entropy=code_bits if uniform else entropy
        )
        table = Table(title=f"lines a token, {tokens:,} tokens a call, caches empty before it", box=box.SIMPLE)
        table.add_column("order")
        for heading in ("read or written", *(f"missed in L{level}" for level in range(1, len(levels) + 1))):
            table.add_column(heading, justify="right")
        records = []
        for order in gather_stream.ORDERS:
            gather = gather_stream.Gather(num_tables, 2**code_bits, hidden_size, reads, dtype, order)
            with console.status(f"{order}"):
                simulator, lines = gather_stream.CacheSimulator(levels), 0
                missed = [0] * len(levels)
                for part in gather_stream.gather_lines(gather, codes):
                    lines += part.size
                    missed = [a + int(b) for a, b in zip(missed, simulator.access(part), strict=True)]
            a_token = [count / tokens for count in missed]
            table.add_row(order, f"{lines / tokens:,.0f}", *(f"{count:,.1f}" for count in a_token))
            records.append(
                {
                    "what": "simulation", "order": order, "hidden_size": hidden_size, "num_tables": num_tables,
                    "code_bits": code_bits, "reads": reads, "dtype": dtype, "tokens": tokens,
                    "entropy": code_bits if uniform else entropy, "lines_per_token": lines / tokens,
                    "caches": [[level.bytes, level.ways] for level in levels], "misses_per_token": a_token,
                }
            )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None
    console.print(table)
    if json_file:
        write_json_lines(Path(json_file), records)
        console.print(f"the lines are in [bold]{json_file}[/]")


@app.command()
def study(
    output_dir: Annotated[str, typer.Option(help="folder of lines and report")] = "runs/hardware",
    machine: Annotated[
        list[str], typer.Option(help="beside the described ones: `here`, or a file that probe wrote; repeat for more")
    ] = [],
    lines: Annotated[
        list[str], typer.Option(help="JSON lines of validate, simulate or the ladder for the report; repeat for more")
    ] = [],
):
    """Lookup beside dense on every described machine and on chips that are not built yet: lines, plots, report."""
    require("lab", "lookupffn hardware study")
    from lookupffn.lab.hardware import study as run
    from lookupffn.lab.hardware.described import describe, descriptions
    from lookupffn.lab.report.study import write_study

    console, folder = Console(soft_wrap=True), Path(output_dir)
    given = [record for file in lines for record in read_lines(file)]
    check_writable(folder / "study.jsonl")
    described = descriptions()
    found = {name: describe(d) for name, d in described.items()}
    measured = {"here" if name == "here" else Path(name).stem: machine_of(name, console) for name in machine}
    with console.status("predicting"):
        records = list(run.study(measured | found))
    names = {name: f"{m.name}, measured" for name, m in measured.items()}
    names |= {name: f"{d['name']}, {d['kind']}" for name, d in described.items()}
    table = Table(title="what would help", box=box.SIMPLE)
    for heading in ("feature", "times faster", "least", "most", "on"):
        table.add_column(heading, justify="left" if heading in ("feature", "on") else "right")
    for r in records:
        if r["what"] == "feature":
            table.add_row(r["feature"], *(f"{r[n]:.2f}" for n in ("times_faster", "least", "most")), r["most_on"])
    console.print(table)
    path = folder / "study.jsonl"
    write_json_lines(path, records)
    page = write_study(records + given, folder, names, "lookupffn hardware study")
    console.print(f"the lines are in [bold]{path}[/], the report in [bold]{page}[/]")


def advise(
    hidden_size: HiddenSize = 768,
    intermediate_size: IntermediateSize = None,
    layers: Layers = 12,
    memory: Annotated[float, typer.Option(help="MiB that all lookup layers may take together")] = 1024.0,
    fewer: Annotated[float, typer.Option(help="how many times fewer multiply-adds than dense, at least")] = 6.0,
    tokens: Tokens = [1, 64, 4096],
    threads: Threads = 1,
    machine: MachineOption = "here",
    dtype: Annotated[list[str], typer.Option(help="of tables: int8, bfloat16, float32; repeat for more")] = ["int8"],
    check: Annotated[bool, typer.Option(help="time the first of them here, beside every dense engine at hand")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="by sizes and caches alone, in seconds: no times")] = False,
    refresh: Refresh = False,
):
    """Names tables, code bits, reads and type for a model's shape, a memory budget and a machine, with the times."""
    from lookupffn.bench.timing import keep_freed_memory
    from lookupffn.lab.hardware import advice

    inner, console = intermediate_size or 4 * hidden_size, Console(soft_wrap=True)
    check_positive(hidden_size=hidden_size, intermediate_size=inner, layers=layers, memory=memory, fewer=fewer)
    check_positive(tokens=min(tokens), threads=threads)
    check_dtypes(dtype)
    limits, counts = (hidden_size, inner, layers, memory * 2**20), {"tokens": tokens, "threads": threads}
    try:
        advice.candidates(*limits, fewer, dtype)  # refused before minutes of probing
        m = None if quick else machine_of(machine, console, refresh)
        found = advice.advise(*limits, m, fewer=fewer, dtypes=dtype, **counts)
    except ValueError as error:
        raise InputError(str(error)) from None
    print_advice(found, f"{layers} layers of width {hidden_size}, dense FFN {inner}", m, console)
    if quick:
        console.print("Without --quick: predicted times, and the first of these timed beside dense.")
    if machine != "here" or not check or quick:
        console.print("Not measured for this shape; docs/hardware.md says how far predictions were off elsewhere.")
        return
    first, engines = found.options[0], advice.engines()
    minutes = math.ceil(len(engines) * len(tokens) * advice.SECONDS_AN_ENGINE / 60)
    keep_freed_memory()
    what = f"timing the first beside {len(engines)} dense engines, about {minutes} min (--no-check leaves it out)"
    with shown(what, console) as progress:
        times = advice.measure(first, hidden_size, inner, layers, threads=threads, progress=progress)
    for n, measured in times.items():
        lookup, predicted = measured.pop("lookup"), first.ns[n]
        engine = min(measured, key=measured.get)
        console.print(
            f"{n:,} token(s): measured [bold]{lookup / 1e3:.2f}[/] µs, {lookup / predicted - 1:+.0%} to predicted; "
            f"the fastest dense engine here, {engine}, takes {measured[engine] / 1e3:.2f} µs: "
            f"[bold]{measured[engine] / lookup:.1f} times[/] as long"
        )
