"""Checkpoints that are whole or are not used: a marker is written last.

A process may be killed between any two system calls: a checkpoint folder counts only once its marker, which lists every
file with its size, has appeared in it.
"""

import json
import re
import shutil
from pathlib import Path

from lookupffn.files import atomic_write, fsync

MARKER = "COMPLETE.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: Path) -> None:
    """Flushes every file of a checkpoint to disk, then writes the marker that makes it count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (*files, *folders, folder, folder.parent):
        fsync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    atomic_write(folder / MARKER, json.dumps({"format_version": 1, "files": sizes}, indent=1) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a marker and every file that it lists, each at its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checkpoints(output_dir: Path) -> list[Path]:
    """All ``checkpoint-N`` folders, complete or not, by rising ``N``."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_complete(output_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None; incomplete ones are never chosen."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


def trainer_state(folder: Path | None) -> dict:
    """What the Trainer wrote of its state in a checkpoint: its history, its best step; empty where it wrote none."""
    try:
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}


def keep_latest(output_dir: Path, keep: int) -> None:
    """Removes incomplete checkpoints, and complete ones but for the ``keep`` latest and the best.

    Called when a new one is complete, never before, so at least one complete checkpoint exists at any time. The
    marker goes first, so that a removal cut short leaves a folder that does not count.
    """
    complete = [path for path in checkpoints(output_dir) if is_complete(path)]
    best = trainer_state(complete[-1] if complete else None).get("best_global_step")
    kept = complete[-keep:] + [path for path in complete if path.name == f"checkpoint-{best}"]
    for path in checkpoints(output_dir):
        if path not in kept:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)
