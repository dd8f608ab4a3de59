"""Fine-tuning of encoders of transformers, dense and converted: GLUE by name, seeds, early stopping, saved and loaded.

Their texts are words by chance of one half of a vocabulary, their label which half: a few steps learn it.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lookupffn  # noqa: F401 - which from_pretrained of a converted model needs
from lookupffn import InputError, LookupConfig, LookupFFN
from lookupffn.branches import BranchedLookupFFN, LowRank, TokenContext, TokenRows, parameters_by_kind
from lookupffn.hf.classifier import load_classifier, longest_text
from lookupffn.hf.loading import transformer_folder
from lookupffn.hf.packed import mark_converted
from lookupffn.hf.slots import slots_of
from lookupffn.train import checkpoint
from lookupffn.train.config import FinetuneConfig
from lookupffn.train.finetune import _metrics, finetune, without_gain
from lookupffn.train.glue import TASKS, task_files
from lookupffn.train.trainer import parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WORDS = [f"w{i}" for i in range(40)]
SIZES = {
    "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2,
    "vocab_size": len(WORDS) + 5, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    return save(BertModel(BertConfig(**SIZES, initializer_range=0.2)), tmp_path_factory.mktemp("dense"))


def lookups(model):
    """Puts lookups with all branches where the feed-forward layers were."""
    context = TokenContext()
    for slot in slots_of(model):
        lookup = LookupFFN(LookupConfig(16, 16, num_tables=4, code_bits=3, block_size=4))
        nn.init.normal_(lookup.tables, std=0.1)
        slot.replace(BranchedLookupFFN(lookup, LowRank(16, 16, 2), [TokenRows(45, 16, 45, context)]))
    mark_converted(model)
    return model


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    torch.manual_seed(0)
    model = lookups(BertModel(BertConfig(**SIZES, initializer_range=0.2)))
    return save(model, tmp_path_factory.mktemp("converted"))


def rows(count, seed, columns=("sentence",)):
    """Of a table: texts of the columns and labels; words of the last column are of the label's half."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count).tolist()
    texts = {
        column: [
            " ".join(generator.choice(WORDS[label * 20 :][:20] if column == columns[-1] else WORDS, 5))
            for label in labels
        ]
        for column in columns
    }
    return texts | {"label": labels}


def folder_of(path, columns=("sentence",), names=("validation",)):
    path.mkdir()
    pq.write_table(pa.table(rows(128, 1, columns)), path / "train.parquet")
    for number, name in enumerate(names):
        pq.write_table(pa.table(rows(32, 2 + number, columns)), path / f"{name}.parquet")
    return str(path)


@pytest.fixture
def sst2(tmp_path):
    return folder_of(tmp_path / "sst2")


def config_for(model, data, tmp_path, **changes):
    given = {"task": "sst2", "max_length": 16, "epochs": 2, "learning_rate": 3e-3, "output_dir": str(tmp_path / "out")}
    return FinetuneConfig(**{"model": str(model), "data": data} | given | changes)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_measure_what_glue_defines():
    """By hand: three of five right, and what scikit-learn and SciPy say."""
    right = np.array([0, 0, 1, 1, 1])
    logits = np.array([[2.0, 1], [0, 1], [0, 1], [1, 0], [0, 3]])
    guess = [0, 1, 1, 0, 1]

    def of(task, *given):
        return _metrics(FinetuneConfig(task=task), *given)

    for task in ("sst2", "qnli", "rte", "wnli", "mnli"):
        assert of(task, logits, right) == {"accuracy": 0.6, "score": 0.6}
    f1 = 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)
    assert sklearn_metrics.f1_score(right, guess) == pytest.approx(f1)
    for task in ("mrpc", "qqp"):
        assert of(task, logits, right) == pytest.approx({"f1": f1, "accuracy": 0.6, "score": (f1 + 0.6) / 2})
    matthews = (2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2)
    assert sklearn_metrics.matthews_corrcoef(right, guess) == pytest.approx(matthews)
    assert of("cola", logits, right) == pytest.approx({"matthews_correlation": matthews, "score": matthews})
    scores, found = np.array([0.0, 1.5, 2.5, 5.0]), np.array([[0.1], [0.4], [0.2], [0.9]])
    pearson, spearman = stats.pearsonr(scores, found[:, 0]).statistic, 0.8
    wanted = {"pearson": pearson, "spearman": spearman, "score": (pearson + spearman) / 2}
    assert of("stsb", found, scores) == pytest.approx(wanted)


