"""The demo from end to end on a tiny model, and the text that is at hand."""

import json
import string

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import BertConfig, BertModel, BertTokenizerFast

from lookupffn import native
from lookupffn.conversion import timing
from lookupffn.conversion.docstrings import docstrings, summary
from lookupffn.errors import InputError
from lookupffn.lab import commands, demo

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    letters = string.ascii_lowercase + string.digits
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "bert")
    parts = [modules.Transformer(str(folder / "bert")), modules.Pooling(32, "mean"), modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "whole"))
    return folder / "whole"


@pytest.mark.skipif(not native.available(), reason="the packed form needs the compiled library")
def test_a_model_is_converted_reported_and_searched_with(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "ENGINES", ())
    documented = [
        (f"module.function{i}", f"Return the number {i} of the {i % 7} lists.\n\nMore of it here.") for i in range(80)
    ]
    documented.append(("module._private", "Nobody should find this one here."))
    monkeypatch.setattr(demo, "docstrings", lambda: iter(documented))
    output = tmp_path / "out"
    for _ in range(2):  # an earlier demo is replaced
        demo.demo(model, output, minutes=1, tokens=3000, seed=0)
    said = capsys.readouterr().out
    assert "80 texts to vectors" in said
    assert said.count("module.function") >= 15
    assert "the teacher" in said
    report = json.loads((output / "report.json").read_text())
    assert report["model"] == "all-MiniLM-L6-v2"
    assert set(report["baselines"]) >= {"no feed-forward layers", "half of the layers"}
    (output / "report.json").write_text('{"what": "something else"}')
    with pytest.raises(InputError, match="holds no conversion: choose another --output-dir"):
        demo.demo(model, output, minutes=1, tokens=3000, seed=0)


def test_without_the_wheel_the_twins_are_trained(monkeypatch, tmp_path, capsys):
    called = {}
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(commands, "twins", lambda **given: called.update(given))
    typer_context = type("Context", (), {"invoked_subcommand": None})()
    commands.demo(typer_context, output_dir=str(tmp_path), minutes=1.0, tokens=None, seed=3)
    assert called == {"output_dir": str(tmp_path), "seed": 3}
    assert "pip install 'lookupffn[minilm]'" in capsys.readouterr().out


def test_docstrings_are_those_of_the_standard_library():
    found = {}
    for name, text in docstrings():
        found[name] = text
        if name == "calendar.isleap":
            break
    assert len(found) > 500
    assert summary(found["argparse.ArgumentParser"]) == "Object for parsing command line strings into Python objects."
    assert found["calendar.isleap"] == "Return True for leap years, False for non-leap years."
