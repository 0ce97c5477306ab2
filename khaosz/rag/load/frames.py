"""What goes through the pipes between this process and a worker: JSON after its length.

Not pickle: a parser that a file has taken over must not be able to run code here.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any

_LENGTH = struct.Struct(">I")


def write_frame(pipe: IO[bytes], message: dict[str, Any]) -> None:
    """`pipe` is unbuffered, so that one write may take only a part."""
    body = json.dumps(message).encode("ascii")  # \\u escapes: paths may hold lone surrogates
    rest = memoryview(_LENGTH.pack(len(body)) + body)
    while rest:
        rest = rest[pipe.write(rest) :]


def read_frame(pipe: IO[bytes], limit: int = 1 << 32) -> dict[str, Any] | None:
    """None at the end of the pipe, which may be inside of a frame.

    Raises ValueError for a frame of more than `limit` bytes, or of something else than an object.
    """
    head = _read(pipe, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise ValueError(f"a frame of {length} bytes, where {limit} are allowed")
    body = _read(pipe, length)
    if body is None:
        return None
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError(f"a frame with a {type(message).__name__}")
    return message


def _read(pipe: IO[bytes], length: int) -> bytes | None:
    parts = []
    while length:
        part = pipe.read(min(length, 1 << 20))
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
