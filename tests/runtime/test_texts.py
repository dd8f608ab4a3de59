"""Texts and batches at their edges, empty ones among them, and the commands that read them from files."""

import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast
from typer.testing import CliRunner

from lookupffn import Session, export, native
from lookupffn.__main__ import _lines, app, main
from lookupffn.errors import InputError

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 1}
WORDS = [f"w{i}" for i in range(60)]
LABELS = ["no", "maybe", "yes"]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """An encoder and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32)
    config = BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(LABELS)), **SIZES)
    torch.manual_seed(0)
    models = {"encoder": BertModel(config), "classifier": BertForSequenceClassification(config)}
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        pooling = "mean" if name == "encoder" else None
        export(model.eval(), folder / name, linears="float32", tokenizer=tokenizer, pooling=pooling)
    return {name: Session(folder / name) for name in models}


# ---- Empty ones ------------------------------------------------------------------------------------------------------


def test_an_empty_text_is_its_special_tokens(sessions):
    ids = np.array([[2, 3]])
    encoder, classifier = sessions["encoder"], sessions["classifier"]
    assert np.array_equal(encoder.embed([""]), encoder.pool(ids))
    assert np.array_equal(encoder.embed(["w1 w2", "", "w3"])[1:2], encoder.pool(ids))
    assert np.array_equal(classifier.classify([""]), classifier.pool(ids))
    assert np.array_equal(classifier.classify([""], [""]), classifier.pool([[2, 3, 3]], None, [[0, 0, 1]]))


def test_of_no_texts_there_are_no_vectors_and_no_logits(sessions):
    for found, width in (
        (sessions["encoder"].embed([]), 48),
        (sessions["classifier"].classify([]), len(LABELS)),
        (sessions["classifier"].classify([], []), len(LABELS)),
    ):
        assert found.shape == (0, width)
        assert found.dtype == np.float32


def test_a_text_without_tokens_is_named_by_its_place_in_the_list(sessions):
    encoder = Session(sessions["encoder"].folder)
    bare = Tokenizer.from_str(encoder.tokenizer.to_str())
    bare.post_processor = None  # of a model without special tokens
    encoder._tokenizer = bare
    assert encoder.embed(["w1", "w2"]).shape == (2, 48)
    with pytest.raises(InputError, match="text 1 has no tokens"):
        encoder.embed(["w1 w2", "", "w3", ""])


@pytest.mark.parametrize("of", [np, torch])
def test_batches_of_no_texts_and_of_no_length(sessions, of):
    session = sessions["encoder"]
    for length in (0, 5):
        hidden = session(of.zeros((0, length), dtype=of.int64))
        assert tuple(hidden.shape) == (0, length, 48)
        assert hidden.dtype == of.float32
        assert session.pool(of.zeros((0, length), dtype=of.int32)).shape == (0, 48)
    for run in (session, session.pool):
        with pytest.raises(InputError, match="text 0 has no tokens: every text needs at least one"):
            run(of.zeros((2, 0), dtype=of.int64))
        with pytest.raises(InputError, match=r"input_ids must be integers \(batch, length\), not .*float.* \[0, 5\]"):
            run(of.zeros((0, 5)))


# ---- From a shell ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(sessions, tmp_path):
    """Runs a command on a session's model and a file of these bytes; gives what it prints."""

    def run(command, which, contents, *options, name="texts.txt"):
        (tmp_path / name).write_bytes(contents.encode())
        arguments = [command, str(sessions[which].folder), str(tmp_path / name), *map(str, options)]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


def test_lines_of_a_file(tmp_path):
    lines = ["w1", "", " w2\tw3\u2028w4\x85 "]
    contents = "\n".join(lines)
    for written in (contents, contents + "\n", "\ufeff" + contents, contents.replace("\n", "\r\n")):
        (tmp_path / "texts.txt").write_bytes(written.encode())
        assert _lines(tmp_path / "texts.txt") == lines
    (tmp_path / "texts.txt").write_bytes(b"w1\n\xff")
    for path in (tmp_path / "texts.txt", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{path} cannot be read as UTF-8 text"):
            _lines(path)


def test_lines_are_classified(run, sessions, tmp_path):
    texts = ["w1 w2", "", "w3\u2028w4\x85 w5", "w6"]  # Unicode has more ends of lines than a file has
    expected = sessions["classifier"].classify(texts)
    best = "".join(f"{LABELS[row.argmax()]}\t{row.max():.4f}\n" for row in expected)
    contents = "\n".join(texts)
    assert run("classify", "classifier", contents) == best
    printed = run("classify", "classifier", contents, "--output", tmp_path / "new" / "logits.npy", "--threads", 2)
    assert "4 texts" in printed
    assert "logits of no, maybe, yes in " in printed
    assert np.array_equal(np.load(tmp_path / "new" / "logits.npy"), expected)


def test_the_two_columns_of_a_tsv_are_pairs(run, sessions, tmp_path):
    expected = sessions["classifier"].classify(["w1 w2", ""], ["w3", "w4 w5"])
    run("classify", "classifier", "w1 w2\tw3\n\tw4 w5\n", "--output", tmp_path / "logits.npy", name="pairs.TSV")
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected)
    for contents, message in (("w1\tw2\nw3\n", "2 has 1 column"), ("w1\tw2\tw3\n", "1 has 3 column")):
        with pytest.raises(InputError, match=rf"pairs\.tsv:{message}\(s\): a \.tsv holds pairs of texts"):
            run("classify", "classifier", contents, name="pairs.tsv")


def test_an_empty_file_has_no_texts(run, tmp_path):
    assert run("classify", "classifier", "") == ""
    run("embed", "encoder", "", "--output", tmp_path / "vectors.npy")
    assert np.load(tmp_path / "vectors.npy").shape == (0, 48)


def test_lines_are_embedded_as_they_are_classified(run, sessions, tmp_path):
    run("embed", "encoder", "w1\u2028w2\n\nw3", "--output", tmp_path / "vectors.npy")
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), sessions["encoder"].embed(["w1\u2028w2", "", "w3"]))


@pytest.mark.parametrize(
    ("command", "which", "message"),
    [
        ("embed", "classifier", "is a classifier of no, maybe, yes: call classify"),
        ("classify", "encoder", "is no classifier: export a model for sequence classification"),
    ],
)
def test_a_command_for_the_other_kind_of_model_is_one_line(
    command, which, message, sessions, tmp_path, monkeypatch, capsys
):
    (tmp_path / "texts.txt").write_text("w1\n")
    arguments = [str(sessions[which].folder), str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out.npy")]
    monkeypatch.setattr(sys, "argv", ["lookupffn", command, *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.npy").exists()
