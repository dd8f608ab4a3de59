"""What the machine is and what a container leaves of it: control groups in folders that a test made."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lookupffn import LookupConfig, LookupFFN, machine, pack
from lookupffn.__main__ import app


def files(root, contents):
    """Writes ``contents``, path to text, under ``root``."""
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(root, group, quotas):
    """A system with control groups of version 2: the process's group, and groups with their ``cpu.max``."""
    maxima = {f"sys/fs/cgroup/{path}/cpu.max": text for path, text in quotas.items()}
    return files(root, {"proc/self/cgroup": f"0::{group}\n"} | maxima)


def version_1(root, groups, quotas):
    """The same of version 1: the lines of ``/proc/self/cgroup``, and groups with their quota and period."""
    folder = "sys/fs/cgroup/cpu"
    for path, (quota, period) in quotas.items():
        files(root, {f"{folder}/{path}/cpu.cfs_quota_us": quota, f"{folder}/{path}/cpu.cfs_period_us": period})
    return files(root, {"proc/self/cgroup": groups})


# ---- Quotas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "cpus"), [("200000 100000\n", 2.0), ("150000 100000", 1.5), ("5000 10000\n", 0.5)])
def test_version_2_of_a_container_that_sees_itself_as_the_root(text, cpus, tmp_path):
    assert machine.cgroup_quota(version_2(tmp_path, "/", {"": text})) == cpus


@pytest.mark.parametrize("text", ["max 100000\n", "max", "", "0 100000", "-1 100000", "200000", "a b", "1 2 3"])
def test_no_limit_and_unreadable_limits_are_none(text, tmp_path):
    assert machine.cgroup_quota(version_2(tmp_path, "/", {"": text})) is None


def test_the_smallest_quota_of_the_group_and_those_above_counts(tmp_path):
    quotas = {"": "max 100000", "kube": "800000 100000", "kube/pod": "300000 100000", "kube/pod/box": "400000 100000",
              "kube/other": "100000 100000"}  # fmt: skip
    assert machine.cgroup_quota(version_2(tmp_path, "/kube/pod/box", quotas)) == 3.0
    assert machine.cgroup_quota(version_2(tmp_path, "/kube/other", {})) == 1.0
    assert machine.cgroup_quota(version_2(tmp_path, "/kube/unknown/deep", {})) == 8.0
    assert machine.cgroup_quota(version_2(tmp_path, "/", {})) is None


VERSION_1 = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n1:name=systemd:/docker/abc\n"
LIMITED, UNLIMITED = ("250000\n", "100000\n"), ("-1\n", "100000\n")


@pytest.mark.parametrize(
    ("groups", "quotas", "cpus"),
    [
        (VERSION_1, {"docker/abc": LIMITED}, 2.5),
        (VERSION_1, {"": LIMITED}, 2.5),  # the container's own group, mounted as the root
        (VERSION_1, {"": UNLIMITED, "docker/abc": UNLIMITED}, None),
        (VERSION_1, {"docker": ("100000", "100000"), "docker/abc": LIMITED}, 1.0),
        (VERSION_1.replace("cpu,cpuacct", "cpuacct"), {"docker/abc": LIMITED}, None),  # no controller of CPU time
        (VERSION_1, {}, None),
    ],
)
def test_version_1(groups, quotas, cpus, tmp_path):
    assert machine.cgroup_quota(version_1(tmp_path, groups, quotas)) == cpus


def test_both_versions_at_once(tmp_path):
    root = version_1(tmp_path, VERSION_1 + "0::/docker/abc\n", {"docker/abc": LIMITED})
    assert machine.cgroup_quota(root) == 2.5
    assert machine.cgroup_quota(files(root, {"sys/fs/cgroup/docker/abc/cpu.max": "200000 100000"})) == 2.0


def test_systems_without_control_groups_have_no_quota(tmp_path):
    assert machine.cgroup_quota(tmp_path) is None
    assert machine.cgroup_quota(files(tmp_path, {"proc/self/cgroup": ""})) is None
    assert machine.cgroup_quota(files(tmp_path, {"proc/self/cgroup": "0::/\n"})) is None


def test_a_group_of_another_namespace_is_no_error(tmp_path):
    assert machine.cgroup_quota(version_2(tmp_path, "/../../other", {"": "200000 100000"})) == 2.0


