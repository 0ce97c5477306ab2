"""Detects the encoding of a text file and decodes it. Everything that reads text does so here.

UTF-8 (also with damaged lines), UTF-16 and UTF-32 are decided by byte order marks and by what is
valid. Encodings from before Unicode decode most of each other's bytes, so they are ranked: by
chardet's statistics, and by the share of common Chinese and Korean characters and of kana, which
decides for short texts and for code with a few comments. `bench/encodings.py` measures both.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

HEAD_BYTES = 1 << 20
"""How much of a file is read to detect its encoding; of a longer one also `SPREAD_BYTES` in the
middle and at the end."""
SPREAD_BYTES = 1 << 18

GUESS = " (a guess)"  # after the name of an encoding
_RANKED_BYTES = 1 << 16  # of lines that are not ASCII
_BINARY_HEAD = 8000
"""Git's rule: a NUL among the first 8000 bytes means binary, or UTF-16."""
_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
_CANDIDATES = (
    *("gb18030", "big5hkscs", "cp932", "euc-jp", "cp949", "cp1252", "iso-8859-15", "cp1251"),
    *("koi8-r", "koi8-u", "cp1250", "iso-8859-2", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257"),
    *("cp874", "cp1258", "iso-8859-5", "iso-8859-7"),
)
_EAST_ASIAN = ("gb18030", "big5hkscs", "cp932", "euc_jp", "cp949")
# Texts in the first are decoded as the second, which has all of its characters and more.
_SUPERSETS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "shift_jis_2004": "cp932",
    "euc_jis_2004": "euc_jp",
    "euc_kr": "cp949",
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
}
# The most common characters, simplified and traditional, with the most common punctuation: three in
# four of any running Chinese text. Text that was decoded wrongly has few of them.
COMMON_CHINESE = frozenset(
    "，。、；：？！“”（）《》…"
    "一七三上下不与且业两並个中为主义之也书了予事二于云五些交产人今从他代令以们件任企会传但位"
    "体何作你使來例供依保信修個們值備傳元先入內全兩八公六共关兵其具内军农决况准出击分划列则创"
    "別利别到制則前創劃力功加务动助動務包化区區十华协協单原去参參及发取受变口只可号各合同名后"
    "向含吾告员命和品員商問單器四回因国图國圖在地型城域執基報境处备复外多大天如始委子字存学學"
    "它安完定实审家容密實審对导将將對導小就展属屬山工已市布常平年并序库应府度庫建开式引张張強"
    "强当录形律後得從復德心必性息您情意應成我或戶户所手打执技护报择括持指按换据採接控提插換擇"
    "擊操據支收改放政效教数整數文新方於施无日时明是显時曰更書最會月有服期未本术机权条来构果查"
    "标样核根格框案档條检業構標模樣機檔檢權次款止正此段每民水求決沒没治況法注活海源準点無然照"
    "營爲版物特犯玄环现現理環生產用由申电當發的益监監目直相督知码确確碼示社种科称稅程税種稱空"
    "立符第等算管節範类系級組結給統經維網線編織级线组织经结给统维编网罪置義者而职職育能自至與"
    "节范華营處號行術表被装裝要見規见规解言計記設許話該認語說調請證議護變计认议记许设证话该语"
    "说请调象負責資负责资起路身軍軟輸轉转软输農过运这进适选這通進運過道適選部都配采重量金錄鍵"
    "键長长門開間關门问间防限院除险險集雲電需非面頁項須預領題類顯页项须预领题馬马體高點"
)
_COMMON_KOREAN = frozenset(
    "가값개경고구그기나는능니다대도되된듈드디래렉력로록른를리릿만메명모목못무문미밀바버번변보"
    "본비사생서선설성세션소수스습시식십아않야어없에여예오올와요용우월위유으은을음의이인일입있"
    "자작장전정제조주중지체크택터템토트파페프플필하한할함합해형호화확"
)
_KANA = re.compile("[\u3041-\u30ff\u3001\u3002\u300c\u300d]")
# A single letter of a script that writes words, with no other beside it.
_LONE = re.compile(r"(?<![^\x00-\x7f])[\u0370-\u06ff\u0e00-\u0e7f](?![^\x00-\x7f])")
# A high byte alone before an ASCII letter: a letter with an accent, hardly ever half of a hanzi.
_ACCENT = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?=[A-Za-z])")
_DAMAGE = re.compile("[\ufffd\uf8f0-\uf8f3]")  # cp932 has private characters for invalid bytes
_WORD = re.compile(rb"[A-Za-z]+")
_ENGLISH = re.compile(
    rb"(?<![\w\x80-\xff])(?:the|of|and|is|it|for|that|this|with|was)(?![\w\x80-\x91\x93-\xff])",
    re.I,
)
# What ISO-8859-15 has other characters for, as read in Windows-1252, inside words or as a currency.
_LATIN_9 = re.compile("[¼½¾¦¨´¸](?=[a-zà-ÿ])|(?<=[a-zà-ÿ])[¼½¾¦¨´¸]|¤")
# Characters of languages other than Chinese and Korean, as UTF-16 in the right order has them.
# Without accented Latin letters, which stand among ASCII ones, and which small numbers look like.
_KNOWN = re.compile("[\t\n\r -~\u0370-\u06ff\u0e00-\u0e7f\u2010-\u2026\u3003-\u30ff\uff04-\uff5e]")
_C1 = re.compile(rb"[\x80-\x9f]")


