"""The report: what its page must say, and that nothing in a report's data can break it or escape into it."""

import copy
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from lookupffn.lab.report import verdict, write_report
from lookupffn.lab.report.plots import spread_labels


def _timings(microseconds, engine, dtype):
    keys = [("ffn", 1), ("ffn", 512), ("model", 1), ("model", 512)]
    how = {"runs": 30, "dtype": dtype, "threads": 2, "engine": engine}
    return [
        {
            "what": what,
            "tokens": tokens,
            "us_per_token": us,
            "us_per_token_low": us * 0.96,
            "us_per_token_high": us * 1.11,
        }
        | how
        for (what, tokens), us in zip(keys, microseconds, strict=True)
    ]


def _curve(end, rate):
    steps = range(0, 2001, 100)
    return [{"step": s, "tokens": s * 2048, "log_perplexity": end + (7.62 - end) * math.exp(-s / rate)} for s in steps]


def _buckets():
    quantiles = [
        (0.05, 0.31, 0.72, 1.30, 2.6),
        (0.04, 0.28, 0.66, 1.19, 2.3),
        (0.06, 0.33, 0.81, 1.42, 2.9),
        (0.05, 0.30, 0.70, 1.3, 2.4),
    ]
    return [
        {
            "layer": layer,
            "buckets_used": used,
            "code_entropy": entropy,
            "dead_bits": dead,
            "bits": 512,
            "margin_quantiles": dict(zip(("0.05", "0.25", "0.5", "0.75", "0.95"), q, strict=True)),
        }
        for layer, (used, entropy, dead, q) in enumerate(
            zip((0.83, 0.91, 0.88, 0.71), (0.91, 0.93, 0.90, 0.82), (0, 0, 0, 3), quantiles, strict=True)
        )
    ]


def _report():
    shared = {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 2048,
    }
    dense = {
        "ffn": "dense",
        "config": {**shared, "ffn": "dense"},
        "log_perplexity": 3.2104,
        "log_perplexity_standard_error": 0.0291,
        "parameters": 13_684_224,
        "ffn_parameters": 8_398_848,
        "ffn_macs_per_token": 2_097_152,
        "model_macs_per_token": 12_615_680,
        "ffn_bytes_per_token": 8_398_848,
        "model_bytes_per_token": 50_462_720,
        "ffn_us_per_token": 17.31,
        "timings": [
            *_timings((121.4, 19.95, 1391.2, 120.3), "PyTorch eager", "float32"),
            *_timings((150.2, 17.31, 1500.4, 96.7), "PyTorch compiled", "bfloat16"),
        ],
        "training_seconds": 214.6,
        "curve": _curve(3.24, 420),
        "buckets": [],
    }
    lookup = {
        "ffn": "lookup",
        "config": {
            **shared,
            "ffn": "lookup",
            "num_tables": 64,
            "code_bits": 8,
            "reads": 2,
            "projection": "bh4",
            "block_size": 64,
            "decay": 0.7,
        },
        "log_perplexity": 3.3251,
        "log_perplexity_standard_error": 0.0302,
        "parameters": 39_378_432,
        "ffn_parameters": 34_093_056,
        "ffn_macs_per_token": 163_840,
        "model_macs_per_token": 4_882_432,
        "ffn_bytes_per_token": 786_432,
        "model_bytes_per_token": 20_013_056,
        "ffn_us_per_token": 39.84,
        "timings": _timings((309.5, 39.84, 2140.8, 187.9), "lookupffn avx512_vnni", "int8"),
        "training_seconds": 371.2,
        "curve": _curve(3.35, 450),
        "buckets": _buckets(),
    }
    guesses = {
        "dense": [
            {"token": " os", "probability": 0.41},
            {"token": " sys", "probability": 0.22},
            {"token": " re", "probability": 0.061},
        ],
        "lookup": [
            {"token": " sys", "probability": 0.33},
            {"token": " os", "probability": 0.29},
            {"token": "\n", "probability": 0.08},
        ],
    }
    return {
        "format_version": 2,
        "created": "2026-11-20T23:40:00Z",
        "command": "lookupffn demo",
        "seed": 0,
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor @ 2.50GHz",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16_647_192_576,
            "os": "Linux 6.1 x86_64",
            "device": "cpu",
            "versions": {
                "python": "3.11.7",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "lookupffn": "0.1.0",
            },
        },
        "data": {
            "source": "stdlib",
            "documents": {"train": 812, "validation": 43},
            "tokens": {"train": 3_011_840, "validation": 150_208},
            "vocab_size": 2048,
            "block_size": 64,
            "skipped": {"not UTF-8": 1},
            "skipped_examples": ["/usr/lib/python3.11/lib2to3/tests/data/bom.py"],
        },
        "training": {
            "steps": 2000,
            "batch_size": 32,
            "learning_rate": 0.002,
            "table_learning_rate_multiplier": 3.0,
            "mask_probability": 0.15,
            "warmup_steps": 200,
            "betas": [0.9, 0.98],
            "weight_decay": 0.01,
        },
        "tokens_trained": 4_096_000,
        "tokens_evaluated": 9011,
        "unigram_entropy": 5.913,
        "models": {"dense": dense, "lookup": lookup},
        "engines_left_out": [
            {"what": what, "engine": f"dense in OpenVINO {dtype}", "reason": "openvino is missing"}
            for what, dtype in (("ffn", "float32"), ("ffn", "bfloat16"), ("model", "float32"))
        ],
        "fills": [
            {"text": "import <mask>\nfrom collections import deque\n", **guesses},
            {
                "text": "    def __init__(self, <mask>=0):\n        self.name = name\n",
                **copy.deepcopy(guesses),
            },
            {
                "text": "Return a string which is the concatenation of the <mask> in iterable.",
                **copy.deepcopy(guesses),
            },
        ],
    }


