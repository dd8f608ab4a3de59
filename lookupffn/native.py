"""The compiled kernels: finds and loads them once, says which implementation runs, and what to do without them."""

import functools
import os
import sys
import sysconfig
import warnings
from pathlib import Path

import torch

REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."


def library_name(name: str = "kernels") -> str:
    """The file of the library ``name``, as CMake calls a shared library on this system."""
    names = {"darwin": f"liblookupffn_{name}.dylib", "win32": f"lookupffn_{name}.dll"}
    return names.get(sys.platform, f"liblookupffn_{name}.so")


@functools.cache
def load(name: str = "kernels") -> str:
    """Loads a library into torch; returns ``""``, or why there is none.

    ``"kernels"`` is what the package runs on; ``"lab"``, which the hardware study measures and counts with, is loaded
    by nothing else.

    Raises:
        OSError: the library is there and cannot be loaded: a broken installation must not be silently slow.
    """
    if os.environ.get("LOOKUPFFN_NATIVE", "1") == "0":
        return "LOOKUPFFN_NATIVE=0 asks to do without; unset it to use them"
    # An editable installation leaves the library in site-packages and the sources here.
    folders = (Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "lookupffn")
    path = next((path for folder in folders if (path := folder / library_name(name)).exists()), None)
    if path is None:
        return (
            f"{library_name(name)} was not built: no C++ compiler, or no torch, when lookupffn was installed. "
            f"Install a C++ compiler, then, in lookupffn's checkout: {REINSTALL}"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be loaded: {error}. It may be of another torch or another processor: build it again, in "
            f"lookupffn's checkout: {REINSTALL} Or set LOOKUPFFN_NATIVE=0 to do without it, slowly."
        ) from error
    return ""


def available() -> bool:
    """Whether the compiled kernels are in use. Raises what :func:`load` raises."""
    return not load()


@functools.cache
def warn_if_absent() -> None:
    """Says, once a process, that the slow path is in use, where it is."""
    if reason := load():
        warnings.warn(
            f"lookupffn runs without its compiled kernels, many times slower: {reason}",
            stacklevel=_users_level(),
        )


def _users_level() -> int:
    """The ``stacklevel`` at which a warning of the caller's points at the user's line, not at ours or torch's."""
    ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level


def implementation() -> str:
    """Name of the implementation in use, for instance ``"avx512_vnni"``; ``"torch"`` without the kernels.

    Raises:
        RuntimeError: the environment variable ``LOOKUPFFN_ISA`` names one that is unknown or cannot run here.
    """
    return torch.ops.lookupffn.implementation("") if available() else "torch"


def implementations() -> list[dict]:
    """What this build has, best first: ``name``, ``runs_here``, ``needs`` (in words); raises as :func:`load` does."""
    if not available():
        return []
    lines = torch.ops.lookupffn.all_implementations().splitlines()
    fields = [line.split("\t") for line in lines]
    return [{"name": name, "runs_here": runs == "1", "needs": needs} for name, runs, needs in fields]
