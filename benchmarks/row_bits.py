"""Rows of four bits beside eight: microseconds a token of packed layers, interleaved in one process, one thread.

    python benchmarks/row_bits.py >> experiments/row-bits.jsonl

Width 512, 128 tables of 256 rows, int8 projection, random weights. Up to 8 tokens go through 12 layers, each of which
finds its rows in memory or L3.
"""

import json

import torch

from lookupffn import LookupConfig, LookupFFN, machine, pack
from lookupffn.bench.timing import time_interleaved

CONFIG = LookupConfig(512, 512, num_tables=128, block_size=64)
CALLS = ((1, 12), (8, 12), (512, 1), (4096, 1))  # tokens, layers


@torch.inference_mode()
def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = {"int8": [], "int4": []}
    for _ in range(12):
        layer = LookupFFN(CONFIG)
        torch.nn.init.normal_(layer.tables)
        for tables, packed in layers.items():
            packed.append(pack(layer, tables))
    for tokens, count in CALLS:
        inputs = [torch.randn(tokens, 512) for _ in range(64)]
        turns = dict.fromkeys(layers, 0)

        def run(tables, tokens_in=inputs, count=count, turns=turns):
            turns[tables] += 1
            x = tokens_in[turns[tables] % 64]
            for layer in layers[tables][:count]:
                x = layer(x)

        times = time_interleaved({tables: lambda tables=tables: run(tables) for tables in layers}, 8.0)
        for tables, time in times.items():
            scale = 1e6 / tokens / count
            record = {"what": "row bits", "tables": tables, "tokens": tokens, "layers": count, "threads": 1}
            record |= {"us_per_token": time.median * scale, "spread": [time.low * scale, time.high * scale]}
            record |= {"ratio": time.median / times["int8"].median, "machine": machine.describe()}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
