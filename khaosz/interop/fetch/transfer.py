"""Download a file whose content is known by its hash: resumed where it stopped, and checked.

What has arrived is stored under the hash, so that a download that is resumed at another time or
from another host is one of the same content. The session, and with it proxies and redirects that
leave the token behind, is huggingface_hub's; its own downloads start again after an interruption.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from khaosz.errors import FetchCode, FetchError, one_line
from khaosz.files import publish

Progress = Callable[[str, int, int], None]  # file, bytes so far, bytes in all (0: unknown)
_ATTEMPTS = 3  # without a byte
_PAUSE_S = 0.5
_AGAIN = "run the command again to resume"


@dataclass(frozen=True)
class RemoteFile:
    """`name` within its model; `digest` is "sha256:" or "git:" (a git blob's) and hex digits, or
    "" where the host publishes no hash: such a file is never resumed."""

    name: str
    url: str
    size: int
    digest: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def part_name(self) -> str:
        return f"{self.digest.replace(':', '-') or 'no-hash'}.part"


def session() -> Any:
    """huggingface_hub's HTTP client, without its telemetry. Raises `FetchError` where it is not
    installed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is imported
    try:
        from huggingface_hub.utils import get_session
    except ImportError:
        raise FetchError(
            "huggingface_hub is not installed", hint="pip install huggingface_hub"
        ) from None
    return get_session()


def timeout_s() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def host_of(url: str) -> str:
    """Host and port, without a password."""
    return urlsplit(url).netloc.rpartition("@")[2]


@contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Failures to reach a host, and statuses that say no, as `FetchError` in one line."""
    client = session()
    http = sys.modules[type(client).__module__.partition(".")[0]]  # httpx, or its successor
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    host = host_of(url)
    try:
        yield
    except OfflineModeIsEnabled:
        raise FetchError(
            "HF_HUB_OFFLINE is set", hint="unset it to download", code="no_network"
        ) from None
    except (HfHubHTTPError, http.HTTPStatusError) as error:
        message, hint = _refusal(error, host)
        denied = error.response.status_code in (401, 403)
        code: FetchCode | None = "not_allowed" if denied else None
        raise FetchError(message, hint=hint, code=code) from error
    except http.TimeoutException as error:
        what = "could not be reached" if isinstance(error, http.ConnectTimeout) else "sent nothing"
        raise FetchError(
            f"timeout: {host} {what} for {timeout_s():.0f} s", hint=_AGAIN, code="no_network"
        ) from error
    except http.RequestError as error:
        reason = one_line(str(error)) or type(error).__name__
        if isinstance(error, http.ConnectError):
            raise FetchError(f"cannot connect to {host}: {reason}", code="no_network") from error
        raise FetchError(f"{host}: {reason}", hint=_AGAIN, code="no_network") from error


def _refusal(error: Any, host: str) -> tuple[str, str | None]:
    """What a status says, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError

    status = error.response.status_code
    token = "set HF_TOKEN to a token that has access"
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated ({status})",
            f"accept its terms on its page at {host}, and {token}",
        )
    if status in (401, 403):
        return f"{host} refuses access ({status}): private, gated or misspelt", token
    if status == 404:
        return f"not found at {host} (404)", "check the name, the file and the revision"
    return f"{host} answers {status}", "try again later" if status >= 429 else None


def download(file: RemoteFile, stage: Path, report: Progress) -> Path:
    """The file as `stage/files/NAME`, with its hash. Raises `FetchError`, and OSError when the disk
    refuses; what has arrived stays for the next time."""
    target = stage / "files" / file.name
    if target.exists() and file.digest and has_digest(target, file.digest):
        return target
    part = stage / file.part_name
    if not file.digest:
        part.unlink(missing_ok=True)
    check_room(stage, file.size - (part.stat().st_size if part.exists() else 0))
    while True:
        resumed = part.exists() and part.stat().st_size > 0
        with network_errors(file.url):
            _transfer(file, part, report)
        if has_digest(part, file.digest):
            break
        part.unlink()
        if not resumed:
            raise FetchError(
                f"{file.name} from {host_of(file.url)} does not have its published hash"
                f" {file.digest}; it was removed",
                hint="try another source with --from",
                code="wrong_hash",
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    publish(part, target)
    return target


def check_room(folder: Path, needed: int) -> None:
    """Raises `FetchError` where a disk has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free",
            hint="free some space, or set KHAOSZ_CACHE to another disk",
            code="disk_full",
        )


def _transfer(file: RemoteFile, part: Path, report: Progress) -> None:
    """Receive until `part` has the file's size; a broken connection is continued."""
    http = sys.modules[type(session()).__module__.partition(".")[0]]
    failures = 0
    while True:
        at = part.stat().st_size if part.exists() else 0
        if at > file.size:
            part.unlink()
            at = 0
        if at == file.size and part.exists():
            return
        report(file.name, at, file.size)  # also after silence: `report` may end the transfer
        try:
            _receive(file, part, at, report)
            failed: Exception | None = None
        except http.TransportError as error:
            failed = error
        now = part.stat().st_size if part.exists() else 0
        if now == file.size:
            return
        failures = 0 if now > at else failures + 1
        if failures >= _ATTEMPTS:
            if failed is not None:
                raise failed
            raise FetchError(
                f"{file.name}: {now:,} of {file.size:,} bytes received",
                hint=_AGAIN,
                code="no_network",
            )
        time.sleep(_PAUSE_S * (1 + failures))


def _receive(file: RemoteFile, part: Path, at: int, report: Progress) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    headers = {**file.headers, "Accept-Encoding": "identity"}
    if at:
        headers["Range"] = f"bytes={at}-"
    with session().stream("GET", file.url, headers=headers, timeout=timeout_s()) as answer:
        if answer.status_code == 416 and at:
            part.unlink()
            return
        hf_raise_for_status(answer)
        if at and not (
            answer.status_code == 206
            and answer.headers.get("Content-Range", "").startswith(f"bytes {at}-")
        ):
            at = 0  # the whole file, although a part was asked for
        with open(part, "r+b" if at else "wb") as out:
            out.seek(at)
            for block in answer.iter_bytes():
                if out.tell() + len(block) > file.size:
                    out.truncate(0)
                    raise FetchError(
                        f"{file.name}: {host_of(file.url)} sends more than {file.size:,} bytes"
                    )
                out.write(block)
                report(file.name, out.tell(), file.size)


def read_range(file: RemoteFile, count: int) -> bytes:
    """The first `count` bytes of a file. Raises `FetchError`."""
    http = sys.modules[type(session()).__module__.partition(".")[0]]
    with network_errors(file.url):
        for _ in range(_ATTEMPTS - 1):
            try:
                return _first(file, count)
            except http.TransportError:
                time.sleep(_PAUSE_S)
        return _first(file, count)


def _first(file: RemoteFile, count: int) -> bytes:
    from huggingface_hub.utils import hf_raise_for_status

    headers = {**file.headers, "Accept-Encoding": "identity", "Range": f"bytes=0-{count - 1}"}
    data = bytearray()
    with session().stream("GET", file.url, headers=headers, timeout=timeout_s()) as answer:
        hf_raise_for_status(answer)
        for block in answer.iter_bytes():
            data += block
            if len(data) >= count:
                break
    return bytes(data[:count])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has a hash; one that is not published is had by every file."""
    kind, _, expected = digest.partition(":")
    if not digest:
        return True
    if kind == "sha256":
        return sha256_of(path) == expected
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while block := file.read(1 << 20):
            blob.update(block)
    return blob.hexdigest() == expected
