"""Times of a converted model, its teacher and the baselines in the runtime, and of the teacher in other engines.

    python experiments/conversion_times.py MODEL CONVERTED >> experiments/conversion-times.jsonl

MODEL is what was converted, CONVERTED the folder of `lookupffn convert`. The baselines are untrained: weights take no
time. One process, interleaved, medians.
"""

import json
import sys
from pathlib import Path

from lookupffn import machine, native
from lookupffn.bench.models import RAGGED
from lookupffn.conversion.baselines import half_the_layers, without_ffns
from lookupffn.conversion.models import parts_of
from lookupffn.conversion.timing import times
from lookupffn.hf.loading import load_encoder

SHAPES = [(1, 8), (1, 32), (1, 128), (64, 128), RAGGED]


def main(model: str, converted: str) -> None:
    encoder = parts_of(*load_encoder(model), "mean", 128, None).encoder.eval()
    baselines = {"no feed-forward layers": without_ffns(encoder), "half of the layers": half_the_layers(encoder)[0]}
    found = times(encoder, Path(converted) / "packed", baselines, shapes=SHAPES, seconds=1.0)
    print(
        json.dumps(
            {"what": "conversion times", "unit": "us a token", "model": Path(model).parent.name}
            | found
            | {"kernels": native.implementation(), "machine": machine.describe()}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
