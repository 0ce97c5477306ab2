"""Detects the encoding of a text file and decodes it, keeping damaged bytes in place.

Strict UTF-8 (with or without a byte order mark), UTF-16 (detected by its byte order mark), and
GB18030 (detected from the first megabyte).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

HEAD_BYTES = 1 << 20
"""How much of a file is read to detect its encoding."""


def detect_encoding(head: bytes) -> str:
    """ "utf-8", "utf-16" or "gb18030" for a text that begins with `head` (up to `HEAD_BYTES`).

    Text of another encoding is hardly ever valid UTF-8, so lines vote: when more than half of those
    that are not ASCII are UTF-8, the others are damaged. Otherwise the same for GB18030.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if decodes(head, "utf-8", whole=False):
        return "utf-8"
    lines = head.split(b"\n")
    if len(head) >= HEAD_BYTES and len(lines) > 1:
        lines.pop()  # may be cut short
    voting = [line for line in lines if not line.isascii()]
    whole = len(voting) > 1
    for encoding in ("utf-8", "gb18030"):
        if 2 * sum(decodes(line, encoding, whole) for line in voting) > len(voting):
            return encoding
    return "utf-8"


def decodes(raw: bytes, encoding: str = "utf-8", whole: bool = True) -> bool:
    """Whether `raw` is valid text; unless `whole`, its last character may be cut short."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(raw, whole)
    except UnicodeDecodeError:
        return False
    return True


def decode_chunks(raw: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Decode; invalid bytes become lone surrogates, so that only their record fails later."""
    errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"
    name = "utf-8-sig" if encoding == "utf-8" else encoding
    decoder = codecs.getincrementaldecoder(name)(errors=errors)
    for chunk in raw:
        if text := decoder.decode(chunk):
            yield text
    try:
        text = decoder.decode(b"", final=True)
    except UnicodeDecodeError:  # half a UTF-16 character
        text = "\udcff"
    if text:
        yield text
