"""Text sources as a stream of raw record batches: JSON Lines (plain or zstd), JSON, Parquet, text.

The reading process only finds where records end; workers decode and parse them. A batch holds
about a megabyte whatever the size of the file, so memory does not depend on the input.

Encodings: UTF-8, strictly (a byte-order mark is tolerated), UTF-16 by its mark, GB18030 when the
first megabyte says so. Records are handed on as UTF-8 in every case.
"""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from khaosz.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.zst", ".json", ".parquet", ".txt")
BATCH_BYTES = 1 << 20
BATCH_LINES = 8192
MAX_LINE_BYTES = 64 << 20
_CHUNK = 1 << 16
_OVERLONG = f"longer than {MAX_LINE_BYTES >> 20} MB"
_NOT_TEXT = "not valid {}"
_PARQUET_COLUMNS = (
    *("text", "lang", "source", "messages", "conversations", "instruction", "input", "output"),
    *("system", "history", "tools"),
)


@dataclass
class RawBatch:
    """Some consecutive records of one file.

    `first_line` numbers `lines[0]`, from 1; for json, parquet and txt the number counts records.
    Lines are JSON (`kind` "json") or plain text, UTF-8, without line end; an empty line is no
    record. `skipped` are records that never became lines, as (line number, reason).
    `file_position` says how many bytes of the file have been read so far.
    """

    path: Path
    first_line: int
    lines: list[bytes]
    kind: Literal["json", "text"] = "json"
    encoding: str = "utf-8"
    skipped: list[tuple[int, str]] = field(default_factory=list)
    file_position: int = 0

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.lines))


@dataclass(frozen=True)
class Skip:
    """Why a line is no record."""

    reason: str


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Files as they are, directories and globs as their supported files, sorted, each once.

    Raises DataError for what does not exist, holds nothing we read, or has another extension.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and suffix_of(p))
            if not inside:
                raise DataError(f"{path} holds no {' '.join(SUFFIXES)} file")
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            _require_suffix(path)
            found[path] = None
        elif glob.has_magic(str(given)):
            matches = [Path(p) for p in sorted(glob.glob(str(given), recursive=True))]
            matches = [p for p in matches if p.is_file() and suffix_of(p)]
            if not matches:
                raise DataError(f"{given} matches no {' '.join(SUFFIXES)} file")
            found.update(dict.fromkeys(matches))
        else:
            raise DataError(f"input {path} does not exist")
    return list(found)


def suffix_of(path: Path) -> str | None:
    """The supported extension of a file name, the longest that fits, or None."""
    name = path.name.lower()
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def _require_suffix(path: Path) -> str:
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(
            f"{path}: cannot read this kind of file",
            hint="supported are " + " ".join(SUFFIXES),
        )
    return suffix


