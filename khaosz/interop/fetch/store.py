"""The folder of pulled models: `models/NAME/` with the model's files and `pulled.json`.

A model is downloaded to `models/.pulling/NAME/` and renamed when every file has its hash, so that
nothing incomplete is ever offered. Models of earlier versions are files and folders in `models/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from khaosz.errors import FetchError
from khaosz.files import FolderInUse, default_cache, exclusive, publish, remove_folder, write_json

RECORD = "pulled.json"


def models_folder() -> Path:
    return default_cache() / "models"


@dataclass(frozen=True)
class Record:
    """What was pulled, and from where. `model`: the file to open, "" for the folder itself;
    `files`: SHA-256 by name; `memory`: bytes with 4,096 tokens of context, None if not known."""

    name: str
    reference: str
    source: str
    revision: str | None
    licence: str | None
    model: str
    bytes: int
    files: dict[str, str] = field(default_factory=dict)
    memory: int | None = None

    def path(self, folder: Path) -> Path:
        return folder / self.model if self.model else folder


def read_record(folder: Path) -> Record | None:
    """None where a folder has no record, or not one of ours."""
    try:
        values: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record = Record(**values)
    except (OSError, ValueError, TypeError):
        return None
    return record if isinstance(record.model, str) and record.path(folder).exists() else None


def pulled_models() -> list[Path]:
    """The models in the cache, the one that was pulled last first."""
    times: dict[Path, float] = {}
    folder = models_folder()
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.suffix == ".gguf" and path.is_file() and _is_first(path):
            times[path] = path.stat().st_mtime
        elif record := read_record(path):
            times[record.path(path)] = (path / RECORD).stat().st_mtime
        elif _has_weights(path):
            times[path] = (path / "config.json").stat().st_mtime
    return sorted(times, key=lambda path: times[path], reverse=True)


def _is_first(path: Path) -> bool:
    """Whether a file is whole, or the first part of a split one."""
    return re.search(r"-(?!00001-)\d{5}-of-\d{5}$", path.stem) is None


def pulled_at(path: Path) -> float:
    """When a pulled model was pulled, in seconds as `time.time` has them."""
    for marker in (path.parent / RECORD, path / RECORD, path / "config.json", path):
        if marker.exists():
            return marker.stat().st_mtime
    return 0.0


def record_of(model: Path) -> Record | None:
    """The record of a model's path, which is a folder or a file in it."""
    return read_record(model) if model.is_dir() else read_record(model.parent)


def _has_weights(folder: Path) -> bool:
    """Whether a folder is complete: earlier versions downloaded into it."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
        return bool(names) and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def staging(name: str) -> Iterator[Path]:
    """The locked folder into which a model is downloaded; what an interrupted download left is in
    it. Raises `FetchError` while another process pulls the same model."""
    folder = models_folder() / ".pulling" / name
    try:
        with exclusive(folder):
            yield folder
    except FolderInUse as holder:
        raise FetchError(
            f"{name} is being pulled by {holder}",
            hint="wait for it, or end it",
            code="being_pulled",
        ) from None


def publish_model(stage: Path, record: Record) -> Path:
    """Make the verified files of a staging folder the model `record.name`; one of that name is
    replaced. Returns the model's path."""
    target, ready = models_folder() / record.name, stage / "files"
    for path in sorted(ready.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(ready).as_posix() not in record.files:
            path.unlink()  # of another revision, which was interrupted
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    write_json(ready / RECORD, asdict(record))
    stale = stage / "stale"
    shutil.rmtree(stale, ignore_errors=True)
    if target.exists():
        os.replace(target, stale)
    publish(ready, target)
    _clear(stage)
    return record.path(target)


def staged_bytes(name: str) -> int:
    """What an interrupted pull of this model has received."""
    folder = models_folder() / ".pulling" / name
    parts = [path for path in folder.glob("*") if path.suffix in (".part", ".pip")]
    with suppress(OSError):  # a pull has just ended
        return sum(path.stat().st_size for path in parts)
    return 0


def drop_stage(name: str) -> None:
    """Remove what an interrupted pull left, of another revision if the model is here."""
    if (models_folder() / ".pulling" / name).exists():
        with suppress(FetchError), staging(name) as stage:
            _clear(stage)


def _clear(stage: Path) -> None:
    for left in stage.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left.name != ".lock":
            left.unlink(missing_ok=True)


def touch(folder: Path) -> None:
    """Make a model the one that was pulled last."""
    with suppress(OSError):
        os.utime(folder / RECORD)


def remove_model(model: Path) -> int:
    """Remove a pulled model; returns the bytes that were freed."""
    target = model if model.parent == models_folder() else model.parent
    files = [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else [target]
    freed = sum(path.stat().st_size for path in files)
    if target.is_dir():
        remove_folder(target)
    else:
        target.unlink()
    return freed
