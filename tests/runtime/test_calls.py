"""How the compiled kernels are called: numbers that are none, arguments, other processes, no kernels at all."""

import ctypes
import math
import os

import pytest
import torch
from native_cases import (
    F64,
    IMPLEMENTATIONS,
    assert_within,
    call,
    every_implementation,
    every_pair,
    expected,
    packed_layer,
    run_python,
    trained,
)

from lookupffn import LookupConfig, PackedLookupFFN, native, pack, reference
from lookupffn.runtime.format import TABLE_TYPES, WEIGHT_TYPES, _assemble, _deinterleave, decode, encode, read_header
from lookupffn.runtime.portable import packed_project
from lookupffn.runtime.tuning import Tiling

pytestmark = [
    pytest.mark.skipif(os.environ.get("LOOKUPFFN_NATIVE") == "0", reason="LOOKUPFFN_NATIVE=0"),
    pytest.mark.usefixtures("one_thread"),
]


# ---- NaN, infinity, denormals, the processor's flags -----------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("tables", TABLE_TYPES)
@pytest.mark.parametrize("projection", [*WEIGHT_TYPES, "none"])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_a_bad_number_stays_in_its_token_and_is_seen_there(projection, tables, reads, isa):
    kind = "none" if projection == "none" else "bh4"
    config = LookupConfig(48, 20, 12, 4, kind, block_size=16, reads=reads)
    packed = encode(trained(config), tables, "float32" if kind == "none" else projection)
    clean = torch.randn(30, 48)
    expected = call(packed, clean, isa)
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        for position in (0, 23, 47):
            x = clean.clone()
            x[7, position] = bad
            y = call(packed, x, isa)
            others = [i for i in range(30) if i != 7]
            assert torch.equal(y[others], expected[others])
            if not math.isfinite(bad):
                assert not y[7].isfinite().any()
                if tables == "int8" or projection in ("int8", "int16") or math.isnan(bad):
                    assert y[7].isnan().all()


@every_implementation
@every_pair
def test_denormal_numbers_count_as_zeros(tables, projection, isa):
    config = LookupConfig(48, 20, 12, 4, block_size=16)
    layer = trained(config)
    with torch.no_grad():
        layer.tables[:, :, ::2] *= 1e-40
        layer.projection.weight[:, 1, 0] *= 1e-40
        layer.projection.bias.fill_(1e-41)
    packed = encode(layer, tables, projection)
    for scale in (1.0, 1e-25, 1e-40):
        x = torch.randn(9, 48) * scale
        y = call(packed, x, isa)
        z = packed_project(decode(packed), x)
        z = z.where(z.abs() > 1e-37, 0.0)
        if projection == "float32":
            z = reference.bh4(x.double(), layer.projection.weight.detach().double(), 0.7, 48).float()
        exact, bound = expected(decode(packed), z)
        assert y.isfinite().all()
        if projection != "float32":
            assert_within(y, exact, bound + 1e-30)
        elif scale < 1:
            assert (y - layer.bias.detach()).abs().max() < 1e-20
        else:  # at this seed no number is so near to zero that rounding decides its bit
            assert z.abs().min() > 1e-5 * z.abs().max()
            assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    token = torch.full((1, 48), 1e-40)
    assert torch.equal(call(packed, token, isa), call(packed, torch.zeros(1, 48), isa))


@every_implementation
@pytest.mark.parametrize("tokens", [1, 9])
def test_scores_that_are_denormal_are_flushed_to_zero(tokens, isa):
    """z of 2e-38 is a normal number, its score of 8 bits, 8 z / 2^8, is none."""
    layer = trained(LookupConfig(24, 20, 3, 8, "none"))
    with torch.no_grad():
        layer.bias.zero_()
    y = call(encode(layer, "float32", "float32"), torch.full((tokens, 24), 2e-38), isa)
    assert torch.equal(y, torch.zeros(tokens, 20))


def denormals_live():
    """Whether products that are denormal come out as such, on torch's other threads too."""
    return bool(((torch.full((200_000,), 1e-30) * 1e-10) > 0).all())


