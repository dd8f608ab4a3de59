"""The twins from end to end, on a corpus and for steps that take seconds; its report has what scripts rely on.

What is timed takes on paper what is written here, and nothing is compiled: test_speed.py has the forms themselves.
"""

import dataclasses
import io
import itertools
import json

import pytest
from rich.console import Console

from lookupffn import native, pack
from lookupffn.errors import InputError
from lookupffn.hf import LookupRobertaForMaskedLM
from lookupffn.lab import twins as twins_module
from lookupffn.train.pretrain import datasets, evaluate, log_perplexity

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")


def time_models(encoders, batch):
    """Two forms of each model; at 512 tokens the second is the faster one."""
    assert batch.shape == (8, 64)
    timings = {"dense": [], "lookup": []}
    for what, tokens, ffn, second in itertools.product(("ffn", "model"), (1, 512), timings, (False, True)):
        us = {"dense": 8.0, "lookup": 2.0}[ffn] * (10 if what == "model" else 1) * (0.5 if second and tokens > 1 else 1)
        us += 1.0 if second and tokens == 1 else 0.0
        timings[ffn].append(
            {"what": what, "tokens": tokens, "engine": "second" if second else "first", "dtype": "float32",
             "fastest": second == (tokens > 1), "us_per_token": us, "us_per_token_low": us, "us_per_token_high": us,
             "runs": 9, "threads": 2}
        )  # fmt: skip
    return timings, [{"what": "ffn", "engine": "dense in third int8", "reason": "is not there"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(
            f"import module{i}\n" + f"def function_{i}(self, value):\n    return value\n" * 20
        )
    patch = pytest.MonkeyPatch()
    patch.setenv("LOOKUPFFN_CACHE", str(folder / "cache"))
    recipe = dataclasses.replace(
        twins_module.RECIPE,
        data=str(text),
        validation_fraction=0.2,
        model={"vocab_size": 300},
        batch_size=8,
        evaluation_sequences=16,
    )
    patch.setattr(twins_module, "RECIPE", recipe)
    patch.setattr(twins_module, "time_models", time_models)
    patch.setattr(twins_module, "CALIBRATION_SECONDS", 0.0)
    yield twins_module.twins(folder / "out", minutes=0.001, steps=None, seed=3).parent
    patch.undo()


def test_report_json_keeps_its_keys(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["tokens_trained"] == 40 * 8 * 64
    blocks = report["data"]["tokens"]["validation"] // 64
    assert blocks > 16  # on which the curve is evaluated
    assert report["tokens_evaluated"] == blocks * 19  # the whole validation set
    assert 0 < report["unigram_entropy"] < 6
    assert report["engines_left_out"] == [{"what": "ffn", "engine": "dense in third int8", "reason": "is not there"}]
    for ffn, macs in (("dense", 2 * 128 * 512), ("lookup", 32 * 8 * 4 * 8 + 32 * 3 * 128)):
        model = report["models"][ffn]
        assert model["ffn_macs_per_token"] == macs
        assert model["ffn_us_per_token"] == {"dense": 4.0, "lookup": 1.0}[ffn]
        assert model["parameters"] > model["ffn_parameters"] > 0
        assert 0 < model["log_perplexity"] < 7
        assert {(t["what"], t["tokens"]) for t in model["timings"]} == {
            (w, n) for w in ("ffn", "model") for n in (1, 512)
        }
        assert model["curve"][-1]["tokens"] == report["tokens_trained"]
    assert report["models"]["dense"]["buckets"] == []
    assert len(report["models"]["lookup"]["buckets"]) == 2
    assert len(report["fills"]) == len(twins_module.SENTENCES)


def test_quality_is_that_of_the_saved_models_on_the_whole_validation_set(folder):
    report = json.loads((folder / "report.json").read_text())
    for ffn in ("dense", "lookup"):
        settings = dataclasses.replace(twins_module.RECIPE, evaluation_sequences=0)
        _, validation = datasets(settings, settings.load_data())
        model = LookupRobertaForMaskedLM.from_pretrained(folder / ffn / "model")
        for name, value in log_perplexity(evaluate(model, validation)).items():
            assert report["models"][ffn][name] == pytest.approx(value, rel=1e-6)
    if native.available():
        expected = log_perplexity(evaluate(pack(model), validation))["log_perplexity"]
        assert report["models"]["lookup"]["packed"]["log_perplexity"] == pytest.approx(expected, rel=1e-6)


def test_the_terminal_has_the_fastest_form_of_each_model(folder):
    console = Console(width=120, record=True, file=io.StringIO())
    twins_module._print(console, json.loads((folder / "report.json").read_text()))
    shown = " ".join(console.export_text().replace("│", " ").split())
    assert "FFN µs a token, 1 token(s) 8.0 2.0 0.25 first, float32 first, float32" in shown
    assert "encoder µs a token, 512 token(s) 40.0 10.0 0.25 second, float32 second, float32" in shown
    assert "lookup FFN is 4.0 times faster than the fastest dense at 512 tokens" in shown


def test_steps_are_as_many_as_fit_into_the_minutes(monkeypatch, tmp_path):
    seen = []

    def pretrain(config, data):
        seen.append((config.ffn, config.steps, config.evaluate_every))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(twins_module, "_seconds_a_step", lambda ffn, data: {"dense": 0.02, "lookup": 0.03}[ffn])
    monkeypatch.setattr(twins_module.PretrainConfig, "load_data", lambda self: None)
    monkeypatch.setattr(twins_module, "pretrain", pretrain)
    with pytest.raises(KeyboardInterrupt):
        twins_module.twins(tmp_path, minutes=2, steps=None, seed=0)
    steps = int(120 / (twins_module.TRAINER_OVERHEAD * 0.05))
    assert seen == [(ffn, steps, 5 * (steps // 40)) for ffn in ("dense", "lookup")]


def test_the_models_differ_in_nothing_but_the_ffn(folder):
    configs = [json.loads((folder / ffn / "config.json").read_text()) for ffn in ("dense", "lookup")]
    assert [c.pop("ffn") for c in configs] == ["dense", "lookup"]
    assert configs[0] == configs[1]


def test_a_folder_that_is_not_ours_is_left_alone(folder, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no run of lookupffn"):
        twins_module.twins(tmp_path, minutes=1, steps=1, seed=0)
    assert (tmp_path / "dense" / "thesis.tex").exists()


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "<script src" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
