"""Where files go, and that they appear whole or not at all, whenever the process dies."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lookupffn.errors import InputError, WriteError


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


def fingerprint(path: Path) -> str:
    """16 digits that a file with other bytes would not have: BLAKE2b's first 8 bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def weight_fingerprints(folder: str | os.PathLike) -> dict[str, str]:
    """Of each file of weights in a model's folder; none of a model that is no folder here."""
    found = sorted(Path(folder).rglob("*.safetensors"))
    return {str(path.relative_to(folder)): fingerprint(path) for path in found}


def fsync(path: Path) -> None:
    """Waits until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises what goes wrong in writing ``path``, or files in it or beside it, as WriteError: the path and the reason.

    Libraries tell of a full disk each in its own way, and of their temporary files.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, WriteError) or not (reason := _write_failure(error, path)):
            raise
        raise WriteError(f"{path} cannot be written: {reason}") from error


def _write_failure(error: Exception, path: Path) -> str | None:
    """Why writing failed, or None where the error is of something else."""
    if isinstance(error, OSError):
        folder = Path(os.path.abspath(path)).parent
        file = error.filename
        ours = file is None or Path(os.path.abspath(os.fsdecode(file))).is_relative_to(folder)
        return (error.strerror or str(error)) if ours else None
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return os.strerror(int(number[1])) if number else None
    ours = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)  # torch.save, which tells no reason
    return f"torch.save failed, with {shutil.disk_usage(path.parent).free:,} bytes free" if ours else None


def check_inside(path: Path, folder: Path) -> None:
    """Refuses a file of a model's folder that is a link to somewhere else, so that a folder from outside shows no more
    than itself. The Hub's cache keeps files in ``blobs``, beside its ``snapshots``, which only hold links to them.

    Raises:
        InputError: the message has the link and where it leads.
    """
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    roots = [root]
    for above in root.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            roots += [above.with_name("blobs"), above.parent.with_name("blobs")]  # of the repository, or shared by all
    if not any(real.is_relative_to(inside) for inside in roots):
        raise InputError(f"{path} is a link to {real}, outside of its folder: copy the file there")


def make_folder(path: Path) -> None:
    """Makes the folder and those above it, where they are missing. Raises WriteError where that is not possible."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path) -> None:
    """Makes the folder of ``path`` and a file in it, which it removes again: before hours of work for that file.

    Raises:
        WriteError: one of them cannot be made; the message has the path and the reason.
    """
    make_folder(path.parent)
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _temporary(path).unlink()


def _temporary(path: Path) -> Path:
    """A new, empty file beside ``path``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not by tempfile, whose files are private: this one's mode is that of any file which the user creates here.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; what is written there replaces ``path``, whole, when the block ends.

    Raises:
        WriteError: the folder or the disk does not take it; what was at ``path`` before stays.
    """
    with writing(path):
        temporary = _temporary(path)
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


def write_json_lines(path: Path, records: Iterable[dict]) -> None:
    """Writes one JSON object a line, making the folder where it is missing."""
    make_folder(path.parent)
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))
