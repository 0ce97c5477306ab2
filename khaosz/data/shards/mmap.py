"""Token files (`*.tok`): written once, then read through a memory map.

    offset 0     magic  b"KHAOSZTK"
           8     u32    format version (1)
          12     u32    length of the JSON
          16     JSON   stage, vocab_size, fingerprint, n_tokens, n_documents, n_bytes,
                        sections: name -> {dtype, offset, count, crc32}
           .     zeros
        4092     u32    CRC-32 of the 4092 bytes before it
        4096     the sections, each at a multiple of 64, up to the end of the file

Sections: `tokens` (uint16 when the vocabulary fits, else uint32), `doc_offsets` (uint64,
n_documents + 1, counted in tokens) and for SFT `loss_mask` (uint8 per token). Little-endian.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from khaosz.errors import TokenFileError
from khaosz.files import publish, write_all

MAGIC = b"KHAOSZTK"
VERSION = 1
HEADER_BYTES = 4096
ALIGNMENT = 64
PREPARE_AGAIN = "the file is damaged: prepare the data again"
_COPY_BYTES = 1 << 20
_PARTS = {"tokens": ".partial", "doc_offsets": ".offsets.partial", "loss_mask": ".mask.partial"}
Stage = Literal["pt", "sft"]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned type on disk that holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def section_dtypes(stage: Stage, vocab_size: int) -> dict[str, np.dtype[Any]]:
    """The sections of a file and the type of their values."""
    dtypes = {"tokens": token_dtype(vocab_size), "doc_offsets": np.dtype("<u8")}
    return dtypes if stage == "pt" else {**dtypes, "loss_mask": np.dtype("u1")}


class TokenFileWriter:
    """Streams documents into `path.partial`; `close` renames it to `path`, atomically.

    Nothing is buffered here: a full disk surfaces as OSError from the call that wrote, and what an
    earlier `flush` described is still intact. Offsets and loss mask grow in side files because the
    number of tokens before them is not known until the end.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        stage: Stage,
        fingerprint: str,
        state: dict[str, Any] | None = None,
    ) -> None:
        """With `state`, return to what that `flush` described; raises TokenFileError when the parts
        hold less."""
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.stage = stage
        self.fingerprint = fingerprint
        self._dtypes = section_dtypes(stage, vocab_size)
        self.n_tokens = self.n_documents = self.n_bytes = 0
        self._parts = {name: _part(self.path, name) for name in self._dtypes}
        self._crc = dict.fromkeys(self._parts, 0)
        self._files: dict[str, Any] = {}
        try:
            if state is None:
                self._create()
            else:
                self._resume(state)
        except (OSError, TokenFileError):
            self.abandon()
            raise

    def _create(self) -> None:
        for name, part in self._parts.items():
            # closed by `close` or `abandon`
            self._files[name] = open(part, "w+b", buffering=0)  # noqa: SIM115
        write_all(self._files["tokens"], bytes(HEADER_BYTES))
        self._write("doc_offsets", bytes(8))

    def _resume(self, state: dict[str, Any]) -> None:
        self.n_tokens = state["n_tokens"]
        self.n_documents = state["n_documents"]
        self.n_bytes = state["n_bytes"]
        self._crc = dict(state["crc32"])
        for name, part in self._parts.items():
            expected = self._part_length(name)
            actual = part.stat().st_size if part.exists() else -1
            if actual < expected:
                raise TokenFileError(
                    f"{part} holds {actual} bytes, {expected} were written before",
                    hint="the work in progress was damaged: remove the output and start again",
                )
            file = open(part, "r+b", buffering=0)  # noqa: SIM115 (as above)
            self._files[name] = file
            file.truncate(expected)
            file.seek(expected)

    def _count(self, name: str) -> int:
        return self.n_documents + 1 if name == "doc_offsets" else self.n_tokens

    def _part_length(self, name: str) -> int:
        before = HEADER_BYTES if name == "tokens" else 0
        return before + self._count(name) * self._dtypes[name].itemsize

    def _write(self, name: str, data: Any) -> None:
        # `or bytes` because a zero-length array has no buffer that memoryview could cast
        raw = memoryview(data).cast("B") if len(data) else memoryview(b"")
        write_all(self._files[name], raw)
        self._crc[name] = zlib.crc32(raw, self._crc[name])

    def append(
        self, tokens: np.ndarray, lengths: np.ndarray, loss_mask: np.ndarray | None, n_bytes: int
    ) -> None:
        """Add documents: tokens (sum of lengths,), lengths (documents,), loss_mask like tokens.

        `n_bytes` is the UTF-8 size of their text. Raises OSError when the disk refuses.
        """
        assert int(lengths.sum()) == len(tokens), (int(lengths.sum()), len(tokens))
        assert (loss_mask is not None) == (self.stage == "sft"), self.stage
        assert not len(tokens) or int(tokens.max()) < self.vocab_size, (
            int(tokens.max()),
            self.vocab_size,
        )
        self._write("tokens", np.ascontiguousarray(tokens, dtype=self._dtypes["tokens"]))
        ends = self.n_tokens + np.cumsum(lengths, dtype=np.uint64)
        self._write("doc_offsets", ends.astype("<u8"))
        if loss_mask is not None:
            assert len(loss_mask) == len(tokens), (len(loss_mask), len(tokens))
            self._write("loss_mask", np.ascontiguousarray(loss_mask, dtype=np.uint8))
        self.n_tokens += len(tokens)
        self.n_documents += len(lengths)
        self.n_bytes += n_bytes

    def flush(self) -> dict[str, Any]:
        """Sync everything; returns the state, which JSON can hold, for another writer."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "n_bytes": self.n_bytes,
            "crc32": dict(self._crc),
        }

    def close(self) -> None:
        """Join the parts, write the header, rename into place."""
        try:
            self._join()
        finally:
            self.abandon()
        publish(self._parts["tokens"], self.path)
        remove_parts(self.path)

    def _join(self) -> None:
        main = self._files["tokens"]
        sections: dict[str, Any] = {}
        end = HEADER_BYTES
        for name, file in self._files.items():
            dtype, count = self._dtypes[name], self._count(name)
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if name != "tokens":
                main.seek(end)
                write_all(main, bytes(start - end))
                file.seek(0)
                while piece := file.read(_COPY_BYTES):
                    write_all(main, piece)
            sections[name] = {
                "dtype": dtype.name,
                "offset": start,
                "count": count,
                "crc32": self._crc[name],
            }
            end = start + count * dtype.itemsize
        header = {
            "stage": self.stage,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "n_bytes": self.n_bytes,
            "sections": sections,
        }
        main.seek(0)
        write_all(main, encode_header(header))

    def abandon(self) -> None:
        """Close the parts and keep them for another writer."""
        for file in self._files.values():
            file.close()


def _part(path: Path, section: str) -> Path:
    return path.with_name(path.name + _PARTS[section])


def remove_parts(path: str | Path) -> None:
    """Remove the partial file and the side files of a writer of `path`."""
    for section in _PARTS:
        _part(Path(path), section).unlink(missing_ok=True)


class MmapFileHandler:
    """A token file, read-only and zero-copy.

    Opening costs the same at any size: only the header and two offsets are read. Views stay valid
    as long as they are referenced. Threads may share a handler; in another process, an unpickled
    handler opens the file again.

    tokens: (n_tokens,) uint16 or uint32; doc_offsets: (n_documents + 1,) uint64;
    loss_mask: (n_tokens,) uint8, None unless stage is "sft".

    Raises TokenFileError for a file that is missing, cut short, or of another version or format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                head = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
                self.header = decode_header(self.path, head)
                check_sections(self.path, self.header, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TokenFileError(f"cannot open {self.path}: {error.strerror}") from error
        self._sections: dict[str, dict[str, Any]] = self.header["sections"]
        self.stage: Stage = self.header["stage"]
        self.vocab_size: int = self.header["vocab_size"]
        self.fingerprint: str = self.header["fingerprint"]
        self.n_tokens: int = self.header["n_tokens"]
        self.n_documents: int = self.header["n_documents"]
        self.n_bytes: int = self.header["n_bytes"]
        self.tokens = self._view("tokens")
        self.doc_offsets = self._view("doc_offsets")
        self.loss_mask = self._view("loss_mask") if "loss_mask" in self._sections else None
        first, last = int(self.doc_offsets[0]), int(self.doc_offsets[-1])
        if (first, last) != (0, self.n_tokens):
            raise TokenFileError(
                f"{self.path}: documents span tokens {first} to {last}, not 0 to {self.n_tokens}",
                hint=PREPARE_AGAIN,
            )

    def _view(self, name: str) -> np.ndarray:
        section = self._sections[name]
        dtype = np.dtype(section["dtype"]).newbyteorder("<")
        return np.frombuffer(
            self._map, dtype=dtype, count=section["count"], offset=section["offset"]
        )

    def __reduce__(self) -> tuple[type[MmapFileHandler], tuple[Path]]:
        return MmapFileHandler, (self.path,)

    def __len__(self) -> int:
        return self.n_documents

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i as a view. Raises IndexError outside 0 .. len - 1."""
        start, end = self.document_span(i)
        return self.tokens[start:end]

    def document_span(self, i: int) -> tuple[int, int]:
        """Where document i lies in `tokens` and `loss_mask`: [start, end)."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} of {self.n_documents} in {self.path}")
        start, end = int(self.doc_offsets[i]), int(self.doc_offsets[i + 1])
        if not start <= end <= self.n_tokens:
            raise TokenFileError(
                f"{self.path}: document {i} spans tokens {start} to {end}", hint=PREPARE_AGAIN
            )
        return start, end

    def pieces(
        self, section: str, start: int = 0, stop: int | None = None, step: int = _COPY_BYTES
    ) -> Iterator[np.ndarray]:
        """Views of `step` values, in order; the memory of each is released after it."""
        view = self._view(section)[:stop]
        offset = self._sections[section]["offset"]
        for begin in range(start, len(view), step):
            piece = view[begin : begin + step]
            yield piece
            # Windows has no madvise: it trims the working set by itself.
            if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
                start_byte = offset + begin * view.itemsize
                first = start_byte // mmap.PAGESIZE * mmap.PAGESIZE
                last = (start_byte + piece.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def verify(self) -> None:
        """Read every byte: checksums, offsets in order, ids inside the vocabulary.

        Raises TokenFileError naming the section.
        """
        for name, section in self._sections.items():
            crc = 0
            previous = 0
            for piece in self.pieces(name):
                crc = zlib.crc32(memoryview(piece), crc)  # type: ignore[arg-type]
                wrong = None
                if name == "tokens" and int(piece.max()) >= self.vocab_size:
                    wrong = f"token id {int(piece.max())} in a vocabulary of {self.vocab_size}"
                elif name == "doc_offsets":
                    if int(piece[0]) < previous or bool((piece[1:] < piece[:-1]).any()):
                        wrong = "document offsets go backwards"
                    previous = int(piece[-1])
                if wrong is not None:
                    raise TokenFileError(f"{self.path}: {wrong}", hint=PREPARE_AGAIN)
            if crc != section["crc32"]:
                raise TokenFileError(
                    f"{self.path}: the checksum of section {name} does not match",
                    hint=PREPARE_AGAIN,
                )

    def close(self) -> None:
        """Unmap the file, or let the last view that is still referenced do so."""
        del self.tokens, self.doc_offsets, self.loss_mask
        try:
            self._map.close()
        except BufferError:  # a view is still referenced; the map is closed with it
            del self._map

    def __enter__(self) -> MmapFileHandler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def encode_header(header: dict[str, Any]) -> bytes:
    """The first 4096 bytes of a token file, checksum included."""
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(body) <= HEADER_BYTES - 20, len(body)
    head = (MAGIC + struct.pack("<II", VERSION, len(body)) + body).ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def decode_header(path: Path, head: bytes) -> dict[str, Any]:
    """The content of a header with a valid checksum. Raises TokenFileError."""
    if head[:8] != MAGIC[: len(head[:8])] or not head:
        raise TokenFileError(f"{path} is not a token file", hint="`khaosz data prepare` makes them")
    if len(head) < HEADER_BYTES:
        raise TokenFileError(f"{path} is cut short inside its header", hint=PREPARE_AGAIN)
    version, length = struct.unpack("<II", head[8:16])
    if version != VERSION:
        raise TokenFileError(
            f"{path} has format version {version}, this program reads {VERSION}",
            hint="prepare the data again with this version",
        )
    if struct.unpack("<I", head[-4:])[0] != zlib.crc32(head[:-4]):
        raise TokenFileError(f"{path}: the header is damaged", hint=PREPARE_AGAIN)
    try:
        header = json.loads(head[16 : 16 + length])
    except ValueError as error:
        raise TokenFileError(f"{path}: the header is not JSON", hint=PREPARE_AGAIN) from error
    return cast(dict[str, Any], header)


def check_sections(path: Path, header: dict[str, Any], size: int) -> None:
    """Check all that the views of a file of `size` bytes rely on. Raises TokenFileError.

    A checksum does not prove good faith, so every type is checked too.
    """

    def bad(what: str) -> TokenFileError:
        return TokenFileError(f"{path}: {what}", hint=PREPARE_AGAIN)

    if not isinstance(header, dict) or not isinstance(header.get("sections"), dict):
        raise bad("the header has no sections")
    for key in ("n_tokens", "n_documents", "n_bytes", "vocab_size"):
        if type(header.get(key)) is not int or header[key] < 0:
            raise bad(f"{key} is {header.get(key)!r}")
    if header.get("stage") not in ("pt", "sft"):
        raise bad(f"stage is {header.get('stage')!r}")
    if not isinstance(header.get("fingerprint"), str):
        raise bad("the header has no tokenizer fingerprint")
    sections = header["sections"]
    dtypes = section_dtypes(header["stage"], header["vocab_size"])
    if set(sections) != set(dtypes):
        raise bad(f"sections are {sorted(sections)}, not {sorted(dtypes)}")
    end = HEADER_BYTES
    for name, section in sections.items():
        if not isinstance(section, dict) or section.get("dtype") != dtypes[name].name:
            raise bad(f"section {name} has the wrong type")
        if any(type(section.get(key)) is not int for key in ("offset", "count", "crc32")):
            raise bad(f"section {name} is incomplete")
        count = header["n_documents"] + 1 if name == "doc_offsets" else header["n_tokens"]
        offset = section["offset"]
        if section["count"] != count or offset < HEADER_BYTES or offset % ALIGNMENT:
            raise bad(f"section {name} has {section['count']} values at byte {offset}")
        end = max(end, offset + count * dtypes[name].itemsize)
    if size < end:
        raise bad(f"cut short: {size} bytes of {end}")
    if size > end:
        raise bad(f"{size - end} bytes too long")
