"""The frozen reference of a run, and its log-probabilities of the data: computed once and stored.

They come from the model the run *started* from, never from the trained one: a resumed run reads the
file, or loads that model again.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from khaosz.data.batches.sampler import permute
from khaosz.data.fingerprint import fingerprint as digest
from khaosz.data.tokenizer import load_tokenizer
from khaosz.errors import ConfigError
from khaosz.files import atomic_path
from khaosz.interop.models import load_model
from khaosz.model import Transformer, weights_fingerprint
from khaosz.trainer.open_run import OpenRun, initial_model
from khaosz.trainer.stages.dpo import DPOStrategy, reference_logprobs
from khaosz.trainer.stages.pairs import PairSet
from khaosz.trainer.stages.reward_sources import check_same_tokenizer
from khaosz.trainer.strategy import Compute


def frozen_reference(run: OpenRun) -> Transformer:
    """A frozen copy of the model that the run started from, or of `reference`: never of a policy
    from a checkpoint. Raises `ConfigError` for another vocabulary or tokenizer."""
    config, parallel = run.config, run.parallel
    name, path = "init_from", config.init_from
    if config.reference is not None:
        name, path = "reference", config.reference
        frozen = load_model(config.reference, device=parallel.device)
        if frozen.config.vocab_size != run.model.config.vocab_size:
            raise ConfigError(
                f"the reference {config.reference} has a vocabulary of"
                f" {frozen.config.vocab_size}, the policy {run.model.config.vocab_size}"
            )
        check_same_tokenizer(run.tokenizer, load_tokenizer(config.reference), config.reference)
    elif run.origin.checkpoint is None and config.lora is None:
        frozen = copy.deepcopy(run.model)
        frozen.compiled_blocks = None
    else:
        frozen = initial_model(config, config.init_from, run.tokenizer, parallel)
    run.record_model(name, path, frozen)
    return frozen.requires_grad_(False).eval()


def add_references(run: OpenRun, strategy: DPOStrategy, compute: Compute) -> None:
    """Add the reference's log-probabilities to both pair sets, unless the policy with its adapters
    off computes them."""
    if strategy.by_adapters:
        return
    config, frozen = run.config, run.model
    if config.reference is not None or run.origin.checkpoint is not None:
        frozen = frozen_reference(run)
    else:
        run.record_model("init_from", config.init_from, frozen)
    for name, data in (("reference", strategy.data), ("reference-val", strategy.held_out)):
        if data.pairs:
            path = config.out / f"{name}.safetensors"
            add_reference(strategy, data, frozen, compute, path, run.console)


def fingerprint(model: Transformer, data: PairSet) -> str:
    """A hash of the reference's weights and of the pairs, on which the log-probabilities depend."""
    ids = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in data.pairs]
    return digest(weights_fingerprint(model), ids)


def add_reference(
    strategy: DPOStrategy,
    data: PairSet,
    model: Transformer,
    compute: Compute,
    path: Path,
    console: Console,
) -> None:
    """Set `data.reference`, from `path` if it has the log-probabilities of this model and data.
    They are computed in the layout of the first epoch, so that policy and reference agree to the
    bit before the first update."""
    key = fingerprint(model, data)
    table = _read(path, key)
    if table is None:
        table = _compute(strategy, data, model, compute, console)
        if strategy.parallel.is_main:
            _write(path, table, key)
        strategy.parallel.barrier()
    data.reference = table


def _compute(
    strategy: DPOStrategy,
    data: PairSet,
    model: Transformer,
    compute: Compute,
    console: Console,
) -> Tensor:
    """log ref (pairs, 2) of the chosen and the rejected answers."""
    parallel, layout = strategy.parallel, strategy.layout
    total = len(data.draws)
    drawn = [permute(i, total, layout.seed, 0) for i in range(total)]
    table = torch.zeros(len(data.pairs), 2)
    steps = range(0, total, layout.per_step)
    was_training = model.training
    model.train()  # the same pass as in training, which has no dropout
    for start in track(steps, "reference", console=console, transient=True, disable=console.quiet):
        mine = drawn[start : start + layout.per_step][parallel.rank :: parallel.world]
        for batch in strategy.batches(data, [data.draws[i] for i in mine]):
            logprobs = reference_logprobs(model, batch.to(parallel.device), compute)
            table[batch.fields["pair"]] = logprobs.cpu().float()
    model.train(was_training)
    if parallel.world > 1:
        shared = table.to(parallel.device)
        dist.all_reduce(shared)  # each rank has filled rows that are zero on the others
        table = shared.cpu()
    return table


def _read(path: Path, key: str) -> Tensor | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            stored, table = file.metadata() or {}, file.get_tensor("logprobs")
            if (stored.get("key"), stored.get("hash")) == (key, digest(table.numpy())):
                return table
    except (OSError, SafetensorError):
        pass
    return None


def _write(path: Path, logprobs: Tensor, key: str) -> None:
    with atomic_path(path) as partial:
        metadata = {"key": key, "hash": digest(logprobs.numpy())}
        save_file({"logprobs": logprobs}, str(partial), metadata=metadata)
