"""The Hugging Face models: saved and loaded, padded, checkpointed, counted, and never remote code."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from lookupffn import LookupFFN, ffns
from lookupffn.hf import (
    PRESETS,
    LookupRobertaConfig,
    LookupRobertaForCausalLM,
    LookupRobertaForMaskedLM,
    LookupRobertaForSequenceClassification,
    LookupRobertaModel,
)

# transformers warns of its own to-be-removed names while it saves and checkpoints
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def tiny(**changes):
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3}
    if changes.get("ffn", "lookup") == "lookup":
        changes["ffn_options"] = {"num_tables": 9} | changes.get("ffn_options", {})
    return LookupRobertaConfig.preset("small", **sizes | changes)


def ids(batch=3, length=11, vocab=97):
    return torch.randint(5, vocab, (batch, length))


def labels_for(input_ids, share=0.4):
    return torch.where(torch.rand(input_ids.shape) < share, input_ids, -100)


every_ffn = pytest.mark.parametrize("ffn", ffns.names())


@every_ffn
def test_saved_and_loaded_by_the_auto_classes_is_the_same_bit_for_bit(ffn, tmp_path):
    model = LookupRobertaForMaskedLM(tiny(ffn=ffn)).eval()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    x = ids()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LookupRobertaForMaskedLM
    # One token alone in an expert is a product with a vector, whose last bit depends on where its matrix lies.
    bound = 1e-5 if ffn in ("switch", "fast-feedforward") else 0
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=bound)
    assert loaded.lm_head.decoder.weight is loaded.encoder.embeddings.word_embeddings.weight
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(encoder(x).last_hidden_state, model.encoder(x).last_hidden_state, rtol=0, atol=bound)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["ffn"] == ffn


def test_loading_for_classification_keeps_the_encoder_and_draws_the_head(tmp_path):
    model = LookupRobertaForMaskedLM(tiny()).eval()
    with torch.no_grad():
        model.encoder.layers[0].ffn.tables.add_(1)  # away from any fresh draw
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4).eval()
    for (name, ours), (_, theirs) in zip(
        classifier.encoder.named_parameters(), model.encoder.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    out = classifier(ids(), labels=torch.tensor([0, 3, 1]))
    assert out.logits.shape == (3, 4)
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 3, 1]))
    torch.testing.assert_close(out.loss, expected)
    assert classifier.classifier.out_proj.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)


def test_a_classifier_looks_at_the_first_token_or_at_the_mean_of_a_texts_own():
    x = ids()
    mask = torch.ones_like(x)
    mask[0, 6:] = 0
    for pooling in ("cls", "mean"):
        torch.manual_seed(0)
        model = LookupRobertaForSequenceClassification(tiny(classifier_pooling=pooling)).eval()
        hidden = model.encoder(x, mask).last_hidden_state
        rows = [h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)]
        pooled = hidden[:, 0] if pooling == "cls" else torch.stack(rows)
        expected = model.classifier(pooled)
        torch.testing.assert_close(model(x, attention_mask=mask).logits, expected)
        alone = model(x[:1, :6]).logits
        torch.testing.assert_close(model(x, attention_mask=mask).logits[:1], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="classifier_pooling must be cls or mean, not 'max'"):
        LookupRobertaForSequenceClassification(tiny(classifier_pooling="max"))


@every_ffn
def test_padding_changes_nothing(ffn):
    model = LookupRobertaForMaskedLM(tiny(ffn=ffn)).eval()
    x = ids()
    mask = torch.ones_like(x)
    mask[0, 6:] = 0
    x[0, 6:] = 1
    padded = model(x, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, :6], model(x[:1, :6]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1:], model(x[1:]).logits, rtol=0, atol=1e-5)


def test_eager_attention_equals_sdpa():
    model = LookupRobertaModel(tiny()).eval()
    x, mask = ids(), torch.ones(3, 11, dtype=torch.long)
    mask[1, 4:] = 0
    sdpa = model(x, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("eager")
    out = model(x, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state, sdpa, rtol=0, atol=1e-5)
    assert len(out.attentions) == 2
    assert len(out.hidden_states) == 3


@every_ffn
def test_gradient_checkpointing_gives_the_same_gradients(ffn):
    model = LookupRobertaForMaskedLM(tiny(ffn=ffn)).train()
    x = ids()
    labels, state = labels_for(x), copy.deepcopy(model.state_dict())
    model(x, labels=labels).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.load_state_dict(state)  # some count their steps, or draw new hashes at each
    model.gradient_checkpointing_enable()
    assert model.encoder.layers[0].gradient_checkpointing
    model(x, labels=labels).loss.backward()
    for n, grad in plain.items():
        torch.testing.assert_close(model.get_parameter(n).grad, grad, rtol=1e-5, atol=1e-7)


def test_a_decoder_predicts_the_next_token_and_does_not_see_it():
    model = LookupRobertaForCausalLM(tiny(is_decoder=True)).eval()
    x = ids()
    out = model(x, labels=x)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    later = x.clone()
    later[:, 7:] = 5
    torch.testing.assert_close(model(later).logits[:, :7], out.logits[:, :7])
    assert not torch.allclose(model(later).logits[:, 7:], out.logits[:, 7:])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(x).logits, out.logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs is_decoder=True"):
        LookupRobertaForCausalLM(tiny())


@pytest.mark.parametrize("sparse_prediction", [False, True])
def test_the_ffns_own_losses_join_in_training_in_the_labelled_tokens_share(sparse_prediction):
    options = {"smoothness": 0.5, "num_tables": 9}
    config = tiny(ffn="lookup-variant", ffn_options=options, sparse_prediction=sparse_prediction)
    model = LookupRobertaForMaskedLM(config)
    x = ids()
    labels = labels_for(x)
    plain, own = model.eval()(x, labels=labels).loss, sum(m.ffn.roughness() for m in model.encoder.layers) / 2
    torch.testing.assert_close(model.train()(x, labels=labels).loss, plain + own)
    number = int((labels != -100).sum())
    shared = model(x, labels=labels, num_items_in_batch=2 * number).loss
    torch.testing.assert_close(shared, (plain + own) / 2)


def test_loss_is_the_mean_over_labelled_tokens_however_it_is_computed():
    model = LookupRobertaForMaskedLM(tiny()).eval()
    x = ids()
    labels = labels_for(x)
    out = model(x, labels=labels)
    picked = labels != -100
    expected = torch.nn.functional.cross_entropy(out.logits[picked], labels[picked])
    torch.testing.assert_close(out.loss, expected)
    model.config.sparse_prediction = True
    sparse = model(x, labels=labels)
    assert sparse.logits.shape == (picked.sum(), 97)
    torch.testing.assert_close(sparse.loss, expected)
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=7).loss, expected * picked.sum() / 7)


@pytest.mark.parametrize("ffn", ["dense", "lookup"])  # the others' own tests count them
def test_flops_and_bytes_of_the_encoder(ffn):
    model = LookupRobertaModel(tiny(ffn=ffn)).eval()
    model.set_attn_implementation("eager")  # the counter does not know every fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids(3, 11))
    assert counter.get_total_flops() == model.flops(33, 11)
    everything = sum(p.numel() * 4 for p in model.parameters())
    embeddings = (97 + 512) * 48 * 4
    tables = sum(m.tables.numel() * 4 for m in model.modules() if isinstance(m, LookupFFN))
    rows = 2 * 48 * 4 + (2 * 9 * 3 * 48 * 4 if ffn == "lookup" else 0)  # of embeddings, and of tables in two layers
    assert model.bytes_read(5) == everything - embeddings - tables + 5 * rows


def test_initial_weights_follow_the_documented_law():
    model = LookupRobertaForMaskedLM(LookupRobertaConfig.preset("small", initializer_range=0.05))
    ffn = model.encoder.layers[1].ffn
    assert model.encoder.layers[0].attention.output.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert ffn.tables.std().item() == pytest.approx(0.02, rel=0.02)
    assert ffn.projection.weight.std().item() == pytest.approx(8**-0.5, rel=0.05)
    assert model.encoder.embeddings.word_embeddings.weight[1].abs().max() == 0  # padding
    assert model.encoder.final_norm.weight.eq(1).all()
    positions = (
        model.encoder.embeddings.position_embeddings.weight
    )  # of a shift s: <p_i, p_(i+s)> is the same for all i
    inner = positions @ positions.T
    torch.testing.assert_close(inner.diagonal(3), inner[0, 3].expand(509), rtol=0, atol=1e-4)
    assert positions.square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_save_what_their_comment_says(preset):
    ratios = {"small": 6.4, "small-512": 6.4, "base": 6.5}
    flops = {}
    for ffn in ffns.names():
        with torch.device("meta"):
            flops[ffn] = LookupRobertaModel(LookupRobertaConfig.preset(preset, ffn=ffn)).layers[0].ffn.flops(1)
    assert round(flops["dense"] / flops["lookup"], 1) == ratios[preset]


def test_the_vocabulary_can_grow():
    model = LookupRobertaForMaskedLM(tiny())
    model.resize_token_embeddings(103)
    assert model(ids(vocab=103)).logits.shape == (3, 11, 103)
    assert model.lm_head.decoder.weight is model.encoder.embeddings.word_embeddings.weight


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="LookupRobertaConfig has no field num_tabels"):
        tiny(num_tabels=7)
    with pytest.raises(ValueError, match="preset must be one of small, small-512, base, not 'tiny'"):
        LookupRobertaConfig.preset("tiny")
    with pytest.raises(ValueError, match=r"ffn must be one of dense, lookup, .*, not 'sparse'"):
        LookupRobertaModel(tiny(ffn="sparse"))
    with pytest.raises(ValueError, match="ffn_options of dense cannot be num_tables; known are none"):
        LookupRobertaModel(tiny(ffn="dense", ffn_options={"num_tables": 3}))
    with pytest.raises(ValueError, match="ffn_options of lookup cannot be num_tabels; known are num_tables, code_bits"):
        LookupRobertaModel(tiny(ffn_options={"num_tabels": 3}))
    with pytest.raises(StrictDataclassError, match="ffn_options"):
        tiny(ffn_options={"num_tables": [3]})
    with pytest.raises(ValueError, match="hidden_size 48 must be a multiple of num_attention_heads, which is 5"):
        LookupRobertaModel(tiny(num_attention_heads=5))
    with pytest.raises(ValueError, match="block_size must be a power of two, 1 to 64"):
        LookupRobertaModel(tiny(ffn_options={"block_size": 128}))
    model = LookupRobertaModel(tiny(max_position_embeddings=10))
    with pytest.raises(ValueError, match="11 tokens, max_position_embeddings is 10"):
        model(ids())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


# ---- Rows by ids

ROWS = [{"rows": 97, "before": 0, "after": 0}, {"rows": 500, "before": 2, "after": 0}]
AROUND = [{"rows": 300, "before": 1, "after": 1}]


def with_rows(kind=LookupRobertaForMaskedLM, rows=ROWS, **changes):
    model = kind(tiny(token_rows=rows, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".rows"):
            assert (parameter == 0).all()
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("ffn", ["lookup", "dense", "none"])
def test_rows_by_ids_are_saved_and_padding_changes_nothing(ffn, tmp_path):
    model, input_ids = with_rows(ffn=ffn, rows=ROWS + AROUND), ids()
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids).logits
        assert torch.equal(again(input_ids).logits, expected)
        for left, right in ((0, 4), (4, 0), (2, 3)):
            padded = torch.nn.functional.pad(input_ids, (left, right), value=1)
            mask = torch.nn.functional.pad(torch.ones_like(input_ids), (left, right))
            found = model(padded, attention_mask=mask).logits[:, left : left + input_ids.shape[1]]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not torch.equal(model(input_ids.roll(1, 1)).logits.roll(-1, 1)[:, 3:-1], expected[:, 3:-1])


def test_rows_by_ids_show_no_token_that_is_to_be_predicted():
    """A masked LM's answer at a mask, by the tokens around it, and a decoder's, by those before, are the same whatever
    token stood there."""
    model, input_ids = with_rows(rows=ROWS + AROUND), ids()
    labels = labels_for(input_ids)
    hidden = torch.where(labels == -100, input_ids, 4)
    with torch.no_grad():
        first = model(hidden, labels=labels).logits
        second = model(hidden, labels=torch.where(labels == -100, -100, (labels + 1) % 97)).logits
    assert torch.equal(first, second)

    decoder = with_rows(LookupRobertaForCausalLM, is_decoder=True)
    other = input_ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 97
    with torch.no_grad():
        first, second = decoder(input_ids).logits, decoder(other).logits
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.equal(first[:, 6], second[:, 6])
    with pytest.raises(ValueError, match="see tokens that it is to predict"):
        LookupRobertaForCausalLM(tiny(is_decoder=True, token_rows=AROUND))


def test_rows_by_ids_are_counted_and_keep_their_vocabulary():
    model, plain = with_rows().encoder, LookupRobertaModel(tiny())
    assert model.bytes_read(5) == plain.bytes_read(5) + 5 * 2 * len(ROWS) * 48 * 4
    assert model.flops(5, 11) == plain.flops(5, 11)
    assert model.layers[0].ffn_bytes_read(5) == plain.layers[0].ffn_bytes_read(5) + 5 * len(ROWS) * 48 * 4
    with pytest.raises(ValueError, match="keeps its vocabulary of 97"):
        model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))
    for rows, said in ((ROWS[0] | {"rows": 0}, "rows must be an int"), ({"rows": 4}, "token_rows must be a map of")):
        with pytest.raises(ValueError, match=said):
            LookupRobertaModel(tiny(token_rows=[rows]))
