"""Checkpoints: a model directory that can be served as it is, and the training state.

    OUT/step-000123/    config.json, model.safetensors, tokenizer.json, ..., train_config.json
                        and the settings of an embedder (interop/sentence_transformers.py)
    OUT/step-000123/adapter/  the adapters of a LoRA run; model.safetensors has them merged, or with
                        lora.base=file is absent
    OUT/step-000123/state/    optimizer.safetensors, rng.safetensors, state.json; in reinforcement
                              learning critic.safetensors and each rank's rollout-R.safetensors;
                              files.json has the size and a hash of each file that a resume reads
    OUT/last, OUT/best        links to such a directory, replaced atomically

A checkpoint is written under a temporary name and renamed when it is complete: a kill or a full
disk leaves the earlier ones as they were.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from khaosz.config import TrainConfig, save_config
from khaosz.errors import CheckpointError, TrainingError, one_line
from khaosz.files import atomic_folder, digest, disk_error, remove_folder, sync, write_json
from khaosz.interop.adapter import save_adapter
from khaosz.interop.huggingface import save_model
from khaosz.interop.sampling import recommended_sampling
from khaosz.interop.sentence_transformers import EmbedderSettings, save_embedder
from khaosz.model import Transformer
from khaosz.model.lora import merge_lora
from khaosz.trainer.extension import LENGTHS
from khaosz.trainer.random_state import random_state, restore_random_state
from khaosz.trainer.train_context import Plan, Progress, TrainContext

ADAPTER = "adapter"
_FILES = "state/files.json"
_LINKS = ("last", "best")
# What a resume reads beside the folders `adapter` and `state`.
_READ = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "train_config.json")  # fmt: skip

# Keys that may differ between a run and its resumption: they do not change the training.
_FREE = {
    "out", "log_every", "eval_every", "eval_tokens", "save_every", "save_minutes", "keep",
    "sample_every",
    "prompts", "early_stop", "loggers", "val", "init_from", "tokenizer", "data", "parallel",
    "allow_unread", "memory_check",
}  # fmt: skip


def save_checkpoint(context: TrainContext) -> Path:
    """Write OUT/step-N for the current step and point OUT/last at it; returns the directory.
    Several ranks have set `context.random_state` before.

    A directory of that name is another run's, or was never linked: it is replaced. Raises
    `TrainingError` when it can't be written (a full disk), leaving nothing half-written.
    """
    out = context.config.out
    final = out / f"step-{context.progress.step:06d}"
    try:
        with atomic_folder(final, replace=True) as partial:
            _write(context, partial)
        point(out / "last", final)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise TrainingError(
            f"could not write checkpoint {final}: {reason or error}",
            hint="free some space; earlier checkpoints are intact; continue with --resume",
        ) from None
    return final


def _write(context: TrainContext, directory: Path) -> None:
    tokenizer = context.tokenizer
    state = directory / "state"
    state.mkdir()
    base = context.config.init_from
    if context.config.lora is not None:
        named: Path | str = base or "a model of its own"
        if base is not None and context.config.keeps_file:
            named = base.absolute()  # the adapter is used from wherever it lies
        origin = {name: context.fingerprints[name]["hash"] for name in context.fingerprints}
        save_adapter(
            context.model,
            directory / ADAPTER,
            named,
            base_weights=origin.get("init_from"),
            base_tokenizer=origin.get("tokenizer"),
        )
    if not context.config.keeps_file:
        save_model(
            merged(context.model) if context.config.lora else context.model,
            directory,
            bos_id=tokenizer.bos_id,
            eos_ids=list(tokenizer.end_ids),
            pad_id=tokenizer.pad_id,
            sampling=None if base is None else recommended_sampling(base),
        )
    if context.config.stage == "embed":
        embed, width = context.config.embed, context.model.config.hidden_size
        settings = EmbedderSettings(
            embed.pooling, embed.query_prefix, embed.passage_prefix, embed.max_length
        )
        save_embedder(directory, settings, width, tokenizer)
    else:
        tokenizer.save(directory)
    save_config(context.config, directory / "train_config.json")
    tensors = {
        k: v.detach().cpu().contiguous() for k, v in context.named_optimizer_tensors().items()
    }
    save_file(tensors, str(state / "optimizer.safetensors"))
    rng = context.random_state or random_state(context.parallel)
    save_file(rng, str(state / "rng.safetensors"))
    if context.critic is not None:
        critic = {n: p.detach().cpu() for n, p in context.critic.named_parameters()}
        save_file(critic, str(state / "critic.safetensors"))
    for rank in range(context.parallel.world):
        pending = _pending_rollout(context, rank)
        if pending.exists():
            shutil.move(pending, state / f"rollout-{rank}.safetensors")
    write_json(state / "state.json", {**context.state(), "files": _FILES})
    folders = (directory / ADAPTER, state)
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    paths += [path for name in _READ if (path := directory / name).exists()]
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "hash": digest(path)}
        for path in sorted(paths)
    }
    write_json(directory / _FILES, files)


def verify(directory: Path) -> None:
    """Raises `CheckpointError`, which names the file, unless every file that a resume reads is as
    it was saved. Checkpoints of earlier versions list no files."""
    path = directory / _FILES
    if not path.exists():
        if _lists_files(directory):
            raise _broken(path, "it is missing")
        return
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        for name, saved in files.items():
            path = directory / name
            size = path.stat().st_size
            if size != saved["bytes"]:
                raise _broken(path, f"it has {size:,} bytes, {saved['bytes']:,} were saved")
            if digest(path) != saved["hash"]:
                raise _broken(path, "it is not what was saved")
    except FileNotFoundError:
        raise _broken(path, "it is missing") from None
    except OSError as error:
        raise _broken(path, str(error.strerror)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, str(error)) from None


def _lists_files(directory: Path) -> bool:
    try:
        state = json.loads((directory / "state" / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # `load_state` says what is wrong with it
    return isinstance(state, dict) and "files" in state


def _broken(path: Path, why: str) -> CheckpointError:
    directory = next(parent for parent in path.parents if step_of(parent) is not None)
    earlier = [step for step in steps(directory.parent) if step < (step_of(directory) or 0)]
    hint = "start again with another out="
    if earlier:
        name = steps(directory.parent)[max(earlier)].name
        hint = f"go back to an earlier checkpoint: ln -sfn {name} {directory.parent / 'last'}"
    return CheckpointError(f"{path} is broken: {why}", hint=hint)


def merged(model: Transformer) -> Transformer:
    """A copy of a model with its adapters merged."""
    copied = copy.deepcopy(model)
    merge_lora(copied)
    return copied


def write_rollout(context: TrainContext) -> None:
    """Store this rank's rollout, which rank 0 moves into the checkpoint."""
    if context.rollouts is not None:
        tensors = context.rollouts.state_tensors()
        save_file(tensors, str(_pending_rollout(context, context.parallel.rank)))


