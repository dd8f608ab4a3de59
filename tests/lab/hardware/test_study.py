"""Advice, sweeps and the study's page, and the commands that lead to them."""

import dataclasses
import itertools
import json
import math
import os
import re
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lookupffn import LookupFFN, native
from lookupffn.__main__ import app, main
from lookupffn.lab.hardware import advice, counting, options, study
from lookupffn.lab.hardware.case import Case
from lookupffn.lab.hardware.described import FEATURES, describe, descriptions
from lookupffn.lab.hardware.model import predict, tuned
from lookupffn.lab.report.study import write_study
from lookupffn.layer import LookupConfig
from lookupffn.runtime.format import encode

pytestmark = pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0")

GENOA = describe(descriptions()["genoa-x"])


# ---- Advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "inner", "layers", "mib", "fewer"), [(128, 512, 2, 64, 6), (320, 1000, 3, 40, 12.5)])
def test_options_keep_to_the_limits_and_the_best_comes_first(width, inner, layers, mib, fewer):
    found = advice.advise(width, inner, layers, mib * 2**20, GENOA, fewer=fewer, dtypes=("int8", "float32"))
    assert found.dense_macs == 2 * width * inner
    for option in found.options:
        c = option.config
        assert option.macs * fewer <= found.dense_macs
        assert option.memory_bytes <= mib * 2**20
        assert c.num_tables % 16 == 0
        assert option.macs == LookupFFN(c, device="meta").flops(1) // 2
        assert c.num_tables >= width / 8
        assert set(option.ns) == {1, 64, 4096}
    first, *others = found.options
    rows = [advice.capacity(o.config) for o in others]
    assert rows == sorted(rows, reverse=True)
    most = max(rows[0], advice.capacity(first.config))
    assert advice.capacity(first.config) == first.config.num_tables * first.config.num_rows * first.config.reads
    equals = [o for o in found.options if advice.capacity(o.config) >= 0.75 * most]
    assert math.prod(first.ns.values()) == min(math.prod(o.ns.values()) for o in equals)
    assert {o.dtype for o in found.options} == {"int8", "float32"}


def test_memory_buys_rows():
    little, much = (advice.advise(384, 1536, 6, mib * 2**20, GENOA).options for mib in (64, 1024))
    assert max(map(advice.capacity, (o.config for o in much))) > 8 * max(
        map(advice.capacity, (o.config for o in little))
    )
    assert much[0].config.code_bits > little[0].config.code_bits


def test_an_option_has_no_table_more_to_give():
    found = advice.advise(128, 512, 2, 512 * 2**20, GENOA)
    assert {o.config.code_bits for o in found.options} == set(advice.CODE_BITS)
    for option in found.options:
        more = dataclasses.replace(option.config, num_tables=option.config.num_tables + 16)
        macs = LookupFFN(more, device="meta").flops(1) // 2
        assert macs * 6 > found.dense_macs, "memory is ample here"


def test_memory_of_an_option_is_about_that_of_packed_layers():
    option = advice.advise(128, 512, 2, 64 * 2**20, GENOA).options[0]
    packed = 2 * encode(LookupFFN(option.config), option.dtype).numel()
    assert option.memory_bytes == pytest.approx(packed, rel=0.01)  # header, scales and biases are left out


def test_what_does_not_fit_is_refused_with_the_least_that_would():
    with pytest.raises(ValueError, match=r"fits 1\.0 MiB in 12 layers: the smallest has 106,496 and takes 54\.8 MiB"):
        advice.advise(768, 3072, 12, 2**20, GENOA)


def test_the_recipe_is_that_of_the_quality_study():
    assert study.recipe(128) == LookupConfig(128, 128, num_tables=32, code_bits=8, reads=3, block_size=8)


def test_passes_are_those_that_are_predicted_to_be_fastest():
    case = Case(study.recipe(768), tokens=4096, layers=12)
    best = tuned(case, GENOA)
    assert best.tiling.groups_per_block < 18, "all tables' slices do not fit into L2"
    assert predict(best, GENOA).ns <= predict(case, GENOA).ns
    assert dataclasses.replace(best, tiling=case.tiling) == case


# ---- Study -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    return list(study.study({"genoa-x": GENOA, "haswell": describe(descriptions()["haswell"])}))


