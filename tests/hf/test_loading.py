"""Models by their folders: with the head that a folder names, or refused; a shell exports what Python does."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from test_roberta import tiny
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)
from typer.testing import CliRunner

from lookupffn import Session, export, native
from lookupffn.__main__ import app
from lookupffn.errors import InputError
from lookupffn.hf import LookupRobertaForMaskedLM, LookupRobertaForSequenceClassification, LookupRobertaModel
from lookupffn.hf.loading import load_encoder
from lookupffn.runtime.session import MODEL_FILE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers of its own names, while it saves
needs_runtime = pytest.mark.skipif(not native.available(), reason="the runtime is a compiled library")

WORDS = [f"w{i}" for i in range(60)]
LABELS = ["no", "maybe", "yes"]
SIZES = {"vocab_size": 5 + len(WORDS), "num_hidden_layers": 1}
BERT = SIZES | {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100}
DISTILBERT = {"vocab_size": 5 + len(WORDS), "dim": 48, "n_heads": 3, "n_layers": 1, "hidden_dim": 100}
HEAD = {"id2label": dict(enumerate(LABELS))}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT, **HEAD)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT, **HEAD, pad_token_id=1)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT, **HEAD)),
    "own": lambda: LookupRobertaForSequenceClassification(tiny(vocab_size=5 + len(WORDS), **HEAD)),
    "masked lm": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "own masked lm": lambda: LookupRobertaForMaskedLM(tiny()),
    "tokens": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "encoder": lambda: BertModel(BertConfig(**BERT)),
    "encoder without a pooler": lambda: RobertaModel(RobertaConfig(**BERT), add_pooling_layer=False),
    "own encoder": lambda: LookupRobertaModel(tiny()),
}
CLASSIFIERS = [name for name, make in list(MODELS.items())[:4]]
TEXTS, OTHERS = ["w1 w2", "w3 w4 w5", "w6"], ["w7 w8 w9", "w1", "w2 w3"]


def saved(model, folder, tokenizer=True):
    """The folder, with weights of which no two models have the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return folder


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_model_that_was_saved_head_and_all(name, tmp_path):
    model = MODELS[name]()
    loaded, tokenizer = load_encoder(str(saved(model, tmp_path)), head=True)
    assert type(loaded) is type(model)
    assert not loaded.training
    for key, values in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], values)
    assert len(tokenizer) == 5 + len(WORDS)
    encoder, _ = load_encoder(str(tmp_path))
    assert "For" not in type(encoder).__name__


def test_the_first_architecture_that_has_a_task_counts(tmp_path):
    saved(MODELS["bert"](), tmp_path)
    names = [
        ("BertModel", ["BertModel"]),
        ("BertModel", None),
        (
            "BertForSequenceClassification",
            ["MyModel", "BertForThis", "BertForSequenceClassification", "BertForMaskedLM"],
        ),
        ("BertForSequenceClassification", ["RoFormerForSequenceClassification"]),
    ]
    for expected, architectures in names:
        change(tmp_path / "config.json", architectures=architectures)
        assert type(load_encoder(str(tmp_path), head=True)[0]).__name__ == expected


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    """Of transformers it is one of five special tokens, for BERT and RoBERTa."""
    for name in ("encoder", "encoder without a pooler", "own encoder"):
        folder = tmp_path / name
        folder.mkdir()
        assert load_encoder(str(saved(MODELS[name](), folder, tokenizer=False)))[1] is None


