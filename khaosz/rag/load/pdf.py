"""PDF as Markdown headings and paragraphs, by PDFium: pages in order, lines in reading order,
wrapped lines joined."""

from __future__ import annotations

import re

import pypdfium2

from khaosz.errors import DocumentError
from khaosz.rag.load.decode import clean
from khaosz.rag.load.document import Limits, Parsed
from khaosz.rag.load.markdown import escape
from khaosz.rag.load.pdf_lines import (
    Line,
    heading_levels,
    in_reading_order,
    join_lines,
    split_headings,
)

# PDFium writes U+FFFE for a hyphen at a line's end, without the line end.
_LINE = re.compile(r"[^\r\n\ufffe]*(?:\ufffe|\r?\n|\r|$)")
_INLINE_HYPHEN = re.compile(r"\b[^\W\d_]+-[^\W\d_]+\b")
_JUNK = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 0x7F, 0xAD, 0xFEFF, 0xFFFF])


def parse(raw: bytes, limits: Limits) -> Parsed:
    """Raises DocumentError for a file that is not a PDF, damaged or encrypted."""
    try:
        pdf = pypdfium2.PdfDocument(raw)
    except pypdfium2.PdfiumError as error:
        if "assword" in str(error):
            raise DocumentError(
                "is protected by a password",
                code="encrypted",
                hint="save a copy without a password",
            ) from error
        raise DocumentError(
            "is a damaged PDF file, or not a PDF file",
            code="damaged",
            hint="open it in a viewer and print it to PDF",
        ) from error
    try:
        title = " ".join(clean(pdf.get_metadata_value("Title")).split())
        pages = [_lines(pdf, number) for number in range(len(pdf))]
    finally:
        pdf.close()
    compounds = {
        word.lower()
        for page in pages
        for line in page
        for word in _INLINE_HYPHEN.findall(line.text)
    }
    levels = heading_levels(pages)
    text = ""
    offsets = []
    for number, page in enumerate(pages):
        body = _page(page, levels, compounds)
        if body and text:
            text += "\n\n"
        if number:
            offsets.append(len(text))
        text += body
    return Parsed(text, title, tuple(offsets))


def _page(lines: list[Line], levels: dict[float, int], compounds: set[str]) -> str:
    parts = []
    for level, part in split_headings(lines, levels):
        text = join_lines(part, compounds)
        parts.append(f"{'#' * level} {' '.join(text.split())}" if level else escape(text))
    return "\n\n".join(parts)


def _lines(pdf: pypdfium2.PdfDocument, number: int) -> list[Line]:
    """A page's lines in reading order; none for a damaged page."""
    try:
        page = pdf[number]
    except pypdfium2.PdfiumError:
        return []
    textpage = page.get_textpage()
    try:
        text = textpage.get_text_range()
        # Characters outside the basic plane, or without a meaning, shift the indices.
        placed = len(text) == textpage.count_chars() and page.get_rotation() == 0
        lines = []
        for match in _LINE.finditer(text):
            line = clean(match[0].replace("\ufffe", "\u2010")).translate(_JUNK).strip()
            if line:
                start = match.start() + len(match[0]) - len(match[0].lstrip())
                box = _box(textpage, start, match.end() - start) if placed else None
                lines.append(Line(line, *box) if box else Line(line, placed=False))
        return in_reading_order(lines)
    finally:
        textpage.close()
        page.close()


def _box(
    textpage: pypdfium2.PdfTextPage, start: int, length: int
) -> tuple[float, float, float, float, float] | None:
    """Left, bottom, right, top and the widest gap, in points; None if nothing is drawn."""
    rects = sorted(textpage.get_rect(n) for n in range(textpage.count_rects(start, length)))
    if not rects:
        return None
    gap, end = 0.0, rects[0][2]
    for left, _, right, _ in rects[1:]:
        gap = max(gap, left - end)
        end = max(end, right)
    # Rectangles enclose the ink: "mean" is lower than "help". This is the font's own height.
    _, bottom, _, top = textpage.get_charbox(start, loose=True)
    return rects[0][0], bottom, end, top, gap
