"""All knowledge bases of a service, below one folder.

catalogue.db    which bases and files exist
uploads/        the files as uploaded, by the SHA-256 of their bytes
bases/NAME.kb   their contents; `khaosz rag search --kb` can open it too
"""

from __future__ import annotations

import os
import sqlite3
import threading
import unicodedata
from contextlib import ExitStack, suppress
from pathlib import Path

from khaosz.errors import ConfigError
from khaosz.folders import HIDDEN, reason_to_skip
from khaosz.rag.load.formats import INSTEAD, SUFFIXES, format_of
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.catalogue import BaseRow, Catalogue, FileRow
from khaosz.serve.knowledge.ingest import Base, Shared
from khaosz.serve.knowledge.uploads import Received, Uploads
from khaosz.serve.retrieval_models import RetrievalModels

MAX_UPLOAD = 256 << 20  # bytes
MAX_NAME = 64  # characters of a knowledge base's name
_MAX_FILE_NAME = 255  # characters
_MAX_NAME_BYTES = 200  # file systems allow 255 for the name and its suffixes
_BIDI_CONTROLS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_STOP_TIMEOUT = 10.0  # seconds for a base's threads; killed after that, they lose nothing


class Library:
    """Thread-safe. Methods wait for the disk, so they are not for an event loop.

    Raises `ConfigError` where the folder cannot be used, or another server uses it.
    """

    def __init__(
        self, data: Path, retrieval: RetrievalModels, *, max_upload: int = MAX_UPLOAD
    ) -> None:
        self.retrieval, self.max_upload = retrieval, max_upload
        self._folder = data / "bases"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.uploads = Uploads(data / "uploads")
            with ExitStack() as undo:
                self._catalogue = Catalogue(data / "catalogue.db")
                undo.callback(self._catalogue.close)
                self.uploads.clean(self._catalogue.uploads())
                undo.pop_all()
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            message = f"{data} cannot be used: {why}"
            raise ConfigError(message, hint="--data names another") from None
        reading = threading.Semaphore(max(2, os.cpu_count() or 1))
        self._shared = Shared(self._catalogue, self.uploads, retrieval, reading)
        self._lock = threading.Lock()  # of uploads with the files that use them, and of bases
        self._bases = {row.name: self._open_base(row) for row in self._catalogue.bases()}

    def start(self) -> None:
        """Continue with unfinished jobs."""
        for row in self._catalogue.bases():
            if row.deleting:
                self._delete(self._bases[row.name])
            else:
                self._bases[row.name].wake()

    def stop(self) -> None:
        for base in list(self._bases.values()):
            base.stop(_STOP_TIMEOUT)
        self._catalogue.close()

    def _open_base(self, row: BaseRow) -> Base:
        return Base(row, self._folder / f"{row.name}.kb", self._shared)

    # --------------------------------------------------------------------------------------- bases

    def bases(self) -> list[Base]:
        with self._lock:
            rows = self._catalogue.bases()
            return [self._bases[row.name] for row in rows if not row.deleting]

    def base(self, name: str) -> Base:
        """Raises `ApiError`."""
        name = unicodedata.normalize("NFC", name)
        for base in self.bases():
            if base.name == name:
                return base
        raise ApiError(404, f"knowledge base {name!r} not found")

    def create(self, name: str, embedder: str | None) -> Base:
        """Raises `ApiError`."""
        name = base_name(name)
        if embedder is not None and embedder not in self.retrieval.embedders:
            known = ", ".join(self.retrieval.embedders) or "none"
            message = f"embedder {embedder!r} not found; available: {known}"
            raise ApiError(400, message, param="embedder")
        with self._lock:
            exists = (self._folder / f"{name}.kb").exists()
            row = None if exists else self._catalogue.add_base(name, embedder)
            if row is None:
                message = f"a knowledge base {name!r} exists already"
                raise ApiError(409, message, param="name", code="name_taken")
            self._bases[name] = base = self._open_base(row)
            return base

    def delete(self, name: str) -> None:
        """Clients no longer see it; its files are deleted when its threads have ended. Raises
        `ApiError`."""
        base = self.base(name)
        with self._lock:
            hashes = {file.sha256 for file in self._catalogue.files(base.name)}
            if not self._catalogue.mark_deleting(base.name):
                raise ApiError(404, f"knowledge base {base.name!r} not found")
            self._drop_unused(hashes)
        self._delete(base).join(1.0)

    def _delete(self, base: Base) -> threading.Thread:
        def end() -> None:
            base.stop()
            base.delete_files()
            with self._lock, suppress(sqlite3.ProgrammingError):  # the server was stopped
                self._catalogue.drop_base(base.name)
                del self._bases[base.name]

        thread = threading.Thread(target=end, name="khaosz-delete", daemon=True)
        thread.start()
        return thread

    # --------------------------------------------------------------------------------------- files

    def files(self, base: Base) -> list[FileRow]:
        return [base.with_progress(row) for row in self._catalogue.files(base.name)]

    def file(self, name: str, file_id: str) -> FileRow:
        """Raises `ApiError`."""
        base = self.base(name)
        row = self._catalogue.file(base.name, file_id)
        if row is None:
            raise ApiError(404, f"file {file_id!r} not found in {base.name!r}")
        return base.with_progress(row)

    def add(self, base: Base, name: str, received: Received) -> FileRow:
        """Add a complete upload; it is ingested in the background. Raises `ApiError`, `OSError` and
        `sqlite3.OperationalError` as the disk does."""
        with self._lock:
            before = {row.sha256 for row in self._catalogue.files(base.name) if row.name == name}
            self.uploads.keep(received)
            try:
                row = self._catalogue.put(base.name, name, received.sha256, received.size)
            finally:
                self._drop_unused({received.sha256, *before})
        if row is None:
            raise ApiError(404, f"knowledge base {base.name!r} not found")
        base.wake()
        return base.with_progress(row)

    def remove(self, name: str, file_id: str) -> None:
        """Raises `ApiError`."""
        base = self.base(name)
        row = self.file(name, file_id)
        with self._lock:
            if not self._catalogue.mark_removed(row):
                raise ApiError(404, f"file {file_id!r} not found in {row.base!r}")
            self._drop_unused({row.sha256})
        base.remove(row)

    def _drop_unused(self, hashes: set[str]) -> None:
        for sha256 in hashes:
            if not self._catalogue.is_used(sha256):
                self.uploads.remove(sha256)


