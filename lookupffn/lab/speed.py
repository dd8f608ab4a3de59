"""The FFNs and the encoders of two models in every engine at hand, all in turn in one process; the fastest is named.

A form is an engine and the types that it computes in: a model is as fast as the fastest of its forms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lookupffn import native
from lookupffn.bench.engines import Run, dense_runs, first_line, torch_runner
from lookupffn.bench.timing import time_interleaved
from lookupffn.hf import LookupRobertaModel
from lookupffn.runtime.packed import PackedLookupFFN

TIMED_TOKENS = (1, 512)
SECONDS_A_FORM = 0.75  # at each size
BLOCK_SECONDS, PAUSE_SECONDS = 20e-3, 1e-3  # as the benchmark has them, lest one engine's threads disturb another's
Form = tuple[str, str, str]  # model, engine, dtype


@torch.no_grad()
def time_models(encoders: dict[str, LookupRobertaModel], batch: Tensor) -> tuple[dict[str, list[dict]], list[dict]]:
    """What one FFN and the encoder of both models take at each size of TIMED_TOKENS, and what was left out and why.

    ``encoders`` are "dense" and "lookup", the latter packed where there are kernels; ``batch`` is of 512 tokens. An FFN
    is timed on the activations that it meets in its trained model, layer 0; an encoder on ``batch``, or on a sequence
    of one token. Of a model's forms the one with the least median is marked ``fastest``.
    """
    inputs = {ffn: _ffn_input(encoder, batch) for ffn, encoder in encoders.items()}  # (512, D)
    timings: dict[str, list[dict]] = {ffn: [] for ffn in encoders}
    missing: dict[tuple[str, str], str] = {}
    for tokens in TIMED_TOKENS:
        forms = {
            "ffn": _ffns(encoders, {ffn: x[:tokens].contiguous() for ffn, x in inputs.items()}),
            "model": _encoders(encoders, batch if tokens > 1 else batch[:1, :1]),
        }
        for what, (runs, left_out) in forms.items():
            missing |= {(what, label): reason for label, reason in left_out.items()}
            times = time_interleaved(runs, SECONDS_A_FORM * len(runs), block=BLOCK_SECONDS, pause=PAUSE_SECONDS)
            for ffn, of_model in timings.items():
                own = {form: t for form, t in times.items() if form[0] == ffn}
                fastest = min(own, key=lambda form: own[form].median)
                for form, t in own.items():
                    scale = 1e6 / tokens
                    of_model.append(
                        {
                            "what": what,
                            "tokens": tokens,
                            "engine": form[1],
                            "dtype": form[2],
                            "fastest": form == fastest,
                            "us_per_token": t.median * scale,
                            "us_per_token_low": t.low * scale,
                            "us_per_token_high": t.high * scale,
                            "runs": t.runs,
                            "threads": torch.get_num_threads(),
                        }
                    )
    return timings, [{"what": what, "engine": label, "reason": why} for (what, label), why in missing.items()]


def _ffns(encoders: dict[str, LookupRobertaModel], inputs: dict[str, Tensor]) -> tuple[dict[Form, Run], dict[str, str]]:
    """The dense FFN in every engine of the benchmark, the lookup's eager and compiled; and what is left out."""
    dense, lookup = (encoders[ffn].layers[0].ffn for ffn in ("dense", "lookup"))
    chain = nn.Sequential(dense.up, nn.GELU(), dense.down)
    found, failed = dense_runs(chain, inputs["dense"], torch.get_num_threads())
    runs: dict[Form, Run] = {("dense", _name(e.name, e.compiled), e.dtype): run for e, run in found.items()}
    left_out = {f"dense in {_name(e.name, e.compiled)} {e.dtype}": reason for e, reason in failed.items()}
    packed = isinstance(lookup, PackedLookupFFN)
    for compiled in (False, True):
        name = _name("PyTorch", compiled)
        engine = f"lookupffn {native.implementation()}{', compiled' if compiled else ''}" if packed else name
        form = "lookup", engine, lookup.table_dtype if packed else "float32"
        _add(runs, left_out, form, partial(torch_runner, lookup, [inputs["lookup"]], compiled=compiled))
    return runs, left_out


def _encoders(encoders: dict[str, LookupRobertaModel], ids: Tensor) -> tuple[dict[Form, Run], dict[str, str]]:
    """Both encoders in PyTorch, eager and compiled, in float32 and bfloat16; and what is left out."""
    runs: dict[Form, Run] = {}
    left_out: dict[str, str] = {}
    for ffn, encoder in encoders.items():
        layer = encoder.layers[0].ffn
        packed = f", FFN {layer.table_dtype}" if isinstance(layer, PackedLookupFFN) else ""
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(encoder).to(dtype)
            for compiled in (False, True):
                form = ffn, _name("PyTorch", compiled), str(dtype).removeprefix("torch.") + packed
                _add(runs, left_out, form, partial(torch_runner, model, [ids], compiled=compiled))
    return runs, left_out


def _name(engine: str, compiled: bool) -> str:
    eager = " eager" if engine in ("PyTorch", "torchao") else ""
    return f"{engine} compiled" if compiled else engine + eager


def _add(runs: dict[Form, Run], left_out: dict[str, str], form: Form, build: Callable[[], Run]) -> None:
    try:
        runs[form] = build()
    except Exception as error:  # no compiler, or no such type here: the others are timed all the same
        left_out["{} in {} {}".format(*form)] = first_line(error)


def _ffn_input(encoder: LookupRobertaModel, batch: Tensor) -> Tensor:
    seen = []
    hook = encoder.layers[0].ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    encoder(batch)
    hook.remove()
    return seen[0]
