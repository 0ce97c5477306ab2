"""DOCX as Markdown: unpacked under limits, converted to HTML by mammoth, written as HTML is.

Only the XML parts are unpacked, and mammoth reads these from a new container: limits apply to what
the decompressor returns, whatever the headers say, and pictures are never unpacked. ECMA-376 part 2
forbids document type declarations in a package, so a part with one is refused, which excludes all
attacks by entities.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from xml.parsers import expat

import mammoth

from khaosz.errors import DocumentError
from khaosz.rag.load.decode import clean
from khaosz.rag.load.document import Limits, Parsed
from khaosz.rag.load.html import html_to_markdown
from khaosz.rag.load.plain import size_text

_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_CHUNK = 1 << 16
_RATIO_FROM = 1 << 20
# In addition to mammoth's: titles, and headings of programs that translate style names.
_STYLES = "\n".join(
    [
        "p[style-name='Title'] => h1:fresh",
        "p[style-name='标题'] => h1:fresh",
        *(f"p[style-name='标题 {level}'] => h{level}:fresh" for level in range(1, 7)),
        *(f"p[style-name='標題 {level}'] => h{level}:fresh" for level in range(1, 7)),
    ]
)
_DC_TITLE = "http://purl.org/dc/elements/1.1/ title"


def parse(raw: bytes, limits: Limits) -> Parsed:
    """Raises DocumentError for a container that is damaged, unsafe or too large."""
    if raw.startswith(_OLE):
        raise DocumentError(
            "is protected by a password, or an old .doc file",
            code="encrypted",
            hint="save it as a plain .docx",
        )
    try:
        parts = _unpack(raw, limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _damaged(error) from error
    if not any(name.lstrip("/") == "[Content_Types].xml" for name in parts):
        raise DocumentError(
            "is a ZIP file, but not a DOCX document",
            code="wrong_kind",
            hint="unpack it and add the folder",
        )
    title = ""
    for name, part in parts.items():
        part_title = _check_xml(name, part, limits.xml_depth)
        if name.lower().endswith("docprops/core.xml"):
            title = " ".join(clean(part_title).split())
    html = mammoth.convert_to_html(
        _pack(parts), style_map=_STYLES, convert_image=_no_image, external_file_access=False
    )
    return Parsed(html_to_markdown(html.value).text, title)


def _damaged(reason: object) -> DocumentError:
    hint = "open it in Word and save it again"
    return DocumentError(f"is a damaged DOCX file: {reason}", code="damaged", hint=hint)


def _no_image(image: object) -> list[object]:
    return []


def _unpack(raw: bytes, limits: Limits) -> dict[str, bytes]:
    """The XML parts by name."""
    parts: dict[str, bytes] = {}
    left = limits.unpacked_bytes
    with zipfile.ZipFile(io.BytesIO(raw)) as container:
        entries = container.infolist()
        if len(entries) > limits.entries:
            raise DocumentError(
                f"unpacks to {len(entries):,} files; at most {limits.entries:,} are allowed",
                code="too_large",
            )
        for entry in entries:
            if not entry.filename.lower().endswith((".xml", ".rels")):
                continue
            if entry.flag_bits & 1:
                raise DocumentError(
                    "is protected by a password", code="encrypted", hint="save it without one"
                )
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # Part 2 allows only these; Python's bzip2 and LZMA unpack without a bound.
                raise DocumentError(
                    "is compressed by a method that DOCX does not allow", code="unsafe"
                )
            parts[entry.filename] = part = _unpack_part(container, entry, left, limits)
            left -= len(part)
    return parts


def _unpack_part(
    container: zipfile.ZipFile, entry: zipfile.ZipInfo, maximum: int, limits: Limits
) -> bytes:
    part = bytearray()
    packed = max(1, entry.compress_size)
    with container.open(entry) as stream:
        while chunk := stream.read(_CHUNK):
            part += chunk
            if len(part) > maximum:
                raise DocumentError(
                    f"unpacks to more than {size_text(limits.unpacked_bytes)}", code="too_large"
                )
            if len(part) > _RATIO_FROM and len(part) > limits.ratio * packed:
                raise DocumentError(
                    f"unpacks to more than {limits.ratio} times its size",
                    code="unsafe",
                    hint="it may be an attack; save it again in Word",
                )
    return bytes(part)


def _check_xml(name: str, part: bytes, max_depth: int) -> str:
    """The text of its `dc:title`. Raises DocumentError for a document type declaration, for XML
    that is too deep, and for damage."""
    parser = expat.ParserCreate(namespace_separator=" ")
    title: list[str] = []
    depth = 0
    in_title = False

    def start(tag: str, attributes: object) -> None:
        nonlocal depth, in_title
        depth += 1
        in_title = tag == _DC_TITLE
        if depth > max_depth:
            raise DocumentError(f"nests more than {max_depth} elements in {name}", code="unsafe")

    def end(tag: str) -> None:
        nonlocal depth, in_title
        depth -= 1
        in_title = False

    def doctype(*declaration: object) -> None:
        raise DocumentError(
            f"declares a document type in {name}, which DOCX forbids",
            code="unsafe",
            hint="it may be an attack; save it again in Word",
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = doctype
    parser.CharacterDataHandler = lambda text: title.append(text) if in_title else None
    try:
        parser.Parse(part, True)
    except expat.ExpatError as error:
        raise _damaged(f"{name}: {error}") from error
    return "".join(title)


def _pack(parts: dict[str, bytes]) -> io.BytesIO:
    """The parts in a container, not compressed."""
    container = io.BytesIO()
    with zipfile.ZipFile(container, "w", zipfile.ZIP_STORED) as writer:
        for name, part in parts.items():
            writer.writestr(name, part)
    container.seek(0)
    return container
