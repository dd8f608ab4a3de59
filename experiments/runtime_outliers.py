"""Relative error of a sentence transformer's int8 products, simulated in PyTorch on real text: as they are, with inputs
scaled (SmoothQuant), with the four largest inputs of a token apart, and of the integer weights alone.

    python experiments/runtime_outliers.py MODEL DATA > experiments/runtime-outliers.jsonl
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

EXPONENTS = (0.3, 0.5, 0.6, 0.7, 0.85)  # arXiv 2211.10438, equation 4


def rounded(values):
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (values / scale).round() * scale


def error(x, weight, found):
    exact = x @ weight.T
    return ((found - exact).square().mean() / exact.var(0).mean()).sqrt().item()


@torch.no_grad()
def main(name, data):
    model = SentenceTransformer(name, device="cpu")
    texts = pq.read_table(Path(data) / "sst2" / "train.parquet").column("sentence").to_pylist()[:200]
    seen, products = {}, {}
    for number, layer in enumerate(model[0].auto_model.encoder.layer):
        own = layer.attention.self
        products[number, "query, key, value"] = (
            own.query,
            torch.cat([m.weight for m in (own.query, own.key, own.value)]),
        )
        for part, module in (
            ("output", layer.attention.output.dense),
            ("up", layer.intermediate.dense),
            ("down", layer.output.dense),
        ):
            products[number, part] = module, module.weight
    for key, (module, _) in products.items():

        def keep(_, inputs, key=key):
            seen.setdefault(key, []).append(inputs[0].flatten(0, -2))

        module.register_forward_pre_hook(keep)
    for text in texts:
        model.encode(text)
    for (number, part), (_, weight) in products.items():
        x = torch.cat(seen[number, part])
        most_x, most_weight = x.abs().amax(0).clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
        factors = [most_weight ** (1 - a) / most_x**a for a in EXPONENTS]
        top = torch.zeros_like(x).scatter(1, x.abs().topk(4, 1).indices, 1.0)
        record = {
            "what": "int8 product",
            "model": Path(name).parent.name,
            "layer": number,
            "product": part,
            "as_they_are": error(x, weight, rounded(x) @ rounded(weight).T),
            "best_smoothquant": min(error(x, weight, rounded(x * f) @ rounded(weight / f).T) for f in factors),
            "four_apart": error(x, weight, (rounded(x * (1 - top)) + x * top) @ rounded(weight).T),
            "weights_alone": error(x, weight, x @ rounded(weight).T),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
