"""What the hardware study's commands print: counts, the probe's record, and predictions beside measurements."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn import machine as this_machine
from lookupffn.lab.hardware.advice import Advice, row_bytes
from lookupffn.lab.hardware.counting import Count
from lookupffn.lab.hardware.model import Machine


def print_advice(advice: Advice, model: str, machine: Machine | None, console: Console) -> None:
    """The options, with the times on a machine that were predicted, or with what decides them where none were."""
    table = Table(title=f"{model}, on {machine.name if machine else this_machine.cpu_name()}", box=box.SIMPLE)
    headings = [f"{n:,} tok." for n in advice.dense] or ["KiB of rows a token", "all tables fit"]
    for heading in ("tables", "bits", "reads", "type", "MiB", "dense / it", *headings):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for number, o in enumerate(advice.options):
        c = o.config
        sizes = (str(c.num_tables), str(c.code_bits), str(c.reads), o.dtype, f"{o.memory_bytes / 2**20:,.0f}")
        if machine:
            last = [f"{o.ns[n] / 1e3:.2f} ({ns / o.ns[n]:.1f}x)" for n, (_, ns) in advice.dense.items()]
        else:
            last = [f"{row_bytes(o) / 2**10:,.0f}", _holder(o.memory_bytes)]
        style = "bold" if number == 0 else None
        table.add_row(*sizes, f"{advice.dense_macs / o.macs:.1f}", *last, style=style)
    if machine:
        table.add_row("dense", "", "", "", "", "", *(f"{ns / 1e3:.2f} {dtype}" for dtype, ns in advice.dense.values()))
    console.print(table)
    limits = "of the layers with about the most rows times reads within the limits: quality followed these"
    if machine:
        console.print(
            "Predicted µs a token and layer; (Nx): dense at its least possible time, which no engine reaches, over it. "
            f"First comes the fastest {limits} (docs/quality.md)."
        )
    else:
        console.print(f"First comes the one that reads the fewest bytes a token {limits} (docs/quality.md).")


def _holder(table_bytes: int) -> str:
    """The first cache here that holds the tables."""
    holding = (cache["level"] for cache in this_machine.caches() if cache["bytes"] >= table_bytes)
    level = next(holding, None)
    return f"L{level}" if level else "memory"


def print_operations(count: Count, title: str, console: Console) -> None:
    """What each loop executes for a token, by kind."""
    table = Table("stage", "loop", "operations", title=title, box=box.SIMPLE)
    for stage, of_stage in count.stages.items():
        for loop, operations in of_stage.items():
            table.add_row(stage, loop, ", ".join(f"{kind} {n:,.6g}" for kind, n in operations.items()))
    console.print(table)


def print_validation(records: list[dict], summaries: list[dict], console: Console) -> None:
    """Predicted and measured times, and how far they are apart."""
    table = Table(box=box.SIMPLE)
    for heading in ("layer", "what", "tokens", "threads", "predicted µs", "measured µs", "error"):
        table.add_column(heading, justify="left" if heading in ("layer", "what") else "right")
    for r in (r for r in records if "predicted_us" in r):
        layer = f"D {r['in_features']}, T {r['num_tables']}, tau {r['code_bits']}, {r['reads']} read(s)"
        size = f"{r['tokens']:,}" + (f" x {r['layers']} layers" if r.get("layers", 1) > 1 else "")
        predicted, measured = r["predicted_us"], r["measured_us"]
        times = (f"{predicted:.3g}", f"{measured:.3g}", f"{predicted / measured - 1:+.0%}")
        table.add_row(layer, r.get("dtype") or r["stage"], size, str(r["threads"]), *times)
    console.print(table)
    for s in summaries:
        console.print(
            f"{s['of']}: median error {s['median_error']:.1%}, largest {s['largest_error']:.1%}, of {s['cases']}"
        )


def print_probe(record: dict, console: Console) -> None:
    """The probe's record as tables for people."""
    m, clock = record["machine"], record["clock_ghz"]
    quota = record["quota"] or "none"
    kernels = f"kernels {record['implementation']}, {record['threads']} thread(s), quota {quota}"
    console.print(f"[bold]{m['cpu']}[/], {kernels}")
    console.print(
        f"clock {clock['scalar']:.2f} GHz, beside wide vectors {clock['beside_wide_vectors']:.2f}; "
        f"huge pages: {record['huge_pages']}"
    )
    for c in record["caches"]:
        ways = f", {c['ways']} ways" if c.get("ways") else ""
        line = f", lines of {c['line_bytes']} bytes" if c.get("line_bytes") else ""
        console.print(
            f"L{c['level']} cache: {c['bytes'] // 2**10:,} KiB{ways}{line}, shared by {c['shared_by']} logical CPUs"
        )

    table = Table(title="instructions of one core", box=box.SIMPLE)
    for heading in ("instruction", "a nanosecond", "all cores at work", "a cycle", "median below best"):
        table.add_column(heading, justify="left" if heading == "instruction" else "right")
    for name, rate in record["rates"].items():
        at_work = f"{record['rates_all'][name]:.2f}" if "rates_all" in record else "-"
        steady = f"{100 * record['spread'][name]:.0f} %"
        table.add_row(name, f"{rate:.2f}", at_work, f"{rate / clock['scalar']:.2f}", steady)
    console.print(table)

    _print_memory(record["memory"], "one thread", console)
    if record.get("memory_all"):
        _print_memory(record["memory_all"], f"{record['threads']} threads", console)

    table = Table(title="a load a page, ns", box=box.SIMPLE)
    for heading in ("pages", "of 4 KiB" if record["pages"][0]["page_bytes"] == 4096 else "small", "on huge pages"):
        table.add_column(heading, justify="right")
    for row in record["pages"]:
        table.add_row(f"{row['pages']:,}", f"{row['small_ns']:.1f}", f"{row['huge_ns']:.1f}")
    console.print(table)

    table = Table(title="PyTorch's products, giga operations a second", box=box.SIMPLE)
    table.add_column("threads", justify="right")
    dtypes = list(next(iter(record["matmul_gflops"].values())))
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for threads, found in record["matmul_gflops"].items():
        table.add_row(threads, *(f"{found[d]:,.0f}" if d in found else "-" for d in dtypes))
    console.print(table)
    for what, why in record["not_measured"].items():
        console.print(f"[yellow]not measured:[/] {what}: {why}")
    worst = max(record["spread"], key=record["spread"].get)
    console.print(f"least steady: {worst}, the median round {100 * record['spread'][worst]:.0f} % from the best")


def _print_memory(rows: list[dict], title: str, console: Console) -> None:
    columns = {"latency_ns": "latency", "runs_of_1_read_ns": "demand loads", "runs_of_1_ns": "prefetched"}
    columns |= {"draws_of_1_ns": "random access", "draws_of_2_ns": "2", "draws_of_4_ns": "4"}
    columns = {key: text for key, text in columns.items() if key in rows[0]}
    columns |= {"stream_ns": "stream", "gbs": "stream, GB/s"}
    table = Table(title=f"memory, {title}: ns a line of 64 bytes", box=box.SIMPLE)
    table.add_column("KiB", justify="right")
    for text in columns.values():
        table.add_column(text, justify="right")
    for row in rows:
        row = row | {"gbs": 64 / row["stream_ns"]}
        table.add_row(f"{row['bytes'] // 2**10:,}", *(f"{row[key]:.3g}" for key in columns))
    console.print(table)
