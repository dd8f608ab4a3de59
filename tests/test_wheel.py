"""The wheel: what is in it, and that it installs and runs where no compiler is."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="builds the wheel")
ROOT = Path(__file__).parents[1]

BUILD = """
import sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], {"build-dir": sys.argv[2]})
"""

RUN = """
import sys, sysconfig, warnings
sys.path[:0] = [{unpacked!r}, {packages!r}]  # -S: without the links of an editable installation
import torch
sysconfig.get_path = lambda _: "nowhere"  # or its library would be found
import lookupffn
assert lookupffn.__file__.startswith({unpacked!r}), lookupffn.__file__
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    layer = lookupffn.LookupFFN(lookupffn.LookupConfig(20, 20, 9, 4, block_size=4))
    layer(torch.randn(5, 20)).sum().backward()
    lookupffn.pack(layer)(torch.randn(5, 20))
print(len(said), said[0].message)
sys.argv = ["lookupffn", "--help"]
import lookupffn.__main__
lookupffn.__main__.main()
"""


def test_without_a_compiler_the_wheel_is_built_has_every_file_runs_and_says_what_it_lacks(tmp_path):
    environment = os.environ | {"CXX": "/nonexistent/c++"}
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path), str(tmp_path / "build")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
        file.extractall(unpacked)
    tracked = subprocess.run(["git", "ls-files", "lookupffn"], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.splitlines() if tracked.returncode == 0 else []
    assert {name for name in files if (ROOT / name).exists()} <= packed
    assert {"lookupffn/py.typed", "lookupffn/train/recipes/small-512.yaml"} <= packed
    code = RUN.format(unpacked=str(unpacked), packages=sysconfig.get_path("purelib"))
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("1 lookupffn runs without its compiled kernels, many times slower: ")
    assert "was not built: no C++ compiler" in ran.stdout
    assert "pretrain" in ran.stdout
