"""Text to distil on, without any sentence that the conversion is measured on: one parquet file, column ``text``.

    python experiments/conversion_text.py DATA text.parquet --reviews 8000

DATA holds sst2/, cola/, mrpc/, imdb/, sick/ and sts/ (parquet). Sentences of SICK and of STS 2012 to 2015 are left out
wherever they occur, compared without case, spaces and punctuation: STS 2012 holds sentences of MRPC.
"""

import argparse
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SENTENCES = {"sst2": ["sentence"], "cola": ["sentence"], "mrpc": ["sentence1", "sentence2"]}


def key(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()


def column(path: Path, name: str) -> list[str]:
    return pq.read_table(path, columns=[name]).column(name).to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--reviews", type=int, default=8000, help="of IMDB, behind all sentences of the other sets")
    given = parser.parse_args()

    measured = set()
    for folder in ("sick", "sts"):
        for path in sorted((given.data / folder).glob("*.parquet")):
            for name in ("sentence1", "sentence2"):
                measured.update(map(key, column(path, name)))
    texts = [
        text for folder, names in SENTENCES.items() for name in names
        for text in column(given.data / folder / "train.parquet", name)
    ]  # fmt: skip
    reviews = column(given.data / "imdb" / "unlabelled.parquet", "text")[: given.reviews]
    texts += [line for review in reviews for line in review.replace("<br />", "\n").split("\n") if line.strip()]
    kept = [text for text in texts if key(text) not in measured]
    pq.write_table(pa.table({"text": kept}), given.output)
    print(f"{len(kept):,} texts; {len(texts) - len(kept):,} left out, which SICK or STS hold")


if __name__ == "__main__":
    main()
