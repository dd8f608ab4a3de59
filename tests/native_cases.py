"""Layers, inputs and expectations that the tests of the compiled kernels share."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from lookupffn import LookupConfig, LookupFFN, native, ops, pack, reference
from lookupffn.runtime.format import TABLE_TYPES, WEIGHT_TYPES, read_header
from lookupffn.runtime.tuning import Tiling

F64 = torch.float64
EPS = 2.0**-24
EXAMPLES = int(os.environ.get("LOOKUPFFN_TEST_EXAMPLES", "0"))  # of all property tests together; 0: a short run
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97, 128, 130, 200]
IMPLEMENTATIONS = [i["name"] for i in native.implementations() if i["runs_here"]]
PAIRS = [
    ("int4", "int8"),
    ("int8", "int8"),
    ("bfloat16", "int16"),
    ("float32", "float32"),
]  # tables, projection: what pack chooses

every_implementation = pytest.mark.parametrize("isa", IMPLEMENTATIONS)
every_pair = pytest.mark.parametrize(("tables", "projection"), PAIRS)


def examples(share, short):
    """Settings of a property test that takes ``share`` of a long run, or ``short`` examples, always the same ones."""
    count = math.ceil(EXAMPLES * share) if EXAMPLES else short
    return settings(max_examples=count, deadline=None, derandomize=not EXAMPLES, database=None)


def run_python(code, timeout=120, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done


def call(packed, x, isa="", tiling=None):
    t = tiling or Tiling()
    out_features = read_header(packed)["out_features"]
    return torch.ops.lookupffn.packed_forward_isa(
        x, packed, out_features, t.tile_tokens, t.groups_per_block, t.prefetch_distance, t.serial_tokens, isa
    )


@torch.no_grad()
def trained(config, seed=0):
    """A layer with biases, tables of different sizes, and a row, an output and a table of zeros."""
    torch.manual_seed(seed)
    layer = LookupFFN(config)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    layer.tables.mul_(10 ** torch.empty(config.num_tables, 1, 1).uniform_(-1, 1))
    layer.tables[0, 0] = 0
    if config.num_tables > 3:
        layer.tables[2] = 0
    if config.projection == "dense":
        layer.projection.weight[-1] = 0
    return layer


def packed_layer(config, tables="int8", projection="int8"):
    layer = trained(config)
    return pack(layer, tables, projection=projection)


# ---- What must come out ----------------------------------------------------------------------------------------------


def expected(u, z, bfloat16=False):
    """``(y, bound)``, float64: a packed layer's output for ``z``, and how far rounding alone may take one from it.

    Codes are those of ``ops.hash_codes``, which compares and adds the same float32 numbers as the kernels. A score is
    ``inner * p``; ``inner`` is exact to tau roundings of ``sum |z|``, ``p`` to six a bit and those of exp. A score that
    lies that near to the middle between two integer steps may become either of them.
    """
    h = u.header
    tables, tau = h["num_tables"], h["code_bits"]
    z = z.view(-1, tables, tau)
    codes, _ = ops.hash_codes(z, h["reads"])  # (B, T, N)
    bits = codes[..., None].long() >> torch.arange(tau - 1, -1, -1) & 1
    signed = z.double()[:, :, None] * (bits * 2 - 1)  # (B, T, N, tau)
    total = z.double().abs().sum(-1, keepdim=True)
    probability = torch.sigmoid(2 * signed).prod(-1)
    scores, cost = signed.sum(-1) * probability, (total - signed.sum(-1)) / 2
    error = EPS * (6 * tau + 10 + 5 * cost) * probability * total + 3e-38 * total
    rows, bias = u.tables.double()[:, : 2**tau], u.bias.double()
    if u.table_scales is None:
        y = reference.gather(rows, codes, scores)
        size = reference.gather(rows.abs(), codes, scores.abs() + error)
        bound = reference.gather(rows.abs(), codes, error) + (tables * h["reads"] + 2) * EPS * size
    else:
        scales = u.table_scales.double()[:, None]
        scores, error = scores * scales, error * scales + EPS * scores.abs() * scales
        largest = scores.abs().amax((1, 2), keepdim=True)
        inverse_scale = (127 / largest).where(largest > 1e-30, 0)
        drift = (error.amax((1, 2), keepdim=True) / largest).where(largest > 1e-30, 0) + 4 * EPS  # of the scale
        value = scores.abs() * inverse_scale
        margin = error * inverse_scale + value * drift
        low, high, scale = (value - margin).clamp(min=0).round(), (value + margin).round(), largest[:, 0] / 127
        scale = scale.where(largest[:, 0] > 1e-30, 0)
        y = reference.gather(rows, codes, value.round() * scores.sign()) * scale
        bound = reference.gather(rows.abs(), codes, high - low + value.round() * drift) * scale
    y, bound = y + bias, bound + 2 * EPS * (y.abs() + bias.abs())
    return y, bound + (2.0**-8 * (y.abs() + bound) if bfloat16 else 0)


def assert_within(got, y, bound):
    wrong = ~((got.double() - y).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} outputs, first at {wrong.nonzero()[0].tolist()}"


# ---- Layers and inputs -----------------------------------------------------------------------------------------------


@st.composite
def configs(draw, projections=("bh4", "dense", "none")):
    tau = draw(st.integers(1, 16))
    num_tables = min(draw(st.sampled_from(SIZES)), max(1, 2**13 >> tau), 97)
    out = min(draw(st.sampled_from(SIZES)), 200 if num_tables << tau <= 2**12 else 33)  # some megabytes at most
    projection = draw(st.sampled_from(projections))
    width = num_tables * tau if projection == "none" else draw(st.one_of(st.sampled_from(SIZES), st.integers(1, 256)))
    block = 1 << draw(st.integers(0, reference.next_power_of_two(width).bit_length() - 1))
    reads = draw(st.integers(1, min(4, 2**tau)))
    decay = draw(st.sampled_from([0.0, 0.5, 0.7, 1.0]))
    block = block if projection == "bh4" else 64
    return LookupConfig(width, out, num_tables, tau, projection, block, decay, reads)


@st.composite
def inputs(draw, layouts=("rows", "misaligned", "wide", "columns", "every other", "one row")):
    return (
        draw(st.sampled_from([1, 2, 3, 5, 8, 15, 17, 24, 25, 33])),
        draw(st.sampled_from(layouts)),
        draw(st.booleans()),
    )


def make_input(tokens, layout, bfloat16, width, seed):
    """``x (tokens, width)`` in a layout of memory, sizes 0.1 to 10 a token, and one token of zeros."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=random) * 10 ** (torch.rand(tokens, 1, generator=random) * 2 - 1)
    if tokens > 4:
        x[3] = 0
    x = x.to(torch.bfloat16 if bfloat16 else torch.float32)
    if layout == "misaligned":
        storage = x.new_empty(tokens * width + 1)[1:].view(tokens, width)
    elif layout == "wide":
        storage = x.new_full((tokens, width + 3), math.nan)[:, 2 : width + 2]
    elif layout == "columns":
        storage = x.new_empty(width, tokens).T
    elif layout == "every other":
        storage = x.new_full((tokens * 2, width * 2), math.nan)[::2, 1::2]
    elif layout == "one row":
        return x[:1].expand(tokens, -1)
    else:
        return x
    return storage.copy_(x)


tilings = st.builds(
    Tiling,
    tile_tokens=st.sampled_from([1, 2, 5, 24, 96, 1000]),
    groups_per_block=st.sampled_from([1, 2, 3, 1 << 20]),
    prefetch_distance=st.sampled_from([0, 1, 17, 128, 100_000]),
    serial_tokens=st.sampled_from([0, 4]),
)
types = st.tuples(st.sampled_from(list(TABLE_TYPES)), st.sampled_from(list(WEIGHT_TYPES)))
seeds = st.integers(0, 2**32 - 1)
