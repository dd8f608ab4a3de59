"""``lookupffn evaluate``: what it measures is what the measures say by hand, in every form, with all to repeat it."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast
from typer.testing import CliRunner

from lookupffn import InputError, LookupConfig, LookupFFN, export, native
from lookupffn.__main__ import app
from lookupffn.branches import BranchedLookupFFN
from lookupffn.conversion.evaluate import evaluate, open_embedder
from lookupffn.conversion.inputs import texts_of
from lookupffn.conversion.quality import retrieval
from lookupffn.files import fingerprint
from lookupffn.hf.packed import mark_converted
from lookupffn.hf.slots import slots_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
needs_runtime = pytest.mark.skipif(not native.available(), reason="the packed form needs the compiled library")
WORDS = [f"w{i}" for i in range(60)]
SIZES = {
    "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2,
    "vocab_size": len(WORDS) + 5, "max_position_embeddings": 24, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of one random encoder: by itself, as a sentence transformer, packed; and of a converted one."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=24)
    found = {name: folder / name for name in ("encoder", "sentences", "packed", "converted")}
    for name in ("encoder", "converted"):
        tokenizer.save_pretrained(found[name])
    model.save_pretrained(found["encoder"])
    parts = [modules.Transformer(str(found["encoder"])), modules.Pooling(16, "mean"), modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(found["sentences"]))
    if native.available():
        options = {"linears": "float32", "tables": "float32"}
        export(model, found["packed"], tokenizer=tokenizer, pooling="mean", **options)
    for slot in slots_of(model):
        lookup = LookupFFN(LookupConfig(16, 16, num_tables=4, code_bits=3, block_size=4))
        nn.init.normal_(lookup.tables, std=0.1)
        slot.replace(BranchedLookupFFN(lookup))
    mark_converted(model)
    model.save_pretrained(found["converted"])
    if native.available():
        export(model, found["converted"] / "packed", tokenizer=tokenizer, pooling="mean", **options)
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)

    def texts(count):
        return [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(count)]

    pairs = zip(texts(40), texts(40), generator.random(40), strict=True)
    lines = [json.dumps({"a": a, "b": b, "score": score}) for a, b, score in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"text": text, "kind": i % 2}) for i, text in enumerate(texts(30))]
    (folder / "kinds.jsonl").write_text("\n".join(lines))
    (folder / "texts.txt").write_text("\n".join([*texts(50), ""]))
    return folder


def by_hand(model, texts):
    """Mean over the tokens of each text, one by one, of length 1."""
    encoder, found = AutoModel.from_pretrained(model).eval(), []
    tokenizer = BertTokenizerFast.from_pretrained(model)
    with torch.no_grad():
        for text in texts:
            hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            found.append((hidden / hidden.norm()).numpy())
    return np.stack(found)


def test_measures_are_what_they_are_by_hand(models, files):
    pairs, texts = f"{files}/pairs.jsonl:a,b,score", f"{files}/texts.txt"
    given = {"pairs": [pairs], "labelled": [f"{files}/kinds.jsonl:text,kind"], "texts": texts}
    result = evaluate(models["converted"], teacher=models["encoder"], pooling="mean", **given)
    measures = {line["measure"]: line for line in result["measures"]}
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    for which, model in (("model", models["converted"]), ("teacher", models["encoder"])):
        cosines = (by_hand(model, [r["a"] for r in rows]) * by_hand(model, [r["b"] for r in rows])).sum(1)
        wanted = spearmanr(cosines, [r["score"] for r in rows]).statistic
        assert measures["spearman"][which] == pytest.approx(wanted, abs=1e-3)
    lines = (files / "texts.txt").read_text().split("\n")[:-1]
    assert texts_of(texts, "utf-8") == lines
    vectors = [by_hand(models[name], lines) for name in ("converted", "encoder")]
    assert measures["retrieval"]["model"] == pytest.approx(retrieval(*vectors), abs=0.03)
    assert measures["cosine"]["model"] == pytest.approx((vectors[0] * vectors[1]).sum(1).mean(), abs=1e-5)
    assert 0 <= measures["classification"]["model"] <= 1
    assert [line["count"] for line in result["measures"]] == [40, 30, 50, 50]
    assert json.loads(json.dumps(result)) == result
    assert result["files"][pairs] == fingerprint(files / "pairs.jsonl")
    assert result["model"]["weights"].keys() >= {"model.safetensors"}
    assert (result["model"]["pooling"], result["model"]["max_length"]) == ("mean", 24)
    assert {"torch", "transformers", "sentence-transformers", "scipy"} <= result["machine"]["versions"].keys()
    assert result["seed"] == 0


@needs_runtime
def test_every_form_of_a_model_gives_the_same_vectors(models):
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    expected = by_hand(models["encoder"], texts)
    forms = {}
    for name, options in (("encoder", {"pooling": "mean"}), ("sentences", {}), ("packed", {})):
        opened = open_embedder(models[name], **options)
        forms[name] = opened.facts["form"]
        np.testing.assert_allclose(opened.embed(texts), expected, atol=1e-5)
        assert (opened.facts["pooling"], opened.facts["max_length"]) == ("mean", 24)
    assert forms == {"encoder": "PyTorch", "sentences": "PyTorch", "packed": "runtime"}
    trained = open_embedder(models["converted"], pooling="mean")
    packed = open_embedder(models["converted"], runtime=True)
    assert (trained.facts["form"], packed.facts["form"]) == ("PyTorch", "runtime")
    np.testing.assert_allclose(packed.embed(texts), trained.embed(texts), atol=1e-5)


def test_the_command_prints_a_table_and_writes_the_file(models, files, tmp_path):
    pairs, output = f"{files}/pairs.jsonl:a,b,score", tmp_path / "new" / "result.json"
    arguments = ["evaluate", models["sentences"], f"--pairs={pairs}", f"--output={output}"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    (line,) = result["measures"]
    assert line["measure"] == "spearman"
    assert f"{line['model']:.4f}" in done.output
    assert "teacher" not in result
    assert result == evaluate(models["sentences"], pairs=[pairs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to measure: give pairs, labelled, texts with a teacher, or mteb"),
        ({"texts": "a.txt"}, "texts 'a.txt' need a teacher"),
        ({"pairs": ["pairs.jsonl"]}, "--pairs 'pairs.jsonl' is not FILE:first,second,score"),
        ({"labelled": ["kinds.jsonl:text"]}, "--labelled 'kinds.jsonl:text' is not FILE:text,label"),
        ({"texts": "nowhere.txt", "teacher": "x"}, "--texts 'nowhere.txt' is no FILE of lines and no FILE:column"),
        ({"pairs": ["{files}/pairs.jsonl:a,b,score"]}, "does not say how it pools: give pooling mean or cls, not None"),
    ],
)
def test_what_does_not_fit_is_named(options, message, models, files):
    options = {
        name: [text.format(files=files) for text in value] if isinstance(value, list) else value
        for name, value in options.items()
    }
    with pytest.raises(InputError, match=message):
        evaluate(models["encoder"], **options)


def test_a_pooling_that_nobody_needs_is_refused(models, files):
    with pytest.raises(InputError, match=r"pooling 'cls' is for models that do not say their own \('.*' by mean\)"):
        evaluate(models["sentences"], pairs=[f"{files}/pairs.jsonl:a,b,score"], pooling="cls")


def test_texts_of_a_table(files, tmp_path):
    assert len(texts_of(f"{files}/kinds.jsonl:text", "utf-8")) == 30
    with pytest.raises(InputError, match=r"no FILE:column"):
        texts_of(f"{files}/kinds.jsonl", "utf-8")
    (tmp_path / "one.txt").write_text("w1\n\nw1\n")
    with pytest.raises(InputError, match="holds 1 texts"):
        texts_of(str(tmp_path / "one.txt"), "utf-8")


# ---- MTEB ------------------------------------------------------------------------------------------------------------


def test_mteb_is_asked_for_before_anything_is_loaded(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(
        InputError, match=r"evaluate --mteb needs mteb, not installed here: pip install 'lookupffn\[mteb"
    ):
        evaluate(models["encoder"], mteb=["STS12"])


@pytest.fixture
def mteb(monkeypatch):
    """Stands for the package, which is not among the tests' own: what of it is called, as version 2.26 has it."""
    fake = {
        name: ModuleType(name) for name in ("mteb", "mteb.models", "mteb.models.abs_encoder", "mteb.models.model_meta")
    }
    fake["mteb"].__version__ = "2.26.24"
    fake["mteb.models.abs_encoder"].AbsEncoder = object
    fake["mteb.models.model_meta"].ModelMeta = SimpleNamespace(create_empty=lambda: "nobody")

    def get_tasks(tasks):
        if tasks != ["STS12"]:
            raise KeyError(f"KeyError: {tasks[0]!r} not found")
        return ["the task"]

    def run(model, task, *, cache, co2_tracker):
        vectors = model.encode([{"text": ["w1", "w2 w3"]}, {"text": ["w4"]}], task_metadata=None, batch_size=32)
        assert (task, cache, co2_tracker, vectors.shape) == ("the task", None, False, (3, 16))
        if fake["mteb"].offline:
            raise ConnectionError("no network")
        result = SimpleNamespace(get_score=lambda: 0.5, dataset_revision="abc", scores={"test": [{"main_score": 0.5}]})
        return SimpleNamespace(task_results=[result])

    fake["mteb"].get_tasks, fake["mteb"].evaluate, fake["mteb"].offline = get_tasks, run, False
    fake["mteb"].__spec__ = SimpleNamespace()
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake["mteb"]


def test_tasks_of_mteb(mteb, models):
    result = evaluate(models["encoder"], mteb=["STS12"], pooling="mean")
    assert result["measures"] == [{"measure": "mteb", "data": "STS12", "count": None, "model": 0.5}]
    assert result["mteb"]["model"]["STS12"]["dataset_revision"] == "abc"
    with pytest.raises(InputError, match=r"--mteb 'STS99' is no task of mteb 2.26.24"):
        evaluate(models["encoder"], mteb=["STS99"], pooling="mean")
    mteb.offline = True
    with pytest.raises(
        InputError, match=r"--mteb 'STS12' cannot be run \(ConnectionError: no network\): its data comes"
    ):
        evaluate(models["encoder"], mteb=["STS12"], pooling="mean")
