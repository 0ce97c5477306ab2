"""Documents, the files they come from, problems with files, and limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from khaosz.errors import DocumentCode


@dataclass(frozen=True)
class Document:
    """A text that can be split, indexed and cited.

    `name` is the path relative to the folder that was added (with "/"), or the file's name; for a
    line of a JSONL file, that name, "#" and the line's `id` (or its number).
    `text` is Markdown for HTML, DOCX and PDF, else the file's own text with "\\r\\n" as "\\n" and
    without byte order mark, NUL and lone surrogates.
    `doc_id` is a JSONL line's `id`, otherwise `name`.
    `pages` are the character offsets at which pages 2, 3, ... of a PDF start.
    `metadata` always has "format" (a key of `formats.FORMATS`), and "title" if the file has one.
    `line` is that of a record in its JSONL file, from 1.
    """

    name: str
    text: str
    doc_id: str
    pages: tuple[int, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Source:
    """A file as it was when it was read. `path` is absolute, with symbolic links resolved.

    `size` (bytes) and `mtime_ns` are taken before the first byte is read, so that a file that
    changes meanwhile counts as changed the next time. `sha256` (hexadecimal) is of the bytes read.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Why a file (or part of it) was not read: one line, and what to do about it. `code` is the
    reason as a stable word."""

    path: Path
    message: str
    hint: str = ""
    code: DocumentCode | None = None


OnProblem = Callable[[Problem], None]


@dataclass(frozen=True)
class InputFile:
    """A file to read; `format` is a key of `formats.FORMATS`."""

    path: Path
    name: str
    format: str


Loaded = tuple[Source, list[Document]]


class Parsed(NamedTuple):
    """What a reader makes of a file; `pages` as in `Document`."""

    text: str
    title: str = ""
    pages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """What a file may cost; a file that needs more is a Problem.

    | limit                              | Linux | macOS | Windows |
    |------------------------------------|-------|-------|---------|
    | `file_bytes`, every format         | yes   | yes   | yes     |
    | `text_characters`, every format    | yes   | yes   | yes     |
    | `unpacked_bytes`, `entries`, `ratio`, `xml_depth` (DOCX) | yes | yes | yes |
    | `seconds` (HTML, PDF, DOCX)        | yes   | yes   | yes     |
    | `memory_bytes` (HTML, PDF, DOCX)   | yes   | no    | no      |

    `seconds` is wall-clock time per file, after which the parent kills the worker. `memory_bytes`
    is the worker's address space (`RLIMIT_AS`), including the interpreter's own 100 MB; macOS
    accepts that call without enforcing it, and Windows has none. There the other limits bound
    memory: an HTML page takes about thirty times its size, a DOCX file about fifty times its XML.
    `ratio` is bytes out per byte in, for parts of more than a megabyte.

    docling (`--docling`) loads PyTorch in the worker: `FOR_DOCLING` allows more of both.
    """

    file_bytes: int = 256 << 20
    text_characters: int = 128 << 20
    seconds: float = 120.0
    memory_bytes: int = 2 << 30
    unpacked_bytes: int = 256 << 20
    entries: int = 10_000
    ratio: int = 250
    xml_depth: int = 256
    workers: int = 2


FOR_DOCLING = Limits(seconds=600.0, memory_bytes=64 << 30, workers=1)
"""Address space, of which compiled libraries reserve much more than they use."""
