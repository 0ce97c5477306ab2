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
    """The module as it is alone, or under DDP with gradients *summed* over ranks.

    The loop has already divided by the global count, so an average would divide twice; the sum is
    a communication hook of our own rather than a factor on the loss.
    """
    if context.world == 1:
        return module
    # Buffers are derived from the configuration and equal everywhere: nothing to broadcast.
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)
    wrapped.register_comm_hook(None, _sum_hook)
    return wrapped


def no_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Hold gradients back until the last micro-batch of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


# Without annotations: DDP compares them with its own classes, and ours are strings.
def _sum_hook(state, bucket):
    work = dist.all_reduce(bucket.buffer(), op=dist.ReduceOp.SUM, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
