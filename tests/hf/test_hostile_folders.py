"""Folders from outside that are broken or mean harm: one typed error each, nothing of theirs run, no memory for lies.

All are opened in one process (audited.py), whose audit hook records what Python itself reports: code compiled or run
from the folder, pickles opened or resolved, processes started, networks asked.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from test_loading import MODELS, saved, sentence_transformer
from test_roberta import tiny
from transformers import BertModel, BertTokenizerFast

from lookupffn import export, native, pack, save_packed
from lookupffn.branches import BranchedLookupFFN, TokenContext
from lookupffn.hf import LookupRobertaForMaskedLM
from lookupffn.hf.loading import load_encoder
from lookupffn.hf.packed import mark_converted
from lookupffn.hf.slots import slots_of
from lookupffn.runtime.records import VERSION

pytest.importorskip("resource")  # of Unix
pytest.importorskip("sentence_transformers.base.modules", reason="folders as version 6 writes them")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers of its own names, while it saves
    pytest.mark.skipif(not native.available(), reason="the runtime is a compiled library"),
]


class Payload:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


# ---- Changes to a folder ---------------------------------------------------------------------------------------------


def entry(file, **entries):
    def change(folder):
        path = folder / file
        said = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(said | entries))

    return change


def quantization(*path, **entries):
    """Entries of ``quantization_config``, or of what lies in it at ``path``."""

    def change(folder):
        said = json.loads((folder / "config.json").read_text())
        at = said["quantization_config"]
        for key in path:
            at = at[key]
        at.update(entries)
        (folder / "config.json").write_text(json.dumps(said))

    return change


def text(file, contents):
    return lambda folder: (folder / file).write_text(contents)


def weights(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def pickled(file):
    def change(folder):
        (folder / WEIGHTS).unlink()
        for name in (file, "training_args.bin"):
            (folder / name).write_bytes(pickle.dumps(Payload()))

    return change


def code(*changes):
    """A module that leaves a mark, and what names it."""

    def change(folder):
        (folder / "evil.py").write_text("open('ran', 'w')\nclass Model: pass\n")
        for change in changes:
            change(folder)

    return change


def module(**entries):
    def change(folder):
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps([modules[0], modules[1] | entries]))

    return change


def moved(file):
    """The file, or folder, elsewhere, and a link to it."""

    def change(folder):
        outside = folder.with_name(f"outside {folder.name} {file}")
        shutil.move(folder / file, outside)
        (folder / file).symlink_to(outside)

    return change


def packed_elsewhere(folder):
    (folder / "packed").mkdir()
    for file in (WEIGHTS, "tokenizer.json"):
        shutil.move(folder / file, folder / "packed" / file)
    moved("packed")(folder)


def metadata(**entries):
    def change(raw):
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        header["__metadata__"] |= entries
        new = json.dumps(header, separators=(",", ":")).encode()
        new += b" " * (-(8 + len(new)) % 64)
        return struct.pack("<Q", len(new)) + new + raw[8 + size :]

    return weights(change)


def cut(size):
    return weights(lambda raw: raw[:size])


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


long_header = weights(lambda raw: struct.pack("<Q", 1 << 60) + raw[8:])
WEIGHTS, INDEX, SBERT = "model.safetensors", "model.safetensors.index.json", "sentence_bert_config.json"
AUTO = {"AutoConfig": "evil.Model", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Model", None]}
DEEP = "[" * 100_000
by_index = both(pickled("evil.bin"), entry(INDEX, metadata={}, weight_map={"a": "evil.bin"}))


def config(**entries):
    return entry("config.json", **entries)


# ---- What is refused, by the folder that is changed, with what the error says ----------------------------------------
# fmt: off
BERT = {
    "a pickle alone": (pickled("pytorch_model.bin"), "pickles (.bin) are never read"),
    "a pickle by an index": (by_index, "'evil.bin'"),
    "an index to files outside": (both(pickled("a.bin"), entry(INDEX, weight_map={"a": "../a.safetensors"})),
                                  "'../a.safetensors'"),
    "auto_map": (code(config(auto_map=AUTO)), "config.json has auto_map"),
    "auto_map inside": (code(config(text_config={"auto_map": AUTO})), "config.json has auto_map"),
    "auto_map of a tokenizer": (code(entry("tokenizer_config.json", auto_map=AUTO)), "tokenizer_config.json has auto"),
    "a kernel by its repository": (config(attn_implementation="evil/kernel"), "must be eager or sdpa, not 'evil/ke"),
    "a base model by its repository": (entry("adapter_config.json", base_model_name_or_path="evil/model"), "adapter"),
    "weights by a name": (config(transformers_weights="../evil.safetensors"), "transformers_weights in its"),
    "a dtype that is a function": (config(dtype="load"), "dtype in its config.json"),
    "an activation that is none": (config(hidden_act="os.system"), "hidden_act in its config.json"),
    "another library's": (config(quantization_config={"quant_method": "awq"}), "in its config.json is 'awq'"),
    "a type that is not known": (config(model_type="evil"), "model type `evil`"),
    "a type that is a list": (config(model_type=["bert"]), "model_type in its config.json must be a string"),
    "architectures that are numbers": (config(architectures=[3]), "must be a list of strings"),
    "a config that is no JSON": (text("config.json", "{"), "its config.json is no JSON"),
    "a config that is a list": (text("config.json", "[]"), "its config.json must hold an object, not list"),
    "a config that nests": (text("config.json", DEEP), "its config.json is no JSON: maximum recursion"),
    "a tokenizer that is no JSON": (text("tokenizer.json", "{"), "its tokenizer is damaged"),
    "a tokenizer that nests": (text("tokenizer.json", DEEP), "its tokenizer is damaged"),
    "another size": (config(intermediate_size=101), "its config.json asks for [101]"),
    "a size below 0": (config(hidden_size=-48), "negative dimension -48"),
    "a huge vocabulary": (config(vocab_size=10**7), "its config.json asks for 480,"),
    "layers without end": (config(num_hidden_layers=10**9), "at most the 23 tensors"),
    "a header that is cut": (cut(100), "model.safetensors is damaged"),
    "data that are cut": (cut(-100), "model.safetensors is damaged"),
    "a header of 2^60": (long_header, "model.safetensors is damaged"),
    "a link": (moved(WEIGHTS), "outside of its folder: copy the file there"),
    "a link of a tokenizer": (moved("tokenizer.json"), "outside of its folder"),
}
ST = {
    "a pickle alone": (pickled("pytorch_model.bin"), "pickles (.bin) are never read"),
    "auto_map": (code(config(auto_map=AUTO)), "config.json has auto_map"),
    "a module of its own": (code(module(type="evil.Model")), "evil.Model is none of sentence-transformers"),
    "a module that imports": (code(module(type="sentence_transformers.models.Dense")), "Dense is not known here"),
    "an attribute": (module(type="sentence_transformers.util.misc.importlib"), "misc.importlib is not known here"),
    "a module outside": (module(path="../other"), "the path of its module Pooling must be"),
    "a module without a type": (text("modules.json", '[{"path": ""}]'), "its module None is none"),
    "modules that are none": (text("modules.json", "3"), "its modules.json must hold a list, not int"),
    "options of a module": (entry(SBERT, model_args={"attn_implementation": "evil/kernel", "allow_all_kernels": True}),
                            "model_args in its sentence_bert_config.json must be left out"),
    "a method": (entry(SBERT, modality_config={"text": {"method": "__init__"}}), "must be 'forward', not '__init__'"),
    "a huge inner layer": (config(intermediate_size=10**7), "its config.json asks for 970,"),
    "a link of a module": (moved("1_Pooling"), "outside of its folder"),
}
PACKED = {
    "a header that is cut": (cut(100), "is damaged or no packed model"),
    "data that are cut": (cut(-100), "is damaged or no packed model"),
    "a header of 2^60": (long_header, "a header of 1152921504606846976 bytes"),
    "a newer format": (metadata(version=str(VERSION + 7)), "upgrade it"),
    "a longest text of 0": (metadata(max_length="0"), "max_length 0 with 512 positions"),
    "a longest text below 0": (metadata(max_length="-5"), "max_length -5 with 512 positions"),
    "a longest text of 10^20": (metadata(max_length="1" + "0" * 20), "with 512 positions"),
    "a link": (moved(WEIGHTS), "outside of its folder"),
    "a link of a folder": (packed_elsewhere, "outside of its folder"),
    "a link of a tokenizer": (moved("tokenizer.json"), "outside of its folder"),
    "a tokenizer that nests": (text("tokenizer.json", DEEP), "is no tokenizer"),
}
CLASSIFIER = {name: BERT[name] for name in ("a pickle by an index", "auto_map", "a huge vocabulary", "a link")}
LAYERS = {"configs that nest": (metadata(configs=DEEP), "is damaged or no file of packed layers")}
LAYER, ROW = "encoder.layer.0", {"rows": 10, "before": 0, "after": 0}
HELD = "by config.json, and the files hold"
# Of from_pretrained, whose errors are ours where they are of quantization_config.
CONVERTED = {
    "a pickle by an index": (by_index, "in safetensors, never in pickles"),
    "a link": (moved(WEIGHTS), "outside of its folder"),
    **{f"{field} = {value!r}": (quantization(**{field: value}), said) for field, value, said in (
        ("evil", 1, "not ['evil']"),
        ("tables", ["int8"], "tables must be one of"),
        ("layers", [1], "layers must be a map"),
        ("layers", {"x": ["int8", "int8"]}, "not ['x']"),
        ("layers", {"x": [["int8"], "int8"]}, "layers['x'] must be"),
        ("lookups", 3, "lookups must be a map"),
        ("lookups", {"x": {}}, "not ['x']"),
        ("lookups", {LAYER: [1]}, "the layer must be a map of lookup, rank, token_rows"),
    )},
    **{f"lookup: {field} = {value!r}": (quantization("lookups", LAYER, "lookup", **{field: value}), said)
       for field, value, said in (
        ("evil", 1, "'evil'"),
        ("num_tables", 10**9, f"lookup.tables is [1000000000, 8, 48] {HELD} [4, 8, 48]"),
        ("num_tables", 10**30, "num_tables must be less than"),
        ("num_tables", "8", "num_tables must be an int"),
        ("num_tables", -1, "num_tables must be at least 1"),
        ("num_tables", True, "num_tables must be an int"),
        ("code_bits", 3.0, "code_bits must be an int"),
        ("code_bits", 10**9, "code_bits must be 1 to 16"),
        ("reads", [[1]], "reads must be an int"),
        ("in_features", 10**9, "in_features must be the model's width"),
        ("out_features", 10**9, "out_features must be the model's width"),
        ("projection", "os.system", "projection must be one of"),
        ("version", 2, "version must be 1"),
    )},
    **{f"layer: {field} = {value!r}"[:60]: (quantization("lookups", LAYER, **{field: value}), said)
       for field, value, said in (
        ("evil", 1, "the layer must be a map of lookup, rank, token_rows"),
        ("rank", 10**9, f"low_rank.reduce.weight is [1000000000, 48] {HELD} [2, 48]"),
        ("rank", 10**30, "rank must be an int"),
        ("rank", "2", "rank must be an int"),
        ("rank", None, "rank must be an int"),
        ("rank", 2.0, "rank must be an int"),
        ("token_rows", [ROW | {"rows": 10**9}], f"token_rows.0.rows is [1000000000, 48] {HELD} [10, 48]"),
        ("token_rows", [ROW | {"rows": True}], "rows must be an int"),
        ("token_rows", [ROW | {"before": 1.5}], "before must be an int"),
        ("token_rows", [ROW | {"evil": 1}], "token_rows must be a map of rows, before, after"),
        ("token_rows", [[1]], "token_rows must be a map"),
        ("token_rows", {}, "token_rows must be a list"),
        ("token_rows", [ROW] * 17, "token_rows must be a list of at most 16"),
    )},
}
# fmt: on
KINDS = {"bert": BERT, "classifier": CLASSIFIER, "st": ST, "packed": PACKED, "converted": CONVERTED, "layers": LAYERS}
CASES = {f"{kind}: {name}": (kind, *case) for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A good folder of each kind."""
    root = tmp_path_factory.mktemp("good")
    for name in ("bert", "st from", "layers"):
        (root / name).mkdir()
    saved(MODELS["encoder"](), root / "bert")
    shutil.copytree(root / "bert", root / "classifier")
    shutil.move(sentence_transformer(root / "st from"), root / "st")
    model = BertModel.from_pretrained(root / "bert")
    export(model, root / "packed", tokenizer=BertTokenizerFast.from_pretrained(root / "bert"), pooling="mean")
    sizes = {"in_features": 48, "out_features": 48, "num_tables": 4, "code_bits": 3}
    for slot in slots_of(model):
        fields = {"lookup": sizes, "rank": 2, "token_rows": [ROW]}
        slot.replace(BranchedLookupFFN.from_config(fields, model.config.vocab_size, TokenContext()))
    mark_converted(model)
    model.save_pretrained(root / "converted")
    save_packed(pack(LookupRobertaForMaskedLM(tiny()).encoder.layers[0].ffn), root / "layers" / WEIGHTS)
    return root


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """For each case: the folder, the error's class and message, what the hook saw, and bytes of memory on top."""
    root = tmp_path_factory.mktemp("hostile")
    cases = CASES | {f"good {kind}": (kind, lambda folder: None, "") for kind in KINDS}
    jobs = [("control", "/folder")]
    for number, (kind, change, _) in enumerate(cases.values()):
        folder = root / str(number)
        shutil.copytree(folders / kind, folder)
        change(folder)
        jobs.append((kind, str(folder)))
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("audited.py")), "jobs.json"]
    online = os.environ | {"HF_HUB_OFFLINE": "0"}  # so that whoever asks the network is seen
    done = subprocess.run(command, cwd=root, env=online, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert not list(root.rglob("ran")), "something of a folder was run"
    opened = [json.loads(line.removeprefix("OPENED")) for line in done.stdout.splitlines() if line.startswith("OPENED")]
    return dict(zip(("control", *cases), opened, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_refused_in_one_line_and_nothing_of_it_is_run(name, results):
    folder, error, message, seen, memory = results[name]
    kind, _, said = CASES[name]
    expected = {"layers": ("PackedError",), "converted": ("PackedError", "ValueError")}.get(kind, ("InputError",))
    assert error in expected, message
    assert said in message
    assert "\n" not in message
    assert error == "ValueError" or folder in message  # one of a field alone: who called from_pretrained has the folder
    assert not seen
    assert memory < 100 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_folder_is_opened_and_nothing_of_it_is_run(kind, results):
    _, error, message, seen, _ = results[f"good {kind}"]
    assert not error, message
    assert not seen


def test_the_hook_sees_code_of_a_folder(results):
    assert results["control"][3] == ["compile /folder/evil.py", "exec /folder/evil.py"]


def test_links_of_the_hubs_cache_are_followed(folders, tmp_path):
    """Its snapshots hold nothing but links, to blobs beside them."""
    repository = tmp_path / "models--some--bert"
    snapshot = repository / "snapshots" / "1234"
    shutil.copytree(folders / "bert", repository / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    model, tokenizer = load_encoder(str(snapshot))
    assert type(model) is BertModel
    assert tokenizer is not None