def test_sweeps_compare_with_the_fastest_dense(records):
    sweeps = [r for r in records if r["what"] == "sweep"]
    assert {r["over"] for r in sweeps} == {"width", "tables", "tokens"}
    for r in sweeps:
        assert r["times_faster"] == pytest.approx(min(r["dense_us"].values()) / r["lookup_us"])
        assert ("bfloat16" in r["dense_us"]) == (r["machine"] == "genoa-x"), "a Haswell has no such product"
    tables = [r["lookup_us"] for r in sweeps if r["over"] == "tables" and r["machine"] == "haswell"]
    assert len(tables) >= 3
    assert tables == sorted(tables)


def test_a_figure_as_it_is_changes_nothing_and_a_better_one_never_costs_time(records):
    for name, d in descriptions().items():
        config = study.recipe(study.WIDTH)
        plain = study._recipe_ns(config, study.TOKENS, describe(d)) / 1e3
        for figure in study.SWEEPS:
            times = {r["value"]: r["lookup_us"] for r in records if r.get("figure") == figure and r["machine"] == name}
            if not times:
                assert len(d["caches"]) < 3, "what has an L3 has its sweeps"
                continue
            if study.SWEEPS[figure][1]:
                assert times[1] == pytest.approx(plain)
            in_order = [times[value] for value in sorted(times, reverse="latency" in figure)]
            assert all(better <= worse * (1 + 1e-9) for worse, better in itertools.pairwise(in_order))


def test_features_are_ranked(records):
    features = [r for r in records if r["what"] == "feature"]
    assert {r["feature"] for r in features} == set(FEATURES)
    gains = [r["times_faster"] for r in features]
    assert gains == sorted(gains, reverse=True)
    assert all(r["least"] <= r["times_faster"] <= r["most"] for r in features)


def test_the_page_has_every_machine_and_loads_nothing(records, tmp_path):
    more = [
        {"what": "prediction", "predicted_us": 1.1, "measured_us": 1.0},
        {"what": "summary", "of": "inference", "cases": 1, "median_error": 0.1, "largest_error": 0.1},
        {"what": "time", "rung": "plain & slow", "tokens": 64, "us_per_token": 14.4},
        {"what": "count", "rung": "plain & slow", "instructions_per_token": 1234.0},
        {"what": "simulation", "order": "table", "tokens": 9, "entropy": 8, "lines_per_token": 5.0,
         "misses_per_token": [4.0]},
    ]  # fmt: skip
    names = {"genoa-x": "<script>alert(1)</script>", "haswell": "old"}
    page = write_study([*records, *more], tmp_path, names, "command").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert page.count("<svg") == 5 + 1 + 1 + len(study.SWEEPS)
    assert "Inference: median error 10 %" in " ".join(page.split())
    assert "plain &amp; slow" in page
    assert "1,234" in page


def test_a_page_without_measurements_says_so(records, tmp_path):
    page = write_study(records, tmp_path, {}, "command").read_text()
    assert "Not measured: <code>lookupffn hardware validate</code>" in page
    assert "ladder" not in page


# ---- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lookupffn", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def test_predict_writes_what_it_prints(tmp_path):
    file = tmp_path / "lines" / "predict.jsonl"
    shape = ["--hidden-size", "128", "--num-tables", "32", "--tokens", "1", "--tokens", "64", "--json", str(file)]
    result = CliRunner().invoke(app, ["hardware", "predict", "--machine", "haswell", *shape])
    assert result.exit_code == 0
    assert "no such product" in result.output
    one, many = (json.loads(line) for line in file.read_text().splitlines())
    assert (one["tokens"], many["tokens"]) == (1, 64)
    assert one["predicted_us"] == pytest.approx(sum(one["predicted_stages_us"].values()))
    assert set(one["dense_us"]) == {"float32", "int8"}


def test_count_writes_what_predict_takes_where_nothing_can_be_counted(tmp_path, monkeypatch, refused):
    file = tmp_path / "operations.jsonl"
    shape = ["--hidden-size", "128", "--num-tables", "32", "--tokens", "1", "--tokens", "64"]
    counted = CliRunner().invoke(app, ["hardware", "count", *shape, "--json", str(file)])
    assert counted.exit_code == 0
    assert "rows" in counted.output
    predict = ["hardware", "predict", "--machine", "haswell", *shape]
    expected = CliRunner().invoke(app, predict).output
    monkeypatch.setattr(counting, "_known", {})
    monkeypatch.setattr(native, "load", lambda name="kernels": "it was not built")
    assert "it was not built. Where it is there, `lookupffn hardware count --json FILE`" in refused(*predict)
    assert CliRunner().invoke(app, [*predict, "--operations", str(file)]).output == expected
    file.write_text('{"what": "operations"}\n')
    assert "a record of counted operations is damaged" in refused(*predict, "--operations", str(file))