@dataclass(frozen=True)
class Detected:
    """`encoding`: a name that Python knows. Not `sure`: another one fits nearly as well."""

    encoding: str
    sure: bool = True

    def __str__(self) -> str:
        return self.encoding if self.sure else self.encoding + GUESS


def detect(head: bytes, more: bytes = b"", *, whole: bool = False) -> Detected:
    """The encoding of a text that begins with `head`; `more` are whole lines from further on.
    Unless `whole`, the last character of `head` may be cut short.

    Text of another encoding is hardly ever valid UTF-8, so lines and runs of bytes above 127 vote:
    if more than half of the lines or nine in ten runs are UTF-8, the others are damaged.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return Detected(name)
    if utf16 := _utf16(head):
        return utf16
    if decodes(head, whole=whole) and decodes(more):
        return Detected(_seven_bits(head))
    body = head if whole else head[: _end_of_line(head)]
    lines = [line for line in [*body.split(b"\n"), *more.split(b"\n")] if not line.isascii()]
    good = sum(map(decodes, lines))
    if len(lines) > 1 and 2 * good > len(lines):
        return Detected("utf-8")
    runs = [run for line in lines for run in _HIGH_RUN.findall(line)]
    if lines and 10 * sum(map(decodes, runs)) >= 9 * len(runs):
        return Detected("utf-8")
    everything = body + b"\n" + more if more else body
    # A damaged line must not rule out the encoding of the others.
    strict = ("gb18030", "big5hkscs", "shift_jis", "euc_jp", "cp949")  # cp932 reads any byte
    valid = [line for line in lines if any(decodes(line, each) for each in strict)]
    damaged = len(valid) < len(lines) < 2 * len(valid)
    if damaged or len(everything) > _RANKED_BYTES:
        everything = b"\n".join(valid if damaged else lines)
    return _legacy(everything)


_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def detect_encoding(head: bytes) -> str:
    return detect(head).encoding


def spread(file: IO[bytes], size: int) -> bytes:
    """Whole lines from the middle and the end of a file of more than `HEAD_BYTES`, whose position
    stays."""
    if size <= HEAD_BYTES:
        return b""
    position = file.tell()
    pieces = []
    for start in (max(HEAD_BYTES, size // 2), max(HEAD_BYTES, size - SPREAD_BYTES)):
        file.seek(start)
        piece = file.read(SPREAD_BYTES)
        pieces.append(piece[piece.find(b"\n") + 1 : _end_of_line(piece)])
    file.seek(position)
    return b"\n".join(pieces)


def decode_bytes(raw: bytes) -> tuple[str, Detected]:
    """A whole text; bytes that are not valid become U+FFFD."""
    more = spread(io.BytesIO(raw), len(raw))
    found = detect(raw[:HEAD_BYTES], more, whole=len(raw) <= HEAD_BYTES)
    return raw.decode(found.encoding, "replace").removeprefix("\ufeff"), found


def decodes(raw: bytes, encoding: str = "utf-8", whole: bool = True) -> bool:
    """Whether `raw` is valid text; unless `whole`, its last character may be cut short."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(raw, whole)
    except UnicodeDecodeError:
        return False
    return True


