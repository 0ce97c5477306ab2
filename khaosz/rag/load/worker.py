"""A worker process of the pool: reads files one after the other, under limits."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khaosz.errors import DocumentError
from khaosz.rag.load.document import Document, InputFile, Limits, Loaded, Parsed
from khaosz.rag.load.formats import FORMATS
from khaosz.rag.load.plain import check_characters, read_source
from khaosz.rag.load.pool import read_frame, write_frame

if TYPE_CHECKING:
    from khaosz.rag.load.by_docling import DoclingParser
if sys.platform != "win32":
    import resource  # at the top: when it is needed, no memory is left for imports

_GRACE_SECONDS = 10.0
_RESERVE_BYTES = 4 << 20
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends us
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a parser prints must not mix with the frames
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)
    first = read_frame(requests)
    if first is None:
        return
    limits = Limits(**first["limits"])
    limit_memory(limits.memory_bytes)
    # Before sockets and programs are refused: its imports inspect the machine.
    docling = _docling() if first["docling"] else None
    reserve = [bytearray(_RESERVE_BYTES)]
    sys.addaudithook(_refuse)
    write_frame(replies, {})
    while (request := read_frame(requests)) is not None:
        # Ends this process if the parent is gone, which would otherwise end it after `seconds`.
        _set_alarm(limits.seconds + _GRACE_SECONDS)
        file = InputFile(Path(request["path"]), request["name"], request["format"])
        reply = _reply(file, limits, reserve, docling)
        _set_alarm(0)
        write_frame(replies, reply)


def limit_memory(n_bytes: int | None) -> None:
    """Limits the address space where the system can (see `Limits`); None lifts the limit."""
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard if n_bytes is None else n_bytes
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):  # macOS refuses less than the size of its shared libraries
        return


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _refuse(event: str, arguments: object) -> None:
    """An audit hook: parsers need no network and no other programs, whatever a document says."""
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} in a document loader")


def _docling() -> DoclingParser:
    os.environ["HF_HUB_OFFLINE"] = "1"  # models are on disk, or missing
    from khaosz.rag.load.by_docling import DoclingParser

    return DoclingParser()


def _reply(
    file: InputFile, limits: Limits, reserve: list[bytearray], docling: DoclingParser | None
) -> dict[str, Any]:
    """A reply with "spent" is the last one of this process. `reserve` is memory to free when no
    other is left."""
    try:
        source, documents = _load(file, limits, docling)
    except DocumentError as error:
        return {"message": str(error), "code": error.code, "hint": error.hint or ""}
    except MemoryError:
        # What was built is still alive, in cycles and in the traceback: no memory for a reply.
        reserve.clear()
        limit_memory(None)
        message = f"needs more than {limits.memory_bytes >> 20} MB of memory"
        hint = "split it into smaller files"
        return {"message": message, "code": "too_large", "hint": hint, "spent": True}
    return {
        "source": {**asdict(source), "path": str(source.path)},
        "documents": [asdict(document) for document in documents],
    }


def _load(file: InputFile, limits: Limits, docling: DoclingParser | None) -> Loaded:
    source, raw = read_source(file.path, file.name, limits.file_bytes)
    try:
        parsed = _parse(file, raw, limits, docling)
    except (DocumentError, MemoryError):
        raise
    except ImportError as error:
        raise DocumentError(
            f"needs the package {error.name}", code="not_read", hint='pip install "khaosz[rag]"'
        ) from error
    except Exception as error:
        raise DocumentError(
            f"cannot be parsed: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            code="damaged",
            hint="it is damaged; open it in its own program and save it again",
        ) from error
    check_characters(parsed.text, limits)
    if not parsed.text:
        raise DocumentError(
            "has no text in it", code="no_text", hint="text in pictures needs OCR first"
        )
    metadata = {"format": file.format} | ({"title": parsed.title} if parsed.title else {})
    return source, [Document(file.name, parsed.text, file.name, parsed.pages, metadata)]


def _parse(file: InputFile, raw: bytes, limits: Limits, docling: DoclingParser | None) -> Parsed:
    row = FORMATS[file.format]
    if docling is not None and row.docling:
        return docling.parse(raw, file.path.name, file.format)
    return row.parse(raw, limits)
