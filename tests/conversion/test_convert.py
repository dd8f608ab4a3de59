"""Conversion: feed-forward layers of every family replaced, closed forms, distillation, the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

import lookupffn
from lookupffn import InputError, LookupConfig, Session, export, native
from lookupffn.branches import BranchedLookupFFN, NoFFN, TokenContext
from lookupffn.conversion import timing
from lookupffn.conversion.answers import answer_of
from lookupffn.conversion.baselines import half_the_layers, without_ffns
from lookupffn.conversion.convert import convert
from lookupffn.conversion.distil import Distillation, distil
from lookupffn.conversion.models import parts_of
from lookupffn.conversion.quality import (
    Labelled,
    Pairs,
    classification,
    cosine,
    embed,
    retrieval,
    similarity,
)
from lookupffn.conversion.start import Shape, collect, converted, start
from lookupffn.conversion.texts import Tokens, in_spans, passages
from lookupffn.hf.loading import is_cross_encoder, load_encoder
from lookupffn.hf.packed import mark_converted
from lookupffn.hf.slots import slots_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
needs_runtime = pytest.mark.skipif(not native.available(), reason="the packed form needs the compiled library")
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
WORDS = [f"w{i}" for i in range(300)]
SIZES = SMALL | {"vocab_size": len(WORDS) + 5}
SHAPE = Shape(num_tables=8, code_bits=4, reads=2, block_size=8, rank=4)

FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "electra": lambda: ElectraModel(ElectraConfig(embedding_size=16, **SIZES)),
    "deberta-v2": lambda: DebertaV2Model(
        DebertaV2Config(**SIZES, relative_attention=True, position_biased_input=False, pos_att_type="c2p|p2c")
    ),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=len(WORDS) + 5, dim=32, n_heads=2, n_layers=2, hidden_dim=64)
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZES, pad_token_id=0)),
    "albert": lambda: AlbertModel(AlbertConfig(embedding_size=16, **SIZES)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_are_found_seen_and_replaced(family):
    """What is collected is what the layer takes and gives; a replaced layer that computes the same changes nothing."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    ids, mask = torch.randint(5, 300, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    slots = slots_of(model)
    found = collect(model, slots, [{"input_ids": ids, "attention_mask": mask}])
    layers = 1 if family == "albert" else 2
    assert len(slots) == len(found) == layers
    assert all(x.shape == y.shape == (27 * 2 // layers, 32) for x, y in found)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state

    class Table(nn.Module):  # the dense layer, by what it was seen to give
        def __init__(self, x, y):
            super().__init__()
            self.x, self.y = x, y

        def forward(self, x):
            rows = torch.cdist(x.reshape(-1, 32), self.x).argmin(1)
            return self.y[rows].view(x.shape)

    for slot, (x, y) in zip(slots, found, strict=True):
        slot.replace(Table(x, y))
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).last_hidden_state, expected, rtol=0, atol=1e-4)


def test_a_family_that_is_not_known_says_how_to_register_it():
    sizes = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 1, "vocab_size": 99}
    with pytest.raises(InputError, match="model_type 't5' cannot be converted; known are albert, bert,"):
        slots_of(T5EncoderModel(T5Config(**sizes)))