@every_implementation
@pytest.mark.parametrize("serial_tokens", [0, 1000])
def test_the_callers_floating_point_flags_are_left_as_found(isa, serial_tokens):
    packed = encode(trained(LookupConfig(48, 20, 12, 4, block_size=16)))
    x = torch.randn(100, 48)
    tiling = Tiling(serial_tokens=serial_tokens)
    torch.set_num_threads(2)
    before = call(packed, x, isa, tiling)
    assert denormals_live()
    if torch.set_flush_denormal(True):
        try:
            assert torch.equal(call(packed, x, isa, tiling), before)
            assert torch.tensor(1e-30) * torch.tensor(1e-10) == 0
        finally:
            torch.set_flush_denormal(False)
    assert denormals_live()


@every_implementation
def test_rounding_is_to_nearest_inside_and_the_callers_outside(isa):
    libm = ctypes.CDLL(None)
    packed, x = encode(trained(LookupConfig(48, 20, 12, 4, block_size=16))), torch.randn(20, 48)
    tiling = Tiling(serial_tokens=1000)
    expected, upward = call(packed, x, isa, tiling), {"x86_64": 0x800, "aarch64": 0x400000}.get(os.uname().machine)
    if upward is None:
        pytest.skip("no number for FE_UPWARD on this processor")
    before = libm.fegetround()
    assert libm.fesetround(upward) == 0
    try:
        got, after = call(packed, x, isa, tiling), libm.fegetround()
    finally:
        libm.fesetround(before)
    assert after == upward
    assert torch.equal(got, expected)


# ---- Arguments -------------------------------------------------------------------------------------------------------

CONFIG = LookupConfig(20, 5, 9, 4, block_size=4)


