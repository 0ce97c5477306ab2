"""The other end of the pool's pipes: one file after the other, parsed under limits."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khaosz.errors import DocumentError
from khaosz.rag.load.document import Document, Found, Limits, Source
from khaosz.rag.load.plain import read_source
from khaosz.rag.load.pool import read_frame, write_frame

if TYPE_CHECKING:
    from khaosz.rag.load.by_docling import DoclingParser
if sys.platform != "win32":
    import resource  # at the top: there is no memory for imports where it is needed

_GRACE_SECONDS = 10.0
_RESERVE_BYTES = 4 << 20
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a parser prints must not get between the frames
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)
    first = read_frame(requests)
    if first is None:
        return
    limits = Limits(**first["limits"])
    limit_memory(limits.memory_bytes)
    # Before sockets and programs are refused: its imports ask what machine this is.
    docling = _docling() if first["docling"] else None
    reserve = [bytearray(_RESERVE_BYTES)]
    sys.addaudithook(_refuse)
    write_frame(replies, {})
    while (request := read_frame(requests)) is not None:
        # Ends this process should the parent be gone, which otherwise ends it at `seconds`.
        _set_alarm(limits.seconds + _GRACE_SECONDS)
        file = Found(Path(request["path"]), request["name"], request["kind"])
        reply = _answer(file, limits, reserve, docling)
        _set_alarm(0)
        write_frame(replies, reply)


def limit_memory(n_bytes: int | None) -> None:
    """The address space, where there is such a limit (see `Limits`); None lifts it again."""
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard if n_bytes is None else n_bytes
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):  # macOS refuses what is below its shared libraries' size
        return


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _refuse(event: str, arguments: object) -> None:
    """A parser has no business with networks and programs, whatever a document says."""
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} in a document loader")


def _docling() -> DoclingParser:
    os.environ["HF_HUB_OFFLINE"] = "1"  # models are on the disk, or missing
    from khaosz.rag.load.by_docling import DoclingParser

    return DoclingParser()


def _answer(
    file: Found, limits: Limits, reserve: list[bytearray], docling: DoclingParser | None
) -> dict[str, Any]:
    """A reply that says "spent" is the last one of this process. `reserve` is memory that is
    given back when there is no other."""
    try:
        source, documents = _load(file, limits, docling)
    except DocumentError as error:
        return {"message": str(error), "code": error.code, "hint": error.hint or ""}
    except MemoryError:
        # What was built is still there, in cycles and in the traceback: no room for an answer.
        reserve.clear()
        limit_memory(None)
        message = f"needs more than {limits.memory_bytes >> 20} MB of memory"
        hint = "split it into smaller files"
        return {"message": message, "code": "too_large", "hint": hint, "spent": True}
    return {
        "source": {**asdict(source), "path": str(source.path)},
        "documents": [asdict(document) for document in documents],
    }


def _load(
    file: Found, limits: Limits, docling: DoclingParser | None
) -> tuple[Source, list[Document]]:
    source, raw = read_source(file.path, file.name, limits.file_bytes)
    try:
        document = _parse(file, raw, limits, docling)
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
    if len(document.text) > limits.text_characters:
        raise DocumentError(
            f"has more than {limits.text_characters:,} characters",
            code="too_large",
            hint="split it",
        )
    if not document.text:
        raise DocumentError(
            "has no text in it", code="no_text", hint="text in pictures needs OCR first"
        )
    return source, [document]


def _parse(file: Found, raw: bytes, limits: Limits, docling: DoclingParser | None) -> Document:
    # Imported here: each is optional, and needed for its own format only.
    match file.kind:
        case "pdf" | "docx" | "pptx" | "xlsx" if docling is not None:
            text, title, pages = docling.parse(raw, file.path.name, file.kind)
        case "html":
            from khaosz.rag.load.html import parse_html

            text, title = parse_html(raw)
            pages = ()
        case "docx":
            from khaosz.rag.load.docx import parse_docx

            text, title = parse_docx(raw, limits)
            pages = ()
        case "pdf":
            from khaosz.rag.load.pdf import parse_pdf

            text, title, pages = parse_pdf(raw)
        case _:
            raise AssertionError(f"{file.kind} is not for a worker")
    metadata = {"format": file.kind} | ({"title": title} if title else {})
    return Document(file.name, text, file.name, pages, metadata)
