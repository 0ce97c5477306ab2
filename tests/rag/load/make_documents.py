"""PDF and DOCX files for tests, written byte by byte."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from khaosz.rag.load import Document, Limits, Problem, Source, load_paths

# x and y of a line in points, the line, and its letter size if not that of the page.
Placed = tuple[float, float, str] | tuple[float, float, str, float]

_W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_CONTENT_TYPES = (
    '<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/'
    'content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.'
    'relationships+xml"/><Default Extension="xml" ContentType="application/xml"/><Override '
    'PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
    'wordprocessingml.document.main+xml"/></Types>'
)
_RELS = (
    '<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/'
    'relationships"><Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/'
    '2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>'
)
_STYLES = (
    f'<w:styles xmlns:w="{_W}">'
    '<w:style w:type="paragraph" w:styleId="1"><w:name w:val="heading 1"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="2"><w:name w:val="标题 2"/></w:style>'
    '<w:style w:type="paragraph" w:styleId="T"><w:name w:val="Title"/></w:style></w:styles>'
)
_NUMBERING = (
    f'<w:numbering xmlns:w="{_W}"><w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0">'
    '<w:numFmt w:val="bullet"/></w:lvl></w:abstractNum><w:num w:numId="1">'
    '<w:abstractNumId w:val="0"/></w:num></w:numbering>'
)


def load(
    *paths: Path, limits: Limits | None = None
) -> tuple[dict[str, tuple[Source, list[Document]]], list[Problem]]:
    """(source, documents) by file name, and the problems."""
    problems: list[Problem] = []
    loaded = {}
    for source, documents in load_paths(paths, on_problem=problems.append, limits=limits):
        assert source.name not in loaded
        loaded[source.name] = (source, documents)
    return loaded, problems


def load_one(path: Path, limits: Limits | None = None) -> Document:
    """The only document of a file that is read without a problem."""
    loaded, problems = load(path, limits=limits)
    assert not problems
    ((_, (document,)),) = loaded.values()
    return document


def problem_of(path: Path, limits: Limits | None = None) -> Problem:
    """The problem of a file that is not read."""
    loaded, (problem,) = load(path, limits=limits)
    assert not loaded
    assert problem.path == path and "\n" not in problem.message + problem.hint
    return problem


def write_docx(
    path: Path,
    body: str,
    more: Mapping[str, str | bytes] | None = None,
    compression: int = zipfile.ZIP_DEFLATED,
    prolog: str = '<?xml version="1.0" encoding="UTF-8"?>',
) -> Path:
    """`body` is WordprocessingML; `more` are parts to add or replace."""
    document = (
        f'{prolog}<w:document xmlns:w="{_W}" xmlns:r="http://schemas.openxmlformats.org/'
        'officeDocument/2006/relationships" xmlns:a="http://schemas.openxmlformats.org/drawingml/'
        '2006/main" xmlns:wp="http://schemas.openxmlformats.org/drawingml/2006/'
        'wordprocessingDrawing" xmlns:pic="http://schemas.openxmlformats.org/drawingml/2006/'
        f'picture"><w:body>{body}</w:body></w:document>'
    )
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": _CONTENT_TYPES,
        "_rels/.rels": _RELS,
        "word/document.xml": document,
        "word/styles.xml": _STYLES,
        "word/numbering.xml": _NUMBERING,
    }
    with zipfile.ZipFile(path, "w", compression) as container:
        for name, part in (parts | dict(more or {})).items():
            container.writestr(name, part)
    return path


def word(text: str, style: str = "", number: bool = False) -> str:
    """A paragraph in WordprocessingML."""
    properties = f'<w:pStyle w:val="{style}"/>' if style else ""
    if number:
        properties += '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>'
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{escape(text)}</w:t></w:r></w:p>"


def pdf_bytes(pages: Sequence[Sequence[Placed]], title: str = "", size: float = 12) -> bytes:
    """A PDF with lines of text, Latin in Helvetica and Chinese in a font without glyphs whose
    ToUnicode map names the characters, as in any PDF of Chinese text."""
    objects: dict[int, bytes] = {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        4: b"<< /Type /Font /Subtype /Type0 /BaseFont /Song /Encoding /Identity-H"
        b" /DescendantFonts [5 0 R] /ToUnicode 6 0 R >>",
        5: b"<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Song /DW 1000 /CIDSystemInfo"
        b" << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> /FontDescriptor 8 0 R >>",
        6: _stream(_to_unicode({c for page in pages for _, _, line, *_ in page for c in line})),
        7: b"<< /Title <" + ("\ufeff" + title).encode("utf-16-be").hex().encode() + b"> >>",
        8: b"<< /Type /FontDescriptor /FontName /Song /Flags 4 /FontBBox [0 -200 1000 800]"
        b" /ItalicAngle 0 /Ascent 800 /Descent -200 /CapHeight 700 /StemV 80 >>",
    }
    kids = []
    for page in pages:
        number = max(objects) + 1
        kids.append(b"%d 0 R" % number)
        objects[number] = (
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R /F2 4 0 R >> >> >>" % (number + 1)
        )
        objects[number + 1] = _stream(
            b"\n".join(_drawn(*line[:3], *line[3:] or (size,)) for line in page)
        )
    objects[2] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(kids))
    return pdf_file(objects, b"/Info 7 0 R")


def pdf_file(objects: Mapping[int, bytes], trailer: bytes = b"") -> bytes:
    """Objects by number as a file; number 1 is the catalog."""
    out = io.BytesIO(b"%PDF-1.7\n")
    out.seek(0, io.SEEK_END)
    offsets = {}
    for number, body in sorted(objects.items()):
        offsets[number] = out.tell()
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start, size = out.tell(), max(objects) + 1
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % size)
    for number in range(1, size):
        out.write(b"%010d 00000 n \n" % offsets[number])
    out.write(
        b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, start)
    )
    return out.getvalue()


def _stream(content: bytes) -> bytes:
    return b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)


def _drawn(x: float, y: float, line: str, size: float) -> bytes:
    if line.isascii():
        escaped = "".join("\\" + c if c in "()\\" else c for c in line)
        return f"BT /F1 {size} Tf {x} {y} Td ({escaped}) Tj ET".encode()
    return f"BT /F2 {size} Tf {x} {y} Td <{line.encode('utf-16-be').hex()}> Tj ET".encode()


def _to_unicode(characters: set[str]) -> bytes:
    codes = sorted(c.encode("utf-16-be").hex() for c in characters)
    lines = [f"{len(codes)} beginbfchar", *(f"<{code}> <{code}>" for code in codes), "endbfchar"]
    return "\n".join(
        [
            "/CIDInit /ProcSet findresource begin 12 dict begin begincmap",
            "/CMapName /U def /CMapType 2 def",
            "1 begincodespacerange <0000> <ffff> endcodespacerange",
            *lines,
            "endcmap end end",
        ]
    ).encode()
