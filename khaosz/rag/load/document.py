"""What loading gives: documents, the files they came from, and the files that gave none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from khaosz.errors import DocumentCode

Kind = Literal["text", "markdown", "code", "jsonl", "html", "pdf", "docx", "pptx", "xlsx"]


@dataclass(frozen=True)
class Document:
    """A text that can be split, indexed and cited.

    `name` is the path relative to the folder that was added (with "/"), or the file's name; for a
    line of a JSONL file that, "#" and the line's `id` (its number when it has none).
    `text` is Markdown for HTML and DOCX, paragraphs for PDF, and the file's own text else: only
    "\\r\\n" became "\\n", and there is no byte-order mark, no NUL and no lone surrogate in it.
    `doc_id` is a JSONL line's `id`, otherwise `name`.
    `pages` are the character offsets at which pages 2, 3, ... of a PDF begin.
    `metadata` always has "format" (a `Kind`), and "title" when the file says so.
    """

    name: str
    text: str
    doc_id: str
    pages: tuple[int, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A file as it was when it was read. `path` is absolute and has no symbolic links in it.

    `size` in bytes and `mtime_ns` were taken before the first byte was read, so that a file that
    changes meanwhile looks changed the next time. `sha256` (hexadecimal) is of the bytes read.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Why a file (or part of it) gave no document: one line, and what to do about it. `code`: why
    reading it failed, in a word that stays."""

    path: Path
    message: str
    hint: str = ""
    code: DocumentCode | None = None


@dataclass(frozen=True)
class Found:
    """A file that is going to be read."""

    path: Path
    name: str
    kind: Kind


@dataclass(frozen=True)
class Limits:
    """What a file may cost; one that needs more is a Problem.

    | limit                              | Linux | macOS | Windows |
    |------------------------------------|-------|-------|---------|
    | `file_bytes`, every format         | yes   | yes   | yes     |
    | `text_characters`, every format    | yes   | yes   | yes     |
    | `unpacked_bytes`, `entries`, `ratio`, `xml_depth` (DOCX) | yes | yes | yes |
    | `seconds` (HTML, PDF, DOCX)        | yes   | yes   | yes     |
    | `memory_bytes` (HTML, PDF, DOCX)   | yes   | no    | no      |

    `seconds` is wall-clock time per file, after which the parent kills the worker. `memory_bytes`
    is the worker's address space (`RLIMIT_AS`), the interpreter's own 100 MB included; macOS takes
    that call without holding to it, and Windows has none. There the other limits bound memory:
    an HTML page takes about thirty times its size, a DOCX file about fifty times its XML.
    `ratio` is bytes out per byte in, for parts of more than a megabyte.

    docling (`--docling`) brings PyTorch into the worker: `FOR_DOCLING` gives it more of both.
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
"""Address space, of which compiled libraries take much more than they use."""
