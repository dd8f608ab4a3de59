"""Files that appear whole or not at all, whenever the process dies."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def fsync(path: Path) -> None:
    """Waits until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; what is written there replaces ``path``, whole, when the block ends."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        fsync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own mode is private
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def atomic_write(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` so that the old or the new content is there whenever the process dies."""
    with atomic_replace(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
