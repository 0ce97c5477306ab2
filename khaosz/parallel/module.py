"""The rank of a process, and data parallelism around a module."""

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
    """Device, rank and world size of a process."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    backend: str | None = None
    threads: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0, which logs and saves."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def sum_over_ranks(values: list[float], context: ParallelContext) -> list[float]:
    """Each value summed over all ranks, in fp64 where the device has it."""
    if context.world == 1:
        return values
    dtype = torch.float32 if context.device.type in ("npu", "mps") else torch.float64
    total = torch.tensor(values, dtype=dtype, device=context.device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return [float(value) for value in total.tolist()]


def data_parallel(module: nn.Module, context: ParallelContext) -> nn.Module:
    """The module itself on one rank, else in DDP, which *averages* gradients over the ranks.

    The gradient wanted is the sum over ranks of the loss sum divided by the global count, so the
    loop divides by `loss_divisor` of that count. DDP's own reduction runs without Python; a summing
    hook in Python would be called, and freed, on gloo's threads, which abort an exiting process.
    """
    if context.world == 1:
        return module
    # Buffers derive from the configuration and are equal on all ranks: no broadcast.
    return DistributedDataParallel(module, broadcast_buffers=False)


def loss_divisor(count: float, context: ParallelContext) -> float:
    """Divisor of a rank's loss sum, such that DDP's average is the global sum over `count`."""
    return count / context.world


def no_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Reduce gradients only with the last micro-batch of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
