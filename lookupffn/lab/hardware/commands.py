"""``lookupffn hardware ...``: the hardware study on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.lab.hardware.tables import print_probe, print_validation

if TYPE_CHECKING:
    from lookupffn.lab.hardware.model import Machine
    from lookupffn.layer import LookupConfig

app = typer.Typer(no_args_is_help=True, help="What this machine gives, and what the layer takes on it and on others.")


@app.command()
def probe(json_file: Annotated[str, typer.Option("--json", help="file of the record")] = "runs/hardware/probe.json"):
    """Measures this machine in under a minute: instructions, caches, memory, pages, products; table and JSON."""
    console = Console(soft_wrap=True)
    with console.status("probing") as status:
        record = _probed(lambda what: status.update(f"probing: {what}"))
    path = write_lines([record], json_file)
    print_probe(record, console)
    console.print(f"the record is in [bold]{path}[/]")


# What several commands take.
MachineOption = Annotated[
    str, typer.Option(help="here: measured now; a file that probe wrote; or a described processor, see `machines`")
]
HiddenSize = Annotated[int, typer.Option(help="width of the model, D = E")]
IntermediateSize = Annotated[int | None, typer.Option(help="width inside the dense FFN [4 times the hidden size]")]
Layers = Annotated[int, typer.Option(help="layers of the model, which take turns in the caches")]
Tokens = Annotated[list[int], typer.Option(help="tokens a call; repeat for more")]
Threads = Annotated[int, typer.Option(help="threads")]


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
    num_tables: Annotated[int, typer.Option(help="tables T")] = 128,
    code_bits: Annotated[int, typer.Option(help="bits of a code, tau")] = 8,
    reads: Annotated[int, typer.Option(help="nearest cells read in a table, N")] = 3,
    block_size: Annotated[int, typer.Option(help="edge of a BH4 block, b")] = 8,
    dtype: Annotated[str, typer.Option(help="of the tables: int8, bfloat16 or float32")] = "int8",
    layers: Layers = 12,
    tokens: Tokens = [1, 64, 4096],  # noqa: B006
    threads: Threads = 1,
    json_file: Annotated[str | None, typer.Option("--json", help="file for one JSON line a number of tokens")] = None,
):
    """What a layer takes on a machine, loop by loop, what each waits for, and dense beside it."""
    from lookupffn.lab.hardware import model
    from lookupffn.lab.hardware.work import PROJECTION_DTYPES, Case

    inner, console = intermediate_size or 4 * hidden_size, Console(soft_wrap=True)
    _positive(hidden_size=hidden_size, intermediate_size=inner, layers=layers, tokens=min(tokens), threads=threads)
    _known_dtypes([dtype])
    config = _config(hidden_size, num_tables, code_bits, reads, block_size)
    m, records = _machine(machine, console), []
    for n in tokens:
        found = model.predict(model.tuned(Case(config, dtype, n, threads, layers), m), m)
        table = Table(title=f"{n:,} token(s) a call, {threads} thread(s): ns a token on {m.name}", box=box.SIMPLE)
        for heading in ("stage", "loop", "ns", "waits for"):
            table.add_column(heading, justify="right" if heading == "ns" else "left")
        for stage, bounds in found.stages.items():
            for b in bounds:
                table.add_row(stage, b.loop, f"{b.ns:,.1f}", b.limit)
        table.add_row("call", "", f"{found.overhead_ns:,.1f}", "")
        table.add_row("[bold]all[/]", "", f"[bold]{found.ns:,.1f}[/]", "")
        dense = {d: model.dense_ns(hidden_size, inner, m, d, n, threads, layers) for d in PROJECTION_DTYPES}
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
        console.print(f"the lines are in [bold]{write_lines(records, json_file)}[/]")


@app.command()
def validate(
    cases: Annotated[int, typer.Option(help="layers and calls drawn at random")] = 24,
    steps: Annotated[int, typer.Option(help="training steps drawn at random")] = 4,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    passes: Annotated[int, typer.Option(help="measurements of everything in turn; the median of each counts")] = 12,
    seconds: Annotated[float, typer.Option(help="time for each measurement")] = 0.2,
    json_file: Annotated[str, typer.Option("--json", help="file of the lines")] = "runs/hardware/validate.jsonl",
):
    """Predictions beside measurements on this machine: how far the model is to be trusted here."""
    import torch

    from lookupffn.lab.hardware import validate as run

    _positive(cases=cases, passes=passes, seconds=seconds)
    console = Console(soft_wrap=True)
    drawn = run.draw_cases(cases, seed, torch.get_num_threads()), run.draw_steps(steps, seed)
    with console.status("validating") as status:

        def probed():
            return _probed(lambda what: status.update(f"probing: {what}"), passes=1)

        records = run.validate(*drawn, probed, passes, seconds, status.update)
    summaries = run.summaries(records)
    print_validation(records, summaries, console)
    console.print(f"the lines are in [bold]{write_lines([*records, *summaries], json_file)}[/]")


@app.command()
def simulate(
    caches: Annotated[
        list[str], typer.Option(help="KiB/ways of a level, from L1 outwards; repeat for more [those of this machine]")
    ] = [],  # noqa: B006
    hidden_size: HiddenSize = 512,
    num_tables: Annotated[int, typer.Option(help="tables T")] = 128,
    code_bits: Annotated[int, typer.Option(help="bits of a code, tau")] = 8,
    reads: Annotated[int, typer.Option(help="nearest cells read in a table, N")] = 1,
    dtype: Annotated[str, typer.Option(help="of the rows: int8, bfloat16 or float32")] = "int8",
    tokens: Annotated[int, typer.Option(help="tokens a call")] = 512,
    entropy: Annotated[
        float | None, typer.Option(help="bits of the nearest rows' codes in a table; code_bits is uniform [code_bits]")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="file for one JSON line an order")] = None,
):
    """Lines that the gather misses in each cache: token by token, table by table, and as the engine has it."""
    from lookupffn import machine
    from lookupffn.lab.hardware import gather_stream

    _positive(hidden_size=hidden_size, tokens=tokens)
    console = Console(soft_wrap=True)
    try:
        levels = [gather_stream.Cache(*_cache(text)) for text in caches] or [
            gather_stream.Cache(c["bytes"], c["ways"]) for c in machine.caches() if "ways" in c
        ]
        if not levels:
            raise _refused("this system does not describe its caches; give them: --caches 32/8 --caches 1024/16")
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
        raise _refused(str(error)) from None
    console.print(table)
    if json_file:
        console.print(f"the lines are in [bold]{write_lines(records, json_file)}[/]")


@app.command()
def study(
    output_dir: Annotated[str, typer.Option(help="folder of lines and report")] = "runs/hardware",
    machine: Annotated[
        list[str], typer.Option(help="beside the described ones: `here`, or a file that probe wrote; repeat for more")
    ] = [],  # noqa: B006
    lines: Annotated[
        list[str], typer.Option(help="JSON lines of validate, simulate or the ladder for the report; repeat for more")
    ] = [],  # noqa: B006
):
    """Lookup beside dense on every described machine and on chips that are not built yet: lines, plots, report."""
    from lookupffn.lab.hardware import study as run
    from lookupffn.lab.hardware.described import describe, descriptions
    from lookupffn.lab.report.study import write_study

    console, folder = Console(soft_wrap=True), Path(output_dir)
    given = [record for file in lines for record in _read_lines(file)]
    described = descriptions()
    found = {name: describe(d) for name, d in described.items()}
    measured = {"here" if name == "here" else Path(name).stem: _machine(name, console) for name in machine}
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
    path = write_lines(records, folder / "study.jsonl")
    try:
        page = write_study(records + given, folder, names, "lookupffn hardware study")
    except ImportError as error:
        raise _refused(str(error)) from None
    console.print(f"the lines are in [bold]{path}[/], the report in [bold]{page}[/]")


def advise(
    hidden_size: HiddenSize = 768,
    intermediate_size: IntermediateSize = None,
    layers: Layers = 12,
    memory: Annotated[float, typer.Option(help="MiB that all lookup layers may take together")] = 1024.0,
    fewer: Annotated[float, typer.Option(help="how many times fewer multiply-adds than dense, at least")] = 6.0,
    tokens: Tokens = [1, 64, 4096],  # noqa: B006
    threads: Threads = 1,
    machine: MachineOption = "here",
    dtype: Annotated[list[str], typer.Option(help="of tables: int8, bfloat16, float32; repeat for more")] = ["int8"],  # noqa: B006
    check: Annotated[bool, typer.Option(help="time the first of them here, beside every dense engine at hand")] = True,
):
    """Names tables, code bits, reads and type for a model's shape, a memory budget and a machine, with the times."""
    from lookupffn.lab.hardware import advice

    inner, console = intermediate_size or 4 * hidden_size, Console(soft_wrap=True)
    _positive(hidden_size=hidden_size, intermediate_size=inner, layers=layers, memory=memory, fewer=fewer)
    _positive(tokens=min(tokens), threads=threads)
    _known_dtypes(dtype)
    m = _machine(machine, console)
    try:
        found = advice.advise(
            hidden_size, inner, layers, memory * 2**20, m, fewer=fewer, dtypes=dtype, tokens=tokens, threads=threads
        )
    except ValueError as error:
        raise _refused(str(error)) from None
    table = Table(title=f"{layers} layers of width {hidden_size}, dense FFN {inner}, on {m.name}", box=box.SIMPLE)
    for heading in ("tables", "bits", "reads", "type", "MiB", "dense / it", *(f"{n:,} tok." for n in tokens)):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for number, o in enumerate(found.options):
        c = o.config
        times = (f"{o.ns[n] / 1e3:.2f} ({found.dense[n][1] / o.ns[n]:.1f}x)" for n in tokens)
        sizes = (str(c.num_tables), str(c.code_bits), str(c.reads), o.dtype, f"{o.memory_bytes / 2**20:,.0f}")
        style = "bold" if number == 0 else None
        table.add_row(*sizes, f"{found.dense_macs / o.macs:.1f}", *times, style=style)
    table.add_row("dense", "", "", "", "", "", *(f"{ns / 1e3:.2f} {dtype}" for dtype, ns in found.dense.values()))
    console.print(table)
    console.print(
        "Predicted µs a token and layer; (Nx): dense at its least possible time, which no engine reaches, over it. "
        "First comes the fastest of the layers with about the most rows times reads within the limits: quality "
        "followed these (docs/quality.md)."
    )
    if machine != "here" or not check:
        console.print("Not measured for this shape; docs/hardware.md says how far predictions were off elsewhere.")
        return
    first = found.options[0]
    with console.status("timing the first beside dense"):
        times = advice.measure(first, hidden_size, inner, layers, threads=threads)
    for n, measured in times.items():
        lookup, predicted = measured.pop("lookup"), first.ns[n]
        engine = min(measured, key=measured.get)
        console.print(
            f"{n:,} token(s): measured [bold]{lookup / 1e3:.2f}[/] µs, {lookup / predicted - 1:+.0%} to predicted; "
            f"the fastest dense engine here, {engine}, takes {measured[engine] / 1e3:.2f} µs: "
            f"[bold]{measured[engine] / lookup:.1f} times[/] as long"
        )


