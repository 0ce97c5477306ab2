"""Decompression of gzip and zstd streams, with an error for a file that is cut short."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from khaosz.errors import DataError

COMPRESSED = (".gz", ".zst")


def decompressed(raw: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed as its name says. Several streams in a row are joined."""
    if path.name.lower().endswith(".gz"):
        yield from _streams(raw, path, "gzip", zlib.error)
    elif path.name.lower().endswith(".zst"):
        yield from _streams(raw, path, "zstd", zstandard.ZstdError)
    else:
        yield from raw


def _streams(
    raw: Iterable[bytes], path: Path, name: str, failure: type[Exception]
) -> Iterator[bytes]:
    # Not a file object of the library: zstandard's does not detect a file that is cut short.
    frame: Any = None
    done = 0
    try:
        for chunk in raw:
            while chunk:
                if frame is None:
                    if done and name == "gzip" and not chunk.strip(b"\0"):
                        break  # padding, as on tapes
                    # 31: a gzip header and the largest window.
                    frame = (
                        zlib.decompressobj(31)
                        if name == "gzip"
                        else zstandard.ZstdDecompressor().decompressobj()
                    )
                text = frame.decompress(chunk)
                done += len(text)
                if text:
                    yield text
                chunk = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    except failure as error:
        raise DataError(
            f"{path}: damaged {name} data after {done} bytes of text: {error}",
            hint="download or compress the file again",
        ) from error
    if frame is not None:
        raise DataError(
            f"{path}: {name} data is cut short after {done} bytes of text",
            hint="download or compress the file again",
        )
