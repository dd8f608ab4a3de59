"""Is the formula for loop sizes (runtime/tuning.py) as good as timing them? Every size of a block, in turn.

    python benchmarks/tiling.py [--json FILE]

The shapes of `lookupffn bench`: T = D / 4 with one read and D / 8 with two, int8, one thread. Prints µs a token of the
formula's choice and of the fastest, medians of turns, and their ratio; noise makes the fastest of several a little too
fast.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from lookupffn import LookupConfig, LookupFFN, machine, native
from lookupffn.runtime.format import encode, read_header
from lookupffn.runtime.tuning import block_sizes, default_tiling


def medians(calls: dict, turns: int, block: float = 4e-3) -> dict:
    """Median seconds a call of each, the order reversed from turn to turn."""
    found, repeats = {name: [] for name in calls}, {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(block / (time.perf_counter() - start)))
    for turn in range(turns):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            found[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 512, 4096])
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--json", type=Path, help="file to which a line a measurement is added")
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine.cpu_name()}, {native.implementation()}, one thread, int8; µs a token")
    ratios = []
    for width in a.hidden_size:
        for tables, reads in ((width // 4, 1), (width // 8, 2)):
            torch.manual_seed(0)
            packed = encode(LookupFFN(LookupConfig(width, width, num_tables=tables, reads=reads)))
            formula = default_tiling(read_header(packed))
            tilings = {n: dataclasses.replace(formula, groups_per_block=n) for n in block_sizes(tables)}
            for tokens in a.tokens:
                inputs = torch.randn(max(1, 2048 // tokens), tokens, width).unbind(0)

                def call(t, turns, packed=packed, width=width):
                    sizes = (t.tile_tokens, t.groups_per_block, t.prefetch_distance, t.serial_tokens)
                    torch.ops.lookupffn.packed_forward(next(turns), packed, width, *sizes)

                calls = {n: functools.partial(call, t, itertools.cycle(inputs)) for n, t in tilings.items()}
                found = {n: s / tokens * 1e6 for n, s in medians(calls, a.turns).items()}
                chosen, fastest = found[formula.groups_per_block], min(found, key=found.get)
                ratios.append(chosen / found[fastest])
                print(
                    f"width {width:4}, T {tables:3}, {reads} read(s), {tokens:4} tokens: {formula.groups_per_block} "
                    f"group(s) {chosen:7.3f}, fastest {fastest:2} {found[fastest]:7.3f}, ratio {ratios[-1]:.3f}",
                    flush=True,
                )
                if a.json:
                    line = {
                        "what": "tiling", "hidden_size": width, "num_tables": tables, "reads": reads, "dtype": "int8",
                        "tokens": tokens, "threads": 1, "seed": 0, "groups_per_block": formula.groups_per_block,
                        "us_per_token": found, "ratio": ratios[-1], "turns": a.turns, "cpu": machine.cpu_name(),
                        "implementation": native.implementation(), "versions": machine.versions(),
                    }  # fmt: skip
                    with a.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    print(f"formula / fastest: median {statistics.median(ratios):.3f}, most {max(ratios):.3f}")


if __name__ == "__main__":
    main()
