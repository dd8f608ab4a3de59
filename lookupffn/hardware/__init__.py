"""The hardware study: what this machine is and gives (probe), and what the layer takes on it and on others (model)."""

from lookupffn.hardware.system import (
    caches,
    cgroup_quota,
    cpu_name,
    huge_pages,
    machine,
    respect_quota,
    versions,
)

__all__ = ["caches", "cgroup_quota", "cpu_name", "huge_pages", "machine", "respect_quota", "versions"]
