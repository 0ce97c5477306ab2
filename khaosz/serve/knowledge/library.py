"""All knowledge bases of a service, below one folder.

catalogue.db    which bases and files there are
uploads/        the files as they came, by the SHA-256 of their bytes
bases/NAME.kb   what was read of them; `khaosz rag search --kb` can open it too
"""

from __future__ import annotations

import os
import sqlite3
import threading
import unicodedata
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from khaosz.errors import ConfigError
from khaosz.rag.load.formats import INSTEAD, SUFFIXES, format_of
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.catalogue import BaseRow, Catalogue, FileRow
from khaosz.serve.knowledge.ingest import Base, Shared
from khaosz.serve.knowledge.uploads import Received, Uploads
from khaosz.serve.retrieval_models import RetrievalModels

MAX_UPLOAD = 256 << 20  # bytes
LONGEST_NAME = 64  # characters of a base's
_LONGEST_FILE = 255  # characters of a file's name
_FILE_BYTES = 200  # of a base's name: a file system leaves 255 for it and what follows it
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_PATIENCE = 10.0  # seconds that threads have to end with the server; killed, they lose nothing


@dataclass(frozen=True)
class Counts:
    files: int
    chunks: int
    embedded: int
    bytes: int


class Library:
    """Its methods may be called from any thread, and wait for the disk: not on an event loop.

    Raises `ConfigError` where the folder cannot be used, or is by another server.
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
        self._lock = threading.Lock()  # of uploads and the files that name them, and of bases
        self._bases = {row.name: self._made(row) for row in self._catalogue.bases()}

    def start(self) -> None:
        """Go on with what is left to be done."""
        for row in self._catalogue.bases():
            if row.deleting:
                self._delete(self._bases[row.name])
            else:
                self._bases[row.name].wake()

    def stop(self) -> None:
        for base in list(self._bases.values()):
            base.stop(_PATIENCE)
        self._catalogue.close()

    def _made(self, row: BaseRow) -> Base:
        path = self._folder / f"{row.name}.kb"
        return Base(row.name, row.embedder, path, self._shared)

    # --------------------------------------------------------------------------------------- bases

    def bases(self) -> list[tuple[BaseRow, Base]]:
        with self._lock:
            rows = self._catalogue.bases()
            return [(row, self._bases[row.name]) for row in rows if not row.deleting]

    def base(self, name: str) -> tuple[BaseRow, Base]:
        """Raises `ApiError`."""
        name = unicodedata.normalize("NFC", name)
        for row, base in self.bases():
            if row.name == name:
                return row, base
        raise ApiError(404, f"there is no knowledge base {name!r}")

    def counts(self, base: Base) -> Counts:
        files = self.files(base)
        return Counts(
            len(files),
            sum(file.chunks for file in files),
            sum(file.embedded for file in files),
            sum(file.size for file in files),
        )

    def create(self, name: str, embedder: str | None) -> tuple[BaseRow, Base]:
        """Raises `ApiError`."""
        name = base_name(name)
        if embedder is not None and embedder not in self.retrieval.embedders:
            known = ", ".join(self.retrieval.embedders) or "none"
            message = f"this server offers no embedder {embedder!r}; there are: {known}"
            raise ApiError(400, message, param="embedder")
        with self._lock:
            in_the_way = (self._folder / f"{name}.kb").exists()
            row = None if in_the_way else self._catalogue.add_base(name, embedder)
            if row is None:
                message = f"there is a knowledge base {name!r} already"
                raise ApiError(409, message, param="name", code="name_taken")
            self._bases[name] = self._made(row)
            return row, self._bases[name]

    def delete(self, name: str) -> None:
        """It is gone for those who ask at once; its files a little later, when its threads have
        ended. Raises `ApiError`."""
        row, base = self.base(name)
        with self._lock:
            hashes = {file.sha256 for file in self._catalogue.files(row.name)}
            if not self._catalogue.mark_deleting(row.name):
                raise ApiError(404, f"there is no knowledge base {row.name!r}")
            self._drop_unused(hashes)
        self._delete(base).join(1.0)

    def _delete(self, base: Base) -> threading.Thread:
        def end() -> None:
            base.stop()
            base.delete_files()
            with self._lock, suppress(sqlite3.ProgrammingError):  # the server has ended first
                self._catalogue.drop_base(base.name)
                del self._bases[base.name]

        thread = threading.Thread(target=end, name="khaosz-delete", daemon=True)
        thread.start()
        return thread

    # --------------------------------------------------------------------------------------- files

    def files(self, base: Base) -> list[FileRow]:
        return [base.shown(row) for row in self._catalogue.files(base.name)]

    def file(self, name: str, file_id: str) -> FileRow:
        """Raises `ApiError`."""
        _, base = self.base(name)
        row = self._catalogue.file(base.name, file_id)
        if row is None:
            raise ApiError(404, f"there is no file {file_id!r} in {base.name!r}")
        return base.shown(row)

    def add(self, base: Base, name: str, received: Received) -> FileRow:
        """A file that came whole; it is read by and by. Raises `ApiError`, `OSError` and
        `sqlite3.OperationalError` as the disk does."""
        with self._lock:
            before = {row.sha256 for row in self._catalogue.files(base.name) if row.name == name}
            self.uploads.keep(received)
            try:
                row = self._catalogue.put(base.name, name, received.sha256, received.size)
            finally:
                self._drop_unused({received.sha256, *before})
        if row is None:
            raise ApiError(404, f"there is no knowledge base {base.name!r}")
        base.wake()
        return base.shown(row)

    def remove(self, name: str, file_id: str) -> None:
        """Raises `ApiError`."""
        _, base = self.base(name)
        row = self.file(name, file_id)
        with self._lock:
            if not self._catalogue.mark_removed(row):
                raise ApiError(404, f"there is no file {file_id!r} in {row.base!r}")
            self._drop_unused({row.sha256})
        base.remove(row)

    def _drop_unused(self, hashes: set[str]) -> None:
        for sha256 in hashes:
            if not self._catalogue.is_used(sha256):
                self.uploads.remove(sha256)


def base_name(given: str) -> str:
    """Raises `ApiError` for what would be no file's name everywhere."""
    name = unicodedata.normalize("NFC", given)
    if not 1 <= len(name) <= LONGEST_NAME or len(name.encode()) > _FILE_BYTES:
        message = f"a name has 1 to {LONGEST_NAME} characters, and {_FILE_BYTES} bytes at most"
        raise ApiError(400, message, param="name", code="invalid_name")
    if name != name.strip() or name[0] == "." or not all(c.isalnum() or c in " -_." for c in name):
        message = "a name has letters, digits, - _ . and spaces inside, and no dot before it"
        raise ApiError(400, message, param="name", code="invalid_name")
    return name


def file_name(given: str) -> str:
    """A file's name as it is shown; it is never a path. Raises `ApiError` for what is no name, and
    for files of a kind that cannot be read."""
    name = unicodedata.normalize("NFC", given)
    if not 1 <= len(name) <= _LONGEST_FILE:
        message = f"a file's name has 1 to {_LONGEST_FILE} characters"
        raise ApiError(400, message, param="name", code="invalid_file_name")
    if name in (".", "..") or not all(map(_may_be_in_name, name)):
        message = "a file's name has no separators, no control characters, and is valid Unicode"
        raise ApiError(400, message, param="name", code="invalid_file_name")
    if format_of(name) is None:
        suffix = os.path.splitext(name)[1].lower()
        what = f"{suffix} files cannot be read" if suffix else "this name has no suffix"
        instead = f": {hint.partition(',')[0]}" if (hint := INSTEAD.get(suffix)) else ""
        message = f"{what}{instead}; these can: {' '.join(SUFFIXES)}"
        raise ApiError(415, message, param="name", code="unsupported_file_type")
    return name


def _may_be_in_name(character: str) -> bool:
    if character in "/\\\ufffd" or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return False
    # What turns the direction of writing makes a name look like another.
    return unicodedata.bidirectional(character) not in _TURNS
