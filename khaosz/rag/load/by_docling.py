"""PDF, DOCX, PPTX and XLSX by docling (the extra `docling`), for tables in PDF, scans and slides.

It needs two gigabytes and some seconds a page more than our own parsers, so it is used only with
`--docling`. For PDF it needs its models on disk (`docling-tools models download`, and
`DOCLING_ARTIFACTS_PATH`); nothing is fetched here. The other formats need no models.
"""

from __future__ import annotations

from io import BytesIO
from itertools import accumulate
from typing import Any

from docling.datamodel.base_models import DocumentStream
from docling.document_converter import DocumentConverter

from khaosz.errors import DocumentError
from khaosz.rag.load.decode import clean
from khaosz.rag.load.document import Parsed


class DoclingParser:
    """Create one per process: docling keeps its models loaded."""

    def __init__(self) -> None:
        self._converter = DocumentConverter()

    def parse(self, raw: bytes, name: str, format_name: str) -> Parsed:
        """Raises DocumentError for missing models; docling's other errors pass through."""
        stream = DocumentStream(name=name, stream=BytesIO(raw))
        document: Any
        try:
            document = self._converter.convert(stream).document
        except (OSError, PermissionError) as error:  # the hub's errors are OSErrors
            raise DocumentError(
                f"docling has no models for {format_name}: {' '.join(str(error).split())[:200]}",
                code="not_read",
                hint="docling-tools models download, and set DOCLING_ARTIFACTS_PATH",
            ) from error
        # docling's page breaks are not where the pages of slides start.
        numbers = sorted(document.pages) or [None]
        pages = [document.export_to_markdown(page_no=number) for number in numbers]
        bodies = [clean(page).strip() + "\n\n" for page in pages]
        offsets = accumulate(len(body) for body in bodies[:-1])
        return Parsed("".join(bodies).rstrip(), pages=tuple(offsets))
