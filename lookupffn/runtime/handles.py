"""Sessions by number, which is how a compiled graph names one; none is kept alive."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

OPEN: WeakValueDictionary[int, Any] = WeakValueDictionary()  # sessions of this process
_numbers = itertools.count()


def register(session: Any, path: Path) -> int:
    """A handle of the session, whose model is the file ``path``, for as long as it lives.

    It is made of the file and of the place among the sessions of this process: the same from run to run, so that
    compilers find their graphs on disk, and another for another file, so that a graph from another process never runs a
    model that it was not made with.
    """
    found = path.stat()
    said = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {next(_numbers)}"
    handle = int.from_bytes(hashlib.sha256(os.fsencode(said)).digest()[:8], "little") >> 1
    OPEN[handle] = session
    return handle
