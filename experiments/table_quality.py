"""What fewer bits a row cost a trained lookup model: log perplexity with int8 and int4 tables, and other quantisers.

    lookupffn pretrain --preset small --ffn lookup --data stdlib --steps 500 --output-dir runs/table-quality
    python experiments/table_quality.py runs/table-quality >> experiments/table-quality.jsonl

The tables of the trained model are replaced by what each quantiser leaves of them, for those that the package does not
have; `packed` lines are the real thing, scores of seven bits included.
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch

from lookupffn import machine, pack
from lookupffn.hf import LookupRobertaForMaskedLM
from lookupffn.layer import LookupFFN
from lookupffn.runtime.format import least_squares_scales
from lookupffn.train.config import PretrainConfig
from lookupffn.train.pretrain import datasets, evaluate, log_perplexity


def rounded(tables, scales, most):
    return (tables / scales).nan_to_num().round().clamp(-most, most) * scales


QUANTISERS = {
    "8 bits, largest a table": lambda t: rounded(t, t.abs().amax((1, 2), keepdim=True) / 127, 127),
    "4 bits, largest a table": lambda t: rounded(t, t.abs().amax((1, 2), keepdim=True) / 7, 7),
    "4 bits, largest a row": lambda t: rounded(t, t.abs().amax(2, keepdim=True) / 7, 7),
    "4 bits, least squares a table": lambda t: rounded(t, least_squares_scales(t, 7)[:, None, None], 7),
    "3 bits, least squares a table": lambda t: rounded(t, least_squares_scales(t, 3)[:, None, None], 3),
}


@torch.no_grad()
def main(folder):
    folder = Path(folder)
    settings = json.loads((folder / "config.json").read_text())
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    config = PretrainConfig(**{name: value for name, value in settings.items() if name in known})
    model = LookupRobertaForMaskedLM.from_pretrained(folder / "model").eval()
    _, validation = datasets(dataclasses.replace(config, evaluation_sequences=0), config.load_data())  # all of it
    variants = {"float32": model}
    for name, quantiser in QUANTISERS.items():
        variants[name] = copy.deepcopy(model)
        for layer in variants[name].modules():
            if isinstance(layer, LookupFFN):
                layer.tables.copy_(quantiser(layer.tables.float()))
    variants |= {f"packed {tables}": pack(model, tables) for tables in ("int8", "int4")}
    for name, variant in variants.items():
        record = {"what": "table quality", "tables": name, "steps": config.steps, "seed": config.seed}
        print(json.dumps(record | log_perplexity(evaluate(variant, validation)) | {"machine": machine.describe()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
