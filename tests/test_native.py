"""Finding the compiled kernels, and what is said where there are none."""

import sys

import pytest
import torch
from native_cases import run_python

from lookupffn import native


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("linux", "liblookupffn_kernels.so"),
        ("darwin", "liblookupffn_kernels.dylib"),
        ("win32", "lookupffn_kernels.dll"),
    ],
)
def test_the_library_has_the_name_that_its_system_gives_it(platform, name, monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native.sysconfig, "get_path", lambda _: str(tmp_path / "site-packages"))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setenv("LOOKUPFFN_NATIVE", "1")
    load = native.load.__wrapped__  # nothing of this is kept
    assert load().startswith(f"{name} was not built: no C++ compiler, or no torch, when lookupffn was installed. ")
    assert load().endswith("in lookupffn's checkout: pip install --force-reinstall --no-deps --no-cache-dir .")
    installed = tmp_path / "site-packages" / "lookupffn" / name
    installed.parent.mkdir(parents=True)
    for path in (installed, tmp_path / name):  # beside the sources comes before an editable installation's
        path.touch()
        assert load() == ""
        assert loaded.pop() == path
    assert loaded == []


def test_a_library_that_cannot_be_loaded_is_named_with_the_reason_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setenv("LOOKUPFFN_NATIVE", "1")
    path = tmp_path / native.library_name()
    path.write_bytes(b"no library")
    with pytest.raises(OSError, match=rf"{path} cannot be loaded: .*pip install .*LOOKUPFFN_NATIVE=0 to do without it"):
        native.load.__wrapped__()


def test_training_without_the_kernels_says_so_once_and_where_there_are_none_to_miss_nothing():
    code = """
import warnings
import torch
from lookupffn import LookupConfig, LookupFFN

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer = LookupFFN(LookupConfig(20, 20, 9, 4, block_size=4), dtype=dtype)
        for _ in range(2):
            layer(torch.randn(5, 20, dtype=dtype)).sum().backward()
        print(len(said))
print(said[0].message)
print(said[0].filename)
"""
    *counts, said, file = run_python(code, LOOKUPFFN_NATIVE="0").stdout.splitlines()
    assert counts == ["0", "1", "1"]
    assert file == "<string>"  # the user's line, not one of ours
    assert said.endswith("unset it to use them")
    assert said.startswith("lookupffn runs without its compiled kernels, many times slower: LOOKUPFFN_NATIVE=0 asks")