def test_tasks_of_pairs_and_of_two_files(dense, tmp_path, one_thread):
    """The second sentence decides, which a BERT tells from the first by its token types."""
    names = ("validation_matched", "validation_mismatched")
    data = folder_of(tmp_path / "mnli", ("premise", "hypothesis"), names)
    results = finetune(config_for(dense, data, tmp_path, task="mnli", epochs=1))
    assert {"accuracy_matched", "accuracy_mismatched"} <= results.keys()
    assert "accuracy" not in results
    assert results["texts_tested"] == 64
    assert results["files"]["test_mismatched"].endswith("validation_mismatched.parquet")


def test_files_are_found_by_the_hubs_names_too_and_missing_ones_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "cola"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}-00000-of-00001.parquet").touch()
    train, tests = task_files("cola", str(folder))
    assert (Path(train).name, list(tests)) == ("train-00000-of-00001.parquet", [""])
    with pytest.raises(InputError, match=r"must be a folder with one validation_matched.parquet for task mnli; it has"):
        task_files("mnli", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"task rte: rte/train-.* cannot be fetched from nyu-mll/glue .*as data"):
        task_files("rte", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sst3"}, f"task must be one of {', '.join(TASKS)}, not 'sst3'"),
        ({"task": "sst2", "train": "a.csv"}, "train 'a.csv': task sst2 takes its files from data"),
        ({"data": "folder"}, "data 'folder' is for a task"),
        ({"task": "stsb", "problem_type": "single_label_classification"}, "task stsb is regression"),
        ({"evaluate_every": 5}, "evaluate_every 5 needs patience"),
        ({"seeds": "0,x"}, "seeds must be different whole numbers with commas between, not '0,x'"),
        ({"seeds": "1,01"}, "seeds must be different"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**settings)


# ---- Models ----------------------------------------------------------------------------------------------------------


def test_a_converted_model_is_fine_tuned_saved_and_loaded_again(converted, sst2, tmp_path, one_thread):
    before = load_classifier(str(converted), num_labels=2).state_dict()
    results = finetune(config_for(converted, sst2, tmp_path, epochs=4))
    assert results["accuracy"] > 0.85
    assert results["ffn"] == "converted"
    assert list(results["weights"]) == ["model.safetensors"]
    folder = tmp_path / "out" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert all(isinstance(slot.last, BranchedLookupFFN) for slot in slots_of(model))
    trained = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.rpartition(".")[2] for name in trained if "output.dense" in name} >= {"tables", "rows", "weight"}
    tokenizer, table = BertTokenizerFast.from_pretrained(folder), rows(32, 2)
    with torch.no_grad():
        logits = model(**tokenizer(table["sentence"], return_tensors="pt", padding=True)).logits
    assert float((logits.argmax(1) == torch.tensor(table["label"])).float().mean()) == results["accuracy"]


def test_a_converted_models_parts_have_rates_as_in_distillation():
    model = lookups(BertModel(BertConfig(**SIZES)))
    kinds = parameters_by_kind(model)
    tables = [p for slot in slots_of(model) for p in (slot.last.lookup.tables, slot.last.token_rows[0].rows)]
    assert {id(p) for p in kinds["tables"]} == {id(p) for p in tables}
    inside = {id(p) for slot in slots_of(model) for p in slot.last.parameters()}
    assert {id(p) for p in kinds["lookups"]} == inside - {id(p) for p in tables}
    assert sum(map(len, kinds.values())) == len(list(model.parameters()))
    config = FinetuneConfig(learning_rate=1e-4)
    rates = {
        round(group["lr"], 8): sum(p.numel() for p in group["params"]) for group in parameter_groups(model, config)
    }
    assert sorted(rates) == [1e-4, 3e-4, 9e-4]
    assert rates[9e-4] == sum(p.numel() for p in tables)


TRANSFORMER = "sentence_transformers.models.Transformer"


