"""The cache simulation beside valgrind's cachegrind, which runs the real gather with the same caches.

    python benchmarks/cachegrind.py                      # uniform codes
    python benchmarks/cachegrind.py --codes codes.npz    # a trained model's too: benchmarks/trained_codes.py

Needs valgrind, and cmake with a C++ compiler for the program (benchmarks/cachegrind_gather.cpp) unless --program names
it. The program gathers once in one run and twice in another; the difference of their misses is that of one gather after
another. The simulation gets the same stream twice, at the addresses that the program prints, and counts the second one.
A table for people, then one JSON line a case and level.

valgrind knows no AVX-512, so the kernels are those of avx2 or scalar. It takes no notice of prefetches: they are off.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lookupffn.lab.hardware.gather_stream import Cache, CacheSimulator, Gather, gather_lines, uniform_codes

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cachegrind"


def built() -> Path:
    """The program, made anew where a source has changed.

    Its own loops go number by number: a vector that lies in two lines, both absent, is one miss to cachegrind and two
    in truth, and rows of the whole-row loops may begin anywhere. The kernels' vectors are written out and stay.
    """
    options = ["-DLOOKUPFFN_TORCH=OFF", "-DLOOKUPFFN_CACHEGRIND=ON", "-DCMAKE_CXX_FLAGS=-fno-tree-vectorize"]
    tools = {**os.environ, "PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}"}
    for command in (["cmake", "-S", ROOT, "-B", BUILD, *options], ["cmake", "--build", BUILD]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=tools)
    return BUILD / "cachegrind_gather"


def run(program: Path, isa: str, gather: Gather, codes: np.ndarray, levels: list[Cache], rounds: int) -> tuple:
    """Misses of D1 and of LL under cachegrind, instructions' not counted, and the addresses of the buffers."""
    g, flushed = gather, 2 * levels[-1].bytes
    sizes = [
        len(codes),
        g.num_tables,
        g.table_rows,
        g.out_features,
        g.reads,
        g.slice,
        min(g.groups_per_block, g.groups),
    ]
    caches = [f"--{name}={c.bytes},{c.ways},{c.line}" for name, c in zip(("D1", "LL"), levels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder, "out"), Path(folder, "codes")
        codes.astype(np.int32).tofile(file)
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", f"--cachegrind-out-file={out}", *caches]
        arguments = [program, g.order, g.dtype, isa, *sizes, g.prefetch_tokens, flushed, rounds, file]
        ran = subprocess.run([*valgrind, *map(str, arguments)], capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}\n{ran.stderr}")
        written = dict(
            line.split(":", 1) for line in out.read_text().splitlines() if line.startswith(("events", "summary"))
        )
    count = dict(zip(written["events"].split(), map(int, written["summary"].split()), strict=True))
    address = {name: int(value) for name, value in map(str.split, ran.stdout.splitlines()) if name != "ns_per_token"}
    return np.array([count["D1mr"] + count["D1mw"], count["DLmr"] + count["DLmw"]]), address


def compare(program: Path, isa: str, gather: Gather, codes: np.ndarray, levels: list[Cache]) -> list[dict]:
    """One record a level."""
    once, _ = run(program, isa, gather, codes, levels, rounds=1)
    twice, address = run(program, isa, gather, codes, levels, rounds=2)
    simulator = CacheSimulator(levels)
    for _ in range(2):
        simulated = sum(simulator.access(lines) for lines in gather_lines(gather, codes, address))
    return [
        {
            "order": gather.order,
            "dtype": gather.dtype,
            "tokens": len(codes),
            "num_tables": gather.num_tables,
            "reads": gather.reads,
            "out_features": gather.out_features,
            "groups_per_block": min(gather.groups_per_block, gather.groups),
            "isa": isa,
            "level": level,
            "bytes": cache.bytes,
            "ways": cache.ways,
            "simulated_misses": int(ours),
            "cachegrind_misses": int(theirs),
            "ratio": float(ours / theirs) if theirs else 1.0 + float(ours),
        }
        for level, cache, ours, theirs in zip(("D1", "LL"), levels, simulated, twice - once, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", help=".npz of benchmarks/trained_codes.py: the first layer's are used")
    parser.add_argument("--program", type=Path, help="a cachegrind_gather that is built already")
    parser.add_argument("--isa", default="avx2", choices=("avx2", "scalar"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--num-tables", type=int, default=32)
    parser.add_argument("--out-features", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", default=["int8", "float32"])
    parser.add_argument("--order", nargs="+", default=["sliced", "token", "table"])
    parser.add_argument("--groups-per-block", type=int, nargs="+", default=[1 << 20, 1], help="of the sliced order")
    parser.add_argument("--d1", type=int, nargs=2, default=[32 << 10, 8], metavar=("BYTES", "WAYS"))
    parser.add_argument("--ll", type=int, nargs=2, default=[1 << 20, 16], metavar=("BYTES", "WAYS"))
    parser.add_argument("--json", type=Path, help="file to add the JSON lines to; without it they are printed")
    a = parser.parse_args()

    codes = {"uniform": uniform_codes(a.tokens, a.num_tables, code_bits=8, reads=3)}
    if a.codes:
        arrays = np.load(a.codes)
        trained = arrays[next(name for name in arrays.files if name != "tokens")]
        codes["trained"] = trained[: a.tokens, : a.num_tables]
    program, levels = a.program or built(), [Cache(*a.d1), Cache(*a.ll)]
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()
    headings = f"{'codes':8} {'order':7} {'block':>5} {'dtype':9} {'level':5} {'simulated':>10} {'cachegrind':>10}"
    print(f"{headings} {'ratio':>6}")
    records = []
    for (name, array), dtype, order in itertools.product(codes.items(), a.dtype, a.order):
        _, num_tables, reads = array.shape
        for groups_per_block in a.groups_per_block if order == "sliced" else [1 << 20]:
            loop = {"dtype": dtype, "order": order, "groups_per_block": groups_per_block}
            gather = Gather(num_tables, 256, a.out_features, reads, **loop)
            for r in compare(program, a.isa, gather, array, levels):
                records.append({"what": "cachegrind", "codes": name, **r, "seed": 0, "valgrind": version})
                print(
                    f"{name:8} {order:7} {r['groups_per_block']:5} {dtype:9} {r['level']:5} {r['simulated_misses']:10} "
                    f"{r['cachegrind_misses']:10} {r['ratio']:6.3f}",
                    flush=True,
                )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if a.json:
        with open(a.json, "a", encoding="utf-8") as file:
            file.write(lines)
    else:
        print(lines, end="")
    worst = max(records, key=lambda r: abs(r["ratio"] - 1))
    print(
        f"furthest from cachegrind: {worst['ratio']:.3f} "
        f"({worst['codes']}, {worst['order']}, {worst['dtype']}, {worst['level']})"
    )


if __name__ == "__main__":
    main()
