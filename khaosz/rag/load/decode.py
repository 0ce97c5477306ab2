"""Bytes of a document to text, if they are text; `khaosz.data.records.charset` detects how."""

from __future__ import annotations

from khaosz.data.records.charset import Detected, decode_bytes
from khaosz.errors import DocumentError

_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_BINARY_HEAD = 8000
"""Git's rule: a NUL among the first 8000 bytes means binary."""
_SAMPLE = 1 << 16


def decode(raw: bytes) -> tuple[str, Detected]:
    """(text, encoding); bytes that are not valid become U+FFFD. Raises DocumentError for bytes that
    are not text."""
    text, found = decode_bytes(raw)
    wide = found.encoding.startswith(("utf-16", "utf-32"))
    head = text[:_SAMPLE]
    controls = sum(map(head.count, map(chr, _CONTROLS)))
    if controls * 20 > len(head) or (b"\0" in raw[:_BINARY_HEAD] and not wide):
        raise DocumentError(
            "is not text but binary data", code="not_text", hint="convert it to text or PDF first"
        )
    if text.count("\ufffd") * 20 > len(text):
        raise DocumentError(
            "is not text in a known encoding", code="not_text", hint="save it as UTF-8"
        )
    return clean(text), found


def clean(text: str) -> str:
    """With "\\n" for "\\r\\n", without byte order mark and NUL, surrogates paired or U+FFFD."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\0", "")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
