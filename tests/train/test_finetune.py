"""Fine-tuning: it learns, saves a classifier that loads, and refuses what does not fit before it writes anything."""

import csv
import json
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lookupffn.errors import InputError
from lookupffn.train.config import FinetuneConfig, PretrainConfig
from lookupffn.train.finetune import finetune
from lookupffn.train.pretrain import pretrain
from lookupffn.train.trainer import Progress

WORDS = {"good": "fine great lovely warm", "bad": "dull awful poor cold"}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def write(path, rows, header=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def rows(count, seed):
    rng = random.Random(seed)
    labels = [rng.choice(list(WORDS)) for _ in range(count)]
    return [(" ".join(rng.choices(WORDS[label].split(), k=9)), label) for label in labels]


@pytest.fixture(scope="module", params=["lookup", "switch"])  # the second with a loss of its own
def pretrained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    text = folder / "text.txt"
    text.write_text("\n\n".join(text for text, _ in rows(300, 1)))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 300}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOKUPFFN_CACHE", str(folder / "cache"))
        config = PretrainConfig(
            output_dir=str(folder), ffn=request.param, data=str(text), model=sizes, sequence_length=16, steps=2,
            batch_size=4, warmup_steps=1, log_every=1, evaluate_every=2, save_every=0, validation_fraction=0.1,
            evaluation_sequences=4,
        )  # fmt: skip
        pretrain(config)
    return folder / "model"


@pytest.fixture
def files(tmp_path):
    return {"train": write(tmp_path / "train.csv", rows(192, 2)), "test": write(tmp_path / "test.csv", rows(50, 3))}


def config_for(pretrained, tmp_path, files, **changes):
    settings = {"max_length": 32, "epochs": 3, "learning_rate": 3e-3, "output_dir": str(tmp_path / "out")}
    return FinetuneConfig(**{"model": str(pretrained)} | files | settings | changes)


def test_it_learns_and_saves_a_classifier_that_gives_the_same_answers(pretrained, tmp_path, files, one_thread):
    results = finetune(config_for(pretrained, tmp_path, files))
    assert results["accuracy"] > 0.95
    assert results["classes"] == ["bad", "good"]
    assert (results["texts_trained"], results["texts_tested"]) == (192, 50)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"] == results["accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    tests = rows(50, 3)
    with torch.no_grad():
        logits = model(**tokenizer([text for text, _ in tests], return_tensors="pt", padding=True)).logits
    right = [model.config.id2label[int(i)] == label for i, (_, label) in zip(logits.argmax(1), tests, strict=True)]
    assert sum(right) / len(right) == pytest.approx(results["accuracy"])


def test_two_runs_with_one_seed_are_equal(pretrained, tmp_path, files, one_thread):
    first, second = (
        finetune(config_for(pretrained, tmp_path, files, epochs=1, output_dir=str(tmp_path / name))) for name in "ab"
    )
    assert first["accuracy"] == second["accuracy"]
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_pairs_of_sentences_and_whole_numbers(pretrained, tmp_path, one_thread):
    texts = [(text, int(label == "good")) for text, label in rows(192, 4)]
    pairs = [("text", text, label) if i % 2 else (text, "text", label) for i, (text, label) in enumerate(texts)]
    path = write(tmp_path / "pairs.csv", pairs, ("a", "b", "kind"))
    files = {"train": path, "test": path}
    results = finetune(config_for(pretrained, tmp_path, files, text_column="a, b", label_column="kind"))
    assert results["classes"] == [0, 1]
    assert results["accuracy"] > 0.95  # either column decides for half of the texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"train": "nowhere.csv"}, r"nowhere.csv: give an existing file that ends in \.jsonl, \.csv, \.tsv, \.parquet"),
        ({"text_column": "txt"}, r"train.csv: no column 'txt'; set text_column to one of: text, label"),
        ({"label_column": "score"}, "no column 'score'; set label_column to one of: text, label"),
        ({"max_length": 1000}, "max_length 1000 must be at most the model's max_position_embeddings, 512"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(change, message, pretrained, tmp_path, files):
    with pytest.raises(InputError, match=message):
        finetune(config_for(pretrained, tmp_path, files, **change))
    assert not (tmp_path / "out").exists()


def test_stopped_and_started_again_it_ends_bit_for_bit_the_same(pretrained, tmp_path, files, one_thread, monkeypatch):
    """192 texts in batches of 32, three times: 18 steps, checkpoints at 8 and 16; it dies at 11."""
    unbroken = finetune(config_for(pretrained, tmp_path, files, save_every=8))
    config = config_for(pretrained, tmp_path, files, save_every=8, output_dir=str(tmp_path / "resumed"))

    def die(self, args, state, control, **kwargs):
        if state.global_step == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert not (tmp_path / "resumed" / "results.json").exists()
    results = finetune(config)
    assert (unbroken["resumed_from"], results["resumed_from"]) == (None, "checkpoint-8")
    assert results["accuracy"] == unbroken["accuracy"]
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("out", "resumed"))
    assert a == b


