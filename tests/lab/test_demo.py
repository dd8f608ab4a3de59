"""The demo from end to end, on a corpus and for steps that take seconds; its report has what scripts rely on."""

import dataclasses
import itertools
import json

import pytest

from lookupffn.bench.timing import time_interleaved
from lookupffn.errors import InputError
from lookupffn.lab import demo as demo_module

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")


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
        demo_module.RECIPE,
        data=str(text),
        validation_fraction=0.2,
        model={"vocab_size": 300},
        evaluation_sequences=16,
    )
    patch.setattr(demo_module, "RECIPE", recipe)
    patch.setattr(demo_module, "SECONDS_A_TIMING", 0.05)
    patch.setattr(demo_module, "CALIBRATION_SECONDS", 0.0)
    yield demo_module.demo(folder / "out", minutes=0.001, steps=None, seed=3).parent
    patch.undo()


def test_report_json_keeps_its_keys(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["tokens_trained"] == 40 * 32 * 64
    assert report["tokens_evaluated"] == 16 * 19
    assert 0 < report["unigram_entropy"] < 6
    for ffn, macs in (("dense", 2 * 128 * 512), ("lookup", 32 * 8 * 4 * 8 + 32 * 3 * 128)):
        model = report["models"][ffn]
        assert model["ffn_macs_per_token"] == macs
        assert model["ffn_us_per_token"] > 0
        assert model["parameters"] > model["ffn_parameters"] > 0
        assert 0 < model["log_perplexity"] < 7
        assert {(t["what"], t["tokens"]) for t in model["timings"]} == {
            (w, n) for w in ("ffn", "model") for n in (1, 512)
        }
        assert model["curve"][-1]["tokens"] == report["tokens_trained"]
    assert report["models"]["dense"]["cells"] == []
    assert len(report["models"]["lookup"]["cells"]) == 2
    assert len(report["fills"]) == len(demo_module.SENTENCES)


def test_twins_differ_in_nothing_but_the_ffn(folder):
    configs = [json.loads((folder / ffn / "config.json").read_text()) for ffn in ("dense", "lookup")]
    assert [c.pop("ffn") for c in configs] == ["dense", "lookup"]
    assert configs[0] == configs[1]


def test_a_folder_that_is_not_ours_is_left_alone(folder, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no run of lookupffn"):
        demo_module.demo(tmp_path, minutes=1, steps=1, seed=0)
    assert (tmp_path / "dense" / "thesis.tex").exists()


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "<script src" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_timing_takes_turns_and_finds_the_slower():
    calls = []
    timings = time_interleaved(
        {"slow": lambda: (calls.append("s"), sum(range(20000))), "fast": lambda: calls.append("f")},
        seconds=0.1,
    )
    assert timings["slow"].median > timings["fast"].median > 0
    assert timings["slow"].low <= timings["slow"].median <= timings["slow"].high
    assert timings["slow"].runs == timings["fast"].runs >= 5
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    assert switches >= 2 * timings["slow"].runs - 1
