"""Files that are there whole or not at all, after a power cut too."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from khaosz.errors import FetchError

SAMPLE_DIR = Path(__file__).parent / "data" / "sample"


def default_cache() -> Path:
    """`KHAOSZ_CACHE`, or `khaosz` in the platform's cache folder of this user."""
    if chosen := os.environ.get("KHAOSZ_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "khaosz"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "khaosz"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "khaosz"


def verify_sha256(path: Path, expected: str) -> None:
    """Remove `path` and raise FetchError unless its SHA-256 is `expected` (lower-case hex)."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        path.unlink()
        raise FetchError(
            f"{path.name}: SHA-256 is {actual}, expected {expected}; the file was removed",
            hint="run the command again to fetch it anew; if it repeats, the mirror is not honest",
        )


def write_json(path: Path, values: dict[str, Any] | list[Any]) -> None:
    """Write one JSON file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_atomic(path: Path, parts: Iterable[bytes]) -> None:
    """Replace `path` by the joined parts when all are on the disk; until then it stays as it was.

    Raises OSError when the disk refuses; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk too. Windows opens no folders, and has nothing to ask."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
