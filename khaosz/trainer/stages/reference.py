"""The reference's log-probabilities of a data set: computed once, kept on disk.

They come from the model the run *started* from, never from what it has become: a resumed run
reads the file, or loads that model again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from khaosz.data.batches.sampler import permute
from khaosz.files import atomic_path
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.dpo import DPOStrategy, reference_logprobs
from khaosz.trainer.stages.pairs import PairSet
from khaosz.trainer.strategy import Compute


def fingerprint(model: Transformer, data: PairSet) -> str:
    """A hash of the reference's weights and of the pairs: what the numbers depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for pair in data.pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
    return digest.hexdigest()


def add_reference(
    strategy: DPOStrategy,
    data: PairSet,
    model: Transformer,
    compute: Compute,
    path: Path,
    parallel: ParallelContext,
    console: Console,
) -> None:
    """Give `data` its reference log-probabilities, from `path` if it holds those of this model and
    data. They are computed in the layout of the first epoch, so that policy and reference agree to
    the bit before the first update."""
    key = fingerprint(model, data)
    known = _read(path, key)
    if known is None:
        known = _compute(strategy, data, model, compute, parallel, console)
        if parallel.is_main:
            _write(path, known, key)
        parallel.barrier()
    data.reference = known


def _compute(
    strategy: DPOStrategy,
    data: PairSet,
    model: Transformer,
    compute: Compute,
    parallel: ParallelContext,
    console: Console,
) -> Tensor:
    total = len(data.draws)
    drawn = [permute(i, total, strategy.seed, 0) for i in range(total)]
    found = torch.zeros(len(data.pairs), 2)
    steps = range(0, total, strategy.per_step)
    was_training = model.training
    model.train()  # the pass that training makes; there is no dropout in it
    for start in track(steps, "reference", console=console, transient=True, disable=console.quiet):
        mine = drawn[start : start + strategy.per_step][parallel.rank :: parallel.world]
        for batch in strategy.batches(data, [data.draws[i] for i in mine]):
            logprobs = reference_logprobs(model, batch.to(parallel.device), compute)
            found[batch.fields["pair"]] = logprobs.cpu().float()
    model.train(was_training)
    if parallel.world > 1:
        shared = found.to(parallel.device)
        dist.all_reduce(shared)  # every rank filled rows that the others left at zero
        found = shared.cpu()
    return found


def _read(path: Path, key: str) -> Tensor | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("logprobs")
    except (OSError, SafetensorError):
        pass
    return None


def _write(path: Path, logprobs: Tensor, key: str) -> None:
    with atomic_path(path) as partial:
        save_file({"logprobs": logprobs}, str(partial), metadata={"key": key})
