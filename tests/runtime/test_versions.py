"""Files of other versions: refused in one line that says which version is read here and what to do."""

import re

import pytest
import torch
from transformers import BertConfig, BertModel

from lookupffn import InputError, LookupConfig, LookupFFN, PackedError, Session, export, load_packed, pack, save_packed
from lookupffn.runtime.format import FORMAT_VERSION, HEADER, read_header
from lookupffn.runtime.records import VERSION, read_metadata
from lookupffn.runtime.session import MODEL_FILE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    return export(BertModel(BertConfig(vocab_size=9, **sizes)), tmp_path_factory.mktemp("model")) / MODEL_FILE


@pytest.mark.parametrize(("step", "remedy"), [(+1, "upgrade it"), (-1, "export the model again")])
@pytest.mark.parametrize("read", [read_metadata, lambda path: Session(path.parent)], ids=["metadata", "session"])
def test_a_model_of_another_version_is_named_with_both(read, step, remedy, model_file, tmp_path):
    path, other = tmp_path / MODEL_FILE, VERSION + step
    here, there = (f'"version":"{version}"'.encode() for version in (VERSION, other))
    data = model_file.read_bytes()
    assert data.count(here) == 1
    path.write_bytes(data.replace(here, there))
    said = f"{path} is of format version {other}, this lookupffn reads {VERSION}: {remedy}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        read(path)


def test_what_has_changed_beside_the_version_is_not_judged(model_file, tmp_path):
    """A newer version may well say other things of a model, as of its labels."""
    path = tmp_path / MODEL_FILE
    changes = {b'"version":"%d"' % VERSION: b'"version":"9"', b'"labels":"[]"': b'"labels":"{}"'}
    data = model_file.read_bytes()
    for old, new in changes.items():
        assert len(old) == len(new)
        data = data.replace(old, new)
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"is of format version 9, this lookupffn reads {VERSION}: upgrade it"):
        read_metadata(path)


@pytest.mark.parametrize(("step", "remedy"), [(+1, "upgrade it"), (-1, "pack the model again")])
def test_a_packed_layer_of_another_version_is_named_with_both(step, remedy, tmp_path):
    layer = pack(LookupFFN(LookupConfig(16, 16, 4, 4, block_size=4)))
    at = HEADER.fields["version"][1]
    layer.packed[at : at + 4] = torch.tensor([FORMAT_VERSION + step], dtype=torch.int32).view(torch.uint8)
    said = f"its format version is {FORMAT_VERSION + step}, this lookupffn reads {FORMAT_VERSION}: {remedy}"
    with pytest.raises(PackedError, match=f"^{re.escape(said)}$"):
        read_header(layer.packed)
    save_packed(layer, tmp_path / "layer.safetensors")
    with pytest.raises(PackedError, match=f"^{re.escape(str(tmp_path / 'layer.safetensors'))}, layer '': {said}$"):
        load_packed(tmp_path / "layer.safetensors")
