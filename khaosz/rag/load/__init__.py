"""Files and folders as documents: text, Markdown, code, JSON Lines, HTML, PDF and DOCX.

    for source, documents in load_paths([Path("notes")], on_problem=print):
        ...

Text is read in this process. Other formats need parsers that an untrusted file can crash, hang or
make use too much memory, so they run in worker processes with limits (`Limits`), started when the
first such file arrives. Nothing is fetched from a network. `formats` is the table of formats.
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from khaosz.errors import DataError, DocumentError
from khaosz.folders import OnSkip
from khaosz.rag.load.document import (
    FOR_DOCLING,
    Document,
    InputFile,
    Limits,
    Loaded,
    OnProblem,
    Problem,
    Source,
)
from khaosz.rag.load.formats import FORMATS, format_of
from khaosz.rag.load.plain import load_plain
from khaosz.rag.load.pool import WorkerPool
from khaosz.rag.load.walk import walk

__all__ = [
    "Document",
    "Limits",
    "Loaded",
    "Problem",
    "Source",
    "WorkerPool",
    "count_files",
    "load_file",
    "load_paths",
]

_LOOK_AHEAD = 64
"""Files that may wait behind one that a worker is reading, so that the other workers are busy."""

Unchanged = Callable[[Path, os.stat_result], bool]


def load_paths(
    paths: Sequence[Path],
    *,
    on_problem: OnProblem,
    unchanged: Unchanged | None = None,
    limits: Limits | None = None,
    docling: bool = False,
    on_skip: OnSkip = lambda skipped: None,
) -> Iterator[Loaded]:
    """Each file that can be read, with its documents (none if it is empty), in a fixed order.

    Files are read as the iterator advances; what cannot be read is passed to `on_problem`, and
    the other files are still read. `unchanged` is called before a file is opened, with its
    resolved path and its size and times; if it returns True, the file is skipped. `docling`: that
    package reads formatted files except HTML (`by_docling`). `on_skip` gets what is left out of a
    folder on purpose.

    Raises DataError, at once, if one of `paths` does not exist or docling is not installed.
    """
    if docling and importlib.util.find_spec("docling") is None:
        raise DataError("docling is not installed", hint="pip install 'khaosz[docling]'")
    limits = limits or (FOR_DOCLING if docling else Limits())
    files = walk(paths, on_problem, docling=docling, on_skip=on_skip)
    return _load(files, on_problem, unchanged, limits, docling)


def load_file(path: Path, name: str, *, pool: WorkerPool, on_problem: OnProblem) -> Loaded:
    """One file as if `name` were its path: `name` says its format and is what citations show.
    `pool` reads what is not read in this process, and has the limits.

    Raises `DocumentError` for a file that cannot be read.
    """
    file = InputFile(path, name, format_of(name) or "text")
    if FORMATS[file.format].in_worker:
        source, documents = pool.submit(file).result()
    else:
        source, documents = load_plain(file, pool.limits, on_problem)
    return replace(source, path=Path(name)), documents


def count_files(paths: Sequence[Path], *, docling: bool = False) -> int:
    """How many files `load_paths` would look at, without opening one."""
    return sum(1 for _ in walk(paths, lambda problem: None, docling=docling))


def _load(
    files: Iterator[InputFile],
    on_problem: OnProblem,
    unchanged: Unchanged | None,
    limits: Limits,
    docling: bool,
) -> Iterator[Loaded]:
    queue: deque[tuple[InputFile, Future[Loaded] | None]] = deque()
    with WorkerPool(limits, docling=docling) as pool:
        for file in files:
            if unchanged and _is_unchanged(file, unchanged):
                continue
            queue.append((file, pool.submit(file) if FORMATS[file.format].in_worker else None))
            while queue and (len(queue) > _LOOK_AHEAD or _is_ready(queue[0][1])):
                yield from _finish(*queue.popleft(), limits, on_problem)
        while queue:
            yield from _finish(*queue.popleft(), limits, on_problem)


def _is_unchanged(file: InputFile, unchanged: Unchanged) -> bool:
    try:
        status = os.stat(file.path)
    except OSError:
        return False  # reading the file reports the error
    return unchanged(file.path, status)


def _is_ready(result: Future[Loaded] | None) -> bool:
    return result is None or result.done()


def _finish(
    file: InputFile, result: Future[Loaded] | None, limits: Limits, on_problem: OnProblem
) -> Iterator[Loaded]:
    try:
        loaded = result.result() if result else load_plain(file, limits, on_problem)
    except DocumentError as error:
        on_problem(Problem(file.path, str(error), error.hint or "", error.code))
    else:
        yield loaded