def test_the_start_gives_0_looks_where_the_regression_of_its_rank_looks_and_fills_buckets_evenly():
    """With the best ``expand`` behind its ``reduce``, the error is that of reduced-rank regression in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 32, generator=generator) * torch.linspace(0.1, 3, 32) + 2
    y = x @ torch.randn(32, 32, generator=generator) * 0.3 + torch.randn(4000, 32, generator=generator) + 5
    layer = SHAPE.layer(32, 100, TokenContext())
    start(layer, x, y)
    assert (layer(x) == 0).all()
    xc, yc = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    full = torch.linalg.lstsq(xc, yc).solution
    _, _, basis = torch.linalg.svd(xc @ full, full_matrices=False)
    best = (xc @ full @ basis[:4].T @ basis[:4] - yc).square().mean()
    seen = xc @ layer.low_rank.reduce.weight.double().T
    found = (seen @ torch.linalg.lstsq(seen, yc).solution - yc).square().mean()
    assert best <= found * (1 + 1e-9) <= best * 1.01 * (1 + 1e-9)
    shares = (layer.lookup.project(x) > 0).double().mean(0)
    assert (shares - 0.5).abs().max() < 0.1


def test_spans_hold_every_word_once_and_keep_half_of_the_long_texts():
    texts = [" ".join(f"w{i}.{j}" for j in range(words)) for i in range(200) for words in (1, 15, 16, 90)]
    spans = in_spans(texts, seed=0)
    assert sorted(" ".join(spans).split()) == sorted(" ".join(texts).split())
    whole = set(texts) & set(spans)
    assert all(text in whole for text in texts if text.count(" ") < 15)
    assert all(3 <= text.count(" ") + 1 <= 17 for text in spans if text not in whole)
    assert 160 <= sum(text.count(" ") >= 15 for text in whole) <= 240  # of 400
    assert spans == in_spans(texts, seed=0) != in_spans(texts, seed=1)


def test_passages_are_sentences_each_once_and_some_of_several():
    documents = ["One two three. Four five six! Seven?", "One two three. Eight nine ten.", "a b"] * 2
    found = list(passages(documents, 40, seed=0))
    assert len(set(found)) == len(found)
    assert {"One two three.", "Eight nine ten."} <= {text for line in found for text in [line, line[:14], line[-15:]]}
    many = list(passages([" ".join(f"word{i} and{i} so{i}." for i in range(2000))], 40))
    lengths = np.array([text.count(" ") + 1 for text in many])
    assert (lengths == 3).any()
    assert (lengths > 15).any()
    assert lengths.max() <= 40


def test_measures():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(700, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert retrieval(vectors, vectors) == 1
    assert retrieval(np.roll(vectors, 1, 0), vectors) < 0.1
    np.testing.assert_allclose(cosine(vectors, -vectors), -1)
    same = Pairs("", ["a", "b", "c"], ["d", "e", "f"], [2.0, 2.0, 2.0])
    assert np.isnan(similarity(lambda texts: vectors[: len(texts)], same))  # constant scores rank nothing
    first = {"a": vectors[0], "b": vectors[1]}
    near = Pairs("", ["a", "a", "a"], ["b", "a", "c"], [2.0, 3.0, 1.0])
    turned = first | {"c": -vectors[0]}
    assert similarity(lambda texts: np.stack([turned[t] for t in texts]), near) == pytest.approx(1)
    labels = (vectors[:, 0] > 0).astype(int)
    told = Labelled("", [str(i) for i in range(700)], labels.tolist())
    assert classification(lambda texts: vectors[[int(t) for t in texts]], told) > 0.95


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32)


def documents(count=60):
    generator = np.random.default_rng(0)
    return [" ".join(f"{' '.join(generator.choice(WORDS, 6))}." for _ in range(8)) for _ in range(count)]


def run(folder, **changes):
    return Distillation(str(folder), 20_000, step_tokens=256, **changes)


def test_distillation_comes_nearer_and_repeats_to_the_same_bits(tokenizer, tmp_path):
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(**SIZES)).eval()
    tokens, answer = Tokens(tokenizer, list(passages(documents(), 20)), 32), answer_of(teacher, "mean")
    weights = []
    for number in range(2):
        student = without_ffns(teacher)
        logs = distil(student, teacher, tokens, run(tmp_path / str(number)), answer)
        weights.append([p.detach().clone() for p in student.parameters()])
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    assert logs[-1]["kept"] > logs[0]["kept"]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    frozen = student.embeddings.word_embeddings.weight
    assert torch.equal(frozen, teacher.embeddings.word_embeddings.weight)


def distilled(folder, name, tokenizer):
    """The weights of a run in the folder ``name`` that saves every 20 steps, and goes on where there is one."""
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(**SIZES)).eval()
    tokens = Tokens(tokenizer, list(passages(documents(), 20)), 32)
    batches = [tokens.batch(c) for c in tokens.batches(512, np.random.default_rng(0))][:4]
    torch.manual_seed(1)
    student = converted(teacher, SHAPE, batches)
    distil(student, teacher, tokens, run(folder / name, save_every=20), answer_of(teacher, "mean"))
    return [p.detach() for p in student.parameters()]


KILLED = """
import os, sys
from test_convert import *
from lookupffn.train import trainer
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 47:
        os.kill(os.getpid(), 9)
