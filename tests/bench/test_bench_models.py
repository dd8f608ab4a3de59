"""``lookupffn bench --model``: engines and shapes that it takes, what it counts, and that engines compute the same."""

import json
import logging
import os

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel
from typer.testing import CliRunner

from lookupffn import native
from lookupffn.__main__ import app
from lookupffn.bench import dense_models, encoders, models
from lookupffn.bench.dense_models import ENGINES, Built, Engine, Source
from lookupffn.bench.footprint import footprint
from lookupffn.errors import InputError
from lookupffn.runtime.families import graph_of

needs_native = pytest.mark.skipif(not native.available(), reason="the kernels were not built")
WIDTH, HEADS, FFN, LAYERS, POSITIONS = 64, 2, 128, 2, 80


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN, vocab_size=100,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


# ---- What is asked for -----------------------------------------------------------------------------------------------


def test_shapes_are_texts_x_tokens_or_ragged():
    assert [models.parse_shape(text) for text in ("8x32", "ragged")] == [(8, 32), "ragged"]
    for text in ("8", "8x", "0x4", "8x-1", "ax3", "1x2x3"):
        with pytest.raises(InputError, match="texts x tokens"):
            models.parse_shape(text)


def test_engines_are_chosen_by_the_beginning_of_their_names_in_their_order():
    assert models.chosen([]) == models.engine_names()
    assert models.chosen(["openvino", "lookupffn int8"]) == [
        "lookupffn int8", "OpenVINO float32", "OpenVINO bfloat16", "OpenVINO int8"
    ]  # fmt: skip
    assert models.chosen(["onnx runtime int8"]) == ["ONNX Runtime int8"]  # not the one per channel
    with pytest.raises(InputError, match=r"no engine 'tvm'; there are: lookupffn int8; "):
        models.chosen(["tvm"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=minilm", "--shape=8"], "a shape is texts x tokens, as 8x32, or ragged, not '8'"),
        (["--model=minilm", "--engine=tvm"], "there is no engine 'tvm'; there are: "),
        (["--engine=OpenVINO"], "--engine is for a whole encoder: give --model as well"),
        (["--shape=1x8"], "--shape is for a whole encoder: give --model as well"),
    ],
)
def test_the_command_refuses_before_anything_is_built(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_texts_longer_than_the_model_takes_are_refused(tiny):
    with pytest.raises(InputError, match=r"shape 1 x 81 has texts of 81 tokens, tiny takes 80"):
        next(models.bench_model("tiny", tiny, 1, 0.01, shapes=[(1, 81)]))


# ---- What is counted -------------------------------------------------------------------------------------------------


def test_flops_are_two_a_multiply_add_of_linears_attention_and_ffn(tiny):
    linears, ffn = 4 * WIDTH**2, 2 * WIDTH * FFN
    for lengths, attended in (([5, 5], 5), ([2, 6], (4 + 36) / 8)):
        expected = 2 * LAYERS * (linears + ffn + 2 * attended * WIDTH)
        assert encoders.flops_per_token(graph_of(tiny), np.array(lengths)) == expected


def test_a_projection_of_embeddings_is_counted_and_shared_layers_share_their_lookup(tiny):
    sizes = tiny.config.to_dict() | {"embedding_size": 24, "model_type": "albert"}
    graph = graph_of(AlbertModel(AlbertConfig(**sizes)))
    added = encoders.flops_per_token(graph, np.array([5])) - encoders.flops_per_token(graph_of(tiny), np.array([5]))
    assert added == 2 * 24 * WIDTH
    first, second = encoders.with_lookups(graph, seed=0).layers
    assert first is second


@pytest.mark.parametrize(("name", "tables", "factor"), [("minilm", 64, 5.76), ("bert-base", 128, 8.47)])
def test_named_shapes_and_their_lookups(name, tables, factor, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no folder of the name is
    layers, *shape = encoders.SHAPES[name]
    monkeypatch.setitem(encoders.SHAPES, name, (1, *shape))
    graph = graph_of(encoders.encoder(name, seed=0))
    assert (len(graph.words), graph.width, graph.heads, graph.layers[0].ffn.up.out_features) == (30522, *shape)
    lookup = encoders.with_lookups(graph, seed=0)
    assert lookup.layers[0].ffn.config.num_tables == tables
    assert encoders.ffn_flops(graph) / encoders.ffn_flops(lookup) == pytest.approx(factor, abs=0.01)
    assert layers == {"minilm": 6, "bert-base": 12}[name]


# ---- Runs ------------------------------------------------------------------------------------------------------------


def fails(source):
    raise RuntimeError("no such instruction\nand more about it")


def later(source):
    return Built(lambda ids, mask: fails(source), None)


@needs_native
def test_records_of_a_run(tiny, monkeypatch, one_thread):
    eager = ENGINES[0]
    others = (Engine("Broken", (), fails), Engine("Absent", ("absent_engine",), fails), Engine("Late", (), later))
    monkeypatch.setattr(dense_models, "ENGINES", (eager, *others))
    monkeypatch.setattr(models, "FOOTPRINT", (2, 512))
    told = []
    shapes = [(2, 8), "ragged"]
    records = list(models.bench_model("tiny", tiny, 1, 0.01, shapes=shapes, progress=told.append))
    runs, (footprints, left_out) = records[:-2], records[-2:]
    engines = [*models.OWN, *models.LOOKUPS, eager.name]
    assert [(r["shape"], r["engine"]) for r in runs] == [(s, e) for s in ("2 x 8", "ragged") for e in engines]
    for r in runs:
        assert r["what"] == "model"
        assert 0 < r["spread"][0] <= r["us_per_token"] <= r["spread"][1]
        assert r["bytes"] > 0
        assert ("ffn_flops" in r) == (r["engine"] in models.LOOKUPS)
    dense, lookup = (next(r["flops_per_token"] for r in runs if r["engine"] == e) for e in (eager.name, engines[2]))
    ffn = runs[2]["ffn_flops"]
    assert dense - lookup == ffn["dense"] - ffn["lookup"]
    assert footprints.items() >= {"what": "footprint", "engine": "lookupffn int8", "shape": "2 x 80"}.items()
    assert footprints["open_seconds"] > 0
    assert left_out["engines"] == dense_models.NO_ENGINE | {
        "Broken": "no such instruction",
        "Absent": "absent_engine not installed",
        "Late": "no such instruction (2 x 8)",
    }
    assert {"building lookupffn int8", "2 x 8: first call of PyTorch float32", "ragged: timing"} <= set(told)
    assert json.loads(json.dumps(records)) == records


def test_an_engine_that_takes_too_long_is_left_out(tiny, monkeypatch, one_thread):
    monkeypatch.setattr(models, "TOO_SLOW", 0)
    left_out = {}
    source, ids = Source(tiny, None, 1, 0), np.ones((1, 4), np.int64)
    built = {"PyTorch float32": ENGINES[0].build(source)}
    models._first_calls(built, source, ids, ids, "1 x 4", left_out, lambda text: None)
    assert built == {}
    assert left_out == {"PyTorch float32": "more than 0 times as long as PyTorch float32 (1 x 4)"}


@needs_native
def test_the_command_prints_a_table_and_keeps_records(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(encoders.SHAPES, "minilm", (1, WIDTH, HEADS, FFN))
    monkeypatch.setattr(models, "FOOTPRINT", (2, 8))
    arguments = ["--model=minilm", "--engine=lookupffn int8", "--engine=pytorch float32", "--shape=1x4"]
    monkeypatch.setattr(dense_models, "ENGINES", ENGINES[:1])
    done = CliRunner().invoke(
        app, ["bench", *arguments, "--seconds=0.01", "--json=found.jsonl"], env={"COLUMNS": "120"}
    )
    assert done.exit_code == 0, done.output
    assert "minilm, 1 thread(s): microseconds a token" in done.output
    assert "lookupffn int8, 2 x 8: memory beside the file of" in done.output
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {r["what"] for r in found} == {"model", "footprint", "left out"}


@needs_native
def test_without_proc_memory_is_not_known(tiny, tmp_path, monkeypatch):
    from lookupffn.bench import footprint as module
    from lookupffn.runtime.export import export

    found = footprint(export(tiny, tmp_path / "packed"), (4, 16), 1)
    assert found.keys() == {"resident_bytes", "open_seconds"}
    monkeypatch.setattr(module, "_anonymous", lambda: None)
    assert module._measure(tmp_path / "packed", 2, 4, 1)["resident_bytes"] is None
    with pytest.raises(RuntimeError, match=r"the process that measures memory failed: .*holds no"):
        footprint(tmp_path / "absent", (4, 16), 1)


def _error(engine, tiny, folder):
    """Relative to float32, on texts of two lengths in two shapes."""
    source, errors = Source(tiny, folder, 1, 0), []
    built = engine.build(source)
    for shape in ((1, 5), (3, 7)):
        lengths = np.full(*shape)
        lengths[-1] -= 2
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        ids = np.random.default_rng(0).integers(1, 100, shape) * mask
        torch._dynamo.reset()
        expected, found = (run(ids, mask) for run in (dense_models.torch_run(source.hidden), built.run))
        found = found.float() if torch.is_tensor(found) else torch.from_numpy(np.array(found))
        counted = torch.from_numpy(mask) > 0
        errors.append(float((found - expected)[counted].norm() / expected[counted].norm()))
    return max(errors), built.bytes


def _error_at_hand(engine, tiny, folder):
    if engine.missing:
        pytest.skip(f"not installed: {engine.missing}")
    try:
        return _error(engine, tiny, folder)
    except RuntimeError as refused:
        if "this CPU" not in str(refused):
            raise
        pytest.skip(str(refused))


@pytest.mark.filterwarnings("ignore")  # of the engines' libraries
@pytest.mark.parametrize("engine", [e for e in ENGINES if "compiled" not in e.name], ids=lambda e: e.name)
def test_an_engine_computes_what_the_model_does_and_leaves_settings_alone(engine, tiny, tmp_path, one_thread):
    level, telemetry = logging.getLogger().level, os.environ.get("NNCF_CI")
    error, stored = _error_at_hand(engine, tiny, tmp_path)
    assert error < (0.1 if "int8" in engine.name else 0.02 if "bfloat16" in engine.name else 1e-5)
    assert stored is None or stored > 0
    assert (logging.getLogger().level, os.environ.get("NNCF_CI")) == (level, telemetry)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", [e for e in ENGINES if "compiled" in e.name], ids=lambda e: e.name)
def test_a_compiled_engine_computes_what_the_model_does(engine, tiny, tmp_path, one_thread):
    error, stored = _error_at_hand(engine, tiny, tmp_path)
    assert error < (0.1 if "int8" in engine.name else 0.02 if "bfloat16" in engine.name else 1e-5)
    assert stored > 0