def open_source(path: str | Path) -> Iterator[RawBatch]:
    """Stream a file. Raises DataError for a file that is missing, damaged or of unknown kind."""
    path = Path(path)
    suffix = _require_suffix(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
            return
        with open(path, "rb") as file:
            raw = _zstd_chunks(file, path) if suffix == ".jsonl.zst" else _plain_chunks(file)
            head, raw = _peek(raw)
            encoding = detect_encoding(head)
            if suffix == ".json" and _starts_array(head, encoding):
                yield from _read_array(path, file, _decode_chunks(raw, encoding), encoding)
            elif suffix == ".txt":
                yield from _read_text(path, file, _lines(raw, encoding), encoding)
            else:
                yield from _read_lines(path, file, _lines(raw, encoding), encoding)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def parse_line(line: bytes) -> dict[str, Any] | Skip:
    """One JSON object, or why it is none. Numbers and constants as Python's json reads them."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Skip("not valid UTF-8")
    except json.JSONDecodeError as error:
        return Skip(f"not valid JSON: {error.msg}")
    except ValueError:  # an integer of thousands of digits
        return Skip("not valid JSON: number too long")
    except RecursionError:
        return Skip("not valid JSON: nested too deeply")
    if not isinstance(value, dict):
        return Skip(f"not a JSON object but {type(value).__name__}")
    return value


_HAN = bytes(range(0xE4, 0xEA))  # first bytes of U+4000..U+9FFF, most of them Han characters
_LETTERS = (
    bytes(range(0x41, 0x5B))
    + bytes(range(0x61, 0x7B))
    + bytes(range(0xC3, 0xE2))  # Latin with accents, Greek, Cyrillic, ..., Indic scripts
    + bytes(range(0xE4, 0xEE))  # Han and Hangul
)


def detect_language(text: str) -> Literal["zh", "en"]:
    """ "zh" when at least a fifth of the letters are Han characters, else "en".

    A Chinese word has about one and a half characters and an English one five letters, so at one in
    five about half of the words are Chinese. Judged by the first 64k characters.
    """
    raw = text[: 1 << 16].encode("utf-8", errors="ignore")
    han = len(raw) - len(raw.translate(None, _HAN))
    letters = len(raw) - len(raw.translate(None, _LETTERS))
    return "zh" if han and han * 5 >= letters else "en"


def detect_encoding(head: bytes) -> str:
    """ "utf-8", "utf-16" or "gb18030" for a text that begins with `head` (up to 1 MB of it).

    UTF-8 is so strict that text of another encoding hardly ever passes, so lines vote: when half of
    those that are not plain ASCII are UTF-8, the others are damage. Else the same for GB18030.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _decodes(head, "utf-8", whole=False):
        return "utf-8"
    lines = head.split(b"\n")
    if len(head) >= BATCH_BYTES and len(lines) > 1:
        lines.pop()  # cut somewhere inside
    speaking = [line for line in lines if not line.isascii()]
    whole = len(speaking) > 1
    for encoding in ("utf-8", "gb18030"):
        if 2 * sum(_decodes(line, encoding, whole) for line in speaking) > len(speaking):
            return encoding
    return "utf-8"


def _decodes(raw: bytes, encoding: str, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(raw, whole)
    except UnicodeDecodeError:
        return False
    return True


def _plain_chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _zstd_chunks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    # Not stream_reader: it takes the end of a file that was cut short for the end of the text.
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    done = 0
    try:
        while chunk := file.read(_CHUNK):
            while chunk:
                if frame is None:
                    frame = decompressor.decompressobj()
                text = frame.decompress(chunk)
                done += len(text)
                if text:
                    yield text
                chunk = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise DataError(
            f"{path}: damaged zstd data after {done} bytes of text: {error}",
            hint="fetch or compress the file again",
        ) from error
    if frame is not None:
        raise DataError(
            f"{path}: zstd data is cut short after {done} bytes of text",
            hint="fetch or compress the file again",
        )


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first megabyte, and the stream with it."""
    head: list[bytes] = []
    size = 0
    for chunk in chunks:
        head.append(chunk)
        size += len(chunk)
        if size >= BATCH_BYTES:
            break

    def again() -> Iterator[bytes]:
        yield from head
        head.clear()
        yield from chunks

    return b"".join(head)[:BATCH_BYTES], again()


def _decode_chunks(raw: Iterator[bytes], encoding: str) -> Iterator[str]:
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


def _to_utf8(text: str) -> bytes:
    """UTF-8, deliberately invalid where the source was."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")


def _lines(raw: Iterator[bytes], encoding: str) -> Iterator[bytes | None]:
    """Lines without their ends, as UTF-8; None for one that is longer than MAX_LINE_BYTES."""
    if encoding != "utf-8":
        raw = (_to_utf8(text) for text in _decode_chunks(raw, encoding))
    pending: list[bytes] = []  # the line so far; joined once, so that long lines stay linear
    size = 0
    first = True
    for chunk in raw:
        if first:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            first = False
        head, newline, rest = chunk.partition(b"\n")
        size += len(head)
        if size <= MAX_LINE_BYTES:
            pending.append(head)
        else:
            pending.clear()
        if not newline:
            continue
        yield b"".join(pending).removesuffix(b"\r") if size <= MAX_LINE_BYTES else None
        *whole, last = rest.split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        pending = [last]
        size = len(last)
    if size:
        yield b"".join(pending).removesuffix(b"\r") if size <= MAX_LINE_BYTES else None


def _read_lines(
    path: Path, file: IO[bytes], lines: Iterator[bytes | None], encoding: str
) -> Iterator[RawBatch]:
    batch = RawBatch(path, 1, [], encoding=encoding)
    size = 0
    number = 0
    for number, line in enumerate(lines, start=1):
        if line is None:
            batch.skipped.append((number, _OVERLONG))
            line = b""
        elif encoding != "utf-8" and not _decodes(line, "utf-8", whole=True):
            batch.skipped.append((number, _NOT_TEXT.format(encoding.upper())))
            line = b""
        batch.lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES or len(batch.lines) >= BATCH_LINES:
            batch.file_position = file.tell()
            yield batch
            batch = RawBatch(path, number + 1, [], encoding=encoding)
            size = 0
    batch.file_position = file.tell()
    if batch.lines or number == 0:
        yield batch


def _read_text(
    path: Path, file: IO[bytes], lines: Iterator[bytes | None], encoding: str
) -> Iterator[RawBatch]:
    """Pieces of about a megabyte that end at a blank line; a file below that is one piece.

    Without any blank line a piece ends at a line end once it is twice as long.
    """
    piece: list[bytes] = []
    skipped: list[tuple[int, str]] = []
    size = 0
    n = 0

    def finish() -> RawBatch:
        text = b"\n".join(piece).strip(b"\n")
        return RawBatch(path, n, [text], "text", encoding, list(skipped), file.tell())

    for number, line in enumerate(lines, start=1):
        if line is None:
            skipped.append((number, _OVERLONG))
            continue
        if not line.isascii() and not _decodes(line, "utf-8", whole=True):
            skipped.append((number, _NOT_TEXT.format(encoding.upper())))
            continue
        piece.append(line)
        size += len(line) + 1
        if (size >= BATCH_BYTES and not line.strip()) or size >= 2 * BATCH_BYTES:
            n += 1
            yield finish()
            piece.clear()
            skipped.clear()
            size = 0
    if piece or skipped or n == 0:
        n += 1
        yield finish()


def _starts_array(head: bytes, encoding: str) -> bool:
    text = codecs.getincrementaldecoder(encoding)(errors="ignore").decode(head[:4096])
    return text.lstrip("\ufeff \t\r\n").startswith("[")


def _read_array(
    path: Path, file: IO[bytes], texts: Iterator[str], encoding: str
) -> Iterator[RawBatch]:
    """The elements of one JSON array, found by raw_decode on a window that slides over the file."""
    decode = json.JSONDecoder().raw_decode
    window = ""
    at = 0
    ended = False
    records = 0
    batch = RawBatch(path, 1, [], encoding=encoding)
    size = 0

    def extend(wanted: int) -> None:
        """Drop what was consumed and read until `wanted` characters are ahead."""
        nonlocal window, at, ended
        parts = [window[at:]]
        length = len(parts[0])
        while length < wanted and not ended:
            text = next(texts, None)
            if text is None:
                ended = True
            else:
                parts.append(text)
                length += len(text)
        window, at = "".join(parts), 0

    def next_character() -> str:
        nonlocal at
        while True:
            while at < len(window) and window[at] in " \t\r\n":
                at += 1
            if at < len(window) or ended:
                return window[at : at + 1]
            extend(_CHUNK)

    def broken(what: str) -> DataError:
        return DataError(
            f"{path}: {what} after {records} records of the JSON array",
            hint="repair the file, or store one JSON object a line as .jsonl",
        )

    next_character()  # the opening bracket, seen before
    at += 1
    while (character := next_character()) != "]":
        if records:
            if character != ",":
                raise broken("expected a comma" if character else "cut short")
            at += 1
            next_character()
        wanted = _CHUNK
        while True:
            try:
                _, end = decode(window, at)
            except (ValueError, RecursionError) as error:
                fault = error
            else:
                # "1" may be the beginning of "1.5"; anything else has its own end.
                if ended or (end < len(window) and window[end] not in ".eE+-0123456789"):
                    break
                fault = ValueError("cut short")
            if ended or len(window) - at > MAX_LINE_BYTES:
                raise broken(getattr(fault, "msg", str(fault))) from fault
            wanted = max(2 * wanted, 2 * (len(window) - at))
            extend(wanted)
        line = window[at:end].encode("utf-8", errors="surrogatepass")
        at = end
        records += 1
        batch.lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES or len(batch.lines) >= BATCH_LINES:
            batch.file_position = file.tell()
            yield batch
            batch = RawBatch(path, records + 1, [], encoding=encoding)
            size = 0
    at += 1
    if next_character():
        raise broken("something follows the end")
    batch.file_position = file.tell()
    if batch.lines or not records:
        yield batch


def _plain(value: Any) -> str:
    # dates and decimals in fields that we do not read closely; bytes would become "b'...'"
    if isinstance(value, bytes):
        raise DataError("a column that we need holds binary values", hint="store text as strings")
    return str(value)


def _read_parquet(path: Path) -> Iterator[RawBatch]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow", hint="pip install 'khaosz[train]'"
        ) from error
    total = path.stat().st_size
    records = 0
    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            columns = [c for c in file.schema_arrow.names if c in _PARQUET_COLUMNS]
            if not columns:
                raise DataError(
                    f"{path}: none of its columns is known: "
                    + ", ".join(file.schema_arrow.names[:20]),
                    hint="expected text, or messages, conversations, instruction and output",
                )
            n_rows = max(1, file.metadata.num_rows)
            batch = RawBatch(path, 1, [])
            size = 0
            for rows in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
                for row in rows.to_pylist():
                    line = json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8")
                    batch.lines.append(line)
                    size += len(line)
                    records += 1
                    if size >= BATCH_BYTES or len(batch.lines) >= BATCH_LINES:
                        batch.file_position = total * records // n_rows
                        yield batch
                        batch = RawBatch(path, records + 1, [])
                        size = 0
            batch.file_position = total
            if batch.lines or not records:
                yield batch
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: damaged Parquet after {records} records: {error}",
            hint="fetch the file again",
        ) from error
