"""The ladder of strategies, measured: from the plain loop to the shipped kernel, one change a rung.

    python benchmarks/ladder.py                     # everything, to experiments/ladder.jsonl
    python benchmarks/ladder.py --no-timing         # valgrind's counts alone, which other work does not disturb
    python benchmarks/ladder.py --rung dot --rung shipped --tokens 64 --no-valgrind
    build/ladder/ladder --list                      # the rungs, and what each changes

Builds benchmarks/ladder*.cpp with cmake, unless --program names the program, and gathers from it, for every rung:

- microseconds a token at each of --tokens, all rungs in turn in one process: median, fastest and 90th percentile. Every
  result is checked against the definition in double precision before anything is timed. Where threads work, they sleep
  between calls, and a time has their waking in it;
- bytes of table rows or of weights that a token loads;
- at a small size, on an instruction set that valgrind knows: instructions (callgrind), and misses of a first-level data
  cache and of one behind it (cachegrind). Each is the difference of a run with two calls and of one with one call, with
  other inputs in each call: misses are those of a call after others. Valgrind takes no notice of prefetches and pages;
- hardware counters beside the times, where ``perf`` has them.

A table for people, then JSON lines: ``"what": "time"`` a rung and size, ``"what": "count"`` a rung. --json is added to.
Needs valgrind for the counts; without it the rest is measured.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lookupffn import machine

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "ladder"
EVENTS = (  # Linux perf's names; of the second-level cache Intel's and AMD's
    *("instructions", "L1-dcache-load-misses", "l2_rqsts.miss", "l2_cache_misses_from_dc_misses"),
    *("LLC-load-misses", "dTLB-load-misses"),
)
COUNTED = {"instructions_per_token": "instr", "d1_misses_per_token": "D1", "ll_misses_per_token": "LL"}


def built() -> Path:
    """The program, made anew where a source has changed."""
    tools = {**os.environ, "PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}"}
    options = ["-DLOOKUPFFN_TORCH=OFF", "-DLOOKUPFFN_LADDER=ON"]
    for command in (["cmake", "-S", ROOT, "-B", BUILD, *options], ["cmake", "--build", BUILD, "--target", "ladder"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=tools)
    return BUILD / "ladder"


def lines(command: list) -> list[dict]:
    """The JSON lines that a command prints; its message where it fails."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr.strip() or f"{command[0]} ended with {ran.returncode}")
    return [json.loads(line) for line in ran.stdout.splitlines()]


def shape_options(tokens: int, width: int, tables: int, bits: int, reads: int, threads: int) -> list:
    return [
        *("--tokens", tokens, "--width", width, "--tables", tables),
        *("--bits", bits, "--reads", reads, "--threads", threads),
    ]


# ---- Valgrind --------------------------------------------------------------------------------------------------------


def valgrind_events(tool: list[str], command: list, runs: int) -> tuple[dict[str, int], dict]:
    """Events of the whole program with so many calls, and the line that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        name = tool[0].partition("=")[2]
        record = lines(["valgrind", *tool, f"--{name}-out-file={out}", *command, "--runs", runs])[0]
        written = dict(
            line.split(":", 1) for line in out.read_text().splitlines() if line.startswith(("events", "summary"))
        )
    return dict(zip(written["events"].split(), map(int, written["summary"].split()), strict=True)), record


def counted(command: list, d1: list[int], ll: list[int]) -> dict:
    """Instructions and misses a token of one more call, beside what the program says of the rung."""
    caches = [f"--{name}={size},{ways},64" for name, (size, ways) in {"D1": d1, "LL": ll}.items()]
    events = {}
    for tool in (["--tool=callgrind"], ["--tool=cachegrind", "--cache-sim=yes", *caches]):
        (once, record), (twice, _) = (valgrind_events(tool, command, runs) for runs in (1, 2))
        if "not_run" in record:
            return record
        more = {name: (twice[name] - once[name]) / record["tokens"] for name in once}
        events = more | events  # instructions are callgrind's
    misses = {
        "d1_misses_per_token": events["D1mr"] + events["D1mw"],
        "ll_misses_per_token": events["DLmr"] + events["DLmw"],
    }
    return record | {"instructions_per_token": events["Ir"]} | misses | {"d1": d1, "ll": ll}


# ---- Hardware counters -----------------------------------------------------------------------------------------------


def perf_events(command: list, events: list[str]) -> dict[str, float]:
    """What ``perf stat`` counts for a command, without the events that it cannot count."""
    names = ",".join(f"{event}:u" for event in events)
    ran = subprocess.run(
        ["perf", "stat", "-x", ",", "-e", names, "--", *map(str, command)], capture_output=True, text=True
    )
    fields = [line.split(",") for line in ran.stderr.splitlines() if ran.returncode == 0 and line.count(",") > 2]
    return {field[2].removesuffix(":u"): float(field[0]) for field in fields if field[0].isdigit()}


def perf_known() -> list[str]:
    """The events that this machine counts, tried one by one: a name that perf does not know fails the whole call."""
    return [event for event in EVENTS if shutil.which("perf") and perf_events(["true"], [event])]


def counters(command: list, tokens: int, events: list[str]) -> dict[str, float]:
    """Events a token of a rung, from the difference of two numbers of calls."""
    calls = max(1, 8192 // tokens)
    once, twice = (perf_events([*command, "--runs", n * calls], events) for n in (1, 2))
    return {event: (twice[event] - once[event]) / (calls * tokens) for event in once if event in twice}


# ---- Rungs -----------------------------------------------------------------------------------------------------------


def timed(a: argparse.Namespace, program: Path, isa: list, rungs: list[str]) -> Iterator[dict]:
    """A record a rung and number of tokens; counters where the machine has them."""
    events = perf_known()
    for tokens in a.tokens:
        shape = [*isa, *shape_options(tokens, a.width, a.tables, a.bits, a.reads, a.threads)]
        chosen = [option for rung in rungs for option in ("--rung", rung)]
        for record in lines([program, *shape, *chosen, "--seconds", a.seconds]):
            found = {}
            if "not_run" not in record and events:
                found = {"counters": counters([program, *shape, "--rung", record["rung"]], tokens, events)}
            elif not events:
                found = {"no_counters": "perf counts nothing here" if shutil.which("perf") else "there is no perf"}
            yield {"what": "time", **record, **found}


def counts(a: argparse.Namespace, program: Path, rungs: list[str], console: Console) -> Iterator[dict]:
    """A record a rung, of valgrind."""
    if not shutil.which("valgrind"):
        console.print("There is no valgrind: instructions and misses are not counted.")
        return
    shape = shape_options(a.count_tokens, a.count_width, a.count_tables, a.bits, a.reads, a.threads)
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()
    for rung in track(rungs, "valgrind", console=console, transient=True):
        record = counted([program, "--isa", a.count_isa, *shape, "--rung", rung], a.d1, a.ll)
        yield {"what": "count", **record, "valgrind": version}


# ---- Table -----------------------------------------------------------------------------------------------------------


def short(value: float | None) -> str:
    """Three digits; nothing where there is no value."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cell(records: list[dict], key: str) -> str:
    """The value of the only record, "not run" where there is none because the processor cannot."""
    if any("not_run" in record for record in records):
        return "not run"
    return short(next((record[key] for record in records), None))


