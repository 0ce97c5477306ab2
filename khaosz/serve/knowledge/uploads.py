"""Files as they were uploaded, by the SHA-256 of their bytes: equal files are stored once.

A file gets its name when it is complete and on the disk; until then it is in `.partial`, which a
starting server empties.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from khaosz.files import publish, write_all

BLOCK = 1 << 20  # bytes written at once


class TooLarge(Exception):
    pass


@dataclass(frozen=True)
class Received:
    """A complete body, on the disk under a temporary name."""

    path: Path
    sha256: str
    size: int

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


class Uploads:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder / ".partial"
        self._partial.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def clean(self, used: set[str]) -> None:
        """Delete what a killed server left: partial bodies, and uploads that are not `used`."""
        shutil.rmtree(self._partial)
        self._partial.mkdir()
        for path in self._folder.iterdir():
            if path.is_file() and path.name not in used:
                path.unlink()

    async def receive(self, body: AsyncIterator[bytes], limit: int) -> Received:
        """Write a body to the disk. An incomplete body leaves nothing.

        Raises `TooLarge`, `OSError` as the disk does, and what the body raises.
        """
        path = self._partial / secrets.token_hex(16)
        digest, size = hashlib.sha256(), 0
        with ExitStack() as undo:
            undo.callback(path.unlink, missing_ok=True)  # also when the request is cancelled
            with open(path, "xb", buffering=0) as file:

                def write(block: bytes) -> None:
                    digest.update(block)
                    write_all(file, block)

                buffer = bytearray()
                async for part in body:
                    size += len(part)
                    if size > limit:
                        raise TooLarge
                    buffer += part
                    if len(buffer) >= BLOCK:
                        await asyncio.to_thread(write, bytes(buffer))
                        buffer.clear()
                await asyncio.to_thread(write, bytes(buffer))
                await asyncio.to_thread(os.fsync, file.fileno())  # not under the library's lock
            undo.pop_all()
        return Received(path, digest.hexdigest(), size)

    def keep(self, received: Received) -> None:
        """Move it to its hash. It survives a power cut."""
        target = self.path(received.sha256)
        if target.exists():
            received.discard()
        else:
            publish(received.path, target)

    def remove(self, sha256: str) -> None:
        with suppress(OSError):  # in use on Windows: `clean` deletes it later
            self.path(sha256).unlink()
