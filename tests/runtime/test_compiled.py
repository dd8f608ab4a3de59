"""A session inside torch.compile and torch.export: one operator, the same bits, and an error where it is gone."""

import gc
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from lookupffn import Session, export, native
from lookupffn.errors import InputError
from lookupffn.runtime import handles

if not native.available():
    pytest.skip("the runtime is a compiled library", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # inside inductor
]

VOCAB = 65
OPERATOR = "lookupffn.session.default"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of two widths."""
    made = []
    for width in (48, 64):
        torch.manual_seed(width)
        sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 60, "num_hidden_layers": 1}
        model = BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        made.append(export(model.eval(), tmp_path_factory.mktemp("model")))
    return made


@pytest.fixture
def session(folders):
    torch.compiler.reset()
    return Session(folders[0])


def batch(texts, length):
    ids = torch.randint(0, VOCAB, (texts, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return ids, mask


class Recorder:
    """A backend that keeps the graphs that it is given, and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def test_a_call_is_one_operator_of_a_whole_graph_with_dynamic_sizes(session):
    recorder = Recorder()
    compiled = torch.compile(
        lambda ids, mask: session(ids, mask).mean(1), fullgraph=True, dynamic=True, backend=recorder
    )
    for texts, length in ((3, 7), (5, 12), (4, 64)):
        ids, mask = batch(texts, length)
        found = compiled(ids, mask)
        assert torch.equal(found, session(ids, mask).mean(1))
        assert not found.requires_grad
    (graph,) = recorder.graphs
    call, mean = (node for node in graph.graph.nodes if node.op.startswith("call"))
    assert (str(call.target), mean.target) == (OPERATOR, "mean")
    hidden = call.meta["example_value"]
    assert (hidden.dim(), hidden.shape[2], hidden.dtype, hidden.requires_grad) == (3, 48, torch.float32, False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_give_the_same_bits(backend, session):
    """The states, not what inductor makes of their mean; sizes become dynamic with the second length."""
    compiled = torch.compile(lambda ids, mask, types: session(ids, mask, types) * 1.0, fullgraph=True, backend=backend)
    for texts, length in ((3, 7), (3, 12), (5, 12), (1, 5)):
        ids, mask = batch(texts, length)
        for types in (torch.randint(0, 2, ids.shape), None):
            assert torch.equal(compiled(ids, mask, types), session(ids, mask, types))


def test_what_a_call_takes_a_compiled_call_takes(session):
    compiled = torch.compile(lambda ids, mask: session(ids, mask), fullgraph=True, backend="aot_eager")
    ids, mask = batch(3, 7)
    expected = session(ids, mask)
    for other in (mask.numpy(), mask.float(), mask.bool()):
        assert torch.equal(session(ids, other), expected)
        assert torch.equal(compiled(ids, other), expected)
    assert torch.equal(compiled(ids.int(), mask), expected)


def test_one_graph_may_take_several_sessions(session, folders):
    compiled = torch.compile(lambda session, ids: session(ids), fullgraph=True, backend="aot_eager")
    ids, _ = batch(3, 7)
    for other in (session, Session(folders[1]), Session(folders[0], threads=2), session):
        assert torch.equal(compiled(other, ids), other(ids))


class Pooled(torch.nn.Module):
    def __init__(self, session):
        super().__init__()
        self.session = session

    def forward(self, ids, mask):
        return self.session(ids, mask).mean(1)


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_with_a_session_is_exported(strict, session):
    sizes = {0: torch.export.Dim("texts", min=1, max=512), 1: torch.export.Dim("length", min=1, max=64)}
    model = Pooled(session)
    program = torch.export.export(model, batch(3, 7), dynamic_shapes=(sizes, sizes), strict=strict)
    assert [str(n.target) for n in program.graph.nodes if "lookupffn" in str(n.target)] == [OPERATOR]
    for texts, length in ((3, 7), (1, 64), (6, 2)):
        ids, mask = batch(texts, length)
        assert torch.equal(program.module()(ids, mask), model(ids, mask))


LOAD = """
import sys
import torch
from lookupffn import Session
from lookupffn.errors import InputError
import lookupffn.runtime.compiled
program, given = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
other = Session(sys.argv[3])  # the first of its process, as that of the program was
try:
    program.module()(*given)
except InputError as error:
    print(error)
"""


def test_a_session_that_is_gone_is_an_error(folders, tmp_path):
    session, given = Session(folders[0]), batch(3, 7)
    program = torch.export.export(Pooled(session), given)
    module = program.module()
    module(*given)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(given, tmp_path / "given.pt")
    handle = session._handle
    del session
    torch.compiler.reset()
    gc.collect()
    with pytest.raises(InputError, match="the session that this graph was compiled with is gone"):
        module(*given)
    with pytest.raises(InputError, match="is gone"):
        torch.ops.lookupffn.session(*given, None, handle, 48)
    command = [sys.executable, "-c", LOAD, tmp_path / "program.pt2", tmp_path / "given.pt", folders[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "is gone, or was of another process" in done.stdout, done.stderr[-2000:]


def test_a_session_has_the_same_handle_in_the_next_run_and_another_file_another(folders, monkeypatch):
    """Compilers keep graphs on disk by what stands in them."""

    def of(*folders):  # as of a process that has no session yet
        monkeypatch.setattr(handles, "_numbers", itertools.count())
        return [Session(folder)._handle for folder in folders]

    first = of(*folders)
    assert of(*folders) == first
    assert len({*first, *of(*reversed(folders)), *of(folders[0], folders[0])}) == 4


def test_a_session_is_not_kept_and_pickles_as_before(session):
    again = pickle.loads(pickle.dumps(session))
    ids, mask = batch(3, 7)
    assert torch.equal(again(ids, mask), session(ids, mask))
    handle = again._handle
    assert handle != session._handle
    assert handles.OPEN[handle] is again
    del again
    gc.collect()
    assert handle not in handles.OPEN
    assert session._handle in handles.OPEN


def test_errors_of_a_compiled_call_are_those_of_a_call(session):
    compiled = torch.compile(lambda ids, mask: session(ids, mask), fullgraph=True, backend="aot_eager")
    ids, mask = batch(3, 7)
    ids[0, 0] = VOCAB
    for run in (session, compiled):
        with pytest.raises(InputError, match=f"token 0 has id {VOCAB}"):
            run(ids, mask)
        with pytest.raises(InputError, match=r"attention_mask is \[3, 6\], input_ids \[3, 7\]"):
            run(ids, mask[:, :6])
        with pytest.raises(InputError, match="input_ids must be integers"):
            run(ids.float(), mask)


def test_tensors_of_another_device_are_refused(session):
    ids, mask = batch(3, 7)
    for given in ((ids.to("meta"), mask), (ids, mask.to("meta")), (ids, mask, ids.to("meta"))):
        with pytest.raises(InputError, match="a tensor is on meta: a session runs on the CPU, move it there"):
            session(*given)
    if torch.cuda.is_available():
        for run in (session, torch.compile(lambda ids: session(ids), fullgraph=True, backend="aot_eager")):
            with pytest.raises(InputError, match="a tensor is on cuda:0: a session runs on the CPU"):
                run(ids.cuda())
    with pytest.raises(InputError, match="a tensor is on meta"):
        session.pool(ids.to("meta"))


def test_the_operator_comes_with_the_first_graph_and_an_import_starts_no_thread():
    code = """
import sys, threading
import lookupffn
assert "lookupffn.runtime.compiled" not in sys.modules
assert threading.active_count() == 1
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def test_numbers_of_numpy_never_meet_the_operator(session):
    ids, mask = batch(3, 7)
    found = session(ids.numpy(), mask.numpy())
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, session(ids, mask).numpy())