def print_tables(records: list[dict], console: Console) -> None:
    """One table a stage, a row a rung, and what the columns were measured with."""
    times = [record for record in records if record["what"] == "time"]
    counts = [record for record in records if record["what"] == "count"]
    sizes = sorted({record["tokens"] for record in times})
    for stage in dict.fromkeys(record["stage"] for record in records):
        table = Table("a change of one rung", title=f"{stage}, a token", title_justify="left")
        for heading in (*(f"µs, {tokens}" for tokens in sizes), *(COUNTED.values() if counts else ())):
            table.add_column(heading, justify="right", no_wrap=True)
        for rung in dict.fromkeys(record["rung"] for record in records if record["stage"] == stage):
            time, count = ([r for r in kind if r["rung"] == rung] for kind in (times, counts))
            about = (time + count)[0]
            before = f"{about['from']}: " if about["from"] else ""
            values = [cell([r for r in time if r["tokens"] == tokens], "us_per_token") for tokens in sizes]
            values += [cell(count, key) for key in COUNTED] if counts else []
            table.add_row(f"[bold]{rung}[/] {before}{about['change']}", *values)
        console.print(table)
    for r in times[:1]:
        others = f"hardware counters: {r['no_counters']}" if "no_counters" in r else "hardware counters in the lines"
        console.print(f"µs: {sizes_of(r)}, {r['compiler']}; {others}")
    for r in [r for r in counts if "not_run" not in r][:1]:
        caches = " and ".join(f"{size >> 10} KiB of {ways} ways" for size, ways in (r["d1"], r["ll"]))
        console.print(f"instr, D1, LL: {r['isa']}, {r['tokens']} tokens, {sizes_of(r)}, caches of {caches}")


def sizes_of(record: dict) -> str:
    return f"width {record['width']}, T {record['tables']}, tau {record['bits']}, reads {record['reads']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, help="a ladder that is built already")
    parser.add_argument("--rung", action="append", help="of these alone; again for more")
    parser.add_argument("--isa", help="for the times; without it the best that the ladder has for this processor")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tables", type=int, default=128)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--reads", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of the rungs that have threads")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each rung at each number of tokens")
    parser.add_argument("--count-isa", default="avx2", help="for valgrind, which knows no AVX-512")
    parser.add_argument("--count-tokens", type=int, default=512)
    parser.add_argument("--count-width", type=int, default=256)
    parser.add_argument("--count-tables", type=int, default=64)
    parser.add_argument("--d1", type=int, nargs=2, default=[48 << 10, 12], metavar=("BYTES", "WAYS"))
    parser.add_argument("--ll", type=int, nargs=2, default=[1 << 20, 16], metavar=("BYTES", "WAYS"))
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--no-valgrind", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "experiments" / "ladder.jsonl")
    a = parser.parse_args()

    console, program = Console(), a.program or built()
    isa = ["--isa", a.isa] if a.isa else []
    rungs = a.rung or [record["rung"] for record in lines([program, *isa, "--list"])]
    common = {**machine.describe(), "caches": machine.caches(), "huge_pages": machine.huge_pages(), "seed": 0}
    parts = [] if a.no_timing else [timed(a, program, isa, rungs)]
    parts += [] if a.no_valgrind else [counts(a, program, rungs, console)]
    records = []
    with a.json.open("a", encoding="utf-8", buffering=1) as file:  # each line at once: valgrind takes minutes
        for record in itertools.chain(*parts):
            records.append(record)
            file.write(json.dumps(common | record) + "\n")
    print_tables(records, console)


if __name__ == "__main__":
    main()
