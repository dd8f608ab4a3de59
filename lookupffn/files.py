"""Files that appear whole or not at all, whenever the process dies."""

import contextlib
import os
import secrets
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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not by tempfile, whose files are private: this one's mode is that of any file which the user creates here.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def atomic_write(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` so that the old or the new content is there whenever the process dies."""
    with atomic_replace(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