def _pending_rollout(context: TrainContext, rank: int) -> Path:
    return context.config.out / f".rollout-{rank}.partial"


@dataclass(frozen=True)
class SavedState:
    """The part of a checkpoint that is stored as JSON."""

    progress: Progress
    plan: Plan
    world: int
    windows: int
    fingerprints: dict[str, dict[str, str]]  # empty in checkpoints of earlier versions


def load_state(directory: Path) -> SavedState:
    """Read what `TrainContext.state` returned. Raises `CheckpointError`."""
    path = directory / "state" / "state.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != 1:
            raise CheckpointError(f"{path}: format {values['format']}, this version reads 1")
        return SavedState(
            Progress(**values["progress"]),
            Plan(**values["plan"]),
            int(values["world"]),
            int(values["windows"]),
            values.get("fingerprints", {}),
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: no training state to resume from",
            hint="start the run without --resume, or name its output directory",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: broken: {error}") from None


def restore(context: TrainContext, directory: Path) -> None:
    """Load optimizer, random state, critic and rollout of a checkpoint; the model is already
    loaded. Raises `CheckpointError`, which names the file."""
    parallel, progress = context.parallel, context.progress

    def read(name: str, load: Callable[[dict[str, Tensor]], object]) -> None:
        path = directory / "state" / f"{name}.safetensors"
        try:
            load(load_file(str(path)))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path}: broken or cut short: {one_line(str(error))}") from None

    read("optimizer", context.load_optimizer_tensors)
    if context.critic is not None:
        read("critic", context.critic.load_state_dict)
    if context.rollouts is not None:
        read(f"rollout-{parallel.rank}", context.rollouts.load_state_tensors)
    # Last: nothing may draw between this and the first step.
    seed, step = context.config.seed, progress.step
    read("rng", lambda states: restore_random_state(states, parallel, seed, step))