def base_name(text: str) -> str:
    """The normalised name. Raises `ApiError` for one that cannot be a file name on all systems."""
    name = unicodedata.normalize("NFC", text)
    if not 1 <= len(name) <= MAX_NAME or len(name.encode()) > _MAX_NAME_BYTES:
        message = f"a name has 1 to {MAX_NAME} characters and at most {_MAX_NAME_BYTES} bytes"
        raise ApiError(400, message, param="name", code="invalid_name")
    if name != name.strip() or name[0] == "." or not all(c.isalnum() or c in " -_." for c in name):
        message = "a name has letters, digits, - _ . and inner spaces, and no dot at its start"
        raise ApiError(400, message, param="name", code="invalid_name")
    return name


def file_name(text: str) -> str:
    """The normalised name; it is never used as a path. Raises `ApiError` for an invalid name, and
    for file types that cannot be read."""
    name = unicodedata.normalize("NFC", text)
    if not 1 <= len(name) <= _MAX_FILE_NAME:
        message = f"a file's name has 1 to {_MAX_FILE_NAME} characters"
        raise ApiError(400, message, param="name", code="invalid_file_name")
    if name in (".", "..") or not all(map(_may_be_in_name, name)):
        message = "a file's name is valid Unicode without separators and control characters"
        raise ApiError(400, message, param="name", code="invalid_file_name")
    if format_of(name) is None:
        suffix = os.path.splitext(name)[1].lower()
        what = f"{suffix} files cannot be read" if suffix else "this name has no suffix"
        instead = f": {hint.partition(',')[0]}" if (hint := INSTEAD.get(suffix)) else ""
        message = f"{what}{instead}; supported: {' '.join(SUFFIXES)}"
        raise ApiError(415, message, param="name", code="unsupported_file_type")
    # A folder that is dropped on the page brings what programs put beside its documents.
    if (reason := reason_to_skip(name, is_folder=False)) not in (None, HIDDEN):
        message = f"this name is one of {reason}, which are not documents"
        raise ApiError(415, message, param="name", code="unsupported_file_type")
    return name


def _may_be_in_name(character: str) -> bool:
    if character in "/\\\ufffd" or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return False
    # Bidirectional controls can make a name look like another.
    return unicodedata.bidirectional(character) not in _BIDI_CONTROLS
