"""Packed models by save_pretrained and from_pretrained: one folder, the same bits, or it is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_roberta import ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lookupffn import LookupFFN, PackedError, PackedLookupFFN, pack
from lookupffn.hf import LookupRobertaForMaskedLM, PackedConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers of its own names, while it saves


def model_with(**changes):
    model = LookupRobertaForMaskedLM(tiny(**changes)).eval()
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.ffn.tables.normal_()  # so that another draw of them would be seen
    return model


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLookupFFN)}


@torch.no_grad()
@pytest.mark.parametrize(
    "kinds", [("int4", "int8"), ("int8", "int8"), ("int8", "int16"), ("bfloat16", "int16"), ("float32", "float32")]
)
def test_a_packed_model_comes_back_from_its_folder_bit_for_bit(kinds, tmp_path):
    model = pack(model_with(), kinds[0], projection=kinds[1])
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "lookupffn", "tables": kinds[0], "projection": kinds[1], "layers": None}
    x = ids()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).logits, model(x).logits)
    for name, layer in packed_layers(loaded).items():
        assert torch.equal(layer.packed, model.get_submodule(name).packed)
        assert layer.packed.data_ptr() % 64 == 0
    assert len(packed_layers(loaded)) == 2
    encoder = AutoModel.from_pretrained(tmp_path).eval()  # without the head
    assert torch.equal(encoder(x).last_hidden_state, model.encoder(x).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(x).logits, model(x).logits)


@torch.no_grad()
def test_layers_that_are_packed_one_by_one_and_differently(tmp_path):
    model = model_with(num_hidden_layers=3)
    model.encoder.layers[0].ffn = pack(model.encoder.layers[0].ffn)
    model.encoder.layers[2].ffn = pack(model.encoder.layers[2].ffn, "bfloat16")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    kinds = [getattr(layer.ffn, "table_dtype", None) for layer in loaded.encoder.layers]
    assert kinds == ["int8", None, "bfloat16"]
    assert isinstance(loaded.encoder.layers[1].ffn, LookupFFN)
    x = ids()
    assert torch.equal(loaded(x).logits, model(x).logits)


@torch.no_grad()
def test_packing_leaves_the_model_as_it_was_and_it_is_saved_as_such(tmp_path):
    model = model_with()
    pack(model).save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "whole")
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole").eval()
    x = ids()
    assert torch.equal(loaded(x).logits, model(x).logits)


@torch.no_grad()
def test_a_model_is_packed_as_it_is_loaded(tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=PackedConfig("bfloat16")).eval()
    x = ids()
    assert torch.equal(loaded(x).logits, pack(model, "bfloat16")(x).logits)


def test_folders_that_are_not_what_they_say_are_refused_by_layer(tmp_path):
    pack(model_with()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = "encoder.layers.1.ffn.packed"
    missing = {k: v for k, v in tensors.items() if k != name}
    zeros = tensors | {name: torch.zeros_like(tensors[name])}
    for changed, reason in ((zeros, "not with b'LOOKUPFF'"), (missing, "the files lack it")):
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(PackedError, match=rf"layer 'encoder.layers.1.ffn': .*{reason}"):
            AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(tables="fp4"), "tables must be one of float32, bfloat16, int8, int4, not 'fp4'"),
        (dict(projection="bfloat16"), "projection must be one of float32, int16, int8, not 'bfloat16'"),
        (dict(layers={"layers.0.ffn": "int8"}), r"layers\['layers.0.ffn'\] must be \[dtype of tables"),
        (dict(bits=4), r"of the fields tables, projection, layers and lookups, not \['bits'\]"),
    ],
)
def test_a_config_that_does_not_fit_is_named(fields, reason):
    with pytest.raises(ValueError, match=reason):
        PackedConfig(**fields)


def test_lora_on_a_classifier_keeps_its_whole_head(tmp_path):
    peft = pytest.importorskip("peft")
    LookupRobertaForMaskedLM(tiny()).save_pretrained(tmp_path / "base")
    x, labels = ids(), torch.tensor([0, 1, 2])

    def classifier(seed):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, target_modules=["query_key_value"])
    model = peft.get_peft_model(classifier(0), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split("default.")[1] for name in trained if "classifier" in name} == {
        f"{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model(input_ids=x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(input_ids=x).logits
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(classifier(1), tmp_path / "lora").eval()
    assert torch.equal(again(input_ids=x).logits, expected)
    merged = again.merge_and_unload().eval()
    torch.testing.assert_close(merged(x).logits, expected)
    pack(merged).save_pretrained(tmp_path / "packed")
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(fast(x).logits, pack(merged)(x).logits)


@pytest.mark.parametrize("options", [dict(target_parameters=["ffn.tables"]), dict(target_modules=["projection"])])
def test_lora_on_tables_or_projection_is_merged_before_packing(options, tmp_path):
    peft = pytest.importorskip("peft")
    model = LookupRobertaForMaskedLM(tiny(ffn_options=dict(projection="dense"))).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options)).eval()
    x = ids()
    expected = adapted(input_ids=x).logits
    with pytest.raises(ValueError, match=r"merge_and_unload"):
        pack(adapted)
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(merged(x).logits, expected)
    assert len(packed_layers(pack(merged))) == 2


def test_a_packed_model_in_a_sentence_transformer_is_saved_and_loaded(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 5, "b": 6}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    pack(model_with()).encoder.save_pretrained(tmp_path / "encoder")
    fast.save_pretrained(tmp_path / "encoder")
    model = st.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert len(packed_layers(model)) == 2
    expected = model.encode(["a b a", "b"])
    model.save(str(tmp_path / "whole"))
    loaded = st.SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    assert len(packed_layers(loaded)) == 2
    assert (loaded.encode(["a b a", "b"]) == expected).all()
    trained = st.SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    with pytest.raises(ValueError, match="holds no LookupFFN layer"):
        pack(trained)


def test_a_forked_child_of_a_server_answers_on_one_thread():
    """docs/use.md: after a call on several threads torch's own products would wait for ever, unless told of one."""
    code = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[1])
from test_roberta import ids, tiny
from lookupffn import pack
from lookupffn.hf import LookupRobertaModel
torch.set_num_threads(2)
model, x = pack(LookupRobertaModel(tiny())).eval(), ids(64, 128)
with torch.inference_mode():
    expected = model(x).last_hidden_state
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        close = torch.allclose(model(x).last_hidden_state, expected, atol=1e-4)
        os._exit(0 if close else 1)
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            sys.exit(os.waitstatus_to_exitcode(status))
        time.sleep(0.05)
    os.kill(pid, 9)
    sys.exit(2)
"""
    folder = str(Path(__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, folder], timeout=120).returncode == 0
