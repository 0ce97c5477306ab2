"""The models that generate text: those of the catalogue, and the files on this machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from khaosz.errors import FetchError, KhaoszError, one_line
from khaosz.inference.generator import chat_memory
from khaosz.interop.fetch.catalogue import Entry, catalogue
from khaosz.interop.fetch.elsewhere import models_elsewhere
from khaosz.interop.fetch.pull import entry_path
from khaosz.interop.fetch.sources import sources
from khaosz.interop.fetch.store import pulled_models, record_of, staged_bytes
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.interop.local_models import trained_models
from khaosz.interop.models import default_name, open_model
from khaosz.interop.retrieval import is_encoder

Origin = Literal["catalogue", "pulled", "trained", "ollama", "lmstudio", "hub"]


@dataclass(frozen=True)
class Row:
    """`memory`: bytes with 4,096 tokens of context, None if the file cannot be read, for the reason
    `problem`; without keys and values unless `memory_is_whole`. `path`: None for a model that is
    not here; then `staged` bytes of it are, and `sources` can have it."""

    name: str
    origin: Origin
    bytes: int
    path: Path | None
    entry: Entry | None = None
    memory: int | None = None
    memory_is_whole: bool = True
    problem: str | None = None
    staged: int = 0
    sources: tuple[str, ...] = ()


def rows(runs: Path, source: str | None) -> list[Row]:
    """The catalogue in its order, then trained models below `runs`, other pulled ones, and files of
    other programs. `source`: as `pull` takes it. Reads headers of files; sends no request."""
    try:
        labelled = sources(source)
    except FetchError:  # huggingface_hub is not installed, as a pull will say
        labelled = []
    known = [_of_entry(entry, labelled) for entry in catalogue().values() if _writes(entry)]
    paths = {row.path for row in known}
    local = [row for row in _local(runs) if row is not None and row.path not in paths]
    return [*known, *{row.name: row for row in reversed(local)}.values()]


def _writes(entry: Entry) -> bool:
    writes = entry.kind in ("chat", "translation")
    return writes and bool(entry.file) and entry.architecture in ARCHITECTURES


def _of_entry(entry: Entry, labelled: list[object]) -> Row:
    path = entry_path(entry)
    return Row(
        entry.name,
        "catalogue",
        entry.bytes,
        path,
        entry,
        entry.memory,
        entry.cache_mb is not None,
        staged=0 if path else min(entry.bytes, staged_bytes(entry.name)),
        sources=tuple(each.label for each in labelled if each.carries(entry)),  # type: ignore[attr-defined]
    )


def _local(runs: Path) -> Iterator[Row | None]:
    for path in trained_models(runs):
        stage = path.parent.relative_to(runs).as_posix()
        yield _of_file(stage if stage != "." else default_name(path), "trained", path)
    for path in pulled_models():
        record = record_of(path)
        yield _of_file(record.reference if record else default_name(path), "pulled", path)
    for name, path in models_elsewhere().items():
        origin: Origin = name.partition("/")[0]  # type: ignore[assignment]
        yield _of_file(name, origin, path)


def _of_file(name: str, origin: Origin, path: Path) -> Row | None:
    """None for an encoder."""
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
    stats = [each.stat() for each in files]
    modified = max((each.st_mtime for each in stats), default=0.0)
    row = Row(name, origin, sum(each.st_size for each in stats), path)
    memory, problem = _memory(path, row.bytes, modified)
    return None if memory == 0 else replace(row, memory=memory, problem=problem)


@functools.lru_cache(256)
def _memory(path: Path, size: int, modified: float) -> tuple[int | None, str | None]:
    """What a file needs, 0 for an encoder, or why it can't be used; of this size and time."""
    try:
        if is_encoder(path):
            return 0, None
        return chat_memory(open_model(path))[0].total, None
    except (KhaoszError, OSError) as error:
        return None, one_line(str(error).removeprefix(f"{path}: "))
