"""Two builds of the kernels in one process, interleaved: is a change slower?

    python benchmarks/compare_builds.py OLD/liblookupffn_kernels.so [NEW.so] [--hidden-size 512] [--json FILE]

The sizes of `lookupffn bench`: 1 and 8 tokens through 12 layers in turn, 512 and 4,096 through one, int8, inputs that
change from call to call. Prints medians, the ratio new / old of each turn's pair (median, 10th and 90th percentile),
and whether the outputs are the same bits. The old library is loaded under another operator namespace: of a copy in
which every `lookupffn` reads `lookupold`.
"""

import argparse
import functools
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lookupffn import LookupConfig, LookupFFN, machine, native
from lookupffn.runtime.format import encode, read_header
from lookupffn.runtime.tuning import default_tiling

CHAIN = 12
LAYERS = {"T 128, 1 read": (128, 1), "T 64, 2 reads": (64, 2)}


def operator(library: Path, namespace: str):
    """The forward operator of a build, loaded under ``namespace`` (as long as ``lookupffn``)."""
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        copy.write(library.read_bytes().replace(b"lookupffn", namespace.encode()))
        copy.flush()
        torch.ops.load_library(copy.name)
    ops = getattr(torch.ops, namespace)
    if hasattr(ops, "prepared"):  # builds before the operator was called packed_forward
        return lambda *arguments: ops.prepared(*arguments, "")
    return ops.packed_forward


def measure(calls: dict, seconds: float, block: float) -> dict[str, list[float]]:
    """Seconds a call of each, turn by turn; the order changes from turn to turn."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
        repeats[name] = max(1, round(block / once))
    found = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        for name in sorted(calls, reverse=bool(turn % 2)):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            found[name].append((time.perf_counter() - start) / repeats[name])
        if time.perf_counter() > end:
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each pair")
    parser.add_argument("--json", type=Path, help="file to which a line a measurement is added")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    native.load()
    build = {"old": operator(a.old, "lookupold")}
    build["new"] = operator(a.new, "lookupnew") if a.new else torch.ops.lookupffn.packed_forward
    width = a.hidden_size
    print(f"{machine.cpu_name()}, {native.implementation()}, {a.threads} thread(s), width {width}, int8; µs a token")
    for label, (tables, reads) in LAYERS.items():
        for tokens in a.tokens:
            torch.manual_seed(0)
            config = LookupConfig(width, width, num_tables=tables, reads=reads)
            chain = [encode(LookupFFN(config)) for _ in range(CHAIN if tokens <= 8 else 1)]
            t = default_tiling(read_header(chain[0]))
            sizes = (width, t.tile_tokens, t.groups_per_block, t.prefetch_distance, t.serial_tokens)
            inputs = torch.randn(max(1, 2048 // tokens), tokens, width).unbind(0)

            def run(forward, turns, chain=chain, sizes=sizes):
                y = next(turns)
                for packed in chain:
                    y = forward(y, packed, *sizes)
                return y

            x = inputs[0]
            same = torch.equal(*(run(build[name], itertools.repeat(x)) for name in build))
            calls = {name: functools.partial(run, forward, itertools.cycle(inputs)) for name, forward in build.items()}
            with torch.inference_mode():
                found = measure(calls, a.seconds, 20e-3)
            ratios = np.divide(found["new"], found["old"])
            old, new = (float(np.median(found[name])) / tokens / len(chain) * 1e6 for name in ("old", "new"))
            ratio, low, high = np.quantile(ratios, (0.5, 0.1, 0.9)).tolist()
            print(
                f"{label:14} {tokens:5} tokens  old {old:8.3f}  new {new:8.3f}  new / old {ratio:.3f} "
                f"({low:.3f} to {high:.3f}), {len(ratios)} pairs, {'same bits' if same else 'OTHER BITS'}"
            )
            if a.json:
                line = {
                    "what": "builds", "label": label, "hidden_size": width, "num_tables": tables, "reads": reads,
                    "dtype": "int8", "tokens": tokens, "layers": len(chain), "threads": a.threads, "seed": 0,
                    "us_per_token_old": old, "us_per_token_new": new, "ratio": ratio, "ratio_low": low,
                    "ratio_high": high, "pairs": len(ratios), "same_bits": same, "cpu": machine.cpu_name(),
                    "implementation": native.implementation(), "versions": machine.versions(),
                }  # fmt: skip
                with a.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
