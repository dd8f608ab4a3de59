"""Derivatives that the operators do not have are refused, never zero: forward mode, and second ones."""

import pytest
import torch
from torch.autograd import forward_ad

from lookupffn import LookupConfig, LookupFFN, ops, pack

# torch compiles decompositions of its own when the first dual tensor is made
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def _dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FORWARD_MODES = {
    "dual": _dual,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
}
Z, CODES = torch.randn(3, 16, 8), torch.zeros(3, 16, 1, dtype=torch.int32)
NO_FORWARD_MODE = {
    "layer": (LookupFFN(LookupConfig(32, 32, num_tables=16)), torch.randn(3, 32)),
    "dense projection": (LookupFFN(LookupConfig(32, 32, num_tables=16, projection="dense")), torch.randn(3, 32)),
    "packed": (pack(LookupFFN(LookupConfig(32, 32, num_tables=16))), torch.randn(3, 32)),
    "bh4": (lambda x: ops.bh4(x, torch.ones(1, 4, 4, 8, 8), 0.7, 32), torch.randn(3, 32)),
    "hash_codes": (lambda z: ops.hash_codes(z, 2)[1], Z),
    "gather, of tables": (lambda tables: ops.gather(tables, CODES, Z[..., :1]), torch.randn(16, 4, 5)),
    "gather, of scores": (lambda scores: ops.gather(torch.ones(16, 4, 5), CODES, scores), Z[..., :1]),
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize("which", NO_FORWARD_MODE)
def test_a_forward_mode_derivative_is_refused_and_never_zero(which, mode):
    function, x = NO_FORWARD_MODE[which]
    with pytest.raises(NotImplementedError, match="forward"):
        FORWARD_MODES[mode](function, x)


def test_a_forward_mode_derivative_in_a_parameter_is_refused():
    layer, x = NO_FORWARD_MODE["layer"]
    for name, value in layer.named_parameters():
        if name == "bias":  # of which y is the sum, and nothing else
            continue
        with pytest.raises(NotImplementedError, match="forward"):
            _dual(lambda p, name=name: torch.func.functional_call(layer, {name: p}, (x,)), value.detach())


def test_what_carries_no_tangent_passes_beside_what_does():
    packed, x = NO_FORWARD_MODE["packed"]
    assert torch.equal(_dual(lambda factor: packed(x) * factor, torch.ones(())), packed(x))


def test_second_derivatives_are_refused_and_never_zero():
    layer, x = NO_FORWARD_MODE["layer"]
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), x)
