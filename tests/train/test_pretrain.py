"""Pretraining: killed and resumed, on one process and on two, each the same as the uninterrupted single one."""

import dataclasses
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from lookupffn import LookupFFN
from lookupffn.errors import InputError, WriteError
from lookupffn.hf import LookupRobertaForMaskedLM
from lookupffn.train import pretrain as pretraining
from lookupffn.train.config import PretrainConfig
from lookupffn.train.masking import MaskedBlocks
from lookupffn.train.pretrain import (
    _PretrainingTrainer,
    build_model,
    evaluate,
    log_perplexity,
    pretrain,
    read_metrics,
)
from lookupffn.train.trainer import parameter_groups

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # transformers' own
    "ignore:.*tensorboard.*:DeprecationWarning",
    "ignore:.*pin_memory.*:UserWarning",
)

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=300)
TABLES = dict(num_tables=6, code_bits=4)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "saw",
    "another",
    "cat",
    "that",
    "ran",
    "away",
    "from",
    "its",
    "own",
    "shadow",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few hundred short documents; the token cache lies beside them, for subprocesses too."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    documents = (" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(300))
    (folder / "text.txt").write_text("\n\n".join(documents))
    os.environ["LOOKUPFFN_CACHE"] = str(folder / "cache")
    yield folder / "text.txt"
    del os.environ["LOOKUPFFN_CACHE"]


def config_for(corpus, output_dir, **changes):
    settings = dict(
        output_dir=str(output_dir),
        preset="small",
        model=dict(SIZES),
        ffn_options={} if changes.get("ffn") == "dense" else TABLES,
        data=str(corpus),
        validation_fraction=0.1,
        sequence_length=16,
        steps=12,
        batch_size=8,
        warmup_steps=2,
        evaluation_sequences=20,
        evaluate_every=4,
        log_every=2,
        save_every=4,
    )
    return PretrainConfig(**settings | changes)


def flags(config):
    flags = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, dict):
            flags += [f"{flag}={k}={v}" for k, v in value.items()]
        elif not isinstance(value, bool | None):
            flags.append(f"{flag}={value}")
    return flags


def losses(output_dir):
    lines = map(json.loads, (Path(output_dir) / "metrics.jsonl").read_text().splitlines())
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in found] == [2, 4, 6, 8, 10, 12]
    return found


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """One whole run, with dropout, so that the random state matters."""
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    config = config_for(corpus, output_dir, model=SIZES | dict(hidden_dropout_prob=0.1))
    return config, pretrain(config)


def test_a_run_leaves_a_model_metrics_and_whole_checkpoints(uninterrupted):
    config, result = uninterrupted
    folder = Path(config.output_dir)
    assert {
        "checkpoint-8",
        "checkpoint-12",
        "config.json",
        "metrics.jsonl",
        "model",
        "results.json",
        "tensorboard",
    } == {p.name for p in folder.iterdir()}
    saved = json.loads((folder / "results.json").read_text())
    assert saved == result.metrics
    assert saved["tokens_trained"] == 12 * 8 * 16
    assert saved["tokens_evaluated"] == 20 * round(0.15 * 16)
    assert [p["step"] for p in result.curve] == [4, 8, 12]
    assert result.curve[-1]["log_perplexity"] == pytest.approx(saved["log_perplexity"], rel=1e-12)
    reloaded = LookupRobertaForMaskedLM.from_pretrained(folder / "model")
    assert not reloaded.config.sparse_prediction
    again = log_perplexity(evaluate(reloaded, result.validation))
    assert again["log_perplexity"] == pytest.approx(saved["log_perplexity"], rel=1e-6)
    buckets = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "buckets" in line]
    assert len(buckets[0]["buckets"]) == 2
    assert buckets[0]["buckets"][0]["bits"] == 24


DIES_WHILE_SAVING = """
import json, os, signal, sys
from lookupffn.train import checkpoint, pretrain
from lookupffn.train.config import PretrainConfig
mark_complete = checkpoint.mark_complete
def dies_at_the_second(path):
    os.kill(os.getpid(), signal.SIGKILL) if path.name == "checkpoint-8" else mark_complete(path)
checkpoint.mark_complete = dies_at_the_second
pretrain.pretrain(PretrainConfig(**json.loads(sys.argv[1])))
"""