def test_where_the_model_lies_in_a_sentence_transformers_folder(tmp_path):
    assert transformer_folder("org/name") == "org/name"
    for path, found in (("", tmp_path), ("0_Transformer", tmp_path / "0_Transformer")):
        (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": TRANSFORMER}]))
        assert transformer_folder(str(tmp_path)) == str(found)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../other", "type": TRANSFORMER}]))
    with pytest.raises(
        InputError, match=r"the path of its module Transformer must be a folder in it, not '\.\./other'"
    ):
        transformer_folder(str(tmp_path))


def test_heads_are_new_where_they_do_not_fit_and_nothing_else_is(dense, tmp_path):
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3, pad_token_id=1))
    assert longest_text(model) == 22  # 24 without the two in front
    model.save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), num_labels=2).classifier.out_proj.out_features == 2
    with pytest.raises(InputError, match="its head looks at what roberta has it look at: leave pooling out"):
        load_classifier(str(tmp_path), "cls", num_labels=2)
    weights = model.state_dict()
    del weights["roberta.encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"its weights lack roberta.encoder.layer.1.output.dense.weight"):
        load_classifier(str(tmp_path), num_labels=2)


# ---- Seeds, and when to stop -----------------------------------------------------------------------------------------


def test_seeds_differ_repeat_and_are_summarised(dense, sst2, tmp_path, one_thread):
    found = finetune(config_for(dense, sst2, tmp_path, epochs=1, seeds="0, 3"))
    assert [run["seed"] for run in found["runs"]] == [0, 3]
    values = [run["accuracy"] for run in found["runs"]]
    assert found["mean"] == {"accuracy": pytest.approx(np.mean(values))}
    assert found["standard_deviation"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert found["settings"]["task"] == "sst2"
    assert {"scipy", "transformers"} <= found["machine"]["versions"].keys()
    alone = finetune(config_for(dense, sst2, tmp_path, epochs=1, seed=3, output_dir=str(tmp_path / "alone")))
    assert alone["data_fingerprint"] == found["data_fingerprint"]
    weights = [
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (tmp_path / "out" / "seed-0", tmp_path / "out" / "seed-3", tmp_path / "alone")
    ]
    assert weights[0] != weights[1] == weights[2]


def test_a_finished_seed_is_not_run_again(dense, sst2, tmp_path, one_thread, monkeypatch):
    config = config_for(dense, sst2, tmp_path, epochs=1, seeds="0")
    found = finetune(config)
    monkeypatch.setattr("lookupffn.train.finetune._FinetuningTrainer", None)
    assert finetune(config) == found
    assert found["standard_deviation"] == {"accuracy": None}


def scripted(monkeypatch, scores):
    """Has evaluations of training give these scores, one by one, and the one after them what is true."""
    left, measure = list(scores), _metrics
    monkeypatch.setattr(
        "lookupffn.train.finetune._metrics",
        lambda *given: measure(*given) | ({"score": left.pop(0)} if left else {}),
    )


def test_early_stopping_ends_without_a_gain_and_keeps_the_best(dense, sst2, tmp_path, one_thread, monkeypatch):
    """128 texts in batches of 32, evaluated every 2 steps: the best at 4, two without a gain, the end at 8 of 40."""
    scripted(monkeypatch, [0.3, 0.7, 0.7, 0.1])
    settings = {"epochs": 10, "patience": 2, "evaluate_every": 2}
    results = finetune(config_for(dense, sst2, tmp_path, **settings))
    assert [line["step"] for line in results["evaluations"]] == [2, 4, 6, 8]
    assert results["best_step"] == 4
    out = tmp_path / "out"
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    kept = (out / "model" / "model.safetensors").read_bytes()
    assert kept == (out / "checkpoint-4" / "model.safetensors").read_bytes()
    assert kept != (out / "checkpoint-8" / "model.safetensors").read_bytes()
    # killed between the stop and the results, it is measured, not trained on
    (out / "results.json").unlink()
    monkeypatch.setattr("lookupffn.train.finetune._FinetuningTrainer.train", None)
    again = finetune(config_for(dense, sst2, tmp_path, **settings))
    assert (again["accuracy"], again["best_step"]) == (results["accuracy"], 4)


def test_the_last_steps_are_evaluated_too(dense, sst2, tmp_path, one_thread, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2, 0.3])
    results = finetune(config_for(dense, sst2, tmp_path, epochs=1, patience=3, evaluate_every=3))
    assert [line["step"] for line in results["evaluations"]] == [3, 4]
    assert results["best_step"] == 4


def test_gains_are_counted_from_the_first_best():
    def history(*scores):
        return {"log_history": [{"loss": 1.0}, *({"eval_score": score} for score in scores)]}

    counts = [without_gain(history(*s)) for s in ((), (1,), (1, 1), (0, 2, 1, 2), (float("nan"), 1, 0))]
    assert counts == [0, 0, 1, 2, 1]


KILLED = """
import os, signal, sys
from lookupffn.train.config import FinetuneConfig
from lookupffn.train.finetune import finetune
from lookupffn.train.trainer import Progress
import torch
torch.set_num_threads(1)
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Progress.on_step_end = on_step_end
finetune(FinetuneConfig(**eval(sys.argv[1])))
"""


def test_killed_and_started_again_it_ends_with_the_same_bits_and_the_same_best(converted, sst2, tmp_path, one_thread):
    """16 steps, evaluated each epoch of 4: it dies at 7 and goes on from 4."""
    settings = {"epochs": 4, "patience": 3}
    whole = finetune(config_for(converted, sst2, tmp_path, **settings))
    config = config_for(converted, sst2, tmp_path, **settings, output_dir=str(tmp_path / "killed"))
    given = {name: value for name, value in vars(config).items() if name not in ("train", "test")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, repr(given)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    results = finetune(config)
    assert results["resumed_from"] == "checkpoint-4"
    assert results["evaluations"] == whole["evaluations"]
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("out", "killed"))
    assert a == b
