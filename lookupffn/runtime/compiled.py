"""A session's call as a torch operator, which torch.compile and torch.export see as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lookupffn.errors import InputError
from lookupffn.runtime.handles import OPEN


# The width is for the shape function, where the handle may be a symbol: in a graph that took several sessions.
@torch.library.custom_op("lookupffn::session", mutates_args=())
def _session(ids: Tensor, mask: Tensor | None, types: Tensor | None, handle: int, width: int) -> Tensor:
    session = OPEN.get(handle)
    if session is None:
        raise InputError(
            "the session that this graph was compiled with is gone, or was of another process: keep it for as long as "
            "the graph, or compile again with one that is there"
        )
    return torch.from_numpy(session._hidden(ids, mask, types))


@_session.register_fake
def _(ids, mask, types, handle, width):
    return ids.new_empty(*ids.shape, width, dtype=torch.float32)


def call(ids: Tensor, mask: Any, types: Any, handle: int, width: int) -> Tensor:
    """Hidden states ``(batch, length, width)`` float32 from the session with this handle, by the operator."""
    mask, types = (x if x is None or isinstance(x, Tensor) else torch.as_tensor(x) for x in (mask, types))
    return _session(ids, mask, types, handle, width)
