"""`setup_parallel`: choose device, backend and threads through PyTorch's device-agnostic calls."""

from __future__ import annotations

import importlib
import importlib.util
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from khaosz.config import ParallelConfig
from khaosz.errors import DeviceError
from khaosz.parallel.module import ParallelContext

# In order of preference. torch_npu, where installed, registers `npu`.
_DEVICES = ("cuda", "npu", "xpu", "mps", "cpu")
_BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl", "mps": "gloo", "cpu": "gloo"}


def available_devices() -> list[str]:
    """Device types of this machine, the preferred one first and `cpu` last."""
    if importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")  # registers `npu`
    return [name for name in _DEVICES if name == "cpu" or _is_available(name)]


def device_type(config: ParallelConfig) -> str:
    """The type of the configured device. Raises `DeviceError` if this machine lacks it."""
    devices = available_devices()
    kind = devices[0] if config.device == "auto" else config.device
    if kind not in devices:
        raise DeviceError(
            f"device '{kind}' is not available here", hint=f"this machine has: {', '.join(devices)}"
        )
    return kind


def world_size() -> int:
    """The number of processes, which `torchrun` puts into the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup_parallel(config: ParallelConfig) -> ParallelContext:
    """Set up this process: alone, or one of many under `torchrun` (RANK and WORLD_SIZE are set).

    Raises `DeviceError` if this machine lacks the configured device or backend.
    """
    kind = device_type(config)
    rank, world = int(os.environ.get("RANK", 0)), world_size()
    local = int(os.environ.get("LOCAL_RANK", 0))
    threads = config.threads or cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if config.threads is not None or world > 1:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    device = torch.device(kind)
    if kind not in ("cpu", "mps"):
        device = torch.device(kind, local)
        getattr(torch, kind).set_device(device)
    if world == 1:
        return ParallelContext(device, threads=threads)
    backend = _BACKENDS[kind] if config.backend == "auto" else config.backend
    if not dist.is_backend_available(backend):
        raise DeviceError(
            f"backend '{backend}' is not in this build of PyTorch", hint="try parallel.backend=gloo"
        )
    if not dist.is_initialized():  # an earlier stage may have joined already
        # Rank 0 may prepare data for hours while the others wait.
        wait = timedelta(hours=12)
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=wait))
        # torchrun restarts workers on one store: they must not read the addresses of those before.
        attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=wait)
    return ParallelContext(device, rank, world, local, backend, threads)


def cpu_threads(local_world: int) -> int:
    """Threads per process when `local_world` processes share the available cores."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // local_world)


def _is_available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())