def test_simulate_counts_what_can_be_counted_by_hand(tmp_path):
    """One token, whole rows: 4 rows of 64 bytes, codes and scores in a line each, bias and output in 4 each."""
    file = tmp_path / "simulate.jsonl"
    shape = ["--hidden-size", "64", "--num-tables", "4", "--code-bits", "3", "--tokens", "1", "--caches", "32/8"]
    assert CliRunner().invoke(app, ["hardware", "simulate", *shape, "--json", str(file)]).exit_code == 0
    by_order = {r["order"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert by_order["token"]["misses_per_token"] == by_order["table"]["misses_per_token"] == [4 + 1 + 1 + 4 + 4]


def test_advise_for_a_described_machine_says_that_it_was_not_measured():
    result = CliRunner().invoke(app, ["advise", "--machine", "graviton4", "--hidden-size", "128", "--layers", "2"])
    assert result.exit_code == 0
    assert "Not measured for this shape" in " ".join(result.output.split())


def test_quick_advice_probes_nothing_and_says_what_decides(monkeypatch):
    monkeypatch.setattr("lookupffn.lab.hardware.options.probed", None)
    result = CliRunner().invoke(app, ["advise", "--quick", "--hidden-size", "128", "--layers", "2"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "First comes the one that reads the fewest bytes a token" in words
    assert "Not measured for this shape" in words
    first, *others = advice.advise(128, 512, 2, 2**30, None).options
    assert first.ns == {}
    equals = [o for o in others if advice.capacity(o.config) >= advice.ABOUT * advice.capacity(others[0].config)]
    assert all(advice.row_bytes(first) <= advice.row_bytes(other) for other in equals)


def test_a_probe_is_kept_for_this_machine_until_another_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOOKUPFFN_CACHE", str(tmp_path / "cache"))
    probes = []
    monkeypatch.setattr(options, "probed", lambda progress: probes.append(progress("part")) or {"number": len(probes)})
    console = Console(soft_wrap=True)
    assert options.kept_probe(console) == {"number": 1}
    told = capsys.readouterr()
    assert "probing this machine in three passes, about" in told.err  # though it is no terminal
    assert "part" in told.err
    assert options.kept_probe(console) == {"number": 1}
    assert "kept in" in capsys.readouterr().out
    assert options.kept_probe(console, refresh=True) == {"number": 2}
    monkeypatch.setattr(options.machine, "cpu_name", lambda: "another")
    assert options.kept_probe(console) == {"number": 3}
    (tmp_path / "cache" / "probe.json").write_text("{torn")
    assert options.kept_probe(console) == {"number": 4}
    monkeypatch.setenv("LOOKUPFFN_CACHE", "/proc/lookupffn")
    assert options.kept_probe(console) == {"number": 5}
    assert "the probe is not kept: /proc/lookupffn cannot be written" in capsys.readouterr().out


def test_what_is_wrong_is_named(refused, tmp_path):
    assert "machine 'cray' is neither" in refused("hardware", "predict", "--machine", "cray")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert "is no record of `lookupffn hardware probe`" in refused("hardware", "predict", "--machine", str(wrong))
    assert "tokens must be positive, not 0" in refused("advise", "--machine", "haswell", "--tokens", "0")
    assert "dtype 'int4' is none of" in refused("advise", "--machine", "haswell", "--dtype", "int4")
    assert "--caches takes KiB/ways, as 32/8, not '32K'" in refused("hardware", "simulate", "--caches", "32K")
    assert "entropy must be 0 to 8" in refused("hardware", "simulate", "--entropy", "9")
    assert "num_tables" in refused("hardware", "predict", "--machine", "haswell", "--num-tables", "0")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"other": 1}\n')
    assert "each line must be a record with `what` it is" in refused("hardware", "study", "--lines", str(lines))
