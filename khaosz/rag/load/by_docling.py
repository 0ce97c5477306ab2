"""PDF, DOCX, PPTX and XLSX by docling (the extra `docling`), for tables in PDF, scans and slides.

It is heavier than our own parsers by two gigabytes and some seconds a page, so it is asked for by
`--docling`. For PDF it needs its models on the disk (`docling-tools models download`, and
`DOCLING_ARTIFACTS_PATH`); nothing is fetched here. What it can read without models it does.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from docling.datamodel.base_models import DocumentStream
from docling.document_converter import DocumentConverter

from khaosz.errors import DocumentError
from khaosz.rag.load.decode import clean


class DoclingParser:
    """Made once in a process: docling then keeps its models."""

    def __init__(self) -> None:
        self._converter = DocumentConverter()

    def parse(self, raw: bytes, name: str, kind: str) -> tuple[str, str, tuple[int, ...]]:
        """(Markdown, title, offsets of pages 2, 3, ...). Raises DocumentError for what it
        can't read; other errors are its own."""
        stream = DocumentStream(name=name, stream=BytesIO(raw))
        found: Any
        try:
            found = self._converter.convert(stream).document
        except (OSError, PermissionError) as error:  # the hub's errors are OSErrors
            raise DocumentError(
                f"docling has no models for {kind}: {' '.join(str(error).split())[:200]}",
                code="not_read",
                hint="docling-tools models download, and set DOCLING_ARTIFACTS_PATH",
            ) from error
        # Its page breaks stand in other places than the pages of slides.
        numbers = sorted(found.pages) or [None]
        pages = [found.export_to_markdown(page_no=number) for number in numbers]
        parts: list[str] = []
        offsets: list[int] = []
        length = 0
        for number, page in enumerate(pages):
            if number:
                offsets.append(length)
            body = clean(page).strip() + ("\n\n" if number + 1 < len(pages) else "")
            parts.append(body)
            length += len(body)
        return "".join(parts).rstrip(), "", tuple(offsets)
