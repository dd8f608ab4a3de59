"""Heads for tasks: loaded by the Auto classes, their losses, padding on either side, what third-party tools expect."""

import pytest
import torch
import torch.nn.functional as F
from test_roberta import every_ffn, ids, tiny
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from lookupffn import pack
from lookupffn.hf import LookupRobertaForMaskedLM, LookupRobertaForSequenceClassification, LookupRobertaModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")

LENGTH, CHOICES = 11, 4
HEADS = {  # by the Auto class: what names the right answer of each of three texts
    AutoModelForSequenceClassification: {"labels": torch.tensor([0, 2, 1])},
    AutoModelForTokenClassification: {"labels": torch.randint(0, 3, (3, LENGTH))},
    AutoModelForMultipleChoice: {"labels": torch.tensor([0, 3, 1])},
    AutoModelForQuestionAnswering: {
        "start_positions": torch.tensor([0, 4, 2]),
        "end_positions": torch.tensor([3, 9, 2]),
    },
}
PEFT_TASKS = {
    AutoModelForSequenceClassification: "SEQ_CLS",
    AutoModelForTokenClassification: "TOKEN_CLS",
    AutoModelForQuestionAnswering: "QUESTION_ANS",
}

every_head = pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__.removeprefix("AutoModelFor"))


def inputs_for(auto):
    x = ids(3 * CHOICES, LENGTH).view(3, CHOICES, LENGTH) if auto is AutoModelForMultipleChoice else ids(3, LENGTH)
    mask = torch.ones_like(x)
    mask[0, ..., 6:] = 0
    return {"input_ids": x, "attention_mask": mask}