# ---- Input -----------------------------------------------------------------------------------------------------------


def _refused(message: str) -> Exception:
    from lookupffn.errors import InputError

    return InputError(message)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise _refused(f"{name} must be positive, not {value}")


def _read_lines(file: str) -> list[dict]:
    try:
        found = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise _refused(f"{file} holds no JSON lines: {error}") from None
    if not all(isinstance(record, dict) and "what" in record for record in found):
        raise _refused(f"{file}: each line must be a record with `what` it is")
    return found


def _known_dtypes(names: Sequence[str]) -> None:
    from lookupffn.lab.hardware.work import PROJECTION_DTYPES

    for name in names:
        if name not in PROJECTION_DTYPES:
            raise _refused(f"dtype {name!r} is none of {', '.join(PROJECTION_DTYPES)}")


def _config(width: int, num_tables: int, code_bits: int, reads: int, block_size: int) -> LookupConfig:
    from lookupffn.layer import LookupConfig

    try:
        return LookupConfig(width, width, num_tables, code_bits, reads=reads, block_size=block_size)
    except ValueError as error:
        raise _refused(str(error)) from None


def _cache(text: str) -> tuple[int, int]:
    size, slash, ways = text.partition("/")
    if not (slash and size.isdigit() and ways.isdigit()):
        raise _refused(f"--caches takes KiB/ways, as 32/8, not {text!r}")
    return int(size) * 2**10, int(ways)


def _machine(name: str, console: Console) -> Machine:
    """This machine probed, a described one, or one that was probed before."""
    from lookupffn.lab.hardware.described import describe, descriptions
    from lookupffn.lab.hardware.model import Machine

    if name == "here":
        with console.status("probing") as status:
            return Machine.from_probe(_probed(lambda what: status.update(f"probing: {what}")))
    known = descriptions()
    if name in known:
        return describe(known[name])
    try:
        return Machine.from_probe(json.loads(Path(name).read_text(encoding="utf-8")))
    except OSError:
        raise _refused(f"machine {name!r} is neither `here`, nor a file, nor one of {', '.join(known)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(f"{name} is no record of `lookupffn hardware probe`: {error!r}") from None


def _probed(progress, **options) -> dict:
    from lookupffn.lab.hardware.probe import probe

    try:
        return probe(progress, **options)
    except RuntimeError as error:
        raise _refused(str(error)) from None


def write_lines(records: Sequence[dict], file: str | Path) -> Path:
    """One JSON object a line."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
