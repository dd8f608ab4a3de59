"""LOOKUPFFN_ISA names an implementation that cannot run: a session opens with an error, as a layer packs with one."""

import os
import subprocess
import sys

import pytest
from transformers import BertConfig, BertModel

from lookupffn import export, native

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Twice each: what is chosen is chosen once a process, and an error is no choice.
CODE = """
import sys
from lookupffn import LookupConfig, LookupFFN, Session, pack
for attempt in (lambda: Session(sys.argv[1]), lambda: pack(LookupFFN(LookupConfig(64, 5)))) * 2:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    return export(BertModel(BertConfig(vocab_size=9, **sizes)), tmp_path_factory.mktemp("model"))


def errors(folder, isa):
    command = [sys.executable, "-c", CODE, str(folder)]
    done = subprocess.run(command, env=os.environ | {"LOOKUPFFN_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["InputError", "RuntimeError"] * 2
    (said,) = {line.partition(" ")[2] for line in lines}  # by all the same
    return said


def test_an_implementation_that_this_processor_lacks(folder):
    lacking = [i for i in native.implementations() if not i["runs_here"]]
    if not lacking:
        pytest.skip("this processor has them all")
    name, needs = lacking[-1]["name"], lacking[-1]["needs"]
    said = f"LOOKUPFFN_ISA: implementation '{name}' needs {needs}, which this processor lacks"
    here = ", ".join(i["name"] for i in native.implementations() if i["runs_here"])
    assert errors(folder, name) == f"{said}; here run {here}"


def test_an_implementation_that_there_is_not(folder):
    known = ", ".join(i["name"] for i in native.implementations())
    said = f"LOOKUPFFN_ISA: there is no implementation 'pentium'; this build has {known}"
    assert errors(folder, "pentium").startswith(said)
