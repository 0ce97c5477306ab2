"""Text sources as a stream of raw record batches: JSON Lines, JSON, CSV, Parquet and text, plain
or compressed with gzip or zstd.

The reading process only splits a file into records; workers decode and parse them. A batch holds
about a megabyte at any file size, so memory does not depend on the input. Records are UTF-8,
whatever the encoding of the file (`charset`). A JSON array is read element by element through a
sliding window.
"""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from khaosz.data.records.charset import HEAD_BYTES, decode_chunks, decodes, detect, spread
from khaosz.data.records.compressed import COMPRESSED, decompressed
from khaosz.data.records.tables import Row, csv_rows, parquet_rows, plain
from khaosz.errors import DataError
from khaosz.folders import (
    LINKED_FOLDERS,
    OTHER_TYPES,
    OnSkip,
    Skipped,
    describe,
    files_below,
    reason_to_skip,
)

if TYPE_CHECKING:  # document loaders import this module under a limit of memory
    from khaosz.config import ColumnsConfig

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
SUPPORTED = f"{' '.join(SUFFIXES)} (all but .parquet also with {' or '.join(COMPRESSED)})"
BATCH_BYTES = 1 << 20
BATCH_LINES = 8192
MAX_LINE_BYTES = 64 << 20
_CHUNK = 1 << 16
_WINDOW = 1 << 16  # characters
_HAN = bytes(range(0xE4, 0xEA))  # first bytes of U+4000..U+9FFF, most of them Han characters
_LETTERS = (
    bytes(range(0x41, 0x5B))
    + bytes(range(0x61, 0x7B))
    + bytes(range(0xC3, 0xE2))  # Latin with accents, Greek, Cyrillic, ..., Indic scripts
    + bytes(range(0xE4, 0xEE))  # Han and Hangul
)


