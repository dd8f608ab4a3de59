"""The library of the lab: the loops that the probe times, the shim that counts operations, the cache simulator."""

from __future__ import annotations

import torch

from lookupffn import native
from lookupffn.errors import InputError


def operators():
    """``torch.ops.lookupffn_lab``; every operator of the hardware study is got here.

    Raises:
        InputError: the library is absent; the message says why.
    """
    if reason := native.load("lab"):
        raise InputError(f"the hardware study needs the library that it measures and counts with: {reason}")
    return torch.ops.lookupffn_lab
