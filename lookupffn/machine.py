"""What this machine is, for the head of every measurement."""

import contextlib
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide every measurement and of others; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "lookupffn", *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """What was typed to start this program."""
    return shlex.join(sys.orig_argv)


def describe(*packages: str) -> dict:
    """CPU, usable cores, threads that torch uses, memory in bytes, system and versions, those of ``packages`` too."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(terse=True),
        "versions": versions(*packages),
    }


# ---- Threads ---------------------------------------------------------------------------------------------------------


def _default_threads() -> set[int]:
    """What torch may have chosen by itself: the logical CPUs that it may use, or the cores that they lie in."""
    if not hasattr(os, "sched_getaffinity"):
        return {os.cpu_count() or 1}
    cpus, cores = os.sched_getaffinity(0), set()
    for cpu in cpus:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            cores.add(siblings.read_text(encoding="utf-8"))
        except OSError:
            cores.add(str(cpu))
    return {len(cpus), len(cores)}


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the process's control groups allow, None without a limit; version 2 and version 1.

    Neither ``os.cpu_count`` nor the affinity mask sees it: it is in ``cpu.max`` (or ``cpu.cfs_quota_us``) of the
    group and of every group above it. ``root`` is there for tests.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        relative = Path(group.lstrip("/"))
        for folder in (mount / relative, *(mount / parent for parent in relative.parents)):
            quotas.append(_quota(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such group, or "max"
        return None


def respect_cpu_quota() -> None:
    """Limits torch's threads to the control groups' CPU quota, rounded down, unless they were set by hand.

    ``OMP_NUM_THREADS`` and an earlier ``torch.set_num_threads`` win. More threads than the quota are throttled: the
    kernel puts them to sleep in the middle of their work, and the others stall at the next barrier.
    """
    quota = cgroup_quota()
    by_hand = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() not in _default_threads()
    if quota is not None and not by_hand and torch.get_num_threads() > max(1, int(quota)):
        torch.set_num_threads(max(1, int(quota)))


# ---- Caches ----------------------------------------------------------------------------------------------------------


def caches() -> list[dict]:
    """Data caches of the first CPU as Linux tells them: ``level``, ``bytes``, ``shared_by`` (logical CPUs), and where
    it says so ``ways`` and ``line_bytes``."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size, shared = (
                (folder / name).read_text(encoding="utf-8").strip()
                for name in ("type", "level", "size", "shared_cpu_map")
            )
        except OSError:
            continue
        if kind != "Instruction":
            factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:], 1)
            count = int(shared.replace(",", ""), 16).bit_count()
            cache = {"level": int(level), "bytes": int(size.rstrip("KMG")) * factor, "shared_by": count}
            for key, name in (("ways", "ways_of_associativity"), ("line_bytes", "coherency_line_size")):
                with contextlib.suppress(OSError, ValueError):
                    cache[key] = int((folder / name).read_text(encoding="utf-8"))
            found.append(cache)
    return found


def huge_pages() -> str:
    """The system's rule for transparent huge pages: ``always``, ``madvise``, ``never``, or ``unknown``."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
        return text.partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"
