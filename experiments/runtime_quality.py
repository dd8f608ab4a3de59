"""What int8 costs a sentence transformer in the runtime: cosine of its vectors to float32, Spearman on STS.

    python experiments/runtime_quality.py MODEL DATA >> experiments/runtime-quality.jsonl

MODEL is a folder of a sentence transformer, DATA one with `sst2/train.parquet`, `mrpc/train.parquet` and
`sts/2012.parquet` to `2015.parquet` (columns `sentence1`, `sentence2`, `score`).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from lookupffn import Session, export, machine

TEXTS = 2000


def spearman(encode, file):
    table = pq.read_table(file)
    a, b = (encode(table.column(name).to_pylist()) for name in ("sentence1", "sentence2"))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(spearmanr(cosine, table.column("score").to_pylist()).statistic)


def main(name, data):
    model, data = SentenceTransformer(name, device="cpu"), Path(data)
    texts = pq.read_table(data / "sst2" / "train.parquet").column("sentence").to_pylist()[: TEXTS // 2]
    texts += pq.read_table(data / "mrpc" / "train.parquet").column("sentence1").to_pylist()[: TEXTS // 2]
    expected = model.encode(texts, normalize_embeddings=True)
    years = {file.stem: file for file in sorted((data / "sts").glob("*.parquet"))}
    exact = {year: spearman(model.encode, file) for year, file in years.items()}
    with tempfile.TemporaryDirectory() as folder:
        for linears in ("float32", "int8"):
            session = Session(export(model, folder, linears=linears), threads=2)
            cosine = (session.embed(texts) * expected).sum(1)
            found = {year: spearman(session.embed, file) for year, file in years.items()}
            record = {
                "what": "runtime quality",
                "model": Path(name).parent.name,
                "linears": linears,
                "texts": len(texts),
                "mean_cosine": float(cosine.mean()),
                "least_cosine": float(cosine.min()),
                "spearman": found,
                "spearman_float32": exact,
                "machine": machine.describe(),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
