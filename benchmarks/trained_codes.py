"""Codes of a trained model on real text: one array int32 (tokens, T, reads) a layer, in one .npz file.

    python benchmarks/trained_codes.py runs/quality/lookup-6x-30000-s0/model imdb/test.parquet codes.npz --tokens 65536

Texts are cut to whole blocks of the model's length, without masks, as a model in use sees them. Prints, for each layer,
the entropy of the nearest rows of its tables, how many of its rows are read at all, and the misses of gathers of int8
rows of --out-features behind an L1 of 48 KiB in an L2 of several sizes: for these codes, for the same tokens in any
order, for codes of the same entropy, and for uniform ones. --json adds a line a layer, order and kind of codes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch

from lookupffn import LookupFFN, ops
from lookupffn.hf import LookupRobertaForMaskedLM
from lookupffn.lab.hardware.gather_stream import (
    Cache,
    Gather,
    code_entropy,
    gather_lines,
    misses,
    skewed_codes,
    uniform_codes,
)
from lookupffn.train.data import load_tokenizer

BATCH = 64
L2_BYTES = [256 << 10, 512 << 10, 1 << 20, 2 << 20]


def blocks_of(path: str, column: str, tokenizer, tokens: int) -> torch.Tensor:
    """The first ``tokens`` token ids of a parquet file's texts, each with its marks: ``(blocks, block)``."""
    length, ids = tokenizer.model_max_length, []
    for batch in parquet.ParquetFile(path).iter_batches(1024, columns=[column]):
        for text in batch.column(0).to_pylist():
            ids += tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor(ids[: tokens // length * length]).view(-1, length)
    raise SystemExit(f"{path} has {len(ids)} tokens, not {tokens}")


@torch.inference_mode()
def codes_of(model: torch.nn.Module, blocks: torch.Tensor) -> dict[str, np.ndarray]:
    """Codes of every LookupFFN of ``model``, by its name."""
    seen: dict[str, list[np.ndarray]] = {}

    def look(name: str, layer: LookupFFN, z: torch.Tensor) -> None:
        z = z.reshape(-1, layer.config.num_tables, layer.config.code_bits)
        seen.setdefault(name, []).append(ops.hash_codes(z, layer.config.reads)[0].int().numpy())

    for name, layer in model.named_modules():
        if isinstance(layer, LookupFFN):
            layer.projection.register_forward_hook(lambda _, __, z, name=name, layer=layer: look(name, layer, z))
    for batch in blocks.split(BATCH):
        model(input_ids=batch)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def l2_misses(codes: np.ndarray, table_rows: int, out_features: int, order: str) -> list[float]:
    """Misses a token of an L2 of each of ``L2_BYTES``."""
    tokens, num_tables, reads = codes.shape
    lines = list(gather_lines(Gather(num_tables, table_rows, out_features, reads, order=order), codes))
    return [misses(lines, [Cache(48 << 10, 12), Cache(size, 16)])[1] / tokens for size in L2_BYTES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained LookupRobertaForMaskedLM")
    parser.add_argument("text", help="parquet file")
    parser.add_argument("output", help=".npz file to write")
    parser.add_argument("--column", default="text")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--simulated", type=int, default=8192, help="tokens of the simulation")
    parser.add_argument("--out-features", type=int, default=512, help="of the simulation")
    parser.add_argument("--json", type=Path, help="file to add the lines to")
    arguments = parser.parse_args()
    blocks = blocks_of(arguments.text, arguments.column, load_tokenizer(arguments.model), arguments.tokens)
    model = LookupRobertaForMaskedLM.from_pretrained(arguments.model).eval()
    codes = codes_of(model, blocks)
    np.savez_compressed(arguments.output, tokens=blocks.numpy(), **codes)
    configs = {name: module.config for name, module in model.named_modules() if isinstance(module, LookupFFN)}
    records = []
    for name, array in codes.items():
        config = configs[name]
        entropy = code_entropy(array, config.num_rows)
        used = np.mean([len(np.unique(table)) / config.num_rows for table in np.moveaxis(array, 1, 0)])
        print(
            f"{name} {array.shape}: entropy {entropy.mean():.2f} bits of {config.code_bits} a table "
            f"({entropy.min():.2f} to {entropy.max():.2f}), {used:.1%} of the rows read"
        )
        trained = array[: arguments.simulated]
        shape = len(trained), config.num_tables, config.code_bits, config.reads
        kinds = {
            "trained": trained,
            "shuffled": np.random.default_rng(0).permutation(trained),
            "skewed": skewed_codes(*shape, entropy=entropy.mean()),
            "uniform": uniform_codes(*shape),
        }
        for order in ("sliced", "token"):
            for kind, some in kinds.items():
                missed = l2_misses(some, config.num_rows, arguments.out_features, order)
                sizes = ", ".join(f"{n:7.1f} of {size >> 10} KiB" for n, size in zip(missed, L2_BYTES, strict=True))
                print(f"    {order} {kind:8} L2 misses a token: {sizes}")
                records.append(
                    {
                        "what": "trained codes", "layer": name, "codes": kind, "order": order, "dtype": "int8",
                        "tokens": len(trained), "num_tables": config.num_tables, "code_bits": config.code_bits,
                        "reads": config.reads, "out_features": arguments.out_features, "entropy": entropy.mean(),
                        "rows_read": used, "l2_bytes": L2_BYTES, "l2_misses_per_token": missed, "seed": 0,
                    }
                )  # fmt: skip
    if arguments.json:
        with arguments.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
