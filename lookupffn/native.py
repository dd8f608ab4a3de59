"""The compiled kernels: finds and loads them once, says which implementation runs, and what to do without them."""

import functools
import os
import sys
import sysconfig
import warnings
from pathlib import Path

import torch


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
        return "LOOKUPFFN_NATIVE=0 asks to do without"
    # An editable installation leaves the library in site-packages and the sources here.
    folders = (Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "lookupffn")
    path = next((path for folder in folders if (path := folder / library_name(name)).exists()), None)
    if path is None:
        return f"{library_name(name)} was not built (no C++ compiler, or torch missing, when lookupffn was installed)"
    torch.ops.load_library(path)
    return ""


def available() -> bool:
    """Whether the compiled kernels are in use."""
    return not load()


@functools.cache
def warn_if_absent() -> None:
    """Says, once a process, that the slow path is in use, where it is."""
    if reason := load():
        warnings.warn(
            f"lookupffn runs without its compiled kernels, many times slower: {reason}. "
            "To build them, install a C++ compiler, then: "
            "pip install --force-reinstall --no-deps --no-cache-dir lookupffn",
            stacklevel=3,
        )


def implementation() -> str:
    """Name of the implementation in use, for instance ``"avx512_vnni"``; ``"torch"`` without the kernels.

    Raises:
        RuntimeError: the environment variable ``LOOKUPFFN_ISA`` names one that is unknown or cannot run here.
    """
    return torch.ops.lookupffn.implementation("") if available() else "torch"


def implementations() -> list[dict]:
    """What this build has, best first: ``name``, ``runs_here`` and ``needs`` (in words)."""
    if not available():
        return []
    lines = torch.ops.lookupffn.all_implementations().splitlines()
    fields = [line.split("\t") for line in lines]
    return [{"name": name, "runs_here": runs == "1", "needs": needs} for name, runs, needs in fields]
