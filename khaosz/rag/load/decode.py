"""Bytes to text, if they are text: UTF-8, UTF-16, GB18030, Big5, Windows-1252.

`khaosz.data.records.charset` tells UTF-8 from GB18030 for corpora of megabytes, where a damaged
line is skipped. Documents are short and whole, so here the other encodings of Chinese and English
files are detected too, and damage becomes U+FFFD.
"""

from __future__ import annotations

import codecs
import re

from khaosz.data.records.charset import HEAD_BYTES, detect_encoding
from khaosz.errors import DocumentError

# The most common characters of Chinese, simplified and traditional, with the most common
# punctuation: about four in ten characters of any running text. Text that was decoded wrongly has
# almost none of them.
_COMMON = (
    "，。、的一是在不了有和人這这中大為为上個个國国我以要他時时來来用們们生到作地於于出就分對对成會会"
    "可主發发年動动同工也能下過过子說说產产種种面而方後后多定行學学法所民得經经"
)
_HAN = re.compile("[\u3400-\u9fff]")
_ASCII = re.compile(r"[\t\n\r -~]")
_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_BINARY_HEAD = 8000
"""Git's rule: a NUL among the first 8000 bytes means binary."""
_SAMPLE = 1 << 16


def decode(raw: bytes) -> tuple[str, str]:
    """(text, encoding). Raises DocumentError for bytes that are not text."""
    text, encoding = _decode(raw)
    if text.count("\ufffd") * 20 > len(text):
        raise DocumentError(
            "is not text in a known encoding", code="not_text", hint="save it as UTF-8"
        )
    return clean(text), encoding


def clean(text: str) -> str:
    """With "\\n" for "\\r\\n", without byte order mark and NUL, surrogates paired or U+FFFD."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\0", "")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _decode(raw: bytes) -> tuple[str, str]:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _refuse_controls(raw.decode("utf-16", "replace")), "utf-16"
    if b"\0" in raw[:_BINARY_HEAD]:
        return _utf16_without_bom(raw)
    head = raw[:_SAMPLE]
    if (len(head) - len(head.translate(None, _CONTROLS))) * 20 > len(head):
        raise _binary()
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    if detect_encoding(raw[:HEAD_BYTES]) == "utf-8" and _mostly_utf8(raw):
        return raw.decode("utf-8", "replace"), "utf-8"
    encoding = _legacy(raw[:_SAMPLE])
    return raw.decode(encoding, "replace"), encoding


def _binary() -> DocumentError:
    return DocumentError(
        "is not text but binary data", code="not_text", hint="convert it to text or PDF first"
    )


def _refuse_controls(text: str) -> str:
    head = text[:_SAMPLE]
    controls = sum(map(head.count, map(chr, _CONTROLS)))
    if controls * 20 > len(head):
        raise _binary()
    return text


def _utf16_without_bom(raw: bytes) -> tuple[str, str]:
    """By the byte order that gives ASCII and the most common Chinese characters, if one does."""
    best, best_share = "", 0.25
    for encoding in ("utf-16-le", "utf-16-be"):
        head = raw[:_SAMPLE].decode(encoding, "replace")
        known = sum(map(head.count, _COMMON)) + len(_ASCII.findall(head))
        if known > best_share * len(head):
            best, best_share = encoding, known / len(head)
    if not best:
        raise _binary()
    return _refuse_controls(raw.decode(best, "replace")), best


def _mostly_utf8(raw: bytes) -> bool:
    """Whether nine in ten runs of bytes above 127 are UTF-8: then it is damaged UTF-8."""
    runs = _HIGH_RUN.findall(raw[:_SAMPLE])[:-1] or [raw]
    good = 0
    for run in runs:
        try:
            run.decode("utf-8")
            good += 1
        except UnicodeDecodeError:
            pass
    return good * 10 >= len(runs) * 9


def _legacy(head: bytes) -> str:
    """The encoding from before Unicode that gives the most common characters.

    Any two of them decode most of each other's bytes, so validity says little.
    """
    best, best_share = "", 0.0
    for encoding in ("gb18030", "big5hkscs"):
        text = head.decode(encoding, "replace")
        han = len(_HAN.findall(text))
        # Bytes that are invalid in this encoding count like uncommon characters.
        share = sum(map(text.count, _COMMON)) / (han + text.count("\ufffd") + 1)
        if share > best_share:
            best, best_share = encoding, share
    if best_share > 0.05:
        return best
    # Too little Chinese to decide. In Windows-1252 an accent or a curly quote stands alone among
    # letters; in GB2312 every character is two bytes above 127.
    odd = any(len(run) % 2 for run in _HIGH_RUN.findall(head))
    return "cp1252" if odd else "gb18030"
