"""Text, Markdown, source code and JSON Lines: the formats that are read without a worker."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import IO, Any

from khaosz.data.records.readers import Skip, parse_line
from khaosz.errors import DocumentError
from khaosz.rag.load.decode import clean, decode
from khaosz.rag.load.document import (
    Document,
    InputFile,
    Limits,
    Loaded,
    OnProblem,
    Problem,
    Source,
)

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


def read_source(path: Path, name: str, limit: int) -> tuple[Source, bytes]:
    """A file and its bytes. Raises DocumentError if there are more than `limit` of them, and if
    the file cannot be read."""
    try:
        # Not blocking: the file may have become a pipe in the meantime, without a writer.
        with open(os.open(path, _FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DocumentError("is neither a file nor a folder", code="wrong_kind")
            raw = _read(file, status.st_size, limit) if status.st_size <= limit else None
    except OSError as error:
        raise DocumentError(
            f"cannot be read: {(error.strerror or str(error)).lower()}", code="not_read"
        ) from error
    if raw is None or len(raw) > limit:
        raise DocumentError(
            f"is larger than {size_text(limit)}",
            code="too_large",
            hint="split it into smaller files",
        )
    digest = hashlib.sha256(raw).hexdigest()
    return Source(path, name, len(raw), status.st_mtime_ns, digest), raw


def _read(file: IO[bytes], expected: int, limit: int) -> bytes:
    """Not `read(limit)`, which allocates that much memory however small the file is."""
    raw = file.read(expected + 1)
    while expected < len(raw) <= limit and (more := file.read(1 << 20)):
        raw += more  # the file grows while it is read
    return raw


def size_text(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MB" if n_bytes >= 1 << 20 else f"{n_bytes} bytes"


def check_characters(text: str, limits: Limits) -> None:
    if len(text) > limits.text_characters:
        raise DocumentError(
            f"has more than {limits.text_characters:,} characters",
            code="too_large",
            hint="split it",
        )


def load_plain(file: InputFile, limits: Limits, on_problem: OnProblem) -> Loaded:
    """Raises DocumentError for a file of which nothing can be used."""
    source, raw = read_source(file.path, file.name, limits.file_bytes)
    text, found = decode(raw)
    check_characters(text, limits)
    if file.format == "jsonl":
        return source, _jsonl_documents(file, text, on_problem)
    if not text or text.isspace():
        return source, []
    metadata = {"format": file.format}
    if found.encoding != "utf-8":
        metadata["encoding"] = str(found)
    return source, [Document(file.name, text, file.name, metadata=metadata)]


def _jsonl_documents(file: InputFile, text: str, on_problem: OnProblem) -> list[Document]:
    documents: dict[str, Document] = {}
    skipped: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        record = parse_line(line.encode("utf-8"))
        document = record if isinstance(record, Skip) else _document(record, file, number)
        if isinstance(document, Skip):
            skipped.append(f"line {number}: {document.reason}")
        elif document.name in documents:
            skipped.append(f"line {number}: the id of an earlier line")
        else:
            documents[document.name] = document
    if skipped:
        count = len(skipped)
        lines = "1 line is not a document" if count == 1 else f"{count} lines are not documents"
        hint = 'each line is a JSON object with a "text" and, for citations, an "id"'
        on_problem(Problem(file.path, f"{lines}; {skipped[0]}", hint))
    return list(documents.values())


def _document(record: dict[str, Any], file: InputFile, number: int) -> Document | Skip:
    text = record.get("text")
    if not isinstance(text, str):
        return Skip('no "text"' if text is None else '"text" is not a string')
    text = clean(text)
    if not text or text.isspace():
        return Skip('an empty "text"')
    record_id = record.get("id")
    # In Python a bool is an int.
    has_id = isinstance(record_id, str | int) and not isinstance(record_id, bool)
    has_id = has_id and record_id != ""
    line_id = clean(str(record_id)) if has_id else str(number)
    name = f"{file.name}#{line_id}"
    metadata = {
        clean(key): clean(value)
        for key, value in record.items()
        if isinstance(value, str) and key not in ("text", "id", "format")
    }
    metadata["format"] = "jsonl"
    return Document(name, text, line_id if has_id else name, metadata=metadata, line=number)
