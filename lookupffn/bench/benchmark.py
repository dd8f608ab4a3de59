"""The benchmark: packed lookup layers beside every dense FFN engine at hand, interleaved in one process.

1 and 8 tokens go through a chain of 12 different layers, as in a model, so that weights come from where they really
lie; more tokens go through one layer. No layer norm on either side. Weights are random, so codes are spread evenly over
all rows, and the lookup's input changes from call to call, so that its rows are not those of the call before: the
hardest case for the caches, which a trained model is not. A dense FFN reads the same weights whatever its input is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from lookupffn import machine, native
from lookupffn.bench.engines import dense_chain, dense_runs, torch_runner
from lookupffn.bench.timing import Timing, time_interleaved
from lookupffn.ffns.dense import DenseFFN
from lookupffn.files import atomic_replace, make_folder
from lookupffn.layer import LookupConfig, LookupFFN
from lookupffn.memory import HUGE_PAGE, aligned_bytes
from lookupffn.runtime.packed import pack

CHAIN = 12
CHAINED_TOKENS = 8  # up to this many
BLOCK_SECONDS, PAUSE_SECONDS = 50e-3, 1e-3  # long enough to find one's own weights in the caches again
DISTINCT_TOKENS = 2048  # of lookup inputs, in turn
TRAINING_TOKENS = 4096
ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A lookup layer in the comparison: its shape, and the types that it is packed in."""

    num_tables: int
    reads: int
    dtype: str
    compiled: bool = False
    projection_dtype: str | None = None

    def config(self, hidden_size: int) -> LookupConfig:
        return LookupConfig(hidden_size, hidden_size, num_tables=self.num_tables, reads=self.reads)

    @property
    def label(self) -> str:
        reads = f", {self.reads} reads" if self.reads > 1 else ""
        projection = f", {self.projection_dtype} projection" if self.projection_dtype else ""
        return f"lookup {self.dtype}, T {self.num_tables}{reads}{projection}{', compiled' if self.compiled else ''}"


def tables_for(hidden_size: int, intermediate_size: int, ratio: float = 6.0) -> int:
    """The most tables, a multiple of 32, with at least ``ratio`` times fewer multiply-adds than dense; 32 at least."""
    dense = DenseFFN(hidden_size, intermediate_size, device="meta").flops(1)
    fits = [32]
    for tables in range(64, 1025, 32):
        if dense / LookupFFN(Lookup(tables, 1, "int8").config(hidden_size), device="meta").flops(1) >= ratio:
            fits.append(tables)
    return fits[-1]


