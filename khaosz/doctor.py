"""What this machine offers and what a run would use of it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from typing import Any

import torch

from khaosz import __version__
from khaosz.config import ParallelConfig
from khaosz.parallel import available_devices, setup_parallel
from khaosz.trainer.calibration import compiler_problem
from khaosz.trainer.callback import matmul_peak


def examine() -> dict[str, Any]:
    """Facts and short measurements (about a second in all)."""
    parallel = setup_parallel(ParallelConfig())
    device = parallel.device
    speeds: dict[str, float | None] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            speeds[name] = round(matmul_peak(device, dtype) / 1e9, 1)
        except RuntimeError:
            speeds[name] = None  # this device has no such kernel
    known = {name: speed for name, speed in speeds.items() if speed}
    problem = compiler_problem(device)
    return {
        "khaosz": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": parallel.threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": _memory_gb(),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "devices": available_devices(),
        "device": device.type,
        "matmul_gflops": speeds,
        "read_gb_per_s": _read_bandwidth(),
        "dtype": max(known, key=lambda name: known[name]),
        "compiler": problem or "yes",
    }


def format_examination(findings: dict[str, Any]) -> str:
    speeds = findings["matmul_gflops"]
    shown = ", ".join(
        f"{k} {v:,.0f} GFLOP/s" if v else f"{k} not supported" for k, v in speeds.items()
    )
    compiler = findings["compiler"]
    lines = [
        ("versions", f"khaosz {findings['khaosz']}, PyTorch {findings['torch']}, "
                     f"Python {findings['python']}"),
        ("machine", f"{findings['platform']}, {findings['cores']} cores, "
                    f"{findings['cpu_capability']}"),
        ("memory", f"{findings['memory_gb']} GB, reading {findings['read_gb_per_s']} GB/s; "
                   f"{findings['disk_free_gb']} GB of disk free"),
        ("devices", ", ".join(findings["devices"])),
        ("speed", f"{shown} in matrix products on {findings['device']}"),
        ("we use", f"{findings['device']} with {findings['threads']} threads; {findings['dtype']} "
                   "is faster here, a run measures it again on the model itself"),
        ("compile", "torch.compile, where it pays" if compiler == "yes" else f"no: {compiler}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<9} {text}" for name, text in lines)


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _read_bandwidth() -> float:
    """GB/s of summing 256 MB with all threads: what decoding one token at a time lives on."""
    values = torch.ones(64 << 20)
    values.sum()
    best, end = 0.0, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        started = time.perf_counter()
        values.sum()
        best = max(best, values.numel() * 4 / (time.perf_counter() - started))
    return round(best / 1e9, 1)
