"""Language models in the runtime: logits of single tokens, and masks filled, against transformers."""

import itertools

import numpy as np
import pytest
import torch
from encoders import deberta_config
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lookupffn import Session, export, native
from lookupffn.errors import InputError
from lookupffn.hf import LookupRobertaConfig, LookupRobertaForCausalLM, LookupRobertaForMaskedLM

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WORDS = [f"w{i}" for i in range(2000)]  # more outputs than any layer has: the head goes in tiles of its own
VOCAB = len(WORDS) + 5
SMALL = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 2}
SIZES = SMALL | {"vocab_size": VOCAB, "pad_token_id": 0}


def own(kind, **changes):
    sizes = SMALL | {"vocab_size": VOCAB, "ffn": "dense"}
    return kind(LookupRobertaConfig.preset("small", **sizes, **changes))


MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES | {"pad_token_id": 1})),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=VOCAB, dim=48, n_heads=3, n_layers=2, hidden_dim=100)
    ),
    "mpnet": lambda: MPNetForMaskedLM(MPNetConfig(**SIZES | {"pad_token_id": 1})),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**SIZES, embedding_size=24)),
    "deberta": lambda: DebertaV2ForMaskedLM(deberta_config(vocab_size=VOCAB)),
    "deberta, legacy": lambda: DebertaV2ForMaskedLM(deberta_config(vocab_size=VOCAB, legacy=True)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=24, hidden_act="relu")),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, local_attention=12)),
    "own": lambda: own(LookupRobertaForMaskedLM),
    "own, causal": lambda: own(LookupRobertaForCausalLM, is_decoder=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_chosen_tokens(name, tmp_path):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
    folder = export(model, tmp_path, linears="float32", tables="float32")
    ids = torch.randint(5, VOCAB, (7, 41), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(41) < torch.arange(5, 36, 5)[:, None]
    ids[~mask] = model.config.pad_token_id or 0
    places = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6) & mask
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits[places].numpy()
    session = Session(folder)
    found = session.logits(ids, mask, places=places)
    assert found.shape == expected.shape == (int(places.sum()), VOCAB)
    assert np.abs(found - expected).max() <= 3e-5 * np.abs(expected).max()
    assert np.array_equal(Session(folder, threads=3).logits(ids, mask, places=places), found)
    for text in (0, 6):  # alone, and one place at a time
        begin = int(places[:text].sum())
        for i, at in enumerate(places[text].nonzero().flatten()[:3]):
            one = torch.zeros_like(places[text : text + 1])
            one[0, at] = True
            alone = session.logits(ids[text : text + 1], mask[text : text + 1], places=one)
            assert np.array_equal(alone[0], found[begin + i])
    assert session.logits(ids, mask, places=torch.zeros_like(places)).shape == (0, VOCAB)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=64)


def test_masks_are_filled(tokenizer, tmp_path):
    model = MODELS["bert"]().eval()
    session = Session(export(model, tmp_path / "fast", linears="float32", tokenizer=tokenizer))
    texts = ["w1 [MASK] w2", "w3", "", "[MASK] [MASK] w4 w5 w6 w7 w8", "[MASK]"]
    filled = session.fill(texts, top=3)
    assert [len(text) for text in filled] == [1, 0, 0, 2, 1]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logs = model(**inputs).logits.log_softmax(-1)
    at = (inputs["input_ids"] == tokenizer.mask_token_id).nonzero()
    for (text, place), found in zip(at, itertools.chain.from_iterable(filled), strict=True):
        best = logs[text, place].topk(3)
        assert [token for token, _ in found] == tokenizer.convert_ids_to_tokens(best.indices)
        np.testing.assert_allclose([log for _, log in found], best.values, atol=1e-5)
    assert session.fill(["w1 [MASK] w2"], top=3)[0] == filled[0]
    assert session.fill([]) == []


def test_a_long_list_of_masks_is_filled_in_bounded_steps(tokenizer, tmp_path, monkeypatch):
    session = Session(export(MODELS["bert"]().eval(), tmp_path / "fast", tokenizer=tokenizer))
    texts = ["w1 " + "[MASK] " * (i % 9) for i in range(40)]
    expected, calls, run = session.fill(texts, top=1), [], session._run
    monkeypatch.setattr("lookupffn.runtime.session.LOGITS_AT_ONCE", 10 * VOCAB)
    monkeypatch.setattr(session, "_run", lambda *a, **k: calls.append(k["places"].sum()) or run(*a, **k))
    assert session.fill(texts, top=1) == expected
    assert max(calls) <= 10
    assert sum(calls) == sum(i % 9 for i in range(40))


def test_what_a_language_model_cannot_do_is_said(tokenizer, tmp_path):
    model = MODELS["bert"]().eval()
    session = Session(export(model, tmp_path / "fast", tokenizer=tokenizer))
    ids, places = np.full((1, 4), 7), np.zeros((1, 4), bool)
    with pytest.raises(InputError, match="is a language model: call fill"):
        session.embed(["w1"])
    with pytest.raises(InputError, match="is a language model, which answers for tokens"):
        session.pool(ids)
    with pytest.raises(InputError, match="top must be 1 to 2005, not 0"):
        session.fill(["w1"], top=0)
    with pytest.raises(InputError, match=r"places must be boolean \[1, 4\] and false where the mask is 0"):
        session.logits(ids, np.array([[1, 1, 1, 0]]), places=~places)
    with pytest.raises(InputError, match=r"places must be boolean \[1, 4\] .* not int64 \[1, 4\]"):
        session.logits(ids, places=places.astype(int))
    bare = Session(export(model, tmp_path / "bare"))
    with torch.no_grad():
        expected = model.bert(torch.from_numpy(ids))[0]
    assert np.abs(bare(ids) - expected.numpy()).max() < 0.05 * float(expected.abs().max())  # hidden states all the same
    assert bare.logits(ids, places=~places).shape == (4, VOCAB)
    with pytest.raises(InputError, match="is no masked LM with a mask token"):
        bare.fill(["w1"])
    encoder = Session(export(model, tmp_path / "encoder", pooling="mean", tokenizer=tokenizer))
    assert encoder.embed(["w1"]).shape == (1, 48)
    with pytest.raises(InputError, match="is no language model"):
        encoder.logits(ids, places=places)
