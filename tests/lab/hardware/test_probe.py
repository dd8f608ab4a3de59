"""The lab's raw operators check what they are given."""

import pytest
import torch

from lookupffn import native

pytestmark = pytest.mark.skipif(bool(native.load("lab")), reason="the lab's library was not built")


def test_raw_reads_check_every_line():
    memory = torch.zeros(640, dtype=torch.uint8)
    lines = torch.arange(10, dtype=torch.int32)
    assert torch.ops.lookupffn_lab.read_lines(memory, lines, 3) == 0
    for bad in (10, -1, 2**31 - 1):
        with pytest.raises(RuntimeError, match="outside memory"):
            torch.ops.lookupffn_lab.read_lines(memory, torch.cat([lines, lines.new_tensor([bad])]), 1)
