"""The forms in which the two models are timed: what each computes, that all take turns, and which of them is named."""

import pytest
import torch

from lookupffn import native, pack
from lookupffn.bench import engines
from lookupffn.bench.engines import DENSE_ENGINES, Engine
from lookupffn.bench.timing import Timing
from lookupffn.hf import LookupRobertaConfig, LookupRobertaModel
from lookupffn.lab import speed

# inductor's own
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@pytest.fixture
def encoders(one_thread):
    """Small models, the lookup packed."""
    made = {}
    for ffn in ("dense", "lookup"):
        options = {"num_tables": 9} if ffn == "lookup" else {}
        sizes = dict(vocab_size=97, num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=64)
        torch.manual_seed(0)
        config = LookupRobertaConfig.preset("small", ffn=ffn, ffn_options=options, **sizes)
        made[ffn] = LookupRobertaModel(config).eval()
    if native.available():
        made["lookup"] = pack(made["lookup"])
    return made


@pytest.fixture
def batch():
    return torch.randint(5, 97, (8, 64), generator=torch.Generator().manual_seed(1))


def fails(chain, x, threads):
    raise RuntimeError("no such instruction\nand more")


@torch.no_grad()
def test_every_form_computes_its_model_and_takes_its_turn(encoders, batch, monkeypatch):
    eager = tuple(engine for engine in DENSE_ENGINES if engine.package is None and not engine.compiled)
    others = (Engine("Broken", "int8", False, None, fails), Engine("Absent", "int8", False, "absent_engine", fails))
    monkeypatch.setattr(engines, "DENSE_ENGINES", eager + others)
    seen, rounds = [], []

    def torch_runner(model, inputs, *, compiled):  # what a compiler makes of it is another test's
        seen.append(compiled)
        return engines.torch_runner(model, inputs, compiled=False)

    def time_interleaved(runs, seconds, *, block, pause):
        assert seconds == speed.SECONDS_A_FORM * len(runs)
        rounds.append({form: run() for form, run in runs.items()})
        return {form: Timing(*(1e-3 * (1 + i % 3) * scale for scale in (1, 0.5, 2)), 7) for i, form in enumerate(runs)}

    monkeypatch.setattr(speed, "torch_runner", torch_runner)
    monkeypatch.setattr(speed, "time_interleaved", time_interleaved)
    timings, left_out = speed.time_models(encoders, batch)
    assert sorted(seen) == [False] * 10 + [True] * 10  # at two sizes one FFN, and two encoders in two types
    assert left_out == [
        {"what": "ffn", "engine": "dense in Broken int8", "reason": "no such instruction"},
        {"what": "ffn", "engine": "dense in Absent int8",
         "reason": "absent_engine is not installed: pip install 'lookupffn[bench]'"},
    ]  # fmt: skip

    kernels = f"lookupffn {native.implementation()}"
    ffn_forms = [("dense", "PyTorch eager", "float32"), ("dense", "PyTorch eager", "bfloat16")]
    if native.available():
        ffn_forms += [("lookup", kernels, "int8"), ("lookup", f"{kernels}, compiled", "int8")]
        packed = ", FFN int8"
    else:
        ffn_forms += [("lookup", "PyTorch eager", "float32"), ("lookup", "PyTorch compiled", "float32")]
        packed = ""
    model_forms = [
        (ffn, f"PyTorch {how}", dtype + (packed if ffn == "lookup" else ""))
        for ffn in ("dense", "lookup") for dtype in ("float32", "bfloat16") for how in ("eager", "compiled")
    ]  # fmt: skip
    assert [list(outputs) for outputs in rounds] == [ffn_forms, model_forms] * 2
    for outputs, tokens in zip(rounds, (1, 1, 512, 512), strict=True):
        ids = batch if tokens > 1 else batch[:1, :1]
        for (ffn, _, dtype), y in outputs.items():
            encoder = encoders[ffn]
            if hasattr(y, "last_hidden_state"):
                y, exact = y.last_hidden_state, encoder(ids).last_hidden_state
            else:
                exact = encoder.layers[0].ffn(speed._ffn_input(encoder, batch)[:tokens])
            bound = 0.02 if "bfloat16" in dtype else 1e-5
            assert (y.float() - exact).norm() <= bound * exact.norm()

    for ffn, of_model in timings.items():
        for what, tokens in (("ffn", 1), ("model", 1), ("ffn", 512), ("model", 512)):
            own = [t for t in of_model if (t["what"], t["tokens"]) == (what, tokens)]
            assert [(ffn, t["engine"], t["dtype"]) for t in own] == [
                form for form in (ffn_forms if what == "ffn" else model_forms) if form[0] == ffn
            ]
            (fastest,) = (t for t in own if t["fastest"])
            assert fastest["us_per_token"] == min(t["us_per_token"] for t in own)
            for t in own:
                assert round(t["us_per_token"] * tokens, 6) in (1000, 2000, 3000)
                assert (t["us_per_token_low"], t["us_per_token_high"]) == pytest.approx(
                    (t["us_per_token"] / 2, t["us_per_token"] * 2)
                )
                assert (t["runs"], t["threads"]) == (7, 1)


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the kernels were not built")
def test_both_encoders_and_ffns_compile_whole(encoders, batch, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS_A_FORM", 0.01)
    monkeypatch.setattr(engines, "DENSE_ENGINES", tuple(e for e in DENSE_ENGINES if e.package is None))
    timings, left_out = speed.time_models(encoders, batch)
    assert left_out == []
    assert {ffn: len(of_model) for ffn, of_model in timings.items()} == {"dense": 2 * (4 + 4), "lookup": 2 * (2 + 4)}