def decode_chunks(raw: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Decode; invalid bytes become lone surrogates, so that only their record fails later."""
    errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "khaosz.surrogates"
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


def _end_of_line(piece: bytes) -> int:
    end = piece.rfind(b"\n")
    return end if end >= 0 else len(piece)


def _seven_bits(head: bytes) -> str:
    """ISO-2022-JP and -KR are ASCII with escape sequences, HZ (RFC 1843) is ASCII with ~{ and ~}.
    Everything else that is valid UTF-8 is UTF-8."""
    for mark, more, name in (
        (b"\x1b$)C", b"\x0e", "iso2022_kr"),
        (b"\x1b$", b"\x1b(", "iso2022_jp"),
    ):
        if mark in head and more in head and decodes(head, name, whole=False):
            return name
    if b"~{" in head and head.isascii() and decodes(head, "hz", whole=False):
        high = [character for character in head.decode("hz", "ignore") if character > "\x7f"]
        common = sum(map(COMMON_CHINESE.__contains__, high))
        if common > 1 and 4 * common >= len(high):
            return "hz"
    return "utf-8"


def _as_surrogates(error: UnicodeError) -> tuple[str, int]:
    """As "surrogateescape", which does not take the bytes below 128 of 7-bit encodings."""
    assert isinstance(error, UnicodeDecodeError)
    raw = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + max(byte, 0x80)) for byte in raw), error.end


codecs.register_error("khaosz.surrogates", _as_surrogates)


def _utf16(head: bytes) -> Detected | None:
    """Without a byte order mark: by the order that gives the most common characters, if one does.
    Text without ASCII has no NUL."""
    has_nul = b"\0" in head[:_BINARY_HEAD]
    if not has_nul and (len(head) % 2 or decodes(head, whole=False)):
        return None
    shares = {}
    for encoding in ("utf-16-le", "utf-16-be"):
        text = head[:_RANKED_BYTES].decode(encoding, "replace")
        known = sum(map(COMMON_CHINESE.__contains__, text)) + len(_KNOWN.findall(text))
        shares[encoding] = known / max(1, len(text))
    best = max(shares, key=shares.__getitem__)
    return Detected(best) if shares[best] > (0.25 if has_nul else 0.5) else None


def _legacy(lines: bytes) -> Detected:
    """The best of the encodings from before Unicode for lines that are not ASCII."""
    import chardet  # its statistics take time to load

    first = _HIGH_RUN.search(lines)
    start = max(0, first.start() - 200) if first and first.start() > _RANKED_BYTES // 2 else 0
    raw = lines[start : start + _RANKED_BYTES]
    confidence: dict[str, float] = {}
    for each in chardet.detect_all(
        raw, include_encodings=_CANDIDATES, compat_names=False, ignore_threshold=True
    ):
        name = each["encoding"] or "cp1252"
        name = _SUPERSETS.get(name, name)
        confidence[name] = max(confidence.get(name, 0.0), each["confidence"])
    top = max(confidence.values(), default=0.0) or 1.0
    texts, scores = {}, {}
    for name in {*confidence, *_EAST_ASIAN, "cp1252"}:
        text = raw.decode(name, "replace").rstrip("\ufffd")
        high = sum(character > "\x7f" for character in text)
        damage = len(_DAMAGE.findall(text))
        if 50 * damage <= high + 25:
            scores[name] = confidence.get(name, 0.0) / top - 3 * damage / max(1, high)
            scores[name] += _familiar(name, text, max(1, high), raw)
            texts[name] = text
    best = max(scores, key=scores.__getitem__, default="cp1252")
    runs = sum(map(len, _HIGH_RUN.findall(raw)))
    if best not in _EAST_ASIAN and top < 0.005 and 2 * runs > len(raw):
        return Detected("utf-8", sure=False)  # of words that no language has
    if best in ("cp1252", "iso8859-15"):  # chardet's statistics are the same for both
        latin_9 = _LATIN_9.search(raw.decode("cp1252", "replace")) and not _C1.search(raw)
        best = "iso8859-15" if latin_9 else "cp1252"
    text = raw.decode(best, "replace").rstrip("\ufffd")
    second = max((scores[name] for name in scores if texts[name] != text), default=-1.0)
    # The measured margins: with 50 characters that are not ASCII, hardly any result is wrong.
    needed = 0.2 if sum(character > "\x7f" for character in text) < 50 else 0.0
    return Detected(best, sure=scores.get(best, 0.0) - second >= needed)


def _familiar(name: str, text: str, high: int, raw: bytes) -> float:
    """How much the `high` characters of `text` that are not ASCII are those that its languages
    have, as an addition to chardet's confidence, whose best is 1."""
    kana = len(_KANA.findall(text)) / high
    match name:
        case "gb18030" | "big5hkscs":
            common = sum(map(COMMON_CHINESE.__contains__, text)) / high
            accents = len(_ACCENT.findall(raw)) / max(1, len(_HIGH_RUN.findall(raw)))
            return 2 * common * (1 - kana) - (accents if name == "gb18030" else 0.0)
        case "cp949":
            return 2 * sum(map(_COMMON_KOREAN.__contains__, text)) / high
        case "cp932" | "euc_jp":
            return 2 * kana
    west = 0.0
    if name == "cp1252":
        english = 10 * len(_ENGLISH.findall(raw)) > len(_WORD.findall(raw))
        west = 0.85 if english else 0.35
    return west - 0.5 * len(_LONE.findall(text)) / high
