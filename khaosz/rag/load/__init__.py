"""Files and folders as documents: text, Markdown, code, JSON Lines, HTML, PDF and DOCX.

    for source, documents in load_paths([Path("notes")], on_problem=print):
        ...

Text is read in this process. HTML, PDF and DOCX are read by parsers that strangers' files can
crash, hang or swell, so they run in worker processes with limits (`Limits`), which start when the
first such file comes along. Nothing is fetched from a network.
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
from khaosz.rag.load.document import FOR_DOCLING, Document, Found, Limits, Problem, Source
from khaosz.rag.load.plain import load_plain
from khaosz.rag.load.pool import Loaded, WorkerPool
from khaosz.rag.load.walk import OnProblem, kind_of, walk

__all__ = [
    "Document",
    "Limits",
    "Problem",
    "Source",
    "WorkerPool",
    "count_files",
    "load_file",
    "load_paths",
]

_FORMATTED = ("html", "pdf", "docx", "pptx", "xlsx")
_LOOK_AHEAD = 64
"""How many files may wait behind one that a worker is reading, so that the others have work."""


def load_paths(
    paths: Sequence[Path],
    *,
    on_problem: Callable[[Problem], None],
    unchanged: Callable[[Path, os.stat_result], bool] | None = None,
    limits: Limits | None = None,
    docling: bool = False,
) -> Iterator[tuple[Source, list[Document]]]:
    """Each file that could be read, with its documents (none when it is empty), in a fixed order.

    Files are read when they are asked for, and what cannot be read goes to `on_problem` without
    stopping the others. `unchanged` is asked before a file is opened, with its resolved path and
    its size and times; a file for which it says True is passed over. `docling`: formatted files but
    HTML are read by that package (`by_docling`).

    Raises DataError, at once, when one of `paths` does not exist, and when docling does not.
    """
    if docling and importlib.util.find_spec("docling") is None:
        raise DataError("docling is not installed", hint="pip install 'khaosz[docling]'")
    limits = limits or (FOR_DOCLING if docling else Limits())
    files = walk(paths, on_problem, docling=docling)
    return _load(files, on_problem, unchanged, limits, docling)


def load_file(path: Path, name: str, *, pool: WorkerPool, on_problem: OnProblem) -> Loaded:
    """One file as if `name` were its path: that says of what kind it is, and what cites it shows
    it. `pool` reads what is not read in this process, and has the limits.

    Raises `DocumentError` for what cannot be read.
    """
    file = Found(path, name, kind_of(name) or "text")
    if file.kind in _FORMATTED:
        source, documents = pool.submit(file).result()
    else:
        source, documents = load_plain(file, pool.limits, on_problem)
    return replace(source, path=Path(name)), documents


def count_files(paths: Sequence[Path], *, docling: bool = False) -> int:
    """How many files `load_paths` would look at, without opening one."""
    return sum(1 for _ in walk(paths, lambda problem: None, docling=docling))


def _load(
    files: Iterator[Found],
    on_problem: OnProblem,
    unchanged: Callable[[Path, os.stat_result], bool] | None,
    limits: Limits,
    docling: bool,
) -> Iterator[tuple[Source, list[Document]]]:
    waiting: deque[tuple[Found, Future[Loaded] | None]] = deque()
    with WorkerPool(limits, docling=docling) as pool:
        for file in files:
            if unchanged and _is_unchanged(file, unchanged):
                continue
            waiting.append((file, pool.submit(file) if file.kind in _FORMATTED else None))
            while waiting and (len(waiting) > _LOOK_AHEAD or _is_ready(waiting[0][1])):
                yield from _finish(*waiting.popleft(), limits, on_problem)
        while waiting:
            yield from _finish(*waiting.popleft(), limits, on_problem)


def _is_unchanged(file: Found, unchanged: Callable[[Path, os.stat_result], bool]) -> bool:
    try:
        status = os.stat(file.path)
    except OSError:
        return False  # reading it will say what is wrong
    return unchanged(file.path, status)


def _is_ready(result: Future[Loaded] | None) -> bool:
    return result is None or result.done()


def _finish(
    file: Found, result: Future[Loaded] | None, limits: Limits, on_problem: OnProblem
) -> Iterator[Loaded]:
    try:
        loaded = result.result() if result else load_plain(file, limits, on_problem)
    except DocumentError as error:
        on_problem(Problem(file.path, str(error), error.hint or "", error.code))
    else:
        yield loaded
