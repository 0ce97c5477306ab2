"""Atomic, synced writes: a file is complete or as it was before, after a power cut too.

A new file is written under a temporary name beside its target, synced, and renamed. What a killed
process left behind is removed by the next writer of the same target.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from khaosz.errors import FetchError, one_line

SAMPLE_DIR = Path(__file__).parent / "data" / "sample"
_BLOCK = 32 << 20
_PIECE = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a file system without locks answers, as some network file systems are.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


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


def config_folder() -> Path:
    """`KHAOSZ_CONFIG`, or `khaosz` in the platform's configuration folder of this user."""
    if chosen := os.environ.get("KHAOSZ_CONFIG"):
        return Path(chosen)
    if sys.platform == "win32":
        roaming = os.environ.get("APPDATA")
        return (Path(roaming) if roaming else Path.home() / "AppData" / "Roaming") / "khaosz"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "khaosz"
    xdg = os.environ.get("XDG_CONFIG_HOME")
    return (Path(xdg) if xdg else Path.home() / ".config") / "khaosz"


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


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sorts names as people count: chapter 2 before chapter 10."""
    parts: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", name.casefold()))
    # Numbers, at the odd places, by length and digits: one of a million digits is cheap, too.
    parts[1::2] = [(len(n), n) for n in (str(each).lstrip("0") for each in parts[1::2])]
    return parts, name


def digest(path: Path) -> str:
    """A BLAKE2b hash of a file's content: the hash of those of its 32 MiB blocks, which threads
    read side by side (0.6 GB/s per core, so that the disk is the limit). Raises OSError."""
    blocks = range(0, max(path.stat().st_size, 1), _BLOCK)
    with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1, 8)) as pool:
        parts = pool.map(functools.partial(_block_digest, path), blocks)
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _block_digest(path: Path, start: int) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while (at := file.tell()) < start + _BLOCK and (piece := file.read(_PIECE)):
            hashed.update(piece[: start + _BLOCK - at])
    return hashed.digest()


# ---- Locking ----------------------------------------------------------------------------------


class FolderInUse(Exception):
    """Another process, or another thread of this one, holds the lock; the text says which."""


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """Hold the lock of an output folder, which is created if necessary, for the block.

    The operating system holds it, in `folder/.lock`, and releases it when the process ends, also
    by SIGKILL. Yields False where the file system has no locks: then nothing is excluded. NFS has
    them if its lock service runs. Raises `FolderInUse`, and OSError where nothing can be written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with holding(folder / ".lock") as is_held:
            yield is_held
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Hold the lock of the lock file `path`, as `exclusive` does."""
    descriptor, is_held = _lock(path)
    try:
        yield is_held
    finally:
        if is_held and os.name != "nt":  # Windows removes no file that is open
            # Removed while it is held: a process that waits for this file sees that it is gone.
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread changes the file `path`, and keep them from it for the
    block. Raises OSError."""
    with ExitStack() as stack:
        while True:
            with suppress(FolderInUse):
                stack.enter_context(holding(path.with_name(f".{path.name}.lock")))
                break
            time.sleep(0.01)
        yield


def _lock(path: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(descriptor)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise
            raise FolderInUse(holder) from None
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                with suppress(OSError):  # a full disk: the lock holds, only its name is missing
                    os.ftruncate(descriptor, 0)
                    os.write(
                        descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
                return descriptor, True
        os.close(descriptor)  # the holder before removed it


def _take(descriptor: int) -> None:
    """Raises OSError when the lock is held. Not a POSIX record lock, which any `close` of the file
    in this process would release."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a locked byte can't be read, so one beyond
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(descriptor: int) -> str:
    with suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        if name := os.read(descriptor, 300).decode(errors="replace").strip():
            return name
    return "another process"


def make_private(folder: Path) -> bool:
    """Take a folder and the files in it from all users but its owner (0700 and 0600); whether one
    had access to it. Files that cannot be changed stay as they are. Raises OSError for the folder:
    it may belong to another user."""
    if os.name == "nt":  # access is inherited from the user's folder
        return False
    was_open = bool(folder.stat().st_mode & 0o077)
    folder.chmod(0o700)
    for path in folder.rglob("*"):
        with suppress(OSError):  # a database that closes removes its -wal
            if not path.is_symlink() and path.stat().st_mode & 0o077:
                path.chmod(0o700 if path.is_dir() else 0o600)
    return was_open


# ---- Writing ----------------------------------------------------------------------------------
# All of these raise OSError when the disk refuses; the target then stays as it was.


def disk_error(error: Exception, place: Path | None = None) -> str:
    """One line for people: the file (by default the `place` that was worked on) and the reason."""
    reason = getattr(error, "strerror", None) or one_line(str(error))
    file = getattr(error, "filename", None) or place
    reason = f"{reason[:1].lower()}{reason[1:]}"
    return reason if file is None else f"{file}: {reason}"


def disk_hint(error: OSError) -> str | None:
    """What to do about an error of `disk_error`, or None."""
    if error.errno in DISK_FULL:
        return "free some space, and run the command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose another place, or change its permissions"
    return None


def is_writable(path: Path) -> bool:
    """Whether a file exists and can be changed, or could be created with its parents."""
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    return os.access(existing, os.W_OK) and (existing == path or existing.is_dir())


def _named(error: OSError, path: Path) -> OSError:
    """A write to an open file does not know its name."""
    if error.filename is None and error.errno is not None:
        return OSError(error.errno, error.strerror, str(path))
    return error


def write_json(path: Path, values: Any) -> None:
    """Replace `path` by `values` as indented JSON in UTF-8."""
    text = json.dumps(finite(values), indent=2, ensure_ascii=False)
    write_atomic(path, [text.encode(), b"\n"])


def finite(values: Any) -> Any:
    """`values` with None for NaN and infinities, which JSON has no way to write."""
    match values:
        case float():
            return values if math.isfinite(values) else None
        case dict():
            return {key: finite(value) for key, value in values.items()}
        case list() | tuple():
            return [finite(value) for value in values]
    return values


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
    except OSError as error:
        raise _named(error, path) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder; it is renamed to `path` when the block ends without an error. `path`
    must not exist, or with `replace` is renamed and removed first."""
    partial, stale = (path.with_name(f".{path.name}.{state}") for state in ("partial", "stale"))
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace and path.exists():
            os.replace(path, stale)
        publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that others read: it is gone at once, not file by file."""
    doomed = path.with_name(f".{path.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


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


def append(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Add `data` to the end of a file: all of it, synced if it has to be `durable`, or nothing."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            write_all(file, data)
            if durable:
                os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise _named(error, path) from None
    if durable and not size:
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
