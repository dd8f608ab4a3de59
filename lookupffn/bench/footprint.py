"""Memory that a session adds, and the time that it takes to open, in a process of their own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lookupffn.runtime.session import Session

OPENINGS = 9
POLL_SECONDS = 0.5e-3


def footprint(folder: Path, shape: tuple[int, int], threads: int) -> dict:
    """``resident_bytes`` that a session of ``folder`` adds for texts and tokens of ``shape`` beyond the mapped file,
    without the caller's ids, mask and hidden states, None where the system has no /proc; and ``open_seconds``, the
    median of opening it with the file in the page cache, imports not counted."""
    command = [sys.executable, "-m", __name__, str(folder), *map(str, (*shape, threads))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the process that measures memory failed: {(done.stderr.splitlines() or ['no message'])[-1]}"
        )
    return json.loads(done.stdout)


def _anonymous() -> int | None:
    """Bytes of this process that are resident and of no file."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """What ``call`` returns, and the most that was resident while it ran or just after it."""
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            found.append(max(found.pop(), _anonymous() or 0))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        result = call()
    finally:
        done.set()
        watching.join()
    return result, max(found[0], _anonymous() or 0)


def _measure(folder: Path, texts: int, tokens: int, threads: int) -> dict:
    ids, mask = np.ones((2, texts, tokens), np.int64)  # the caller's: resident before anything is measured
    _peak(lambda: None)  # so that the thread that watches is counted before
    before = _anonymous()
    hidden, peak = _peak(lambda: Session(folder, threads)(ids, mask))
    resident = None if before is None else peak - before - hidden.nbytes
    seconds = []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        session = Session(folder, threads)
        seconds.append(time.perf_counter() - start)
        del session  # closed outside of the timing
    return {"resident_bytes": resident, "open_seconds": statistics.median(seconds)}


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
