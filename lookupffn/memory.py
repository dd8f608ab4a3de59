"""Memory for packed bytes: aligned, on huge pages where the system has them on request."""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def aligned_bytes(size: int) -> Tensor:
    """A uint8 vector that starts on a cache line; large ones on a huge page (``MADV_HUGEPAGE``).

    An ordinary tensor under ``torch.inference_mode`` too: what is kept in it outlives that.
    """
    with torch.inference_mode(False):
        return _aligned_bytes(size)


def _aligned_bytes(size: int) -> Tensor:
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)  # torch aligns to 64 bytes
    region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones serve too
        region.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(region, dtype=torch.uint8, offset=start, count=size)
