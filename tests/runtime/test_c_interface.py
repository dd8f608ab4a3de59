"""The C interface: a program that uses it, and single layers by ctypes."""

import ctypes as c
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lookupffn import LookupConfig, LookupFFN, Session, export, native, pack, save_packed
from lookupffn.runtime.session import MODEL_FILE, library

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)


@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="needs a C compiler")
def test_a_c_program_gives_the_same_numbers(tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 2}
    folder = export(BertModel(BertConfig(vocab_size=211, **sizes)), tmp_path / "fast")
    root = Path(__file__).parents[2]
    libraries = Path(sysconfig.get_path("platlib")) / "lookupffn"
    program = tmp_path / "hidden"
    command = [
        "cc",
        "-Wall",
        "-Werror",
        root / "examples" / "hidden.c",
        "-I",
        root / "csrc" / "include",
        "-L",
        libraries,
    ]
    subprocess.run([*command, "-llookupffn_runtime", f"-Wl,-rpath,{libraries}", "-o", program], check=True)
    ids = [5, 17, 200, 3]
    printed = subprocess.run([program, folder / MODEL_FILE, *map(str, ids)], check=True, capture_output=True, text=True)
    found = np.array([[float(x) for x in line.split(": ")[1].split()] for line in printed.stdout.splitlines()])
    np.testing.assert_allclose(found, Session(folder)(np.array([ids]))[0, :, :3], rtol=0, atol=1e-6)
    wrong = subprocess.run([program, folder / MODEL_FILE, "9999"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "token 0 has id 9999" in wrong.stderr


def layers():
    torch.manual_seed(0)
    shapes = ((40, 24), (24, 70), (70, 70))
    made = [LookupFFN(LookupConfig(i, o, num_tables=20, reads=2, block_size=16)) for i, o in shapes]
    for layer in made:
        nn.init.normal_(layer.tables)
    return pack(nn.Sequential(*made))


def run(layer, x, threads=1):
    lib, inputs, outputs, size = library(), c.c_int32(), c.c_int32(), c.c_size_t()
    lib.lookupffn_layer_features(layer, c.byref(inputs), c.byref(outputs))
    assert inputs.value == x.shape[1]
    lib.lookupffn_layer_workspace.restype = lib.lookupffn_run_layer.restype = c.c_char_p
    assert lib.lookupffn_layer_workspace(layer, c.c_int64(len(x)), threads, c.byref(size)) is None
    workspace, y = np.empty(size.value, np.uint8), np.full((len(x) + 1, outputs.value), 7, np.float32)
    pool = c.c_void_p(lib.lookupffn_pool_new(threads))
    arguments = [c.c_void_p(a.ctypes.data) for a in (x, y)] + [c.c_int64(len(x)), c.c_void_p(workspace.ctypes.data)]
    short = lib.lookupffn_run_layer(layer, *arguments, c.c_size_t(size.value - 1), pool)
    assert short == f"the workspace has {size.value - 1} bytes of {size.value}".encode()
    assert lib.lookupffn_run_layer(layer, *arguments, size, pool) is None
    lib.lookupffn_pool_free(pool)
    assert (y[-1] == 7).all()
    return y[:-1]


@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_layers_of_a_version_1_file_by_number(tokens, tmp_path):
    packed, lib = layers(), library()
    save_packed(packed, tmp_path / "layers.safetensors")
    lib.lookupffn_open_layer.restype = c.c_char_p
    for index in range(3):
        opened = c.c_void_p()
        path = str(tmp_path / "layers.safetensors").encode()
        assert lib.lookupffn_open_layer(path, index, c.byref(opened)) is None
        x = torch.randn(tokens, packed[index].config.in_features)
        for threads in (1, 3):
            assert np.array_equal(run(opened, x.numpy(), threads), packed[index](x).numpy())
        lib.lookupffn_close_layer(opened)


def test_a_layer_of_bytes_and_what_is_no_layer(tmp_path):
    packed, lib = layers()[1], library()
    lib.lookupffn_open_layer_bytes.restype = lib.lookupffn_open_layer.restype = c.c_char_p
    data, opened = packed.packed.numpy(), c.c_void_p()
    where = c.c_void_p(data.ctypes.data)
    assert lib.lookupffn_open_layer_bytes(where, c.c_size_t(len(data)), c.byref(opened)) is None
    x = torch.randn(7, 24)
    assert np.array_equal(run(opened, x.numpy()), packed(x).numpy())
    lib.lookupffn_close_layer(opened)
    for size in (0, 7, 151, 152, len(data) - 64, len(data) - 1):
        assert lib.lookupffn_open_layer_bytes(where, c.c_size_t(size), c.byref(opened))
    save_packed(layers(), tmp_path / "layers.safetensors")
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 1}
    export(BertModel(BertConfig(vocab_size=99, **sizes)), tmp_path)
    raw = (tmp_path / "layers.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(raw[: len(raw) // 2])
    for file, index, reason in (
        ("layers.safetensors", 3, b"it has 3 layers, and none of number 3"),
        ("layers.safetensors", -1, b"layers are counted from 0, not -1"),
        (MODEL_FILE, 0, b"it is a packed model, no file of packed layers"),
        ("short.safetensors", 2, b"says more bytes than there are"),
        ("nowhere", 0, b"No such file"),
    ):
        wrong = lib.lookupffn_open_layer(str(tmp_path / file).encode(), index, c.byref(opened))
        assert reason in (wrong or b"opened")