@every_pair
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0), (2, 3, 4), (1, 1, 1, 1)])
def test_any_leading_shape(shape, tables, projection):
    module = packed_layer(CONFIG, tables, projection)
    x = torch.randn(*shape, 20)
    y = module(x)
    assert y.shape == (*shape, 5)
    assert y.dtype == torch.float32
    assert torch.equal(y.reshape(-1, 5), call(module.packed, x.reshape(-1, 20)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_other_floating_point_inputs_pass_through_float32(dtype):
    module = packed_layer(CONFIG)
    x = torch.randn(30, 20).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert torch.equal(y, module(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_inputs_that_are_no_real_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        packed_layer(CONFIG)(torch.ones(3, 20).to(dtype))


def test_layouts_of_memory_change_nothing():
    module = packed_layer(CONFIG)
    x = torch.randn(6, 4, 20)
    y = module(x)
    assert torch.equal(module(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(module(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)), y)
    assert torch.equal(module(x[::2, 1:]), y[::2, 1:])
    assert torch.equal(module(x[:1, :1].expand(6, 4, 20)), y[:1, :1].expand(6, 4, 5))
    assert torch.equal(module(x[..., :1].expand(6, 4, 20)), module(x[..., :1].expand(6, 4, 20).contiguous()))
    complex_ = torch.complex(x, -x)
    assert torch.equal(module(complex_.conj().imag), y)  # a lazy minus sign
    assert torch.equal(module(x.flip(0)), y.flip(0))
    one = packed_layer(LookupConfig(1, 5, 9, 4, "dense"))
    column = torch.randn(6, 20)[:, 3:4]
    assert torch.equal(one(column), one(column.contiguous()))


def test_packed_bytes_may_be_misaligned():
    packed = encode(trained(CONFIG))
    x = torch.randn(30, 20)
    storage = packed.new_empty(len(packed) + 64)
    for shift in (1, 4, 33):
        assert torch.equal(call(storage[shift : shift + len(packed)].copy_(packed), x), call(packed, x))


def test_the_layer_names_what_does_not_fit():
    module = packed_layer(CONFIG)
    for shape in ((3, 19), (20, 3), (3, 21), (3, 0), ()):
        with pytest.raises(ValueError, match=r"in_features = 20; x is \["):
            module(torch.zeros(shape))
    assert module(torch.empty(3, 20, device="meta")).shape == (3, 5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.zeros(3, 20).to_sparse())


def test_a_layer_on_another_device_is_refused():
    module = packed_layer(CONFIG).to("meta")
    with pytest.raises(RuntimeError, match=r"(?i)device|meta"):
        module(torch.zeros(3, 20))
    assert module(torch.empty(3, 20, device="meta")).is_meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.tensor(0.0)), r"x must be \(..., features\) in float32 or bfloat16, not \(\)"),
        (dict(x=torch.zeros(3, 20, dtype=F64)), "float32 or bfloat16"),
        (dict(x=torch.zeros(3, 20, dtype=torch.float16)), "float32 or bfloat16"),
        (dict(x=torch.zeros(3, 20, dtype=torch.int32)), "float32 or bfloat16"),
        (dict(x=torch.zeros(3, 21)), r"x \(3, 21\) must have the layer's in_features, 20"),
        (dict(packed=torch.zeros(4000)), "packed must be a contiguous vector of bytes"),
        (dict(packed=torch.zeros(2, 99, dtype=torch.uint8)), r"contiguous vector of bytes on the CPU, not \(2, 99\)"),
        (dict(packed=torch.zeros(4000, dtype=torch.uint8)[::2]), "contiguous vector of bytes"),
        (dict(packed=torch.zeros(3, dtype=torch.uint8)), "3 bytes, fewer than its header"),
        (dict(packed=torch.zeros(4000, dtype=torch.uint8)), "does not begin with LOOKUPFF"),
        (dict(out_features=6), "out_features is 6, the packed layer's 5"),
        (dict(out_features=-1), "out_features is -1"),
        (dict(tile_tokens=0), "must be positive.* not negative"),
        (dict(groups_per_block=-(2**40)), "must be positive.* not negative"),
        (dict(prefetch_distance=-1), "must be positive.* not negative"),
        (dict(serial_tokens=-1), "must be positive.* not negative"),
        (dict(isa="mmx"), "no implementation 'mmx'; this build has .*scalar"),
    ],
)
def test_the_operator_names_what_does_not_fit(changes, message):
    given = dict(x=torch.zeros(3, 20), packed=encode(trained(CONFIG)), out_features=5, tile_tokens=24,
                 groups_per_block=1, prefetch_distance=0, serial_tokens=0, isa="")  # fmt: skip
    arguments = (given | changes).values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lookupffn.packed_forward_isa(*arguments)
    if "isa" not in changes:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lookupffn.packed_forward(*list(arguments)[:-1])


def test_bytes_are_opened_anew_where_others_lie_at_the_same_place():
    """A layer is parsed when its bytes are first seen; here a buffer holds one layer after the other."""
    layers = [
        encode(trained(LookupConfig(20, 5, 9, 4, block_size=4), seed)) if same else encode(trained(config))
        for seed, (same, config) in enumerate(
            [(True, None), (True, None), (False, LookupConfig(20, 5, 9, 4, block_size=4, reads=2))]
        )
    ]
    x = torch.randn(3, 20)
    expected = [call(layer, x) for layer in layers]
    assert not torch.equal(expected[0], expected[1])
    size = max(layer.numel() for layer in layers)
    buffer = torch.empty(size, dtype=torch.uint8)
    for turn in (0, 2, 1, 0, 0, 2):
        there = buffer[: layers[turn].numel()].copy_(layers[turn])
        assert torch.equal(call(there, x), expected[turn]), turn
    there.zero_()
    with pytest.raises(RuntimeError, match="does not begin with LOOKUPFF"):
        torch.ops.lookupffn.packed_forward(x, there, 5, 12, 1, 128, 4)
    there = buffer[: layers[0].numel()].copy_(layers[0])
    assert torch.equal(call(there, x), expected[0])
    levels = read_header(there)["offset"]["levels"]
    there[levels : levels + 4].view(torch.float32).fill_(128)  # the header is as it was
    with pytest.raises(RuntimeError, match="activation level 128"):
        torch.ops.lookupffn.packed_forward(x, there, 5, 12, 1, 128, 4)


def test_more_layers_than_a_thread_remembers_take_turns():
    layers = [encode(trained(LookupConfig(20, 5, 3, 4, block_size=4), seed)) for seed in range(200)]
    x = torch.randn(2, 20)
    first = [call(layer, x) for layer in layers]
    assert all(torch.equal(call(layer, x), y) for layer, y in zip(layers, first, strict=True))


def test_tiling_numbers_may_be_as_large_as_they_come():
    packed, x = encode(trained(CONFIG)), torch.randn(30, 20)
    huge = Tiling(2**62, 2**62, 2**62, 2**62)
    assert torch.equal(call(packed, x, "", huge), call(packed, x))


@pytest.mark.slow  # 6 GB of memory
def test_tables_of_more_than_two_to_the_31_numbers():
    T, K, E, scale = 520, 2**16, 64, 0.01  # 2.03 GiB of int8
    fields = dict(
        in_features=16 * T, out_features=E, num_tables=T, code_bits=16, reads=1, stages=0, repeats=1, blocks=1
    )
    fields |= dict(block_in=0, block_out=0, scale=1.0, residual=0.0, weight_type=0, table_rows=K, slice=64)
    tables = torch.zeros(1, T, K, E, dtype=torch.int8)
    tables[0, -1, -1] = torch.arange(E)  # the last row of all
    scales = torch.zeros(528)
    scales[T - 1] = scale
    sections = {"tables": tables, "table_scales": scales, "bias": torch.zeros(E)}
    packed = _assemble(fields | {"table_type": TABLE_TYPES["int8"]}, sections)
    x = torch.full((3, 16 * T), 0.5)  # every code is that of the last row
    m = torch.full((16,), 0.5, dtype=F64)
    score = m.sum() / (1 + torch.exp(-2 * m)).prod()
    expected = (score * scale * _deinterleave(torch.arange(E, dtype=torch.int8)[None])[0].double()).expand(3, E)
    torch.testing.assert_close(call(packed, x).double(), expected, rtol=1e-5, atol=1e-6)


# ---- Processes -------------------------------------------------------------------------------------------------------


FORK = """
import os, sys, time, torch
from lookupffn import LookupConfig, LookupFFN, pack

def in_child(work):  # the child's exit status, or None where it has not ended in time
    pid = os.fork()
    if not pid:
        status = 9
        try:
            status = work()
        finally:
            os._exit(status)
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""


def test_a_forked_child_computes_the_same_and_never_hangs():
    code = (
        FORK
        + """
torch.set_num_threads(2)
module = pack(LookupFFN(LookupConfig(64, 70, 40, 5, block_size=16)))
x = torch.randn(300, 64)
y = module(x)  # torch's threads run now, and a child will not have them
for threads in (1, 2, None):
    def work():
        if threads:
            torch.set_num_threads(threads)
        return 0 if torch.equal(module(x), y) and torch.equal(module(x[:1]), y[:1]) else 1
    print(in_child(work))
assert torch.equal(module(x), y)
"""
    )
    assert run_python(code).stdout.split() == ["0", "0", "0"]


def test_each_implementation_can_be_forced_and_says_so():
    """LOOKUPFFN_ISA is read once a process, so one process forks before it is read."""
    names = [*(i["name"] for i in native.implementations()), ""]
    code = (
        FORK
        + f"""
torch.set_num_threads(1)
from lookupffn import native
from lookupffn import PackedLookupFFN
torch.manual_seed(0)
layer = LookupFFN(LookupConfig(64, 70, 40, 5, block_size=16))
native.load()
x, results = torch.randn(9, 64), {{}}
for name in {names}:
    read, write = os.pipe()
    def work():
        os.environ["LOOKUPFFN_ISA"] = name
        module = pack(layer)
        bits = module(x).view(torch.int32).long().sum().item()
        os.write(write, f"{{native.implementation()}} {{bits}}".encode())
        return 0
    print(name or "none", in_child(work), end=" ", flush=True)
    os.close(write)
    print(os.read(read, 1000).decode(), flush=True)
"""
    )
    lines = [line.split() for line in run_python(code).stdout.splitlines()]
    assert [line[0] for line in lines] == [*names[:-1], "none"]
    assert lines[-1][1:3] == ["0", IMPLEMENTATIONS[0]]  # the best one, where none is forced
    for line in lines[:-1]:
        if line[0] in IMPLEMENTATIONS:
            assert line[1:3] == ["0", line[0]]
        else:
            assert line[1] == "9"  # it cannot run here, and said so
    assert len({line[3] for line in lines if len(line) > 3}) == 1  # the same bits


def test_an_unknown_implementation_is_an_error_that_names_the_known_ones():
    code = """
from lookupffn import LookupConfig, LookupFFN, native, pack
for attempt in (native.implementation, lambda: pack(LookupFFN(LookupConfig(64, 5))),
                lambda: pack(LookupFFN(LookupConfig(64, 5)))):
    try:
        attempt()
    except RuntimeError as error:
        print(error)
"""
    lines = run_python(code, LOOKUPFFN_ISA="pentium").stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("LOOKUPFFN_ISA: there is no implementation 'pentium'; this build has ")
        assert ", ".join(i["name"] for i in native.implementations()) in line


def test_without_the_kernels_everything_works_says_so_once_and_agrees(tmp_path):
    config = LookupConfig(64, 70, 40, 5, block_size=16, reads=2)
    layer = trained(config)
    x = torch.randn(40, 64)
    torch.save({"layer": layer.state_dict(), "x": x}, tmp_path / "in.pt")
    code = f"""
import torch, warnings
from lookupffn import LookupConfig, LookupFFN, native, pack
from lookupffn.runtime.tuning import timed_tiling
warnings.simplefilter("always")
saved = torch.load({str(tmp_path / "in.pt")!r})
layer = LookupFFN({config})
layer.load_state_dict(saved["layer"])
assert not native.available() and native.implementation() == "torch" and native.implementations() == []
out = dict()
with warnings.catch_warnings(record=True) as said:
    for tables in {list(TABLE_TYPES)}:
        out[tables] = pack(layer, tables)(saved["x"])
assert len(said) == 1, [str(w.message) for w in said]
x = saved["x"].requires_grad_()
try:
    pack(layer)(x).sum().backward()
except RuntimeError as error:
    assert "no backward pass" in str(error), error
else:
    raise AssertionError("a gradient came out")
other = pack(LookupFFN(layer.config))
other.load_state_dict(pack(layer).state_dict())
assert torch.equal(other(saved["x"]), out["int8"])
torch.save(out, {str(tmp_path / "out.pt")!r})
print(said[0].message)
"""
    said = run_python(code, LOOKUPFFN_NATIVE="0").stdout
    assert "without its compiled kernels" in said
    assert "LOOKUPFFN_NATIVE=0" in said
    for tables, y in torch.load(tmp_path / "out.pt").items():
        module = pack(layer, tables)
        u = decode(module.packed)
        if tables != "float32":  # the projection's integers are the same bits on both paths
            exact, bound = expected(u, packed_project(u, x))
            assert_within(y, exact, bound)
            assert_within(module(x), exact, bound)
        else:
            # float32 sums differ in their last bits from machine to machine, run to run: only codes away from a
            # boundary are the same on both paths.
            z = packed_project(u, x).view(40, 40, 5).abs().sort(-1).values
            safe = (torch.minimum(z[..., 0], z[..., 1] - z[..., 0]) > 1e-4).all(1)
            assert safe.sum() >= 30
            # To the size of what is summed: torch's first call in a process was seen 3e-5 of it off its later ones.
            bound = 1e-4 * y.abs().max().item()
            torch.testing.assert_close(module(x)[safe], y[safe], rtol=0, atol=bound)


def test_a_packed_layer_is_what_it_says():
    module = packed_layer(CONFIG, "bfloat16", "int16")
    assert isinstance(module, PackedLookupFFN)
    assert "tables=bfloat16, projection=int16" in repr(module)
    assert (module.table_dtype, module.weight_dtype) == ("bfloat16", "int16")