@dataclass
class RawBatch:
    """Some consecutive records of one file.

    `first_line` numbers `lines[0]`, from 1; for json, tables and txt the number counts records.
    Lines are JSON (`kind` "json") or plain text, UTF-8, without line end; empty lines are not
    records. `skipped` are records that could not become lines, as (line number, reason).
    `file_position` is the number of bytes of the file read so far. `encoding` is for people and
    says if it is a guess.
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
    """Why a line is not a record."""

    reason: str


class InputFiles(list[Path]):
    """Files to read. notes: lines on what was left out of their folders."""

    notes: tuple[str, ...] = ()


def expand_inputs(inputs: Iterable[str | Path]) -> InputFiles:
    """Files as they are, directories and globs as their supported files, sorted, each once. Of a
    folder `khaosz.folders` leaves out what programs put there, and folders that are only linked;
    the same file under two names is read once.

    Raises DataError for a path that does not exist, holds no supported file, or has an unsupported
    extension.
    """
    files: dict[Path, None] = {}  # an ordered set
    roots: list[Path] = []
    skipped: list[Skipped] = []
    for pattern in inputs:
        path = Path(pattern)
        if path.is_file():
            _require_suffix(path)
            files[path] = None
            continue
        inside: Iterable[Path]
        left_out: list[Skipped] = []
        if path.is_dir():
            inside, verb, root = files_below(path, left_out.append), "holds", path
        elif glob.has_magic(str(pattern)):
            inside, verb, root = _matching(str(pattern), left_out.append), "matches", Path()
        elif path.exists():
            raise DataError(f"input {path} is neither a file nor a folder")
        else:
            raise DataError(f"input {path} does not exist")
        matches = []
        for file in sorted(inside):
            if _suffix_of(file):
                matches.append(file)
            else:
                left_out.append(Skipped(file, OTHER_TYPES))
        if not matches:
            notes = "; ".join(describe(dict.fromkeys(left_out), [root]))
            raise DataError(f"{pattern} {verb} no {SUPPORTED} file", hint=notes or None)
        distinct = set(_distinct(matches, left_out.append))
        files.update(dict.fromkeys(file for file in matches if file in distinct))
        roots.append(root)
        skipped += left_out
    expanded = InputFiles(files)
    expanded.notes = tuple(describe(dict.fromkeys(skipped), roots))
    return expanded


def _matching(pattern: str, on_skip: OnSkip) -> Iterator[Path]:
    """The files that a glob names, without what a folder would leave out. Links to folders are
    followed only where the pattern names a level of folders."""
    fixed = next((i for i, p in enumerate(Path(pattern).parts) if glob.has_magic(p)), 0)
    for file in map(Path, glob.glob(pattern, recursive=True)):
        names = file.parts
        places = [Path(*names[: i + 1]) for i in range(fixed, len(names))]
        for place in places:
            if reason := reason_to_skip(place.name, is_folder=place != file):
                on_skip(Skipped(place, reason))
                break
            if place != file and "**" in pattern and place.is_symlink():
                on_skip(Skipped(place, LINKED_FOLDERS))
                break
        else:
            if file.is_file():
                yield file


def _distinct(files: Sequence[Path], on_skip: OnSkip) -> Iterator[Path]:
    """Without links, symbolic or hard, to a file that is read already."""
    seen: set[tuple[int, int]] = set()
    for linked in (False, True):  # the file itself before links to it
        for file in files:
            if file.is_symlink() != linked:
                continue
            status = file.stat()
            key = status.st_dev, status.st_ino
            if status.st_ino and key in seen:
                on_skip(Skipped(file, "the same file under another name"))
            else:
                seen.add(key)
                yield file


def _suffix_of(path: Path) -> str | None:
    """The kind of file, without that of its compression."""
    name = path.name.lower()
    inner = next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)
    suffix = next((s for s in SUFFIXES if inner.endswith(s)), None)
    return None if suffix == ".parquet" and inner != name else suffix


def _require_suffix(path: Path) -> str:
    suffix = _suffix_of(path)
    if suffix is None and not path.exists():
        raise DataError(f"input {path} does not exist")
    if suffix is None:
        raise DataError(
            f"{path}: unsupported file type",
            hint=f"supported are {SUPPORTED}",
        )
    return suffix


def open_source(
    path: str | Path, columns: ColumnsConfig | None = None, *, every_column: bool = False
) -> Iterator[RawBatch]:
    """Stream a file. Of a table the columns that a layout or `columns` knows are read, or every
    one. Raises DataError for a missing, damaged or unsupported file."""
    path = Path(path)
    suffix = _require_suffix(path)
    try:
        if suffix == ".parquet":
            rows, position = parquet_rows(path, columns, every_column)
            yield from _batches(path, _as_json(rows), position)
            return
        with open(path, "rb") as file:
            raw = decompressed(iter(lambda: file.read(_CHUNK), b""), path)
            head, raw = _peek(raw)
            packed = path.name.lower().endswith(tuple(COMPRESSED))
            more = b"" if packed else spread(file, path.stat().st_size)
            found = detect(head, more, whole=len(head) < HEAD_BYTES)
            encoding = found.encoding
            label = encoding if found.sure else f"{encoding} (a guess: {path.name})"
            if suffix == ".txt":
                yield from _read_text(path, file, _lines(raw, encoding, check=True), label)
                return
            records: Iterable[bytes | Skip]
            if suffix in (".csv", ".tsv"):
                texts = decode_chunks(raw, encoding)
                records = _as_json(csv_rows(path, texts, columns, every_column, MAX_LINE_BYTES))
            elif suffix == ".json" and starts_array(head, encoding):
                records = array_elements(path, decode_chunks(raw, encoding), MAX_LINE_BYTES)
            else:  # parsing in a worker checks UTF-8
                records = _lines(raw, encoding, check=encoding != "utf-8")
            yield from _batches(path, records, file.tell, label)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _as_json(rows: Iterable[Row]) -> Iterator[bytes | Skip]:
    for row in rows:
        if isinstance(row, str):
            yield Skip(row)
        else:
            text = json.dumps(row, ensure_ascii=False, default=plain)
            yield text.encode("utf-8", errors="surrogatepass")


def parse_line(line: bytes) -> dict[str, Any] | Skip:
    """One JSON object, or why the line is not one. Numbers as Python's json reads them."""
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


def parsed(batch: RawBatch) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
    """The records of a batch with their numbers; blank lines are not records."""
    for number, line in enumerate(batch.lines, start=batch.first_line):
        if line and not line.isspace():
            text = batch.kind == "text"
            yield number, {"text": line.decode("utf-8")} if text else parse_line(line)


