"""Atomic, synced writes: a file is complete or as it was before, after a power cut too.

A new file is written under a temporary name beside its target, synced, and renamed. What a killed
process left behind is removed by the next writer of the same target.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
            hint="run the command again; if this repeats, the mirror serves another file",
        )


# ---- Writing ----------------------------------------------------------------------------------
# All of these raise OSError when the disk refuses; the target then stays as it was.


def write_json(path: Path, values: Any) -> None:
    """Replace `path` by `values` as indented JSON in UTF-8."""
    write_atomic(path, [json.dumps(values, indent=2, ensure_ascii=False).encode(), b"\n"])


def write_atomic(path: Path, parts: Iterable[bytes]) -> None:
    """Replace `path` by the joined parts."""
    with atomic_file(path) as file:
        file.writelines(parts)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file; it replaces `path` when the block ends without an error."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of an empty file, for a library that opens its file itself; the file replaces
    `path`, with its permissions, when the block ends without an error."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # root could replace /dev/null
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    partial = _partial(path)
    partial.open("wb").close()
    try:
        if path.is_file():
            shutil.copymode(path, partial)
        yield partial
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; it is renamed to `path`, which must not exist, when the block ends
    without an error."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, path: Path) -> None:
    """Sync a file, or a folder with all that is in it, and rename it to `path`.

    A file replaces another one. A folder replaces an empty one at most, else OSError.
    """
    if partial.is_dir():
        for inner in partial.rglob("*"):
            sync(inner)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file: all of it, synced, or nothing."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            write_all(file, data)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if not size:
        sync(path.parent)


def write_all(file: Any, data: bytes | memoryview) -> None:
    """Write all of `data`; an unbuffered file takes only a part when the disk is almost full."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # which opens no folders
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders.
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    """A name beside `path` of this process; files of processes that no longer run are removed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = partial.name.split(".")[-2]
        if pid.isdecimal() and int(pid) != os.getpid() and not _is_running(int(pid)):
            with suppress(PermissionError):  # Windows removes no file that is open
                partial.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _is_running(pid: int) -> bool:
    """False where it can't be known: on Windows, where signal 0 would end the process."""
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        pass
    return True