def test_this_machines_own_quota_is_at_most_that_of_its_topmost_group():
    topmost = [machine._quota(Path("/sys/fs/cgroup") / folder) for folder in ("", "cpu")]
    quota = machine.cgroup_quota() or math.inf
    assert 0 < quota <= min((q for q in topmost if q is not None), default=math.inf)


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """A machine of eight CPUs for respect_cpu_quota: sets the quota, gives the threads that it leaves."""
    state = {"threads": 8}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
    monkeypatch.setattr(machine, "_default_threads", lambda: {8, 4})

    def under(quota):
        monkeypatch.setattr(machine, "cgroup_quota", lambda: quota)
        machine.respect_cpu_quota()
        return state["threads"]

    return under


@pytest.mark.parametrize(
    ("quota", "left"), [(2.0, 2), (2.9, 2), (1.0, 1), (0.5, 1), (7.99, 7), (8.0, 8), (64.0, 8), (None, 8)]
)
def test_threads_are_the_quota_rounded_down_and_at_least_one(quota, left, threads):
    assert threads(quota) == left


def test_the_environment_variable_wins_over_the_quota(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads(2.0) == 8


@pytest.mark.parametrize("chosen", [1, 3, 16])
def test_set_num_threads_wins_over_the_quota(chosen, threads):
    torch.set_num_threads(chosen)
    assert threads(2.0) == chosen


def test_a_limit_once_set_stays(threads):
    assert threads(2.0) == 2
    assert threads(2.0) == 2
    assert threads(1.0) == 2  # from then on it counts as chosen


def test_the_command_line_respects_the_quota_and_the_library_leaves_threads_alone(threads):
    assert threads(None) == 8
    machine.cgroup_quota = lambda: 2.0  # put back by the fixture's monkeypatch
    pack(LookupFFN(LookupConfig(16, 4, 3, 4, block_size=16)))
    assert torch.get_num_threads() == 8
    assert CliRunner().invoke(app, ["flops"]).exit_code == 0
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread cannot be limited to fewer")
def test_a_number_set_before_the_import_wins_too():
    code = """
import os, torch
for threads in (7, None):
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    if threads:
        torch.set_num_threads(threads)
    from lookupffn import machine
    machine.cgroup_quota = lambda: 1.0
    machine.respect_cpu_quota()
    print(torch.get_num_threads(), flush=True)
    os._exit(0)
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == ["7", "1"], done.stderr


# ---- The machine -----------------------------------------------------------------------------------------------------


def test_the_machine_is_described_in_numbers_that_json_keeps():
    facts = machine.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert 1 <= facts["cores"] <= os.cpu_count()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_caches_are_those_that_linux_tells_of():
    caches = machine.caches()
    kinds = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/type")]
    assert len(caches) == sum(kind != "Instruction" for kind in kinds)
    for cache in caches:
        assert {"level", "bytes", "shared_by"} <= set(cache) <= {"level", "bytes", "shared_by", "ways", "line_bytes"}
        assert 1 <= cache["level"] <= 4
        assert cache["bytes"] >= 4096
        assert cache["shared_by"] >= 1
    assert [c["level"] for c in caches] == sorted(c["level"] for c in caches)


def test_caches_in_every_unit_with_their_sharers(monkeypatch, tmp_path):
    told = [("Data", "1", "48K", "0001,00000001\n"), ("Instruction", "1", "32K", "1\n"), ("Unified", "2", "2M", "f\n"),
            ("Unified", "3", "1G", "ff,ffffffff\n")]  # fmt: skip
    for i, values in enumerate(told):
        names = (f"index{i}/{name}" for name in ("type", "level", "size", "shared_cpu_map"))
        files(tmp_path, dict(zip(names, values, strict=True)))
    files(tmp_path, {"index0/ways_of_associativity": "12\n", "index0/coherency_line_size": "64\n"})
    (tmp_path / "index9").mkdir()  # one that tells nothing
    real = machine.Path
    monkeypatch.setattr(machine, "Path", lambda p: tmp_path if str(p).endswith("cpu0/cache") else real(p))
    assert machine.caches() == [
        {"level": 1, "bytes": 48 << 10, "shared_by": 2, "ways": 12, "line_bytes": 64},
        {"level": 2, "bytes": 2 << 20, "shared_by": 4},
        {"level": 3, "bytes": 1 << 30, "shared_by": 40},
    ]


@pytest.mark.parametrize(
    ("text", "rule"), [("always [madvise] never\n", "madvise"), ("[always] madvise never", "always"), (None, "unknown")]
)
def test_the_rule_for_huge_pages(text, rule, monkeypatch, tmp_path):
    path = tmp_path / "enabled"
    if text:
        path.write_text(text)
    monkeypatch.setattr(machine, "Path", lambda _: path)
    assert machine.huge_pages() == rule
