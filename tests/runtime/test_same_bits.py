"""A text's numbers have the same bits alone, in any batch, with any padding, on 1 to 4 threads: 0 ULP."""

import numpy as np
import pytest
import torch
from encoders import MODELS, VOCAB, roberta
from test_branches import model as branched
from test_language_models import MODELS as LANGUAGE_MODELS
from transformers import RobertaForSequenceClassification

from lookupffn import Session, export, native

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)

LENGTHS = [1, 150, 7, 16, 33, 2, 48, 97, 15, 64]
CASES = [
    *(
        (name, linears, linears)
        for linears in ("float32", "int8")
        for name in MODELS
        if "odd" in name or "groups" in name or "," not in name
    ),
    *(("own, lookup", linears, tables) for linears in ("float32", "int8") for tables in ("int8", "int4")),
    ("own, causal", "int8", "int8"),
    ("own, dense, rows by ids", "int8", "int4"),
    ("own, none, rows by ids", "float32", "int8"),
    ("bert", "bfloat16", "int8"),
    ("branches", "float32", "int4"),
    ("branches", "int8", "int8"),
    ("classifier", "int8", "int8"),
]


def same(a, b):
    return np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


def made(name):
    if name == "branches":
        return branched()[0]
    if name == "classifier":
        return roberta(RobertaForSequenceClassification)
    return MODELS[name]()


def texts(lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(2, VOCAB, (1, length)) for length in lengths]  # RoBERTa's padding is 1


def batches(lengths, count, left=False):
    """Random choices of texts in rows with padding on the right, on either side where ``left``."""
    generator, given = np.random.default_rng(1), texts(lengths)
    for _ in range(count):
        chosen = generator.permutation(len(given))[: generator.integers(1, len(given) + 1)]
        longest = max(lengths[i] for i in chosen) + int(generator.integers(0, 9))
        ids, mask = np.ones((len(chosen), longest), int), np.zeros((len(chosen), longest), bool)
        for row, i in enumerate(chosen):
            begin = int(generator.integers(0, longest - lengths[i] + 1)) if left else 0
            ids[row, begin : begin + lengths[i]], mask[row, begin : begin + lengths[i]] = given[i], True
        yield chosen, ids, mask


@pytest.mark.parametrize(("name", "linears", "tables"), CASES)
def test_a_text_has_the_same_bits_alone_in_any_batch_and_on_any_threads(name, linears, tables, tmp_path):
    pooling = {} if name == "classifier" else {"pooling": "mean", "normalise": True}
    folder = export(made(name), tmp_path, linears=linears, tables=tables, **pooling)
    sessions = [Session(folder, threads) for threads in (1, 2, 3, 4)]
    alone = [sessions[0](text)[0] for text in texts(LENGTHS)]
    vectors = [sessions[0].pool(text)[0] for text in texts(LENGTHS)]
    by_place = sessions[0].metadata["position_rule"] == "index"  # on the left, another text to the model
    for number, (chosen, ids, mask) in enumerate(batches(LENGTHS, 12, left=not by_place)):
        session = sessions[number % 4]
        found, pooled = session(ids, mask), session.pool(ids, mask)
        for row, i in enumerate(chosen):
            assert same(found[row][mask[row]], alone[i])
            assert same(pooled[row], vectors[i])


@pytest.mark.parametrize("name", ["bert", "own, lookup", "modernbert", "mpnet", "electra", "albert", "deberta"])
def test_a_text_with_holes_has_the_same_bits_in_any_batch(name, tmp_path):
    folder = export(made(name), tmp_path, linears="int8", pooling="mean")
    sessions = [Session(folder, threads) for threads in (1, 3)]
    generator = np.random.default_rng(2)
    ids, mask = generator.integers(2, VOCAB, (9, 70)), generator.random((9, 70)) < 0.7
    mask[:, 3] = True
    hidden, pooled = sessions[0](ids, mask), sessions[0].pool(ids, mask)
    for session in sessions:
        for chosen in (generator.permutation(9)[:5], *np.arange(9)[:, None]):
            assert same(session(ids[chosen], mask[chosen]), hidden[chosen])
            assert same(session.pool(ids[chosen], mask[chosen]), pooled[chosen])


@pytest.mark.parametrize("linears", ["int8", "bfloat16"])
def test_a_token_has_the_same_logits_in_any_batch(linears, tmp_path):
    torch.manual_seed(1)
    folder = export(LANGUAGE_MODELS["bert"]().eval(), tmp_path, linears=linears)
    sessions, lengths = [Session(folder, threads) for threads in (1, 4)], LENGTHS[::2]
    alone = [sessions[0].logits(text, places=np.ones_like(text, bool)) for text in texts(lengths)]
    for number, (chosen, ids, mask) in enumerate(batches(lengths, 6)):
        places = mask & (np.random.default_rng(number).random(mask.shape) < 0.4)
        found = sessions[number % 2].logits(ids, mask, places=places)
        expected = np.concatenate([alone[i][places[row, : lengths[i]]] for row, i in enumerate(chosen)])
        assert same(found, expected)