def check_same_run(
    config: TrainConfig, directory: Path, *, extend: bool = False, extended: bool = False
) -> TrainConfig:
    """The stored configuration, if `config` describes the same run. Raises `CheckpointError` with
    the first key that differs. Keys that `config` leaves open take the stored value, with `extend`
    the length too. A run that was `extended` has one length, whatever others its recipe has."""
    path = directory / "train_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored = TrainConfig.parse(values, source=str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"missing or broken: {disk_error(error, path)}") from None
    requested: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    for key, value in requested.items():
        before = values.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            same = all(before.get(name) == inner for name, inner in value.items())
        else:
            same = value is None or value == before or (key == "size" and value == "auto")
        if key in LENGTHS:
            same = same or extend or (extended and before is None)
        if key not in _FREE and not same:
            raise CheckpointError(
                f"{directory} was trained with {key}={before}, the recipe has {value}",
                hint="resume with the recipe it was started with, or choose another out=",
            )
    changed = {k: v for k, v in config.model_dump(exclude_unset=True).items() if k in _FREE}
    return stored.updated(**changed)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, by its name, or None for another name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def steps(out: Path) -> dict[int, Path]:
    """The checkpoints in an output directory by step, in order."""
    paths = {step: path for path in out.glob("step-*") if (step := step_of(path)) is not None}
    return {step: paths[step] for step in sorted(paths) if paths[step].is_dir()}


def has_checkpoints(out: Path) -> bool:
    """Whether there are checkpoints, or links to some that are gone."""
    names = (name for link in _LINKS for name in (link, f".{link}.new", f".{link}.old"))
    return bool(steps(out)) or any(os.path.lexists(out / name) for name in names)


def rotate(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the targets of last and best. Later ones
    than `last` are not this run's: they stay until it gets there and replaces them."""
    linked = {name: resolve(out / name) for name in _LINKS}
    newest = step_of(linked["last"]) if linked["last"] else None
    mine = [path for step, path in steps(out).items() if newest is None or step <= newest]
    for path in mine[:-keep]:
        if path.resolve() not in linked.values():
            remove_folder(path)
    for pattern in (".step-*.partial", ".step-*.stale"):  # of processes that were killed
        for path in out.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def point(link: Path, target: Path) -> None:
    """Make `link` point at the sibling directory `target`, atomically.

    A symbolic link is replaced by renaming another over it. Windows cannot do that, but a junction
    needs no privilege there: the old one is renamed first, and `resolve` completes the
    swap after a crash between the two renames.
    """
    new = link.with_name(f".{link.name}.new")
    _remove_link(new)
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target.resolve()), str(new))
        swap_by_two_renames(new, link)
    else:
        os.symlink(target.name, new, target_is_directory=True)
        os.replace(new, link)
        sync(link.parent)


def swap_by_two_renames(new: Path, link: Path) -> None:
    old = link.with_name(f".{link.name}.old")
    _remove_link(old)
    if os.path.lexists(link):
        os.rename(link, old)
    os.rename(new, link)
    _remove_link(old)


def resolve(link: Path) -> Path | None:
    """The target of OUT/last or OUT/best, or None; completes a swap that a crash interrupted."""
    if not os.path.lexists(link):
        for name in (f".{link.name}.new", f".{link.name}.old"):
            leftover = link.with_name(name)
            if os.path.lexists(leftover) and leftover.exists():
                os.rename(leftover, link)
                break
        _remove_link(link.with_name(f".{link.name}.old"))
    return link.resolve() if link.exists() else None


def _remove_link(link: Path) -> None:
    if os.path.lexists(link):
        # A junction is removed like an empty directory; its target is untouched.
        os.unlink(link) if link.is_symlink() else os.rmdir(link)


def stored_window(directory: Path) -> int | None:
    """The window a model directory was trained with, or None for a model from elsewhere."""
    try:
        values = json.loads((directory / "train_config.json").read_text(encoding="utf-8"))
        return values.get("window")
    except (OSError, ValueError):
        return None