def lookups_for(hidden_size: int, intermediate_size: int) -> list[Lookup]:
    """The lookup layers that stand beside a dense FFN of this shape."""
    tables = tables_for(hidden_size, intermediate_size)
    kinds = [Lookup(tables, 1, "int8"), Lookup(tables, 1, "int8", compiled=True), Lookup(tables // 2, 1, "int8")]
    wide = [Lookup(tables, 1, "bfloat16"), Lookup(tables, 1, "bfloat16", projection_dtype="int8")]
    return [*kinds, Lookup(tables // 2, 2, "int8"), *wide, Lookup(tables, 1, "float32")]


def bench(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    threads: Iterable[int],
    *,
    seconds: float,
    seed: int,
    training: bool,
    console: Console,
) -> Iterator[list[dict]]:
    """Measures every engine at every size and prints a table a shape; after each shape all records until then."""
    common = {"cpu": machine.cpu_name(), "versions": versions(), "isa": native.implementation(), "seed": seed}
    before, records, failed = torch.get_num_threads(), [], set()
    try:
        for count in threads:
            torch.set_num_threads(count)
            records += [common | r | {"threads": count} for r in _gather_bandwidth(seed)] if count == 1 else []
            for hidden_size, intermediate_size in shapes:
                found = _bench_shape(
                    hidden_size, intermediate_size, list(tokens), count, seconds, seed, failed, console
                )
                found += _bench_training(hidden_size, intermediate_size, seed) if training else []
                shape = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "threads": count}
                records += [common | shape | r for r in found]
                _print_shape([r for r in records if r.items() >= shape.items()], shape, console)
                yield records
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Versions of this package and of every library in the comparison."""
    found = machine.versions()
    for name in ("torchao", "onnxruntime", "openvino", "nncf", "zentorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _bench_shape(hidden_size, intermediate_size, tokens, threads, seconds, seed, failed, console) -> list[dict]:
    records = []
    lookups = lookups_for(hidden_size, intermediate_size)
    dense = {"ffn": "dense", "num_tables": None, "code_bits": None, "reads": None}
    dense["ffn_macs_per_token"] = DenseFFN(hidden_size, intermediate_size, device="meta").flops(1) // 2
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{hidden_size}/{intermediate_size}, {threads} thread(s)", total=len(tokens))
        for layers in sorted({CHAIN if n <= CHAINED_TOKENS else 1 for n in tokens}, reverse=True):
            chain = dense_chain(hidden_size, intermediate_size, layers, seed)
            packed = _packed_chains(lookups, hidden_size, layers, seed, failed, console)
            for n in (n for n in tokens if (CHAIN if n <= CHAINED_TOKENS else 1) == layers):
                generator = torch.Generator().manual_seed(seed)
                inputs = torch.randn(max(1, DISTINCT_TOKENS // n), n, hidden_size, generator=generator).unbind(0)
                runs, left_out = dense_runs(chain, inputs[0], threads)
                calls = {engine.label: run for engine, run in runs.items()}
                about = {e.label: dense | {"engine": e.name, "dtype": e.dtype, "compiled": e.compiled} for e in runs}
                for engine, reason in left_out.items():
                    if engine.label not in failed:
                        console.print(f"[yellow]left out:[/] {engine.label}: {reason}")
                    failed.add(engine.label)
                for lookup, model in packed.items():
                    calls[lookup.label] = torch_runner(model, inputs, compiled=lookup.compiled)
                    about[lookup.label] = {
                        "ffn": "lookup", "engine": "lookupffn", "dtype": lookup.dtype, "compiled": lookup.compiled,
                        "num_tables": lookup.num_tables, "code_bits": 8, "reads": lookup.reads,
                        "projection_dtype": model[0].weight_dtype, "tiling": dataclasses.asdict(model[0].tiling),
                        "ffn_macs_per_token": model[0].flops(1) // 2,
                    }  # fmt: skip
                timings = time_interleaved(calls, seconds * len(calls), block=BLOCK_SECONDS, pause=PAUSE_SECONDS)
                for label, timing in timings.items():
                    size = {"what": "forward", "tokens": n, "layers": layers}
                    records.append(about[label] | size | _microseconds(timing, n * layers) | {"label": label})
                progress.advance(task)
    return records


def _packed_chains(lookups, hidden_size, layers, seed, failed, console) -> dict[Lookup, nn.Sequential]:
    """A chain for each, shared by those that differ in compilation; one too large for this machine is left out."""
    chains, chain_of = {}, {}
    for lookup in lookups:
        kind = dataclasses.replace(lookup, compiled=False)
        config = lookup.config(hidden_size)
        size = layers * config.num_tables * config.num_rows * hidden_size * ITEM_BYTES[lookup.dtype]
        if size > machine.describe()["memory_bytes"] / 8:  # all chains are in memory together, beside the dense ones
            if lookup.label not in failed:
                console.print(f"[yellow]left out:[/] {lookup.label}: {layers} layers take {size / 2**30:.1f} GiB")
            failed.add(lookup.label)
            continue
        if kind not in chains:
            chains[kind] = _packed_chain(kind, hidden_size, layers, seed)
        chain_of[lookup] = chains[kind]
    return chain_of


def _packed_chain(lookup: Lookup, hidden_size: int, layers: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    chain = []
    for _ in range(layers):
        layer = LookupFFN(lookup.config(hidden_size))
        chain.append(pack(layer, lookup.dtype, projection=lookup.projection_dtype))
    return nn.Sequential(*chain).eval()


def _microseconds(timing: Timing, tokens: int) -> dict:
    low, high = timing.low / tokens * 1e6, timing.high / tokens * 1e6
    return {"us_per_token": timing.median / tokens * 1e6, "spread": [low, high], "runs": timing.runs}


def _bench_training(hidden_size: int, intermediate_size: int, seed: int) -> list[dict]:
    """A training step of one layer, forward and backward of input and parameters, float32, eager."""
    torch.manual_seed(seed)
    full = Lookup(tables_for(hidden_size, intermediate_size), 1, "float32")
    half = Lookup(full.num_tables // 2, 2, "float32")
    layers = {"dense FFN, training": DenseFFN(hidden_size, intermediate_size)}
    about = {"dense FFN, training": {"ffn": "dense", "num_tables": None, "code_bits": None, "reads": None}}
    for lookup in (full, half):
        label = lookup.label.replace("lookup float32", "lookup layer") + ", training"
        layers[label] = LookupFFN(lookup.config(hidden_size))
        about[label] = {"ffn": "lookup", "num_tables": lookup.num_tables, "code_bits": 8, "reads": lookup.reads}
    x = torch.randn(TRAINING_TOKENS, hidden_size, requires_grad=True)
    gradient = torch.randn(TRAINING_TOKENS, hidden_size)

    def step(layer):
        for parameter in (*layer.parameters(), x):
            parameter.grad = None
        layer(x).backward(gradient)

    timings = time_interleaved({label: lambda layer=layer: step(layer) for label, layer in layers.items()}, 6.0)
    size = {"what": "training", "tokens": TRAINING_TOKENS, "layers": 1, "dtype": "float32", "compiled": False}
    size["engine"] = "PyTorch"
    return [about[label] | size | {"label": label} | _microseconds(t, TRAINING_TOKENS) for label, t in timings.items()]


def _gather_bandwidth(seed: int) -> list[dict]:
    """Bytes a second of the gather's rows, beside those of random lines from half of L2, on one thread."""
    if native.load() or native.load("lab"):
        return []
    torch.manual_seed(seed)
    l2 = next((cache["bytes"] for cache in machine.caches() if cache["level"] == 2), 1 << 20)
    memory = aligned_bytes(max(l2 // 2, HUGE_PAGE)).zero_()[: l2 // 2]  # as tables lie, on huge pages
    lines = torch.randint(0, l2 // 2 // 64, (1 << 14,), dtype=torch.int32)
    rounds = 20
    layer = pack(LookupFFN(Lookup(128, 1, "int8").config(512)))
    x, tokens, t = torch.randn(4096, 512), 4096, layer.tiling
    stages = []

    def gather():
        stages.append(
            torch.ops.lookupffn.stage_seconds(x, layer.packed, t.tile_tokens, t.groups_per_block, t.prefetch_distance)
        )

    probe = time_interleaved(
        {"probe": lambda: torch.ops.lookupffn_lab.read_lines(memory, lines, rounds), "gather": gather}, 3.0
    )["probe"]
    project, hashing, gathering = torch.stack(stages[3:]).median(0).values.tolist()
    row_bytes = 128 * 512 * tokens
    return [
        {
            "what": "bandwidth", "label": "random lines from half of L2", "engine": "probe",
            "gigabytes_per_second": rounds * lines.numel() * 64 / probe.median / 1e9, "set_bytes": l2 // 2,
        },
        {
            "what": "bandwidth", "label": "gather, int8, T 128", "engine": "lookupffn", "tokens": tokens,
            "gigabytes_per_second": row_bytes / gathering / 1e9, "project_us_per_token": project / tokens * 1e6,
            "hash_us_per_token": hashing / tokens * 1e6, "gather_us_per_token": gathering / tokens * 1e6,
        },
    ]  # fmt: skip


# ---- What people see -------------------------------------------------------------------------------------------------


def _print_shape(records: list[dict], shape: dict, console: Console) -> None:
    forward = [r for r in records if r["what"] == "forward"]
    sizes = sorted({r["tokens"] for r in forward})
    width, inner, threads = shape["hidden_size"], shape["intermediate_size"], shape["threads"]
    table = Table(title=f"µs a token and layer: width {width}, dense FFN {inner}, {threads} thread(s)")
    table.add_column("engine")
    for n in sizes:
        table.add_column(f"{n:,} tokens" if n > 1 else "1 token", justify="right")
    labels = list(dict.fromkeys(r["label"] for r in forward))
    fastest = {
        n: min((r["us_per_token"] for r in forward if r["tokens"] == n and r["ffn"] == "dense"), default=0)
        for n in sizes
    }
    for label in labels:
        cells = []
        for n in sizes:
            r = next((r for r in forward if r["label"] == label and r["tokens"] == n), None)
            if r is None:
                cells.append("-")
            elif r["ffn"] == "dense":
                best = r["us_per_token"] == fastest[n]
                cells.append(f"[bold]{r['us_per_token']:.2f}[/]" if best else f"{r['us_per_token']:.2f}")
            else:
                cells.append(f"{r['us_per_token']:.2f} ({fastest[n] / r['us_per_token']:.1f}x)")
        table.add_row(label, *cells)
    console.print(table)
    console.print("Bold: the fastest dense engine. (Nx): times faster than it.")
    for r in records:
        if r["what"] == "training":
            console.print(
                f"{r['label']}: {r['us_per_token']:.2f} µs a token, {r['tokens']:,} tokens, forward and backward"
            )


def print_bandwidth(records: list[dict], console: Console) -> None:
    for r in records:
        if r["what"] == "bandwidth":
            console.print(f"{r['label']}: {r['gigabytes_per_second']:.0f} GB/s, 1 thread")


def plot(records: list[dict], path: Path) -> None:
    """Microseconds a token over tokens, a panel a shape and number of threads: dense engines grey, lookup in colour."""
    import matplotlib.pyplot as plt

    forward = [r for r in records if r["what"] == "forward"]
    panels = list(dict.fromkeys((r["hidden_size"], r["intermediate_size"], r["threads"]) for r in forward))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False, layout="constrained")
    markers = "ov^s<>Dph*"
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [r for r in forward if (r["hidden_size"], r["intermediate_size"], r["threads"]) == panel]
        dense = dict.fromkeys(r["label"] for r in shown if r["ffn"] == "dense")
        lookup = dict.fromkeys(r["label"] for r in shown if r["ffn"] == "lookup" and not r["compiled"])
        greys, colours = (
            plt.cm.Greys(np.linspace(0.35, 0.8, len(dense))),
            plt.cm.viridis(np.linspace(0, 0.85, len(lookup))),
        )
        for labels, palette, wide in ((dense, greys, 1.0), (lookup, colours, 2.2)):
            for i, label in enumerate(labels):
                points = sorted((r["tokens"], r["us_per_token"], *r["spread"]) for r in shown if r["label"] == label)
                xs, ys, low, high = zip(*points, strict=True)
                axis.plot(
                    xs,
                    ys,
                    color=palette[i],
                    linewidth=wide,
                    marker=markers[i % len(markers)],
                    markersize=4,
                    label=label,
                )
                axis.fill_between(xs, low, high, color=palette[i], alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel="tokens a call", ylabel="µs a token and layer")
        axis.set_title(f"width {panel[0]}, dense FFN {panel[1]}, {panel[2]} thread(s)")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, ncols=2)
    make_folder(path.parent)
    with atomic_replace(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
    plt.close(figure)
