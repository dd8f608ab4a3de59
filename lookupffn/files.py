"""Where files go, and that they appear whole or not at all, whenever the process dies."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lookupffn.errors import InputError


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$LOOKUPFFN_CACHE``, else ``lookupffn`` in ``$XDG_CACHE_HOME``, else in
    ``~/.cache``.

    Raises:
        InputError: neither variable is set and the user has no home folder.
    """
    if chosen := os.environ.get("LOOKUPFFN_CACHE"):
        return Path(chosen).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "lookupffn"
    try:
        return Path.home() / ".cache" / "lookupffn"
    except RuntimeError:  # a user id without a name, and no HOME, as in `docker run --user 12345`
        raise InputError("this user has no home folder: set LOOKUPFFN_CACHE to a folder for caches") from None


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