def detect_language(text: str) -> Literal["zh", "en"]:
    """ "zh" when at least a fifth of the letters are Han characters, else "en".

    A Chinese word has about one and a half characters and an English one five letters, so at one in
    five about half of the words are Chinese. Reads the first 64k characters.
    """
    raw = text[: 1 << 16].encode("utf-8", errors="ignore")
    han = len(raw) - len(raw.translate(None, _HAN))
    letters = len(raw) - len(raw.translate(None, _LETTERS))
    return "zh" if han and han * 5 >= letters else "en"


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first megabyte, and the whole stream."""
    head: list[bytes] = []
    size = 0
    for chunk in chunks:
        head.append(chunk)
        size += len(chunk)
        if size >= HEAD_BYTES:
            break
    return b"".join(head)[:HEAD_BYTES], chain(head, chunks)


def _lines(raw: Iterator[bytes], encoding: str, check: bool) -> Iterator[bytes | Skip]:
    """Lines without their ends, as UTF-8; only `check` makes sure that they are valid."""
    if encoding != "utf-8":
        raw = (
            text.encode("utf-8", errors="surrogatepass") for text in decode_chunks(raw, encoding)
        )
    for line in _split_lines(raw):
        if line is None:
            yield Skip(f"longer than {MAX_LINE_BYTES >> 20} MB")
        elif check and not line.isascii() and not decodes(line):
            yield Skip(f"not valid {encoding.upper()}")
        else:
            yield line


def _split_lines(raw: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is longer than MAX_LINE_BYTES."""
    pending: list[bytes] = []  # the line so far, joined once: linear in its length
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
        *complete, last = rest.split(b"\n")
        for line in complete:
            yield line.removesuffix(b"\r")
        pending = [last]
        size = len(last)
    if size:
        yield b"".join(pending).removesuffix(b"\r") if size <= MAX_LINE_BYTES else None


def starts_array(head: bytes, encoding: str) -> bool:
    text = codecs.getincrementaldecoder(encoding)(errors="ignore").decode(head[:4096])
    return text.lstrip("\ufeff \t\r\n").startswith("[")


def array_elements(path: Path, texts: Iterator[str], limit: int) -> Iterator[bytes]:
    """The JSON of each element as UTF-8. `texts` are the consecutive parts of the file `path`.

    Raises DataError, with the number of elements read, for damage and for an element of more than
    `limit` characters.
    """
    decode = json.JSONDecoder().raw_decode
    window = ""
    at = 0
    ended = False
    elements = 0

    def extend(size: int) -> None:
        """Drop the consumed part and read until `size` characters are ahead."""
        nonlocal window, at, ended
        parts = [window[at:]]
        length = len(parts[0])
        while length < size and not ended:
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
            extend(_WINDOW)

    def broken(what: str) -> DataError:
        return DataError(
            f"{path}: {what} after {elements} records of the JSON array",
            hint="repair the file, or store one JSON object a line as .jsonl",
        )

    next_character()  # the opening bracket
    at += 1
    while (character := next_character()) != "]":
        if elements:
            if character != ",":
                raise broken("expected a comma" if character else "cut short")
            at += 1
            next_character()
        size = _WINDOW
        while True:
            try:
                _, end = decode(window, at)
            except (ValueError, RecursionError) as error:
                fault = error
            else:
                # "1" may be the start of "1.5"; other values end by themselves.
                if ended or (end < len(window) and window[end] not in ".eE+-0123456789"):
                    break
                fault = ValueError("cut short")
            if ended or len(window) - at > limit:
                raise broken(getattr(fault, "msg", str(fault))) from fault
            size = 2 * max(size, len(window) - at)
            extend(size)
        element = window[at:end]
        at = end
        elements += 1
        yield element.encode("utf-8", errors="surrogatepass")
    at += 1
    if next_character():
        raise broken("unexpected text")


def _batches(
    path: Path,
    records: Iterable[bytes | Skip],
    position: Callable[[], int],
    encoding: str = "utf-8",
) -> Iterator[RawBatch]:
    """Records in batches, at least one; a skipped record leaves an empty line."""
    batch = RawBatch(path, 1, [], encoding=encoding)
    size = number = 0
    for number, record in enumerate(records, start=1):
        if isinstance(record, Skip):
            batch.skipped.append((number, record.reason))
            record = b""
        batch.lines.append(record)
        size += len(record)
        if size >= BATCH_BYTES or len(batch.lines) >= BATCH_LINES:
            batch.file_position = position()
            yield batch
            batch = RawBatch(path, number + 1, [], encoding=encoding)
            size = 0
    batch.file_position = position()
    if batch.lines or number == 0:
        yield batch


def _read_text(
    path: Path, file: IO[bytes], lines: Iterable[bytes | Skip], encoding: str
) -> Iterator[RawBatch]:
    """Pieces of about a megabyte that end at a blank line; a smaller file is one piece.

    Without blank lines a piece ends at a line end once it is twice as long.
    """
    piece: list[bytes] = []
    skipped: list[tuple[int, str]] = []
    size = n = 0

    def finish() -> RawBatch:
        text = b"\n".join(piece).strip(b"\n")
        return RawBatch(path, n, [text], "text", encoding, list(skipped), file.tell())

    for number, line in enumerate(lines, start=1):
        if isinstance(line, Skip):
            skipped.append((number, line.reason))
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
