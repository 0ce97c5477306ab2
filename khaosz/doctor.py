"""Report the devices and speed of this machine, and what a run will use."""

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
from khaosz.parallel.setup import cpu_threads
from khaosz.trainer.calibration import compiler_problem
from khaosz.trainer.callback import matmul_peak


def examine() -> dict[str, Any]:
    """Versions, devices and short measurements; takes about a second."""
    parallel = setup_parallel(ParallelConfig())
    device = parallel.device
    speeds: dict[str, float | None] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            speeds[name] = round(matmul_peak(device, dtype) / 1e9, 1)
        except RuntimeError:
            speeds[name] = None  # no kernel for this type on this device
    return {
        "khaosz": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cores": cpu_threads(1),
        "threads": parallel.threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": _memory_gb(),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "devices": available_devices(),
        "device": device.type,
        "matmul_gflops": speeds,
        "read_gb_per_s": _read_bandwidth(),
        "dtype": max(speeds, key=lambda name: speeds[name] or 0.0),
        "compiler": compiler_problem(device) or "yes",
    }


def format_report(report: dict[str, Any]) -> str:
    speeds = report["matmul_gflops"]
    speed = ", ".join(
        f"{k} {v:,.0f} GFLOP/s" if v else f"{k} not supported" for k, v in speeds.items()
    )
    compiler = report["compiler"]
    lines = [
        ("versions", f"khaosz {report['khaosz']}, PyTorch {report['torch']}, "
                     f"Python {report['python']}"),
        ("machine", f"{report['platform']}, {report['cores']} cores, "
                    f"{report['cpu_capability']}"),
        ("memory", f"{report['memory_gb']} GB, read at {report['read_gb_per_s']} GB/s; "
                   f"{report['disk_free_gb']} GB free on disk"),
        ("devices", ", ".join(report["devices"])),
        ("speed", f"{speed} in matrix multiplication on {report['device']}"),
        ("defaults", f"{report['device']} with {report['threads']} threads; {report['dtype']}, the "
                     "faster type here (each run measures it again on its model)"),
        ("compile", "torch.compile, where it pays off" if compiler == "yes" else f"no: {compiler}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<9} {text}" for name, text in lines)


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _read_bandwidth() -> float:
    """GB/s of summing 256 MB with all threads: the bound on decoding one token at a time."""
    values = torch.ones(64 << 20)
    values.sum()
    best, end = 0.0, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        started = time.perf_counter()
        values.sum()
        best = max(best, values.numel() * 4 / (time.perf_counter() - started))
    return round(best / 1e9, 1)