def test_killed_and_started_again_it_ends_bit_for_bit_the_same(uninterrupted, corpus, tmp_path):
    """The second checkpoint is there, but for the mark that it is whole: training goes on from the first."""
    config, result = uninterrupted
    config = dataclasses.replace(config, output_dir=str(tmp_path))
    settings = json.dumps(dataclasses.asdict(config))
    command, one_thread = [sys.executable, "-c", DIES_WHILE_SAVING, settings], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "checkpoint-4" / "COMPLETE.json").exists()
    assert (tmp_path / "checkpoint-8" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-8" / "COMPLETE.json").exists()
    assert not (tmp_path / "results.json").exists()
    resumed = pretrain(config)
    assert resumed.metrics["resumed_from"] == "checkpoint-4"
    ours, theirs = (load_file(Path(c) / "model" / "model.safetensors") for c in (tmp_path, result.output_dir))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert losses(tmp_path) == losses(result.output_dir)
    assert resumed.metrics["log_perplexity"] == result.metrics["log_perplexity"]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The run of one process, a whole batch at a time."""
    with pytest.MonkeyPatch.context() as patch:
        seen = batches_seen(patch)
        result = pretrain(config_for(corpus, tmp_path_factory.mktemp("alone"), save_every=0))
    assert seen == [8] * 12
    return result


def batches_seen(patch):
    """The sizes of the batches that a model is trained on, from now on."""
    build, seen = pretraining.build_model, []

    def look(model, _, inputs):
        if model.training:
            seen.append(len(inputs["labels"]))

    def build_model(config, tokenizer):
        model = build(config, tokenizer)
        model.register_forward_pre_hook(look, with_kwargs=True)
        return model

    patch.setattr(pretraining, "build_model", build_model)
    return seen


# What torchrun does with `-m lookupffn pretrain ...`, but that both processes share the seconds of the imports, and
# none of them takes its interpreter apart at the end.
TWO_PROCESSES = """
import os, sys, traceback
import lookupffn.train.pretrain
from lookupffn.__main__ import main
for rank in ("0", "1"):
    if not os.fork():
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        try:
            main()
        except SystemExit as ended:
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
os._exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
"""


def test_two_processes_have_the_losses_of_one(alone, corpus, tmp_path):
    config = config_for(corpus, tmp_path / "two", save_every=0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ranks
    program = [sys.executable, "-c", TWO_PROCESSES, "pretrain", *flags(config)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (step, a), (other_step, b) in zip(losses(alone.output_dir), losses(tmp_path / "two"), strict=True):
        assert step == other_step
        assert a == pytest.approx(b, abs=1e-5)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["tokens_evaluated"] == alone.metrics["tokens_evaluated"]
    assert results["log_perplexity"] == pytest.approx(alone.metrics["log_perplexity"], abs=1e-5)


def test_accumulation_changes_nothing_but_memory(alone, corpus, tmp_path, monkeypatch):
    seen = batches_seen(monkeypatch)
    accumulated = pretrain(config_for(corpus, tmp_path, accumulation=4, save_every=0))
    assert seen == [2] * 4 * 12
    for (_, a), (_, b) in zip(*(losses(run.output_dir) for run in (alone, accumulated)), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_folder_with_other_settings_is_refused(uninterrupted):
    config, _ = uninterrupted
    with pytest.raises(ValueError, match=r"other settings \(steps: 12 there, 13 asked\): choose another folder"):
        pretrain(dataclasses.replace(config, steps=13))


def test_a_batch_that_does_not_divide_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="batch_size 8 must be a multiple of processes x accumulation = 1 x 3"):
        pretrain(config_for(corpus, tmp_path, accumulation=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0, not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be more than 0, not nan"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float, not 'fast'"),
        ({"steps": 1.5}, "steps must be of type int, not 1.5"),
        ({"bf16": 1}, "bf16 must be of type bool, not 1"),
        ({"model": [3]}, r"model must be of type dict, not \[3\]"),
        ({"mask_probability": 1.0}, "mask_probability must be between 0 and 1, not 1.0"),
        ({"save_every": 30}, "save_every 30 must be a multiple of log_every 50"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(InputError, match=message):
        PretrainConfig(**change)


def test_numbers_may_come_as_yaml_reads_them():
    config = PretrainConfig(learning_rate="1e-3", max_grad_norm=1, model=None)
    assert (config.learning_rate, config.max_grad_norm, config.model) == (1e-3, 1.0, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"num_tabels": 7}}, "model: LookupRobertaConfig has no field num_tabels"),
        ({"model": {"ffn": "dense"}}, "model cannot set ffn"),
        ({"model": {"is_decoder": True}}, "model cannot set is_decoder"),
        ({"model": {"num_attention_heads": 5}}, "model: hidden_size 128 must be a multiple"),
        ({"model": {"max_position_embeddings": 64}}, "sequence_length 128 must be at most .* 64"),
        ({"ffn_options": {"num_tables": "many"}}, "model: num_tables must be an int, not 'many'"),
        ({"ffn_options": {"block_size": 256}}, "model: block_size must be a power of two, 1 to 128"),
        ({"ffn_options": {"tables": 3}}, "model: ffn_options of lookup cannot be tables; known are num_tables"),
    ],
)
def test_model_fields_that_are_not_the_users_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        PretrainConfig(preset="small", **settings).load_data()


@pytest.mark.parametrize(("name", "value"), [("preset", "tiny"), ("ffn", "sparse")])
def test_an_unknown_preset_or_ffn_is_refused_before_any_text_is_read(name, value):
    with pytest.raises(InputError, match=f"model: {name} must be one of .* not '{value}'"):
        PretrainConfig(data="/nowhere", **{name: value}).load_data()


def test_matched_models_start_from_the_same_weights_but_for_their_ffn():
    models = [build_model(config_for("stdlib", "x", ffn=ffn), _Tokenizer()) for ffn in ("dense", "lookup")]
    dense, lookup = (dict(model.named_parameters()) for model in models)
    shared = dense.keys() & lookup.keys()
    others = dense.keys() ^ lookup.keys()
    assert others
    assert all(".ffn." in name for name in others)
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(dense[name], lookup[name]), name
    layers = lookup["encoder.layers.0.ffn.tables"], lookup["encoder.layers.1.ffn.tables"]
    assert not torch.equal(*layers)
    other = build_model(config_for("stdlib", "x", seed=1), _Tokenizer())
    assert not torch.equal(other.encoder.layers[0].ffn.tables, layers[0])


def test_what_was_skipped_is_said_once_and_kept(corpus, tmp_path, caplog):
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = corpus.read_text().split("\n\n")
    (folder / "good.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_bytes("déjà vu".encode("latin-1"))
    config = config_for(folder, tmp_path / "run", steps=2, skip_bad=True)
    metrics = pretrain(config).metrics
    (said,) = (record.getMessage() for record in caplog.records if record.name == "lookupffn.train.pretrain")
    assert said.startswith(f"{folder}: 300 documents are used; skipped: 2 not UTF-8 ({folder}/a.txt: not UTF-8; ")
    assert metrics["data"]["skipped"] == {"not UTF-8": 2}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["data"] == metrics["data"]


@pytest.mark.parametrize("limit", [1 << 16, 1 << 18])  # bytes a file: less than the model, less than its optimizer
def test_a_full_disk_is_said_by_its_folder_and_the_run_goes_on_when_there_is_room(corpus, tmp_path, limit):
    config = config_for(corpus, tmp_path / "run", steps=4, save_every=2)
    config.load_data()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(WriteError, match=rf"^{tmp_path}/run cannot be written: (File too large|torch.save failed)"):
            pretrain(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pretrain(config).metrics["resumed_from"] is None
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size > 1 << 16


def test_a_folder_that_cannot_be_made_is_named(corpus):
    with pytest.raises(WriteError, match=r"^/proc/lookupffn cannot be written: No such file or directory"):
        pretrain(config_for(corpus, "/proc/lookupffn", steps=2))


def test_a_torn_line_of_metrics_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "none") == []


def test_a_refused_run_does_not_claim_its_folder(corpus, tmp_path):
    with pytest.raises(InputError, match="no field num_tabels"):
        pretrain(config_for(corpus, tmp_path, model=SIZES | {"num_tabels": 3}))
    assert not (tmp_path / "config.json").exists()


def test_parameter_groups():
    config = PretrainConfig(learning_rate=0.1, table_learning_rate_multiplier=3.0, weight_decay=0.01)
    model = LookupRobertaForMaskedLM(config_for("stdlib", "x").model_config(_Tokenizer()))
    matrices, vectors, tables = parameter_groups(model, config)
    assert [(g["lr"], g["weight_decay"]) for g in (matrices, vectors, tables)] == [
        (0.1, 0.01),
        (0.1, 0.0),
        (pytest.approx(0.3), 0.0),
    ]
    assert [id(p) for p in tables["params"]] == [id(m.tables) for m in model.modules() if isinstance(m, LookupFFN)]
    assert all(p.dim() == 1 for p in vectors["params"])
    grouped = [p for g in (matrices, vectors, tables) for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


@pytest.mark.parametrize("table_schedule", ["linear", "constant"])
def test_schedules(table_schedule):
    config = PretrainConfig(warmup_steps=3, table_schedule=table_schedule)
    model = LookupRobertaForMaskedLM(config_for("stdlib", "x").model_config(_Tokenizer()))
    optimizer = torch.optim.SGD(parameter_groups(model, config))
    scheduler = _PretrainingTrainer.create_scheduler(SimpleNamespace(config=config, optimizer=None), 10, optimizer)
    standard = get_linear_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], lr=1e-3), 3, 10)
    for step in range(11):
        matrices, vectors, tables = scheduler.get_last_lr()
        assert matrices == vectors == pytest.approx(standard.get_last_lr()[0], rel=1e-12)
        expected = 3e-3 * min(1, step / 3) if table_schedule == "constant" else 3 * matrices
        assert tables == pytest.approx(expected, rel=1e-12)
        for part in (optimizer, scheduler, standard.optimizer, standard):
            part.step()


def test_a_setting_that_is_newer_than_a_run_had_its_default_then():
    config = PretrainConfig(learning_rate=2e-3, output_dir="there")
    written = dataclasses.asdict(config) | {"output_dir": "here"}
    del written["table_schedule"], written["ffn_options"]
    assert config.changes(written) == []
    changed = dataclasses.replace(config, table_schedule="constant", steps=7)
    assert changed.changes(written) == [
        "steps: 1000 there, 7 asked",
        "table_schedule: 'linear' there, 'constant' asked",
    ]


class _Tokenizer:
    """What a model config and MaskedBlocks ask of a tokenizer."""

    mask_token_id, pad_token_id, bos_token_id, eos_token_id = 4, 1, 0, 2
    all_special_ids = [0, 1, 2, 3, 4]

    def __len__(self):
        return 300

    def get_vocab(self):
        return {str(i): i for i in range(300)}


def test_log_perplexity_is_the_mean_over_masked_tokens_whatever_the_batch_and_the_ranks():
    model = LookupRobertaForMaskedLM(config_for("stdlib", "x").model_config(_Tokenizer()))
    blocks = np.random.default_rng(0).integers(5, 300, (13, 16), dtype=np.uint16)
    dataset = MaskedBlocks(blocks, _Tokenizer(), seed=0)
    items = [dataset[i] for i in range(13)]
    model.config.sparse_prediction = False
    logits = model(torch.stack([i["input_ids"] for i in items])).logits
    labels = torch.stack([i["labels"] for i in items])
    nll = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none").double()
    expected = {
        "log_perplexity": nll.mean().item(),
        "log_perplexity_standard_error": (nll.std(correction=0) / len(nll) ** 0.5).item(),
        "tokens_evaluated": 13 * 2,
    }
    for sparse in (False, True):
        model.config.sparse_prediction = sparse
        for batch_size in (1, 5, 64):
            assert log_perplexity(evaluate(model, dataset, batch_size)) == pytest.approx(expected, rel=1e-5)
    parts = sum(evaluate(model, dataset, 4, rank, 3) for rank in range(3))
    assert log_perplexity(parts) == pytest.approx(expected, rel=1e-5)
