"""Describes the machine of a measurement, and the memory of a process."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def describe(command: list[str] | None = None) -> dict[str, Any]:
    """Processor, cores, memory, versions, commit, date, load and command: what RESULTS.md states.

    `command` is the argument list of the bench, by default this process's. The machine's name and
    folders are left out.
    """
    arguments = sys.argv if command is None else command
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        # Other work on the cores shows here.
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "command": _shown(arguments),
    }


def as_markdown(machine: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['os']},"
        f" Python {machine['python']}, {versions}; commit {machine['commit'] or 'none'};"
        f" {machine['date']}; load before {machine['load_1min']}; `{machine['command']}`"
    )


def peak_rss_mb() -> float:
    """Peak physical memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux a child's ru_maxrss starts at its parent's.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def cores() -> int:
    """Cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the working tree, with `+` when files differ; None outside a repository."""
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return None
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _shown(arguments: list[str]) -> str:
    first, rest = arguments[0], arguments[1:]
    if not first.startswith("python -m"):
        first = f"python -m bench.{Path(first).stem}"
    return " ".join([first, *map(shlex.quote, rest)])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages * size / 2**30, 1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    found = describe()
    print(as_markdown(found))
    print(json.dumps(found, ensure_ascii=False))
