"""The quality lab: what is planned, trained, resumed, measured and shown; and what is refused."""

import dataclasses
import io
import json
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from rich.console import Console

from lookupffn import native
from lookupffn.__main__ import main
from lookupffn.bench.timing import Timing
from lookupffn.errors import InputError
from lookupffn.lab import compare as lab
from lookupffn.lab.report.comparison import _name, _tick, markdown, plot, show, summarise
from lookupffn.train import commands
from lookupffn.train.pretrain import evaluate, log_perplexity

# transformers' own, and of the loader, where there is no GPU
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning",
                                        "ignore:.*tensorboard.*:DeprecationWarning")  # fmt: skip
COMMON = {
    "preset": "small",
    "sequence_length": 16,
    "batch_size": 4,
    "warmup_steps": 2,
    "log_every": 2,
    "save_every": 0,
    "evaluation_sequences": 8,
    "mask_probability": 0.3,
    "validation_fraction": 0.1,
    "model": {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}
RECIPES = {
    "six": {"ffn": "lookup", "ffn_options": {"num_tables": 6, "code_bits": 4, "block_size": 4}},
    "odd": {"ffn": "lookup-variant", "ffn_options": {"num_tables": 6, "code_bits": 4, "block_size": 4, "offset": True}},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng, words = random.Random(0), ["the", "layer", "reads", "rows", "of", "its", "tables", "for", "each", "token"]
    text = "\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(200))
    (folder / "text.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOKUPFFN_CACHE", str(folder / "cache"))
        yield str(folder / "text.txt")


def test_the_plan_holds_every_recipe_horizon_and_seed_with_its_settings():
    runs = lab.plan(RECIPES, COMMON, ["dense", "six"], [0, 3], [10, 30], "out")
    assert [run.folder.name for run in runs] == [
        f"{name}-{steps}-s{seed}" for name in ("dense", "six") for steps in (10, 30) for seed in (0, 3)
    ]
    last = runs[-1].config
    assert (last.ffn, last.steps, last.seed, last.evaluate_every) == ("lookup", 30, 3, 14)
    assert last.model_config().ffn_options["num_tables"] == 6
    assert runs[0].config.ffn == "dense"


@pytest.mark.parametrize(
    ("recipes", "name", "message"),
    [
        ({}, "sparse", "ffn 'sparse' is neither a recipe nor a feed-forward layer; there are dense, lookup"),
        ({"a": {"ffn": "lookup", "stepps": 3}}, "a", "recipe 'a': .*stepps"),
        ({"a": {"ffn": "lookup", "ffn_options": {"reads": 9}}}, "a", "reads must be 1 to 4"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_trained(recipes, name, message):
    with pytest.raises(InputError, match=message):
        lab.plan(recipes, COMMON, [name], [0], [4], "out")


@pytest.fixture
def processes(monkeypatch, one_thread):
    """Commands that compare starts run in this process, at once; each counts as running until it is asked for."""
    running, most = set(), []

    class Process:
        def __init__(self, command, *, env, stdout, stderr):
            assert command[:3] == [sys.executable, "-m", "lookupffn"]
            assert (env["OMP_NUM_THREADS"], stderr) == ("1", subprocess.STDOUT)
            self.pid, self.status = len(most), 0
            running.add(self.pid)
            most.append(len(running))
            with monkeypatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stdout):
                patch.setattr(sys, "argv", command[2:])
                try:
                    main()
                except SystemExit as error:
                    self.status = error.code

        def poll(self):
            running.discard(self.pid)
            return self.status

        def terminate(self):
            pytest.fail("nothing has to be stopped")

    monkeypatch.setattr(lab, "subprocess", SimpleNamespace(Popen=Process, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(lab, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(commands, "quiet", lambda: None)
    return most


def test_runs_are_trained_measured_and_not_trained_again(corpus, tmp_path, capsys, monkeypatch, processes):
    monkeypatch.setattr(lab, "DENSE_ENGINES", lab.DENSE_ENGINES[2:3])  # PyTorch in bfloat16: wherever this runs
    microseconds, evaluated = {"dense": (9, 3), "six": (5, 2), "odd": (4,)}, []

    def timed(forms, seconds):
        """Each form is run, and takes on paper what is written above: eager first, then in the engine."""
        assert seconds == pytest.approx(0.02 * len(forms))
        left, found = {recipe: list(us) for recipe, us in microseconds.items()}, {}
        for form, call in forms.items():
            call()
            us = left[form[0]].pop(0) * lab.TIMED_TOKENS
            found[form] = Timing(us / 1e6, us / 2e6, us / 0.5e6, 7)
        return found

    def evaluated_by(model, dataset, batch_size):
        sums = evaluate(model, dataset, batch_size)
        evaluated.append(([type(layer.ffn).__name__ for layer in model.encoder.layers], len(dataset), sums))
        return sums

    monkeypatch.setattr(lab, "time_interleaved", timed)
    monkeypatch.setattr(lab, "evaluate", evaluated_by)
    runs = lab.plan(RECIPES, COMMON | {"data": corpus}, ["dense", "six", "odd"], [0], [4], tmp_path)
    records = lab.compare(runs, tmp_path, jobs=2, seconds=0.02)
    assert processes == [1, 2, 1]
    assert [r["recipe"] for r in records] == ["dense", "six", "odd"]
    assert [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()] == records
    dense, six, odd = records
    assert dense["tokens"] == 4 * 4 * 16
    assert dense["ffn_macs_per_token"] == 2 * 32 * 64
    assert six["ffn_options"] == RECIPES["six"]["ffn_options"]
    assert dense["log_perplexity_int8"] is odd["log_perplexity_int8"] is None  # the engine has neither
    assert (dense["ffn_engine"], dense["ffn_dtype"], odd["ffn_engine"]) == ("PyTorch", "bfloat16", "PyTorch eager")
    assert (dense["ffn_us_per_token"], odd["ffn_us_per_token"]) == pytest.approx((3, 4))
    if native.available():
        ((kinds, blocks, sums),) = evaluated
        assert (set(kinds), blocks) == ({"PackedLookupFFN"}, 8)
        assert six["log_perplexity_int8"] == log_perplexity(sums)["log_perplexity"] != six["log_perplexity"]
        assert (six["ffn_dtype"], six["ffn_us_per_token"]) == ("int8", pytest.approx(2))
        for found in (dense, six):
            assert abs(found["log_perplexity_deployed"] - found["log_perplexity"]) < 0.02
            assert 100_000 < found["deployed_bytes"] < 1_000_000
        assert odd["log_perplexity_deployed"] is odd["deployed_bytes"] is None  # a variant of the layer
    assert 0 < dense["train_loss"] < 7
    assert dense["buckets"] == []
    assert six["buckets"][0]["bits"] == 24
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert len(table) == 5
    assert table[3].startswith("| six | 0.000256 | 1 | ")

    before = {run.folder: (run.folder / "results.json").stat().st_mtime_ns for run in runs}
    assert [r["log_perplexity"] for r in lab.compare(runs, tmp_path, jobs=1, seconds=0.02)] == [
        r["log_perplexity"] for r in records
    ]
    assert "3 runs, 3 of them finished before" in capsys.readouterr().out
    assert {run.folder: (run.folder / "results.json").stat().st_mtime_ns for run in runs} == before


def test_a_run_that_fails_is_named_and_stops_no_other(corpus, tmp_path, processes):
    runs = lab.plan(RECIPES, COMMON | {"data": corpus}, ["dense", "six"], [0], [2], tmp_path)
    runs[0].folder.mkdir()
    (runs[0].folder / "config.json").write_text('{"steps": 99}')  # another run's
    with pytest.raises(InputError, match=r"1 of 2 runs failed; .*dense-2-s0\.log"):
        lab.compare(runs, tmp_path, jobs=2, seconds=0.02)
    assert "holds a run with other settings" in " ".join((tmp_path / "dense-2-s0.log").read_text().split())
    assert len((tmp_path / "compare.jsonl").read_text().splitlines()) == 1


def test_a_run_with_other_settings_or_data_does_not_count_as_finished(corpus, tmp_path):
    run = lab.plan({}, COMMON | {"data": corpus}, ["dense"], [0], [4], tmp_path)[0]
    assert not run.finished
    run.folder.mkdir()
    settings = dataclasses.asdict(run.config) | {"tokens": run.config.load_data().summary["tokens"]}
    (run.folder / "config.json").write_text(json.dumps(settings))
    assert not run.finished
    (run.folder / "results.json").write_text("{}")
    assert run.finished
    for change in ({"learning_rate": 1.0}, {"tokens": {"train": 5}}):
        (run.folder / "config.json").write_text(json.dumps(settings | change))
        assert not run.finished


def record(recipe, seed, log_perplexity, tokens=100, **changes):
    fields = {
        "recipe": recipe,
        "seed": seed,
        "tokens": tokens,
        "log_perplexity": log_perplexity,
        "log_perplexity_int8": None,
        "ffn_macs_per_token": 600 if recipe == "dense" else 100,
        "ffn_bytes_per_token": 8,
        "parameters": 7,
        "training_tokens_per_second": 10.0,
        "ffn_us_per_token": 0.5,
        "ffn_engine": "some",
        "ffn_dtype": "int8",
    }
    return fields | changes


def test_the_summary_pairs_seeds_and_keeps_horizons_apart(tmp_path):
    records = [
        record("dense", 0, 3.0),
        record("dense", 1, 3.4),
        record("six", 0, 2.9, log_perplexity_int8=2.91),
        record("six", 1, 3.2),
        record("six", 2, 9.0, tokens=300),
    ]
    dense, six, longer = summarise(records)
    assert dense["difference"] is None
    assert dense["macs_ratio"] == 1
    assert dense["spread"] == pytest.approx(0.2 * 2**0.5)
    assert six["difference"] == pytest.approx(-0.15)
    assert six["int8_difference"] == pytest.approx(0.01)
    assert six["macs_ratio"] == 6
    assert longer["spread"] is longer["difference"] is longer["macs_ratio"] is None
    assert "| six | 0.0003 | 1 | 9.0000 | - | - | - | - | - | 100 | - |" in markdown(records)
    nothing = [*records, record("none", 0, 3.5, ffn_macs_per_token=0, log_perplexity_deployed=3.51, deployed_bytes=2e6)]
    (none,) = (row for row in summarise(nothing) if row["recipe"] == "none")
    assert none["macs_ratio"] is None
    assert none["deployed_difference"] == pytest.approx(0.01)
    assert "| none | 0.0001 | 1 | 3.5000 | - | +0.5000 | - | +0.0100 | 2.00 | 0 | - |" in markdown(nothing)
    plot(nothing, tmp_path / "plot.png")  # a recipe without multiply-adds, on an axis that has room for 0
    console = Console(width=80, record=True, file=io.StringIO())
    show(records, console)
    shown = console.export_text()
    assert "-0.1500" in shown
    assert "…" not in shown


def test_names_in_the_plot_are_clear_of_each_other_and_stay_inside():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    marks = [(0.5, 0.5, "first", "k"), (0.5, 0.5, "second", "k"), (0.52, 0.51, "third", "k"), (0.99, 0.5, "last", "k")]
    _name(axes, marks)
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(boxes) == {"first", "second", "third", "last"}
    together = [boxes[name] for name in ("first", "second", "third")]
    assert not any(a.overlaps(b) for i, a in enumerate(together) for b in together[:i])
    assert boxes["last"].x1 < axes.transData.transform((0.99, 0.5))[0] < axes.bbox.x1
    assert boxes["first"].x0 > axes.transData.transform((0.5, 0.5))[0]


def test_ticks_of_a_logarithmic_axis_are_few_and_plain():
    assert [_tick(value, "125") for value in (0.2, 0.3, 5, 7, 10_000, 30_000, 50_000)] == [
        *("0.2", "", "5", "", "10,000", "", "50,000")
    ]
    assert [_tick(value, "1") for value in (0.1, 0.5, 1_000_000)] == ["0.1", "", "1,000,000"]