def test_a_folder_with_another_run_is_refused_and_left_as_it_is(pretrained, tmp_path, files):
    finetune(config_for(pretrained, tmp_path, files, epochs=1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    with pytest.raises(InputError, match=r"out holds a run with other settings \(epochs: 1 there, 2 asked\)"):
        finetune(config_for(pretrained, tmp_path, files, epochs=2))
    write(tmp_path / "train.csv", rows(192, 5))
    with pytest.raises(InputError, match=r"other settings \(data_fingerprint: '\w+' there, '\w+' asked\)"):
        finetune(config_for(pretrained, tmp_path, files, epochs=1))
    assert {path: path.read_bytes() for path in before} == before


def test_a_number_is_learnt_by_regression(pretrained, tmp_path, one_thread):
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        good = rng.randint(0, 8)
        words = rng.choices(WORDS["good"].split(), k=good) + rng.choices(WORDS["bad"].split(), k=8 - good)
        texts.append((" ".join(rng.sample(words, 8)), good / 4 - 1))
    files = {"train": write(tmp_path / "a.csv", texts[:250], ("text", "score")), "label_column": "score"}
    files["test"] = write(tmp_path / "b.csv", texts[250:], ("text", "score"))
    results = finetune(config_for(pretrained, tmp_path, files, problem_type="regression", epochs=8))
    assert results["spearman"] > 0.9
    assert "accuracy" not in results
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_correlation_with_a_constant_is_not_defined_and_no_number_in_the_results(pretrained, tmp_path):
    path = write(tmp_path / "a.csv", [(f"fine {i}", 2.5) for i in range(8)])
    files = {"train": path, "test": path}
    results = finetune(config_for(pretrained, tmp_path, files, problem_type="regression", epochs=1))
    assert results["spearman"] is None
    written = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["mean_squared_error"] > 0


@pytest.mark.parametrize("kind", ["lists", "columns"])
def test_several_labels_a_text(pretrained, tmp_path, kind, one_thread):
    rng = random.Random(0)
    texts = [([name for name in WORDS if rng.random() < 0.5]) for _ in range(300)]
    made = [" ".join(["so", *(rng.choice(WORDS[name].split()) for name in names for _ in range(4))]) for names in texts]
    if kind == "lists":
        path = tmp_path / "a.jsonl"
        lines = [json.dumps({"text": text, "label": names}) for text, names in zip(made, texts, strict=True)]
        path.write_text("\n".join(lines))
        column = "label"
    else:
        cells = [(text, *(int(name in names) for name in WORDS)) for text, names in zip(made, texts, strict=True)]
        path, column = write(tmp_path / "a.csv", cells, ("text", *WORDS)), ",".join(WORDS)
    files = {"train": str(path), "test": str(path), "label_column": column}
    results = finetune(config_for(pretrained, tmp_path, files, problem_type="multi_label_classification", epochs=8))
    assert results["classes"] == ["bad", "good"]
    assert min(results["f1_micro"], results["f1_macro"], results["accuracy"]) > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.problem_type == "multi_label_classification"


def test_rows_left_out_are_said_and_kept(pretrained, tmp_path, files, caplog):
    train = write(tmp_path / "train.csv", [*rows(64, 2), ("", "good"), (" ", "bad"), ("fine", "")])
    with pytest.raises(InputError, match=r"3 rows cannot be used \(.*train\.csv:row 65: no text in column 'text'"):
        finetune(config_for(pretrained, tmp_path, files))
    results = finetune(config_for(pretrained, tmp_path, files, skip_bad=True, epochs=1))
    skipped = {"no text in column 'text'": 2, "no label in column 'label'": 1}
    assert results["skipped"] == {"train": skipped, "test": {}}
    assert results["texts_trained"] == 64
    (said,) = (record.getMessage() for record in caplog.records if record.name == "lookupffn.train.finetune")
    assert said == f"{train}: 64 texts are used; skipped: 2 no text in column 'text', 1 no label in column 'label'"


def test_classes_must_fit(pretrained, tmp_path, files):
    one = write(tmp_path / "one.csv", [("text", "good")])
    with pytest.raises(InputError, match="holds one class only"):
        finetune(config_for(pretrained, tmp_path, {"train": one, "test": one}))
    new = write(tmp_path / "new.csv", [("text", "so-so")])
    with pytest.raises(InputError, match=r"new.csv: classes \['so-so'\] do not occur in .*train.csv"):
        finetune(config_for(pretrained, tmp_path, files | {"test": new}))
    numbers = write(tmp_path / "numbers.csv", [("text", 0.5)])
    with pytest.raises(InputError, match="must hold whole numbers or words only, not float"):
        finetune(config_for(pretrained, tmp_path, files | {"train": numbers}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("learning_rate", 0.0, "learning_rate must be more than 0"),
        ("warmup_fraction", 1.0, "warmup_fraction must be at least 0 and less than 1"),
        ("seed", -1, "seed must be at least 0"),
        ("problem_type", "ranking", "problem_type must be one of single_label_classification, multi_label"),
        ("pooling", "max", "pooling must be one of mean, cls, not 'max'"),
        ("batch_size", "many", "batch_size must be of type int, not 'many'"),
    ],
)
def test_settings_out_of_range_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**{name: value})
