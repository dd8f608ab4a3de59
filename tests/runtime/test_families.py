"""Packed encoders of every family against the models that they were exported from, in every implementation."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from encoders import CLASSIFIERS, MODELS, POSITIONS, TYPED, VOCAB, albert, batch, bert, hidden, randomised

from lookupffn import Session, export, native
from lookupffn.runtime.session import MODEL_FILE

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_the_model(name, exported):
    folder, model = exported(name)
    ids, mask, types = batch()
    types = types if isinstance(model, TYPED) else None
    expected, session = hidden(model, ids, mask, types), Session(folder)
    found = session(ids, mask, types)
    assert (found[mask == 0] == 0).all()
    error = (found - expected)[mask == 1].abs().max()
    assert error <= 2e-5 * expected.abs().max()
    for length in (1, 2, 15, 16, 17, POSITIONS):
        ids, mask, _ = batch(4, length)
        mask[:] = 1
        expected = hidden(model, ids, mask)
        limit = 2e-5 * expected.abs().max()
        assert np.abs(session(ids.numpy()) - expected.numpy()).max() <= limit


@pytest.mark.parametrize(
    "name", ["bert", "bert, odd sizes", "own, dense", "mpnet", "modernbert, odd sizes", "electra", "albert", "deberta"]
)
def test_int8_is_near_the_model(name, exported):
    folder, model = exported(name, "int8")
    ids, mask, _ = batch()
    expected, found = hidden(model, ids, mask), Session(folder)(ids, mask)
    cosine = torch.nn.functional.cosine_similarity(found[mask == 1], expected[mask == 1])
    assert cosine.min() > 0.999


@pytest.mark.parametrize("width", [48, 66, 128])
def test_int8_words_are_rounded_by_row(width, tmp_path):
    """A model without layers: what its int8 form computes is the embeddings alone."""
    model = bert(width=width, heads=2, layers=0)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(torch.rand(VOCAB, 1) * 10)
        model.embeddings.word_embeddings.weight[5] = 0
    session, (ids, mask, types) = Session(export(model, tmp_path)), batch()
    ids[0, :3] = 5
    with torch.no_grad():
        words = model.embeddings.word_embeddings.weight
        scales = words.abs().amax(1, keepdim=True) / 127
        words.copy_((words / scales).nan_to_num().round() * scales)
    expected = hidden(model, ids, mask, types)
    error = (session(ids, mask, types) - expected)[mask == 1].abs().max()
    assert error <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["bert", "modernbert, odd sizes"])
def test_bfloat16_rounds_the_weights_alone(name, tmp_path):
    model = MODELS[name]()
    session, (ids, mask, _) = Session(export(model, tmp_path, linears="bfloat16")), batch()
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.copy_(linear.weight.bfloat16())
    expected, found = hidden(model, ids, mask), session(ids, mask)
    error = (found - expected)[mask == 1].abs().max()  # queries are scaled before they are rounded
    assert error <= 3e-2 * expected.abs().max()
    assert (found - expected)[mask == 1].square().mean().sqrt() <= 2e-3 * expected.std()


def test_an_input_that_is_far_larger_than_the_others_does_not_take_their_integers(tmp_path):
    """As one of MiniLM's dimensions is: without its exact product the error is ten times as large."""
    model = bert(width=64, heads=2, inner=64, layers=1)
    with torch.no_grad():
        model.encoder.layer[0].attention.output.LayerNorm.bias[7] = 60.0
        model.embeddings.LayerNorm.weight[3] = 50.0
    ids, mask, _ = batch()
    expected = hidden(model, ids, mask)
    found = Session(export(model, tmp_path, linears="int8"))(ids, mask)
    error = (found - expected)[mask == 1]
    assert error.square().mean().sqrt() < 0.02 * expected[mask == 1].std()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [False, True])
def test_pooled_vectors(pooling, normalise, exported):
    folder, model = exported("bert", pooling=pooling, normalise=normalise)
    ids, mask, _ = batch()
    states = hidden(model, ids, mask)
    rows = [state[here == 1] for state, here in zip(states, mask, strict=True)]
    expected = torch.stack([row.mean(0) if pooling == "mean" else row[0] for row in rows])
    if normalise:
        expected = torch.nn.functional.normalize(expected)
    torch.testing.assert_close(torch.from_numpy(Session(folder).pool(ids, mask)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_its_logits(name, tmp_path):
    model = randomised(CLASSIFIERS[name]())
    session = Session(export(model, tmp_path, linears="float32", tables="float32"))
    ids = torch.randint(2, VOCAB, (60, 37), generator=torch.Generator().manual_seed(0))  # more than a tile of them
    mask = (torch.arange(37) < torch.arange(1, 61)[:, None]).long()
    ids[mask == 0] = 1
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits.numpy()
    got = session.pool(ids, mask)
    assert session.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert np.abs(got - expected).max() <= 3e-5 * np.abs(expected).max()
    assert np.array_equal(session.pool(ids[7:8], mask[7:8]), got[7:8])
    assert np.array_equal(Session(tmp_path, threads=3).pool(ids, mask), got)


GOLDEN_MODELS = {  # family, type of the linears: the first 8 bytes of a SHA-256
    ("bert", "float32"): "3d38c06270ddc03e",
    ("bert", "int8"): "a7bbe2a220a22fd2",
    ("albert", "int8"): "22b43de79e1be3ff",
}


@pytest.mark.parametrize(("family", "linears"), GOLDEN_MODELS)
def test_all_bytes_of_a_small_model_are_those_of_version_2(family, linears, tmp_path):
    """docs/format.md: a change here is a new version."""
    model = CLASSIFIERS[family]()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(((torch.arange(parameter.numel()) * (i + 3) % 31 - 15) / 64).view_as(parameter))
    data = (export(model, tmp_path, linears=linears) / MODEL_FILE).read_bytes()
    assert hashlib.sha256(data).hexdigest()[:16] == GOLDEN_MODELS[family, linears]


def test_layers_that_are_shared_are_stored_once(tmp_path):
    sizes = {
        layers: export(albert(num_hidden_layers=layers), tmp_path / str(layers)).joinpath(MODEL_FILE).stat().st_size
        for layers in (1, 12)
    }
    assert sizes[12] - sizes[1] < 2000  # eleven times the places of six records


COMPARE = """
import sys
import numpy as np
from lookupffn import Session
given = np.load(sys.argv[1])
for folder, expected in zip(sys.argv[2:], ("float32", "int8"), strict=True):
    found = Session(folder, 2)(given["ids"], given["mask"])
    error = np.abs(found - given[expected])[given["mask"] == 1].max()
    assert error <= (2e-5 if expected == "float32" else 0.02) * np.abs(given[expected]).max(), (folder, error)
"""


@pytest.mark.parametrize("isa", [i["name"] for i in native.implementations() if i["runs_here"]])
@pytest.mark.parametrize("name", ["bert", "own, causal", "mpnet", "modernbert", "electra", "deberta"])
def test_every_implementation(isa, name, exported, tmp_path):
    folders = [exported(name, linears)[0] for linears in ("float32", "int8")]
    model = exported(name)[1]
    ids, mask, _ = batch(6, 70)
    states = hidden(model, ids, mask).numpy()
    np.savez(tmp_path / "given.npz", ids=ids, mask=mask, float32=states, int8=Session(folders[1])(ids, mask))
    command = [sys.executable, "-c", COMPARE, str(tmp_path / "given.npz"), *map(str, folders)]
    done = subprocess.run(command, env=os.environ | {"LOOKUPFFN_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