trainer.Checkpoints.on_step_end = on_step_end
torch.set_num_threads(int(sys.argv[2]))
folder = Path(sys.argv[1])
distilled(folder, "killed", BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32))
"""


def test_a_killed_distillation_goes_on_to_the_same_bits(tokenizer, tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path, str(torch.get_num_threads())]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert "checkpoint-40" in [path.name for path in (tmp_path / "killed").iterdir()]
    weights = [distilled(tmp_path, name, tokenizer) for name in ("killed", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@needs_runtime
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "mpnet", "distilbert", "modernbert", "electra", "albert", "deberta-v2"]
)
def test_baselines_of_every_family_run_in_the_runtime(family, tmp_path):
    """They are timed there when everything is trained: too late to learn that they cannot."""
    torch.manual_seed(0)
    ids = torch.randint(5, 300, (2, 9))
    for number, model in enumerate((half_the_layers(FAMILIES[family]())[0], without_ffns(FAMILIES[family]()))):
        with torch.no_grad():
            expected = model.eval()(input_ids=ids).last_hidden_state
        found = Session(export(model, tmp_path / str(number), linears="float32"))(ids)
        assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()


def test_texts_are_cut_to_the_positions_that_a_model_has(tokenizer):
    model = BertModel(BertConfig(**SIZES | {"max_position_embeddings": 16}))
    assert parts_of(model, tokenizer, "mean", 128, None).max_length == 16


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "modernbert"])
def test_half_of_the_layers_match_the_states_behind_each_pair(family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    student, states = half_the_layers(model)
    assert states == [2]
    ids = torch.randint(5, 300, (2, 9))
    found, all_states = (
        m(input_ids=ids, output_hidden_states=True).hidden_states for m in (student.eval(), model.eval())
    )
    assert len(found) == 2
    assert torch.equal(found[0], all_states[0])
    if family != "modernbert":  # whose last state is behind the final norm
        torch.testing.assert_close(found[1], all_states[1])
    sizes = SIZES | {"num_hidden_layers": 5}
    student, states = half_the_layers(BertModel(BertConfig(**sizes)))
    assert len(student.encoder.layer) == 3
    assert states == [2, 4, 5]


@needs_runtime
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_conversion_from_end_to_end(wrapped, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ENGINES", ())
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(**SIZES | {"initializer_range": 0.3}))  # whose layers do something
    model = teacher
    if wrapped:
        teacher.save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
        parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(32, "mean"), modules.Normalize()]
        model = SentenceTransformer(modules=parts, device="cpu")
    before = [p.clone() for p in teacher.parameters()]
    pairs = [Pairs("pairs", ["w1 w2", "w3", "w4 w5"], ["w1 w3", "w9", "w4"], [1.0, 2.0, 3.0])]
    labelled = [Labelled("kinds", [f"w{i} w{i + 100}" for i in range(40)], [i % 2 for i in range(40)])]
    given = {"tokens": 20_000, "tokenizer": tokenizer, "shape": SHAPE, "max_length": 32}
    output = tmp_path / "out"
    done = lookupffn.convert(model, documents(), output, pairs=pairs, labelled=labelled, **given)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert sum(isinstance(m, BranchedLookupFFN) for m in done.model.modules()) == 2
    report = json.loads((output / "report.json").read_text())
    assert set(report["baselines"]) == {"no feed-forward layers", "half of the layers"} | (
        set() if "static vectors" in report.get("left_out", ()) else {"static vectors"}
    )
    assert report["teacher"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert report["teacher"]["retrieval"] == 1
    assert report["teacher"]["errors_by_layer"] == [0, 0]
    student = report["lookups"]
    assert student["converted"] == [0, 1]
    assert student["cosine"] > report["baselines"]["no feed-forward layers"]["cosine"] - 0.05
    assert abs(report["lookups, packed"]["cosine"] - student["cosine"]) < 0.005
    lookup = LookupConfig(32, 32, num_tables=8, code_bits=4, reads=2, block_size=8)
    layer = done.model.encoder.layer[0].output.dense
    assert layer.lookup.config == lookup
    each = 2 * 4 * 32 + BranchedLookupFFN(layer.lookup).flops(1) // 2
    assert student["ffn_multiply_adds"] == 2 * each
    assert report["teacher"]["ffn_multiply_adds"] == 2 * 2 * 32 * 64
    assert report["baselines"]["no feed-forward layers"]["ffn_multiply_adds"] == 0
    assert report["texts"]["held_out"] == len(documents()) * 8 // 10 or report["texts"]["held_out"] >= 20
    assert not (output / "distillation").exists()
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "of the way from the model without feed-forward layers" in page or "Better than the lookups" in page

    # loaded by what a user has, in a process that knows nothing else
    text = "w1 w2 w3"
    expected = report_vectors(done.model, tokenizer, [text])
    session = Session(output)
    assert session.metadata["tables"] == "int4"
    assert session.embed([text])[0] @ expected[0] / np.linalg.norm(session.embed([text])) > 0.99
    loaded = AutoModel.from_pretrained(output)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), done.model.parameters(), strict=True))
    if wrapped:
        vectors = SentenceTransformer(str(output), device="cpu").encode([text])
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    with pytest.raises(InputError, match="holds a model: choose another folder"):
        lookupffn.convert(model, documents(), output, **given)


def report_vectors(model, tokenizer, texts):
    return embed(model, tokenizer, texts, "mean", 32)


@needs_runtime
def test_what_cannot_be_converted_is_named_before_anything_is_trained(tokenizer, tmp_path):
    teacher = BertModel(BertConfig(**SIZES))
    with pytest.raises(InputError, match="the documents hold 2 sentences, at least 20 are needed"):
        convert(teacher, ["one two three. four five six."], tmp_path, tokens=9, tokenizer=tokenizer)
    with pytest.raises(InputError, match="BertModel comes without a tokenizer"):
        convert(teacher, documents(), tmp_path, tokens=9)
    with pytest.raises(InputError, match=r"DeBERTa with embedded positions .* cannot be exported"):
        convert(DebertaV2Model(DebertaV2Config(**SIZES)), documents(), tmp_path, tokens=9, tokenizer=tokenizer)
    for given, message in (
        ({"tables": "int5"}, "tables must be one of float32, bfloat16, int8, int4, not 'int5'"),
        ({"pooling": "max"}, "pooling 'max' cannot be matched: mean and cls can"),
        ({"tokens": 0}, "tokens and minutes must be positive, not 0"),
        ({"keep": 1.5}, "keep must be more than 0 and at most 1, not 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            convert(teacher, documents(), tmp_path, tokenizer=tokenizer, **{"tokens": 9} | given)
    assert not (tmp_path / "distillation").exists()


@needs_runtime
@pytest.mark.parametrize("kind", ["classes", "regression", "masked LM"])
def test_models_with_heads_are_matched_on_what_they_answer(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ENGINES", ())
    torch.manual_seed(0)
    sizes = SIZES | {"initializer_range": 0.3}
    if kind == "masked LM":
        model, measures = BertForMaskedLM(BertConfig(**sizes)), {"agreement", "log_perplexity"}
    else:
        labels = 3 if kind == "classes" else 1
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=labels))
        measures = {"agreement" if labels == 3 else "1 - error"}
    output = tmp_path / "out"
    done = convert(model, documents(), output, tokens=10_000, tokenizer=tokenizer, shape=SHAPE, max_length=32)
    assert measures <= set(done.report["lookups"])
    assert done.report["teacher"][done.report["measure"]] == pytest.approx(1)
    loaded = type(model).from_pretrained(output)
    ids = torch.randint(5, 300, (2, 9))
    with torch.no_grad():
        expected = done.model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    session = Session(output)
    if kind == "masked LM":
        found = session.logits(ids, places=torch.ones_like(ids).bool()).reshape(expected.shape)
    else:
        found = session.pool(ids)
    assert np.abs(found - expected.numpy()).max() < 0.15 * np.abs(expected.numpy()).max()


@needs_runtime
@pytest.mark.parametrize("as_object", [True, False])
def test_a_cross_encoder_reads_two_texts_and_is_measured_by_its_scores(as_object, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ENGINES", ())
    torch.manual_seed(0)
    reranker = BertForSequenceClassification(BertConfig(**SIZES | {"initializer_range": 0.3}, num_labels=1))
    reranker.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    CrossEncoder(str(tmp_path / "bert"), device="cpu").save_pretrained(str(tmp_path / "reranker"))
    model, own = CrossEncoder(str(tmp_path / "reranker"), device="cpu"), None
    if not as_object:
        assert is_cross_encoder(str(tmp_path / "reranker"))
        assert not is_cross_encoder(str(tmp_path / "bert"))
        model, own = load_encoder(str(tmp_path / "reranker"), head=True)
    pairs = [Pairs("pairs", ["w1 w2", "w3", "w4 w5"], ["w1 w3", "w9", "w4"], [1.0, 2.0, 3.0])]
    output, given = tmp_path / "out", {"tokens": 10_000, "shape": SHAPE, "max_length": 32, "baselines": False}
    done = convert(model, documents(), output, tokenizer=own, in_pairs=own and True, pairs=pairs, **given)
    assert done.report["texts"]["paired"]
    assert set(done.report["lookups, packed"]["spearman"]) == {"pairs"}
    assert done.report["lookups, packed"]["1 - error"] == pytest.approx(done.report["lookups"]["1 - error"], abs=0.05)
    texts = [("w1 w2", "w9 w8 w7"), ("w4", "w4 w5")]
    logits = CrossEncoder(str(output), device="cpu").predict(texts, activation_fn=nn.Identity())
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(logits, done.model(**batch).logits[:, 0], rtol=1e-4, atol=1e-5)
    found = Session(output).classify(*map(list, zip(*texts, strict=True)))[:, 0]
    assert np.abs(found - logits).max() < 0.1 * np.abs(logits).max() + 0.05


@needs_runtime
def test_keep_converts_the_layers_that_are_needed_least(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ENGINES", ())
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(**SIZES | {"initializer_range": 0.3, "num_hidden_layers": 3}))
    for p in teacher.encoder.layer[1].output.dense.parameters():
        nn.init.zeros_(p)  # one that nobody misses
    given = {"tokens": 2_000, "tokenizer": tokenizer, "shape": SHAPE, "max_length": 32, "baselines": False}
    done = convert(teacher, documents(), tmp_path / "out", keep=0.999, **given)
    assert done.report["keep"]["order"][0] == 1
    assert done.report["lookups"]["converted"] == [1]
    assert set(done.report["keep"]["tried"]) <= {1, 2, 3}
    with pytest.raises(InputError, match="no layer can be converted at 1"):
        convert(randomised_teacher(), documents(), tmp_path / "none", keep=1.0, **given)


def randomised_teacher():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES | {"initializer_range": 0.5}))


@needs_runtime
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "mpnet", "distilbert", "modernbert", "electra", "albert", "deberta-v2"]
)
def test_a_converted_model_of_every_family_runs_in_the_runtime(family, tmp_path):
    """One layer of lookups, one without a feed-forward layer."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    first, *others = slots_of(model)
    for slot in others:
        slot.replace(NoFFN())
    for slot in [first]:
        layer = SHAPE.layer(32, len(WORDS) + 5, TokenContext())
        nn.init.normal_(layer.lookup.tables, std=0.1)
        slot.replace(layer)
    ids = torch.randint(5, 300, (3, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    found = Session(export(model, tmp_path, linears="float32", tables="float32"))(ids)
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()


LOADED = """
import lookupffn, sys, transformers, torch
model = transformers.AutoModel.from_pretrained(sys.argv[1])
torch.save([p.detach() for p in model.parameters()], sys.argv[1] + "/found.pt")
"""


def test_a_converted_model_needs_only_that_the_package_is_imported(tmp_path):
    """Before transformers; behind it is how every other test here loads one."""
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(5, 300, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    model = converted(FAMILIES["bert"](), SHAPE, [batch], [1]).eval()
    nn.init.normal_(slots_of(model)[1].last.lookup.tables)
    mark_converted(model)
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert all(torch.equal(a, b) for a, b in zip(found, model.parameters(), strict=True))


SHARED = """
import sys
from test_convert import *
from lookupffn.conversion import timing
timing.ENGINES = ()
folder = sys.argv[1]
tokenizer = BertTokenizerFast(folder + "/vocab.txt", model_max_length=32)
torch.manual_seed(0)
teacher = BertModel(BertConfig(**SIZES | {"initializer_range": 0.3}))
convert(teacher, documents(), folder + "/out", tokens=10_000, tokenizer=tokenizer, shape=SHAPE, max_length=32)
"""


@needs_runtime
@pytest.mark.slow
def test_two_processes_share_a_conversion(tokenizer, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*command, tmp_path / "shared.py", tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["machine"]["processes"] == 2
    assert report["lookups"]["cosine"] > 0.5
    assert not (tmp_path / "out" / "distillation").exists()
    assert Session(tmp_path / "out").embed(["w1 w2"]).shape == (1, 32)
