"""ONNX: the layer's operators in standard ones, for ``torch.onnx.export(..., custom_translation_table=...)``.

Each function builds the nodes of one operator of ``ops.py``, equal to the function of ``reference.py`` by its name, for
any number of tokens: opset 18, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lookupffn import native, ops
from lookupffn.errors import InputError
from lookupffn.extras import require
from lookupffn.reference import hadamard_matrix

TABLES_AT_ONCE = 16  # whose rows of all tokens are there at the same time


def translation_table() -> dict[Callable, Callable]:
    """The table for ``torch.onnx.export(model, inputs, custom_translation_table=translation_table(), dynamo=True)``.

    It takes :class:`lookupffn.LookupFFN` and models that hold it, with any sizes dynamic that are leading ones of the
    layer's input. A packed layer has no ONNX form, for its integers are the engine's own: export what it was packed
    from.

    Raises:
        InputError: onnxscript is not installed; and in the export, that the model holds a packed layer.
    """
    require("onnx", "lookupffn.onnx")
    table = {
        torch.ops.lookupffn.bh4.default: _bh4,
        torch.ops.lookupffn.hash_codes.default: _hash_codes,
        torch.ops.lookupffn.gather.default: _gather,
    }
    if native.available():
        table[torch.ops.lookupffn.packed_forward.default] = _packed_forward
    return table


def _packed_forward(*_: Any) -> None:
    raise InputError("a packed layer has no ONNX form: export the model that it was packed from")


def _constants(like: Any) -> Callable:
    """What makes constants in the dtype of a value."""
    from onnxscript import opset18 as op

    return lambda array: op.Constant(value=_tensor(np.asarray(array, like.dtype.numpy())))


def _tensor(array: np.ndarray) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(array)


def _bh4(x: Any, weight: Any, decay: float, out_features: int) -> Any:
    """``out_r = decay * M_r x + (1 - decay) * x`` by its stages, on ``(R, n, B, b)`` (``reference.bh4``)."""
    from onnxscript import opset18 as op

    repeats, stages, n, b, _ = weight.shape
    constant = _constants(x)
    hadamard_n, hadamard_b = (constant(hadamard_matrix(size).numpy()) for size in (n, b))
    blocks = op.Transpose(op.MatMul(hadamard_b, weight), perm=[0, 1, 2, 4, 3])
    padded = op.Pad(x, op.Constant(value_ints=[0, 0, 0, n * b - x.shape[1]]))
    start = op.Transpose(op.Reshape(padded, op.Constant(value_ints=[-1, 1, n, b])), perm=[1, 2, 0, 3])
    y = start
    for i in range(stages):
        y = op.MatMul(y, op.Gather(blocks, op.Constant(value_int=i), axis=1))
        flat = op.Reshape(y, op.Constant(value_ints=[repeats, n, -1]))
        y = op.Reshape(op.MatMul(hadamard_n, flat), op.Constant(value_ints=[repeats, n, -1, b]))
    z = op.Add(op.Mul(y, constant(decay)), op.Mul(start, constant(1 - decay)))
    z = op.Reshape(op.Transpose(z, perm=[2, 0, 1, 3]), op.Constant(value_ints=[-1, repeats * n * b]))
    return op.Slice(z, *(op.Constant(value_ints=[at]) for at in (0, out_features, 1)))


def _hash_codes(z: Any, reads: int) -> tuple[Any, Any]:
    """Codes and scores of the ``reads`` nearest buckets, ``(B, T, N)``; ``ops.py`` says how flips are found."""
    from onnxscript import INT32
    from onnxscript import opset18 as op

    tau, constant = z.shape[2], _constants(z)
    last, two = op.Constant(value_ints=[-1]), constant(2.0)
    bit_value = _tensor(1 << np.arange(tau - 1, -1, -1, dtype=np.int32))
    places = op.Constant(value_ints=list(range(tau)))
    m = op.Abs(z)
    bits = op.Cast(op.Greater(z, constant(0.0)), to=INT32.dtype)
    code = op.ReduceSum(op.Mul(bits, op.Constant(value=bit_value)), last)  # (B, T, 1)
    total, probability = op.ReduceSum(m, last), op.ReduceProd(op.Sigmoid(op.Mul(two, m)), last)
    costs, flips, left = [op.Mul(total, constant(0.0))], [op.Mul(code, op.Constant(value=_tensor(np.int32([0]))))], m
    for _ in range(reads - 1):
        place = op.ArgMin(left, axis=-1)  # the first of equals
        costs.append(op.ReduceMin(left, last))
        flips.append(op.Gather(op.Constant(value=bit_value), place))
        left = op.Where(op.Equal(place, places), constant(np.inf), left)
    if reads == ops.MAX_READS:
        pair = op.Add(costs[1], costs[2])
        flips[3] = op.Where(op.Less(costs[3], pair), flips[3], op.Add(flips[1], flips[2]))
        costs[3] = op.Min(costs[3], pair)
    cost = op.Concat(*costs, axis=-1)
    codes = op.BitwiseXor(code, op.Concat(*flips, axis=-1))
    twice = op.Mul(two, cost)
    return codes, op.Mul(op.Sub(total, twice), op.Mul(probability, op.Exp(op.Neg(twice))))


def _gather(tables: Any, codes: Any, scores: Any) -> Any:
    """``y[b] = sum_t sum_n scores[b, t, n] tables[t, codes[b, t, n]]``, some tables at a time."""
    from onnxscript import INT64
    from onnxscript import opset18 as op

    count, rows, width = tables.shape
    reads = codes.shape[2]
    flat = op.Reshape(tables, op.Constant(value_ints=[count * rows, width]))
    first_row = op.Constant(value=_tensor(np.arange(count, dtype=np.int64)[:, None] * rows))
    places = op.Add(op.Cast(codes, to=INT64.dtype), first_row)  # (B, T, N)
    weights, y = op.Cast(scores, to=tables.dtype), None
    for t in range(0, count, TABLES_AT_ONCE):
        some = min(TABLES_AT_ONCE, count - t)
        cut = [op.Constant(value_ints=[at]) for at in (t, t + some, 1)]
        read = op.Gather(flat, op.Reshape(op.Slice(places, *cut), op.Constant(value_ints=[-1, some * reads])))
        weight = op.Reshape(op.Slice(weights, *cut), op.Constant(value_ints=[-1, 1, some * reads]))
        part = op.MatMul(weight, read)  # (B, 1, E)
        y = part if y is None else op.Add(y, part)
    return op.Squeeze(y, op.Constant(value_ints=[1]))
