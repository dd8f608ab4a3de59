"""The ladder of strategies (benchmarks/ladder.py): its rungs compute what they should, at sizes that fit nothing."""

import concurrent.futures
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("benchmarks/ladder*.cpp"), *ROOT.glob("csrc/kernels/*.cpp")]
ARM = os.uname().machine == "aarch64"

pytestmark = pytest.mark.slow  # an exhibit: nothing that users run depends on it


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Not optimised: nothing is timed here, and most of the time goes into compiling."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not compiler:
        pytest.skip("needs a C++ compiler: none of c++, g++, clang++ is there")
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("its sources are chosen here for x86_64 and aarch64")
    folder = tmp_path_factory.mktemp("ladder")
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-Wno-psabi", "-pthread", "-Icsrc"]
    flags += ['-DLOOKUPFFN_TABLES="kernels/kernels.h"', '-DLOOKUPFFN_LOOPS="kernels/loops-inl.h"']  # as CMakeLists.txt

    def compiled(source):
        built = folder / f"{source.stem}.o"
        subprocess.run([*compiler.split(), *flags, "-c", str(source), "-o", str(built)], cwd=ROOT, check=True)
        return built

    other = ("isa_amx", "isa_avx") if ARM else ("isa_neon",)
    chosen = [source for source in SOURCES if not source.stem.startswith(other)]
    chosen.sort(key=lambda source: "isa" not in source.stem)  # the longest first
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, chosen))
    subprocess.run([*compiler.split(), "-pthread", *map(str, objects), "-o", str(folder / "ladder")], check=True)
    return folder / "ladder"


def climb(program, *options):
    return subprocess.run([str(program), *map(str, options)], capture_output=True, text=True, timeout=60)


def test_every_rung_but_the_first_of_a_stage_changes_another(program):
    rungs = [json.loads(line) for line in climb(program, "--list").stdout.splitlines()]
    names = [rung["rung"] for rung in rungs]
    assert len(set(names)) == len(names) >= 30
    for i, rung in enumerate(rungs):
        earlier = [r["rung"] for r in rungs[:i] if r["stage"] == rung["stage"]]
        assert rung["from"] in earlier if earlier else rung["from"] == ""


@pytest.mark.parametrize("isa", [(), ("--isa", "scalar")], ids=["best", "scalar"])
@pytest.mark.parametrize(
    ("width", "tokens", "reads", "bits"), [(96, 1, 1, 8), (160, 3, 3, 8), (160, 1, 3, 4), (96, 3, 1, 4), (96, 13, 1, 8)]
)
def test_rungs_compute_what_they_should_at_awkward_sizes(program, isa, width, tokens, reads, bits):
    sizes = ("--width", width, "--tokens", tokens, "--reads", reads, "--bits", bits, "--tables", 17)
    ran = climb(program, *isa, *sizes, "--seconds", 0)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == len(climb(program, "--list").stdout.splitlines())
    for line in lines:
        assert (line["width"], line["tokens"], line["reads"], line["bits"], line["tables"]) == (
            *(width, tokens, reads, bits),
            17,
        )
        assert line["rung"] == "amx" or line["bytes_per_token"] > 0
        assert "us_per_token" not in line  # nothing was timed


def test_more_threads_than_tokens_slices_and_groups(program):
    threaded = ("--rung", "threads-tokens", "--rung", "threads-slices", "--rung", "threads-tables")
    ran = climb(program, *threaded, "--threads", 5, "--tokens", 2, "--width", 64, "--tables", 17, "--seconds", 0)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line)["threads"] for line in ran.stdout.splitlines()] == [5, 5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rung", "attic"), "there is no rung 'attic'"),
        (("--isa", "abacus"), "there is no implementation 'abacus'"),
        (("--width", "100"), "--width must be a multiple of 16"),
        (("--tokens", "0"), "--tokens must be a number from 1"),
        (("--reads", "5"), "--reads must be a number from 1 to 4"),
        (("--tokens",), "unknown or incomplete option --tokens"),
        (("--fast", "1"), "unknown or incomplete option --fast"),
    ],
)
def test_what_is_refused(program, options, message):
    ran = climb(program, *options)
    assert ran.returncode == 1
    assert message in ran.stderr
    assert ran.stdout == ""
