"""Which encoding a text file has, and its text as UTF-8 whose damage stays where it was.

UTF-8, strictly (a byte-order mark is tolerated), UTF-16 by its mark, GB18030 when the first
megabyte says so.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

HEAD_BYTES = 1 << 20
"""How much of a file is looked at to tell its encoding."""


def detect_encoding(head: bytes) -> str:
    """ "utf-8", "utf-16" or "gb18030" for a text that begins with `head` (up to `HEAD_BYTES`).

    UTF-8 is so strict that text of another encoding hardly ever passes, so lines vote: when half of
    those that are not plain ASCII are UTF-8, the others are damage. Else the same for GB18030.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if decodes(head, "utf-8", whole=False):
        return "utf-8"
    lines = head.split(b"\n")
    if len(head) >= HEAD_BYTES and len(lines) > 1:
        lines.pop()  # cut somewhere inside
    speaking = [line for line in lines if not line.isascii()]
    whole = len(speaking) > 1
    for encoding in ("utf-8", "gb18030"):
        if 2 * sum(decodes(line, encoding, whole) for line in speaking) > len(speaking):
            return encoding
    return "utf-8"


def decodes(raw: bytes, encoding: str = "utf-8", whole: bool = True) -> bool:
    """Whether `raw` is text; unless it is `whole`, its last character may be cut short."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(raw, whole)
    except UnicodeDecodeError:
        return False
    return True


def decode_chunks(raw: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Text whose undecodable bytes are lone surrogates, which later fails where they stand."""
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
