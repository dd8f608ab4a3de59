"""What an import brings, in an interpreter of its own. That imports run one way is a contract in pyproject.toml."""

import json
import subprocess
import sys

import lookupffn

LOOK = """
import json, os, sys, threading

def look():
    tasks = "/proc/self/task"
    return set(sys.modules), len(os.listdir(tasks)) if os.path.exists(tasks) else threading.active_count()

import torch
before, threads = look()
import {module}
after, more = look()
print(json.dumps([sorted(after - before), more - threads]))
"""


def brought_by(module):
    """The modules that importing ``module`` brings over torch's own, and the threads that it starts."""
    done = subprocess.run([sys.executable, "-c", LOOK.format(module=module)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules, threads = json.loads(done.stdout)
    return set(modules), threads


def packages(modules):
    """The packages that are not Python's own."""
    names = {name.partition(".")[0] for name in modules}
    return {name for name in names - set(sys.stdlib_module_names) if not name.startswith("_")}


def test_the_package_brings_torch_numpy_and_safetensors_alone_and_starts_no_thread():
    modules, threads = brought_by("lookupffn")
    assert packages(modules) <= {"lookupffn", "torch", "numpy", "safetensors"}
    assert not {name for name in modules if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed"))}
    folders = {"lookupffn." + name for name in ("ffns", "hf", "conversion", "train", "bench", "lab", "__main__")}
    assert "lookupffn.runtime.packed" in modules
    assert not {name for name in modules if ".".join(name.split(".")[:2]) in folders}
    assert threads == 0
    assert len(lookupffn.__all__) <= 18


def test_the_models_bring_none_of_the_feed_forward_layers():
    modules, _ = brought_by("lookupffn.hf")
    assert "transformers" in modules
    assert {name for name in modules if name.startswith("lookupffn.ffns.")} == set()
    assert not packages(modules) & {"typer", "datasets", "matplotlib"}


def test_the_command_line_brings_no_folder_before_a_command_of_it_is_called():
    modules, threads = brought_by("lookupffn.__main__")
    assert "typer" in modules
    assert not {name for name in modules if name.startswith(("lookupffn.lab", "lookupffn.train", "lookupffn.bench"))}
    assert not packages(modules) & {"transformers", "datasets", "matplotlib", "yaml"}
    assert threads == 0
