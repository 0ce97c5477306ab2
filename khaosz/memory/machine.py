"""How much memory this process may still take, and what says so.

Swap is not counted: a model that is swapped is too slow to use. What cannot be read limits nothing.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as almost 2**63
_THREAD = 72 << 20  # address space of a thread: 8 MB of stack, 64 MB that glibc's malloc reserves


@dataclass(frozen=True)
class Limit:
    """`free` bytes are left under a limit. `mapped`: whether pages of a mapped file count."""

    name: str
    free: int
    mapped: bool = True


def memory_limits(device: str | torch.device = "cpu", root: Path = Path("/")) -> tuple[Limit, ...]:
    """Every limit that can be read, empty where none can. `root`: of /proc and /sys."""
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (Limit(f"this device ({_gb(total)})", free + cached),)
    if device.type != "cpu":
        return ()
    limits = [*_cgroup_limits(root), *_resource_limits(root)]
    if (available := _available(root)) is not None:
        limits.insert(0, Limit("this machine", available))
    return tuple(limits)


def resident_memory(root: Path = Path("/")) -> int:
    """Resident bytes of this process: its code, its libraries and what it has allocated."""
    if match := re.search(r"VmRSS:\s+(\d+) kB", _text(root / "proc/self/status")):
        return int(match[1]) << 10
    if sys.platform == "win32":
        return _TYPICAL
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def release_freed_memory() -> None:
    """Give freed blocks back to the system, which glibc keeps: 70 MB after a tokenizer of 150,000
    tokens is read. Without effect elsewhere."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def return_large_blocks() -> None:
    """Let glibc give every freed block of a megabyte back at once. It raises that bound by itself
    to 32 MB, and then holes stay between what backward needs: 15 MB a layer of a model of 0.5B
    whose matrices are dequantised one at a time. Without effect elsewhere."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


_TYPICAL = 320 << 20  # of Python with PyTorch and our imports


def _available(root: Path) -> int | None:
    """Bytes that can be taken without swapping, the page cache included."""
    if match := re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo")):
        return int(match[1]) << 10
    if sys.platform == "darwin":
        try:
            done = subprocess.run(
                ["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return vm_stat_available(done.stdout)
    if sys.platform == "win32":
        return _windows_available()
    return None


def vm_stat_available(report: str) -> int | None:
    """Available bytes in the output of macOS's `vm_stat`."""
    size = re.search(r"page size of (\d+) bytes", report)
    kinds = "free", "inactive", "speculative", "purgeable"
    counts = [re.search(rf"^Pages {kind}:\s+(\d+)", report, re.MULTILINE) for kind in kinds]
    if size is None or counts[0] is None:
        return None
    return int(size[1]) * sum(int(count[1]) for count in counts if count is not None)


def _windows_available() -> int | None:
    import ctypes

    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (
            [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)]
            + [("total", ctypes.c_ulonglong), ("available", ctypes.c_ulonglong)]
            + [(f"rest{i}", ctypes.c_ulonglong) for i in range(5)]
        )  # fmt: skip

    status = Status(length=ctypes.sizeof(Status))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  (only on Windows)
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _cgroup_limits(root: Path) -> Iterator[Limit]:
    """Of the process's control group and of those above it. In a container the path may be the
    host's, with the container's own group at the root of the mount."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for mount in (mounts, mounts / "unified"):
                yield from _each_level(mount, path, _unified)
        elif "memory" in controllers.split(","):
            yield from _each_level(mounts / "memory", path, _legacy)


def _each_level(mount: Path, path: str, read: object) -> Iterator[Limit]:
    inside = PurePosixPath("/", path).relative_to("/")
    for part in (inside, *inside.parents):
        limit = read(mount / part)  # type: ignore[operator]
        if limit is not None:
            yield limit


def _unified(folder: Path) -> Limit | None:
    """Version 2. Above memory.high processes are slowed down until they free memory."""
    most = [_number(folder / name) for name in ("memory.max", "memory.high")]
    return _group_limit(
        min((value for value in most if value is not None), default=None),
        _number(folder / "memory.current"),
        _text(folder / "memory.stat"),
        "",
    )


def _legacy(folder: Path) -> Limit | None:
    return _group_limit(
        _number(folder / "memory.limit_in_bytes"),
        _number(folder / "memory.usage_in_bytes"),
        _text(folder / "memory.stat"),
        "total_",
    )


def _group_limit(most: int | None, used: int | None, stat: str, prefix: str) -> Limit | None:
    if most is None or most >= _UNLIMITED or used is None:
        return None
    # The page cache counts as used, and is freed when memory is needed.
    kinds = "inactive_file", "active_file"
    cached = (re.search(rf"^{prefix}{kind} (\d+)$", stat, re.MULTILINE) for kind in kinds)
    reclaimable = sum(int(match[1]) for match in cached if match is not None)
    return Limit(f"a cgroup limit of {_gb(most)}", max(0, most - max(0, used - reclaimable)))


def _resource_limits(root: Path) -> Iterator[Limit]:
    """`ulimit -v` and `ulimit -d`, where the process's own use is known."""
    if sys.platform == "win32":
        return
    import resource

    status = _text(root / "proc/self/status")
    later = (torch.get_num_threads() - 1) * _THREAD
    for name, number, used, taken in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize", later),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData", 0),
    ):
        most = resource.getrlimit(number)[0]
        match = re.search(rf"{used}:\s+(\d+) kB", status)
        if most != resource.RLIM_INFINITY and match is not None:
            free = max(0, most - (int(match[1]) << 10) - taken)
            yield Limit(f"{name} of {_gb(most)}", free, mapped=name == "RLIMIT_AS")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _gb(count: int) -> str:
    return f"{count / (1 << 30):.1f} GB"
