"""A run's place among its processes, and data parallelism laid over a module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class ParallelContext:
    """One process's place: device, rank and the size of the world."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    backend: str | None = None
    threads: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that logs and saves."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def across(values: list[float], context: ParallelContext) -> list[float]:
    """Each value summed over all ranks, in fp64 where the backend's device has it."""
    if context.world == 1:
        return values
    wide = torch.float32 if context.device.type in ("npu", "mps") else torch.float64
    total = torch.tensor(values, dtype=wide, device=context.device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return [float(value) for value in total.tolist()]


def data_parallel(module: nn.Module, context: ParallelContext) -> nn.Module:
    """The module as it is alone, or under DDP, which *averages* gradients over the ranks.

    The loop wants the sum of what it divided by the global count, so it divides by that count's
    share of one rank (`share_of`). DDP's own reduction runs without Python; a summing hook written
    in Python is called, and freed, on gloo's threads, which abort a process that is just exiting.
    """
    if context.world == 1:
        return module
    # Buffers are derived from the configuration and equal everywhere: nothing to broadcast.
    return DistributedDataParallel(module, broadcast_buffers=False)


def share_of(count: float, context: ParallelContext) -> float:
    """What a rank divides its loss sum by, so that DDP's average is the sum over `count`."""
    return count / context.world


def no_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Hold gradients back until the last micro-batch of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
