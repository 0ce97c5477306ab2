"""The header of a token file (`*.tok`) and what a reader may rely on once it has passed.

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
import struct
import zlib
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from khaosz.errors import TokenFileError

MAGIC = b"KHAOSZTK"
VERSION = 1
HEADER_BYTES = 4096
ALIGNMENT = 64
PREPARE_AGAIN = "the file is damaged: prepare the data again"

Stage = Literal["pt", "sft"]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned type on disk that holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def section_dtypes(stage: Stage, vocab_size: int) -> dict[str, np.dtype[Any]]:
    """The sections of a file and the type of their values."""
    dtypes = {"tokens": token_dtype(vocab_size), "doc_offsets": np.dtype("<u8")}
    return dtypes if stage == "pt" else {**dtypes, "loss_mask": np.dtype("u1")}


def encode_header(header: dict[str, Any]) -> bytes:
    """The 4096 bytes that open a token file, checksum included."""
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(body) <= HEADER_BYTES - 20, len(body)
    head = (MAGIC + struct.pack("<II", VERSION, len(body)) + body).ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def decode_header(path: Path, head: bytes) -> dict[str, Any]:
    """The content of a header whose checksum is right. Raises TokenFileError."""
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
    """Everything that the views of a file of `size` bytes rely on; raises TokenFileError.

    A checksum is no proof of good faith, so every type is looked at too.
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