def without(file, *names):
    weights = load_file(file)
    save_file({name: values for name, values in weights.items() if name not in names}, file, {"format": "pt"})


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    weights = saved(MODELS["bert"](), tmp_path) / "model.safetensors"
    without(weights, "bert.pooler.dense.bias", "classifier.weight")
    with pytest.raises(InputError, match=r"its weights lack bert\.pooler\.dense\.bias, classifier\.weight"):
        load_encoder(str(tmp_path), head=True)
    load_encoder(str(tmp_path))  # needs neither
    without(weights, "bert.encoder.layer.0.output.dense.bias")
    with pytest.raises(InputError, match=r"its weights lack encoder\.layer\.0\.output\.dense\.bias"):
        load_encoder(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_encoder(str(tmp_path))
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        load_encoder(str(tmp_path), head=True)


# ---- Folders of sentence-transformers --------------------------------------------------------------------------------


def sentence_transformer(folder):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = modules.Transformer(str(saved(MODELS["masked lm"](), folder)))
    model = SentenceTransformer(modules=[transformer, modules.Pooling(48, "cls"), modules.Normalize()], device="cpu")
    model.save(str(folder / "st"))
    return folder / "st"


@pytest.mark.parametrize("length", [32, 9])
@needs_runtime
def test_a_cross_encoder_is_loaded_as_one(length, tmp_path):
    """A folder of version 6 has modules, of which a SentenceTransformer would make an encoder."""
    model = RobertaForSequenceClassification(RobertaConfig(**BERT, num_labels=1, pad_token_id=1))
    reranker = CrossEncoder(str(saved(model, tmp_path)), device="cpu", max_length=length)
    reranker.save_pretrained(str(tmp_path / "ce"))
    expected = export(reranker, tmp_path / "python")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ce"), "--output", str(tmp_path / "shell")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "shell" / MODEL_FILE).read_bytes() == (expected / MODEL_FILE).read_bytes()
    session = Session(tmp_path / "shell")
    assert session.metadata["max_length"] == str(length)
    assert np.array_equal(session.classify(TEXTS, OTHERS), Session(expected).classify(TEXTS, OTHERS))
    # Without modules, as version 5 saves it and the Hub has them.
    for file in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (tmp_path / "ce" / file).unlink()
    change(tmp_path / "ce" / "config.json", sentence_transformers={"activation_fn": "torch.nn.Sigmoid"})
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ce"), "--output", str(tmp_path / "older")])
    assert (tmp_path / "older" / MODEL_FILE).read_bytes() == (expected / MODEL_FILE).read_bytes()


def test_a_module_without_settings_needs_no_folder(tmp_path):
    folder = sentence_transformer(tmp_path)
    shutil.rmtree(folder / "2_Normalize")  # as older folders, all-MiniLM-L6-v2's among them
    assert len(load_encoder(str(folder))[0]) == 3


def test_a_sentence_transformer_counts_before_the_head_that_it_was_made_from(tmp_path):
    folder = sentence_transformer(tmp_path)
    change(folder / "config.json", architectures=["BertForMaskedLM"])  # as many on the Hub say
    for head in (False, True):
        model, tokenizer = load_encoder(str(folder), head=head)
        assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
        assert tokenizer is None


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("modules.json", [{"type": "mine.Pooling"}], r"its module mine\.Pooling is none of sentence-transformers"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "it is a SparseEncoder of 3 modules"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "it is a CrossEncoder of 3 modules"),
    ],
)
def test_what_sentence_transformers_has_and_the_runtime_has_not_is_refused(file, contents, message, tmp_path):
    folder = sentence_transformer(tmp_path)
    (folder / file).write_text(json.dumps(contents))
    with pytest.raises(InputError, match=message):
        load_encoder(str(folder), head=True)


# ---- From a shell ----------------------------------------------------------------------------------------------------


@needs_runtime
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_from_a_shell_has_the_bits_of_one_from_python(name, tmp_path):
    model = MODELS[name]()
    folder = saved(model, tmp_path)
    done = CliRunner().invoke(app, ["export", str(folder), "--output", str(tmp_path / "shell")])
    assert done.exit_code == 0, done.output
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    expected = export(model, tmp_path / "python", tokenizer=tokenizer)
    assert (tmp_path / "shell" / MODEL_FILE).read_bytes() == (expected / MODEL_FILE).read_bytes()
    session = Session(tmp_path / "shell")
    assert session.labels == LABELS
    assert np.array_equal(session.classify(TEXTS), Session(expected).classify(TEXTS))


@needs_runtime
def test_pooling_asks_for_the_encoder_of_a_classifier(tmp_path):
    model = MODELS["bert"]()
    arguments = ["export", str(saved(model, tmp_path)), "--output", str(tmp_path / "shell"), "--pooling", "mean"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    session = Session(tmp_path / "shell")
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    python = Session(export(model.bert, tmp_path / "python", pooling="mean", tokenizer=tokenizer))
    assert session.labels == []
    assert np.array_equal(session.embed(TEXTS), python.embed(TEXTS))


def test_a_head_that_the_runtime_has_not_is_left_out_with_a_word(tmp_path):
    arguments = ["export", str(saved(MODELS["tokens"](), tmp_path)), "--output", str(tmp_path / "shell")]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "the head of BertForTokenClassification is left out" in [str(w.message).split(":")[0] for w in found]