@pytest.fixture
def report():
    return _report()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return _html(_report(), tmp_path_factory.mktemp("page"))


def _html(report, folder):
    return write_report(report, folder).read_text(encoding="utf-8")


def _text(html):
    """What a reader sees: no styles, no markup."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S).split())


def test_json_is_the_same_dict(report, tmp_path):
    assert write_report(report, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "report.html"
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8")) == _report()


def test_page_is_self_contained(page):
    assert not re.search(r"https?:|//\w+\.|@import|<script|<link|<iframe|\ssrc=", page)
    assert set(re.findall(r"href=[\"'](.)", page)) == {"#"}
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_ids_are_unique_and_references_resolve(page):
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) > 100
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]*)', page))
    assert references
    assert references <= set(ids)


def test_figures_follow_the_theme(page):
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(figures) == 2 + 4 + 2  # curves wide and narrow, times, buckets
    for svg in figures:
        assert not re.search(r"#[0-9a-f]{6}\b|rgb\(|font-family", svg)
        assert {"var(--muted)", "var(--lookup)"} <= set(re.findall(r"var\(--\w+\)", svg))
    for svg in figures[:6]:
        assert "var(--dense)" in svg
        assert "<text" in svg  # words stay words: searchable, in the page's font


@pytest.mark.parametrize(
    "number",
    [
        "log perplexity, nats 3.210 ± 0.029 3.325 ± 0.030 0.115 worse",
        "perplexity 24.8 27.8 1.12× higher",
        "Quality on 9,011 evaluated tokens",
        "one FFN at 1 token 121 117–135 310 297–344 2.5× slower",
        "one FFN at 512 tokens 17.3 16.6–19.2 39.8 38.2–44.2 2.3× slower",
        "whole model at 1 token 1,391 1,336–1,544 2,141 2,055–2,376 1.5× slower",
        "whole model at 512 tokens 96.7 92.8–107 188 180–209 1.9× slower",
        "one FFN 2,097,152 163,840 12.8× fewer",
        "whole model 12,615,680 4,882,432 2.6× fewer",
        "one FFN 8.01 MiB 768 KiB 10.7× fewer",
        "whole model 48.1 MiB 19.1 MiB 2.5× fewer",
        "all FFNs 8,398,848 34,093,056 4.1× more",
        "whole model 13,684,224 39,378,432 2.9× more",
        "wall time 3 min 35 s 6 min 11 s 1.7× longer",
        "unigram entropy 5.91",
        "FFN at 1 token PyTorch eager, float32; lookupffn avx512_vnni, int8; 2 threads",
        "FFN at 512 tokens PyTorch compiled, bfloat16; lookupffn avx512_vnni, int8; 2 threads",
        "dense PyTorch eager float32 121 19.9 dense PyTorch compiled bfloat16 150 17.3",
        "lookup lookupffn avx512_vnni int8 310 39.8",
        "dense PyTorch compiled bfloat16 1,500 96.7 lookup lookupffn avx512_vnni int8 2,141 188",
        "Left out: dense in OpenVINO float32, dense in OpenVINO bfloat16 (openvino is missing).",
        "3 71 % 82 % 3 of 512 0.70",
        "␣os 41 % ␣sys 22 %",
        "lookupffn demo , seed 0, 2026-11-20T23:40:00Z",
        "table learning rate multiplier 3",
        "memory 15.5 GiB",
        "not UTF-8: 1 /usr/lib/python3.11/lib2to3/tests/data/bom.py",
    ],
)
def test_page_shows(page, number):
    assert number in _text(page)


def test_the_fastest_form_of_each_model_is_bold(page):
    assert re.findall(r"<strong>(.*?)</strong>", page) == [
        *("121", "17.3", "310", "39.8"),  # one FFN
        *("1,391", "96.7", "2,141", "188"),  # the whole model
    ]


def test_page_opens_with_the_verdict(page):
    for sentence in verdict(_report()):
        assert sentence in _text(page)


@pytest.mark.parametrize(
    ("ours", "word"), [(3.6, "0.390 nats worse than dense"), (2.9, "0.310 nats better than dense")]
)
def test_verdict_on_quality(report, ours, word):
    report["models"]["lookup"]["log_perplexity"] = ours
    first = verdict(report)[0]
    assert word in first
    assert "9,011 evaluated tokens" in first
    assert "no clear difference" not in first


def test_verdict_calls_noise_noise(report):
    report["models"]["lookup"]["log_perplexity"] = 3.2504
    assert "0.040 nats worse" in verdict(report)[0]
    assert "less than two standard errors (0.084): no clear difference" in verdict(report)[0]


@pytest.mark.parametrize("end", [5.9, 5.93])
def test_verdict_names_a_model_that_learned_nothing(report, end):
    report["models"]["lookup"]["log_perplexity"] = end
    text = "Not below the unigram entropy of 5.91 nats: lookup." if end > 5.913 else "Both models end below"
    assert verdict(report)[1].startswith(text)


@pytest.mark.parametrize(
    (
        "what",
        "at_1",
        "at_512",
        "says",
    ),  # microseconds a token; dense takes 121.4 and 17.31, its model 1391.2 and 96.7
    [
        (
            "ffn",
            60.7,
            39.84,
            "lookup FFN is 2.3 times slower than the fastest dense at 512 tokens and 2.0 times faster at 1 token "
            "(dense, the fastest of 2: PyTorch compiled, bfloat16 at 512 tokens and PyTorch eager, float32 at 1 token; "
            "lookup: lookupffn avx512_vnni, int8; 2 threads).",
        ),
        (
            "ffn",
            364.2,
            3.0,
            "lookup FFN is 5.8 times faster than the fastest dense at 512 tokens and 3.0 times slower at 1 token (",
        ),
        (
            "model",
            1391.2,
            967.0,
            "lookup model is 10.0 times slower than the fastest dense at 512 tokens and as fast as the fastest dense "
            "at 1 token (",
        ),
        (
            "model",
            math.nan,
            90.0,
            "lookup model is 1.07 times faster than the fastest dense at 512 tokens and not measured at 1 token (",
        ),
    ],
)
def test_verdict_on_speed(report, what, at_1, at_512, says):
    for timing in report["models"]["lookup"]["timings"]:
        if timing["what"] == what:
            timing["us_per_token"] = at_1 if timing["tokens"] == 1 else at_512
    assert any(says in sentence for sentence in verdict(report))


def test_verdict_on_size(report):
    report["models"]["lookup"]["ffn_macs_per_token"] = 2 * 2_097_152
    sentences = verdict(report)
    assert "Multiply-adds a token: 2.0 times more in the FFN, 2.6 times fewer in the whole model." in sentences
    assert "Memory for weights: 4.1 times more in the FFN, 2.9 times more in the whole model." in sentences


def test_hostile_text_stays_text(report, tmp_path):
    evil = "</pre><script>alert('$\\frac')</script>\"onload=\"x\udc80"
    report["fills"][0]["text"] = f"{evil}<mask>{evil}"
    report["fills"][0]["dense"][0]["token"] = evil
    report["machine"]["cpu"] = report["command"] = report["data"]["source"] = evil
    report["data"]["skipped"] = {evil: 1}
    report["data"]["skipped_examples"] = [evil]
    report["models"]["dense"]["config"][evil] = evil
    for timing in report["models"]["lookup"]["timings"]:
        timing["engine"] = evil
    report["engines_left_out"][0]["reason"] = evil
    html = _html(report, tmp_path)
    assert "<script" not in html
    assert 'onload="' not in html
    assert html.count("&lt;/pre&gt;&lt;script&gt;") >= 10
    assert html.count("<mark>mask</mark>") == 3
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_same_dict_same_bytes(page, report, tmp_path):
    assert _html(report, tmp_path) == page


def _without_numbers(value, number):
    if isinstance(value, dict):
        return {key: _without_numbers(entry, number) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_numbers(entry, number) for entry in value]
    return number if isinstance(value, float) else value


@pytest.mark.parametrize("number", [math.nan, math.inf, None])
def test_numbers_that_are_none(report, tmp_path, number):
    html = _html(_without_numbers(report, number), tmp_path)
    text = _text(html)
    assert text.count("not measured") > 20
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert re.search(r"Learning curves: not measured", text)
    strict = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert strict["models"]["lookup"]["log_perplexity"] is None


def test_one_bad_number_hides_no_other(report, tmp_path):
    report["models"]["lookup"]["curve"][3]["log_perplexity"] = math.nan
    slower, fastest = (t for t in report["models"]["dense"]["timings"] if (t["what"], t["tokens"]) == ("ffn", 512))
    fastest["us_per_token"] = math.inf
    html = _html(report, tmp_path)
    assert len(re.findall("<svg", html)) == 8
    assert "FFN at 512 tokens 19.9 19.2–22.1 39.8 38.2–44.2 2.0× slower" in _text(html)
    slower["us_per_token"] = math.nan
    html = _html(report, tmp_path)
    assert len(re.findall("<svg", html)) == 8
    assert "FFN at 512 tokens not measured 19.2–22.1 39.8 38.2–44.2 not measured" in _text(html)


def test_nothing_measured(report, tmp_path):
    report["fills"], report["data"]["skipped"], report["data"]["skipped_examples"] = [], {}, []
    for model in report["models"].values():
        model["curve"], model["timings"], model["buckets"] = [], [], []
    html = _html(report, tmp_path)
    assert "<svg" not in html
    assert "Learning curves: not measured." in html
    assert "Use of the hash buckets: not measured." in html


def test_a_failed_report_leaves_the_old_one(report, tmp_path):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report["seed"] = 1
    report["training"]["callback"] = {"object": object()}  # no JSON
    with pytest.raises(TypeError):
        write_report(report, tmp_path)
    del report["fills"]
    with pytest.raises(Exception, match="fills"):
        write_report(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"report.html", "report.json"}


def test_a_missing_library_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'lookupffn\[lab\]'"):
        write_report(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_labels_beside_axes_are_apart_and_none_is_above_them():
    axes = Figure().subplots()
    axes.set_ylim(0, 100)
    spread_labels(SimpleNamespace(axes=axes, height=150), [(100, "used", "k"), (96, "entropy", "k"), (20, "low", "k")])
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights == pytest.approx({"used": 1.0, "entropy": 0.9, "low": 0.2})
