"""Conversion: feed-forward layers of every family replaced, closed forms, distillation, the report."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
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

from lookupffn import InputError, LookupConfig, Session, export, native
from lookupffn.branches import BranchedLookupFFN
from lookupffn.convert.baselines import half_the_layers, without_ffns
from lookupffn.convert.conversion import Pairs, convert
from lookupffn.convert.distil import distil
from lookupffn.convert.quality import cosine, retrieval, spearman
from lookupffn.convert.slots import slots_of
from lookupffn.convert.start import Shape, collect, start
from lookupffn.convert.texts import Tokens, passages

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
WORDS = [f"w{i}" for i in range(300)]
SIZES = SMALL | {"vocab_size": len(WORDS) + 5}
SHAPE = Shape(num_tables=8, code_bits=4, reads=2, block_size=8, rank=4)

FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "electra": lambda: ElectraModel(ElectraConfig(embedding_size=16, **SIZES)),
    "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**SIZES)),
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
    found = collect(model, slots, [(ids, mask)])
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


def test_the_start_is_the_regression_of_this_rank():
    """Against reduced-rank regression by hand, in float64; every bit of a code is 0 for half of the inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 32, generator=generator) * torch.linspace(0.1, 3, 32) + 2
    y = x @ torch.randn(32, 32, generator=generator) * 0.3 + torch.randn(4000, 32, generator=generator) + 5
    layer = SHAPE.layer(32)
    start(layer, x, y)
    xc, yc = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    full = torch.linalg.lstsq(xc, yc).solution
    _, _, basis = torch.linalg.svd(xc @ full, full_matrices=False)
    best = (xc @ full @ basis[:4].T @ basis[:4] - yc).square().mean()
    found = (layer(x).double() - y).square().mean()
    assert best <= found * (1 + 1e-9) <= best * 1.01 * (1 + 1e-9)
    shares = (layer.lookup.project(x) > 0).double().mean(0)
    assert (shares - 0.5).abs().max() < 0.1


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
    assert spearman([1, 2, 2, 9], [3, 5, 5, 8]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32)


def documents(count=60):
    generator = np.random.default_rng(0)
    return [" ".join(f"{' '.join(generator.choice(WORDS, 6))}." for _ in range(8)) for _ in range(count)]


def test_distillation_comes_nearer_and_repeats_to_the_same_bits(tokenizer):
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(**SIZES)).eval()
    tokens = Tokens(tokenizer, passages(documents(), 20), 32)
    losses, weights = [], []
    for _ in range(2):
        student = without_ffns(teacher)
        distil(student, teacher, tokens, budget=20_000, pooling="mean", say=lambda p: losses.append(p.loss), every=2)
        weights.append([p.detach().clone() for p in student.parameters()])
    assert losses[len(losses) // 2 - 1] < 0.7 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    frozen = student.embeddings.word_embeddings.weight
    assert torch.equal(frozen, teacher.embeddings.word_embeddings.weight)


def test_half_of_the_layers_match_the_states_behind_each_pair():
    sizes = SIZES | {"num_hidden_layers": 5}
    student, states = half_the_layers(BertModel(BertConfig(**sizes)))
    assert len(student.encoder.layer) == 3
    assert states == [2, 4, 5]


@pytest.mark.skipif(not native.available(), reason="the packed form needs the compiled library")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_conversion_from_end_to_end(wrapped, tokenizer, tmp_path):
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
    said = []
    done = convert(
        model,
        documents(),
        tmp_path / "out",
        tokens=20_000,
        tokenizer=tokenizer,
        shape=SHAPE,
        max_length=32,
        pairs=pairs,
        say=lambda name, progress: said.append((name, progress.tokens)),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert sum(isinstance(m, BranchedLookupFFN) for m in done.model.modules()) == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == json.loads(json.dumps(done.report))
    assert set(report["baselines"]) == {"no feed-forward layers", "half of the layers"}
    assert report["teacher"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert report["teacher"]["retrieval"] == 1
    assert report["student"]["cosine"] > report["student"]["cosine_untrained"]
    assert abs(report["packed"]["cosine"] - report["student"]["cosine"]) < 0.005
    assert Session(tmp_path / "out" / "packed").metadata["tables"] == "int4"
    lookup = LookupConfig(32, 32, num_tables=8, code_bits=4, reads=2, block_size=8)
    each = 2 * 4 * 32 + BranchedLookupFFN(done.model.encoder.layer[0].output.dense.lookup).flops(1) // 2
    assert done.model.encoder.layer[0].output.dense.lookup.config == lookup
    assert report["student"]["ffn_multiply_adds"] == 2 * each
    assert report["teacher"]["ffn_multiply_adds"] == 2 * 2 * 32 * 64
    with pytest.raises(InputError, match="the documents hold 2 sentences, at least 20 are needed"):
        convert(teacher, ["one two three. four five six."], tmp_path, tokens=9, tokenizer=tokenizer)
    with pytest.raises(InputError, match="BertModel comes without a tokenizer"):
        convert(teacher, documents(), tmp_path, tokens=9)
    with pytest.raises(InputError, match="model_type 'electra' cannot be exported"):
        convert(FAMILIES["electra"](), documents(), tmp_path, tokens=9, tokenizer=tokenizer)


@pytest.mark.skipif(not native.available(), reason="the packed form needs the compiled library")
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "distilbert", "modernbert"])
def test_a_converted_model_of_every_family_runs_in_the_runtime(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for slot in slots_of(model):
        layer = SHAPE.layer(32)
        nn.init.normal_(layer.lookup.tables, std=0.1)
        slot.replace(layer)
    ids = torch.randint(5, 300, (3, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    found = Session(export(model, tmp_path, linears="float32", tables="float32"))(ids)
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()