@pytest.fixture
def base(tmp_path):
    LookupRobertaForMaskedLM(tiny()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def head_on(auto, base, seed=0):
    torch.manual_seed(seed)
    return auto.from_pretrained(base, num_labels=3)


def scores(output):
    return torch.cat([value.flatten() for name, value in output.items() if "logits" in name])


@every_head
def test_it_starts_from_an_encoder_is_saved_packed_and_loaded(auto, base, tmp_path):
    model, inputs = head_on(auto, base).eval(), inputs_for(auto)
    expected = model(**inputs)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(model)
    assert torch.equal(scores(again(**inputs)), scores(expected))
    fast = pack(model).eval()
    fast.save_pretrained(tmp_path / "packed")
    assert torch.equal(scores(auto.from_pretrained(tmp_path / "packed").eval()(**inputs)), scores(fast(**inputs)))


@every_head
def test_its_loss_is_the_cross_entropy_of_the_right_answers(auto, base):
    model, inputs, right = head_on(auto, base).eval(), inputs_for(auto), HEADS[auto]
    output = model(**inputs, **right)
    if auto is AutoModelForQuestionAnswering:
        start = F.cross_entropy(output.start_logits, right["start_positions"])
        expected = (start + F.cross_entropy(output.end_logits, right["end_positions"])) / 2
        assert output.start_logits.shape == (3, LENGTH)
    else:
        expected = F.cross_entropy(output.logits.flatten(0, -2), right["labels"].flatten())
    torch.testing.assert_close(output.loss, expected)


@every_head
def test_it_trains_by_transformers_trainer(auto, base, tmp_path, one_thread):
    model, inputs = head_on(auto, base), inputs_for(auto)
    rows = [{name: x[i] for name, x in (inputs | HEADS[auto]).items()} for i in range(3)] * 2
    settings = {"per_device_train_batch_size": 3, "num_train_epochs": 15, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, **settings)
    before = model(**inputs, **HEADS[auto]).loss.item()
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert model.eval()(**inputs, **HEADS[auto]).loss.item() < before / 2


@every_head
def test_an_ffns_own_loss_joins_in_training(auto, base):
    model = head_on(auto, base).train()
    inputs = inputs_for(auto) | HEADS[auto]
    torch.manual_seed(0)
    plain = model(**inputs).loss
    model.encoder.layers[1].ffn.auxiliary_loss = torch.tensor(0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(model(**inputs).loss, plain + 0.5)


# ---- Padding on the left ---------------------------------------------------------------------------------------------


def turned(x, mask, fill):
    """The same texts with their padding on the left."""
    rows = [torch.cat([row[~m], row[m]]) for row, m in zip(torch.where(mask.bool(), x, fill), mask.bool(), strict=True)]
    return torch.stack(rows)


@every_ffn
def test_padding_on_the_left_changes_nothing(ffn):
    model, x = LookupRobertaModel(tiny(ffn=ffn)).eval(), ids()
    mask = torch.ones_like(x)
    mask[0, 6:], mask[1, 9:] = 0, 0
    right = model(x, attention_mask=mask).last_hidden_state[mask.bool()]
    left_mask = turned(mask, mask, 0)
    left = model(turned(x, mask, 1), attention_mask=left_mask).last_hidden_state[left_mask.bool()]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_classifier_of_texts_padded_on_the_left(pooling):
    model, x = LookupRobertaForSequenceClassification(tiny(classifier_pooling=pooling)).eval(), ids()
    mask = torch.ones_like(x)
    mask[0, 6:] = 0
    left = model(turned(x, mask, 1), attention_mask=turned(mask, mask, 0)).logits
    torch.testing.assert_close(left, model(x, attention_mask=mask).logits, rtol=0, atol=1e-5)


def test_positions_that_are_given_are_taken():
    model, x = LookupRobertaModel(tiny()).eval(), ids()
    mask, places = torch.ones_like(x), torch.arange(11).flip(0).expand(3, -1)
    given = model(x, attention_mask=mask, position_ids=places).last_hidden_state
    assert torch.equal(given, model(x, position_ids=places).last_hidden_state)
    assert not torch.allclose(given, model(x, attention_mask=mask).last_hidden_state)


# ---- What third-party tools expect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", PEFT_TASKS, ids=PEFT_TASKS.get)
def test_lora_trains_and_keeps_the_whole_head(auto, base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=PEFT_TASKS[auto], target_modules=["query_key_value"])
    model, inputs = peft.get_peft_model(head_on(auto, base), config), inputs_for(auto)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(**inputs, **HEADS[auto]).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(head_on(auto, base, seed=1), tmp_path / "lora")
    assert torch.equal(scores(again.eval()(**inputs)), scores(model.eval()(**inputs)))


def test_lora_on_an_encoder_for_features(base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", target_modules=["query_key_value"], init_lora_weights=False
    )
    model, x = peft.get_peft_model(LookupRobertaModel.from_pretrained(base), config).eval(), ids()
    expected = model(x).last_hidden_state
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(LookupRobertaModel.from_pretrained(base), tmp_path / "lora").eval()
    assert torch.equal(again(x).last_hidden_state, expected)
    merged = again.merge_and_unload().eval()
    torch.testing.assert_close(merged(x).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_lora_with_gradient_checkpointing_reaches_the_adapters(base):
    """Frozen embeddings give checkpointed layers an input without gradient, unless the model makes it require one."""
    peft = pytest.importorskip("peft")
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = LookupRobertaForMaskedLM.from_pretrained(base)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        config = peft.LoraConfig(target_modules=["query_key_value"])
        model = peft.get_peft_model(model, config).train()
        torch.manual_seed(1)
        x = ids()
        model(input_ids=x, labels=x).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_tokens_added_to_a_classifier_and_to_a_packed_model(base):
    model = head_on(AutoModelForSequenceClassification, base).eval()
    assert model.get_input_embeddings() is model.encoder.embeddings.word_embeddings
    fast, x = pack(model).eval(), ids()
    before = fast(x).logits
    fast.resize_token_embeddings(103)
    assert fast.config.vocab_size == 103
    assert torch.equal(fast(x).logits, before)
    assert fast(ids(vocab=103)).logits.shape == (3, 3)


def test_accelerate_prepares_and_unwraps(base):
    accelerate = pytest.importorskip("accelerate")
    model = head_on(AutoModelForSequenceClassification, base)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(wrapped(ids(), labels=torch.tensor([0, 1, 2])).loss)
    optimizer.step()
    assert pack(accelerator.unwrap_model(wrapped)).eval()(ids()).logits.shape == (3, 3)
