"""Limits of memory as /proc and /sys state them: cgroups of both versions, resource limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from khaosz.memory.machine import memory_limits, resident_memory, vm_stat_available

GB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root with these files below it, and a machine with 8 GB available."""
    for name, text in {"proc/meminfo": f"MemAvailable: {8 << 20} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def tightest(root: Path) -> tuple[float, str]:
    limit = min(memory_limits("cpu", root), key=lambda limit: limit.free)
    return limit.free / GB, limit.name


def test_memory_of_the_machine(tmp_path: Path) -> None:
    assert tightest(machine(tmp_path, {})) == (8.0, "this machine")


def test_nothing_is_limited_where_nothing_can_be_read(tmp_path: Path) -> None:
    if sys.platform == "linux":
        assert memory_limits("cpu", tmp_path) == ()


@pytest.mark.parametrize(
    ("names", "free"),
    [
        ({"memory.max": 2 * GB, "memory.high": "max"}, 1.75),
        ({"memory.max": 4 * GB, "memory.high": 2 * GB}, 1.75),
        ({"memory.max": "max", "memory.high": "max"}, 8.0),
    ],
)
def test_cgroup_version_2(tmp_path: Path, names: dict[str, object], free: float) -> None:
    files = {"proc/self/cgroup": "0::/user.slice/run.scope\n"}
    group = "sys/fs/cgroup/user.slice/run.scope"
    files |= {f"{group}/{name}": f"{value}\n" for name, value in names.items()}
    # Half of what is used is page cache, which is freed when memory is needed.
    files[f"{group}/memory.current"] = f"{GB // 2}\n"
    files[f"{group}/memory.stat"] = (
        f"anon {GB // 4}\nactive_file {GB // 8}\ninactive_file {GB // 8}\n"
    )
    assert tightest(machine(tmp_path, files))[0] == free


def test_a_cgroup_above_the_process_limits_it_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/container/memory.max": "max\n",
        "sys/fs/cgroup/pod/container/memory.current": "0\n",
        "sys/fs/cgroup/pod/memory.max": f"{3 * GB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{GB}\n",
    }
    assert tightest(machine(tmp_path, files)) == (2.0, "a cgroup limit of 3.0 GB")


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])  # or the container's own root
def test_cgroup_version_1(tmp_path: Path, folder: str) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        f"sys/fs/cgroup/{folder}/memory.limit_in_bytes": f"{2 * GB}\n",
        f"sys/fs/cgroup/{folder}/memory.usage_in_bytes": f"{GB}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"total_inactive_file {GB // 2}\n",
    }
    assert tightest(machine(tmp_path, files)) == (1.5, "a cgroup limit of 2.0 GB")


def test_cgroup_version_1_without_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    }
    assert tightest(machine(tmp_path, files)) == (8.0, "this machine")


def test_available_memory_on_macos() -> None:
    report = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\nPages active:                  1000.\n"
        "Pages inactive:                           20.\nPages speculative:                3.\n"
        "Pages purgeable:                           7.\n"
    )
    assert vm_stat_available(report) == 40 * 16384
    assert vm_stat_available("not a report") is None


@pytest.mark.skipif(sys.platform != "linux", reason="resource limits are read from /proc")
def test_address_space_of_this_process() -> None:
    code = (
        "import resource\nfrom khaosz.memory.machine import memory_limits\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))\n"
        "limits = {limit.name: limit for limit in memory_limits()}\n"
        "print(limits['RLIMIT_AS of 64.0 GB'].free >> 30, resource.RLIM_INFINITY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 40 < int(done.stdout.split()[0]) < 64  # less the libraries' and the threads' to come


def test_resident_memory_of_this_process() -> None:
    assert 100 << 20 < resident_memory() < 1 << 36  # Python with PyTorch takes more than 100 MB
