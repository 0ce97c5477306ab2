"""The global random state of every rank. Dropout draws from it and nothing else: whatever draws
besides has a generator of its own, so that a resumed run draws what an unbroken one does.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from khaosz.parallel import ParallelContext


def seed_random_state(seed: int, parallel: ParallelContext, step: int = 0) -> None:
    """Seed all devices of this process. Ranks draw different masks; rank 0 starts at `seed`."""
    # Odd multipliers, far apart: no two ranks or steps of a run share a seed.
    mixed = seed + parallel.rank * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95
    torch.manual_seed(mixed % 2**63)


def random_state(parallel: ParallelContext) -> dict[str, Tensor]:
    """The states of all ranks, gathered: "cpu" and, say, "cuda" are rank 0's, "cpu.1" rank 1's.
    Every rank has to call this."""
    mine = {"cpu": torch.get_rng_state()}
    kind = parallel.device.type
    if kind != "cpu":
        mine[kind] = getattr(torch, kind).get_rng_state().cpu()
    if parallel.world == 1:
        return mine
    states: dict[str, Tensor] = {}
    for name, state in mine.items():
        sent = state.to("cpu" if parallel.backend == "gloo" else parallel.device)
        received = [torch.empty_like(sent) for _ in range(parallel.world)]
        dist.all_gather(received, sent)
        states |= {_key(name, rank): part.cpu() for rank, part in enumerate(received)}
    return states


def restore_random_state(
    states: dict[str, Tensor], parallel: ParallelContext, seed: int, step: int
) -> None:
    """Set this rank's part of what `random_state` returned. A rank or a device without a part (a
    run resumed on more ranks, or elsewhere) is seeded by the step."""
    seed_random_state(seed, parallel, step)
    if (state := states.get(_key("cpu", parallel.rank))) is not None:
        torch.set_rng_state(state)
    kind = parallel.device.type
    if kind != "cpu" and (state := states.get(_key(kind, parallel.rank))) is not None:
        getattr(torch, kind).set_rng_state(state)


def _key(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name
