"""`KnowledgeBase`: documents in, passages out. The rest of the package serves this class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from khaosz.data.records.charset import GUESS
from khaosz.errors import ConfigError, DataError, KhaoszError
from khaosz.folders import Skipped
from khaosz.rag.load import Document, Loaded, Problem, Source, count_files, load_paths
from khaosz.rag.models.embedders import open_embedder
from khaosz.rag.models.protocols import Embedder, Reranker
from khaosz.rag.search.hit import Hit, Mode
from khaosz.rag.search.search import first_hits, search
from khaosz.rag.split.structure import StructureSplitter
from khaosz.rag.store import open_store
from khaosz.rag.store.index import VectorIndex, open_index
from khaosz.rag.store.records import (
    NAMED,
    RECORD_LINE,
    NewChunk,
    NewDocument,
    SourceFile,
    StoredDocument,
    indexed_text,
)
from khaosz.rag.store.sql import Store

if TYPE_CHECKING:
    from khaosz.rag.split.semantic import SemanticSplitter

DEFAULT_COLLECTION = "default"
_BATCH_FILES = 64  # written in one transaction, at most
_BATCH_CHARACTERS = 4_000_000  # the same
_EMBED_CHUNKS = 64  # passed to an embedder at once


@dataclass
class AddReport:
    """Files by result, of `found` in total (counted if `on_file` is given); new chunks; and how
    many of the `to_embed` chunks without a vector are embedded. `guessed`: names of files whose
    encoding is uncertain, with the one that was used. `excluded`: of those removed, how many are
    still there but left out now; `kept`: how many of those stay, by `may_empty`. `skipped`: what is
    left out of the folders on purpose."""

    found: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    documents: int = 0
    chunks: int = 0
    characters: int = 0
    embedded: int = 0
    to_embed: int = 0
    problems: list[Problem] = field(default_factory=list)
    guessed: dict[str, str] = field(default_factory=dict)
    excluded: int = 0
    kept: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.added + self.updated + self.unchanged + len(self.problems)


class KnowledgeBase:
    """Opens the knowledge base at `where` (see `khaosz.rag.store`), or creates it; a store passed
    as `where` is closed with it. The embedder of an existing knowledge base is opened by its stored
    name; without one it is lexical.

    Raises `DataError` for a file that is not a knowledge base and for one that is partly moved,
    `ConfigError` for an embedder other than that of its vectors.
    """

    def __init__(
        self,
        where: Path | str | Store,
        *,
        embedder: Embedder | str | None = None,
        splitter: StructureSplitter | SemanticSplitter | None = None,
    ) -> None:
        self._embedder = open_embedder(embedder) if isinstance(embedder, str) else embedder
        self.store = open_store(where) if isinstance(where, Path | str) else where
        self.splitter = splitter or StructureSplitter()
        self._index: VectorIndex | None = None
        with ExitStack() as stack:
            stack.callback(self.store.close)
            self._check()
            stack.pop_all()

    def _check(self) -> None:
        if (origin := self.store.get("moving")) is not None:
            raise DataError(
                f"{self.store.where} is an incomplete copy of {origin}",
                hint="khaosz rag move --from ... --to ... continues it",
            )
        stored = self.store.get("embedder")
        if self._embedder is not None and stored not in (None, self._embedder.name):
            raise ConfigError(
                f"{self.store.where} was embedded by {stored}, not by {self._embedder.name}",
                hint="khaosz rag reindex --embedder NAME embeds it again",
            )
        if self._embedder is not None and stored is None and self.store.chunk_count:
            raise ConfigError(
                f"{self.store.where} is lexical and has {self.store.chunk_count:,} chunks",
                hint="khaosz rag reindex --embedder NAME embeds them",
            )

    @property
    def embedder_name(self) -> str | None:
        return self._embedder.name if self._embedder else self.store.get("embedder")

    def embedder(self) -> Embedder | None:
        """Opened when it is first needed, so that lexical search loads no model."""
        if self._embedder is None and (name := self.store.get("embedder")) is not None:
            try:
                self._embedder = open_embedder(name)
            except KhaoszError as error:
                raise ConfigError(
                    f"{self.store.where} was embedded by {name}: {error}",
                    hint=f"{error.hint or 'restore it'}; --mode lexical searches without it,"
                    " khaosz rag reindex --embedder NAME embeds again",
                ) from error
        return self._embedder

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------- add

    def add(
        self,
        paths: Sequence[Path | str],
        *,
        collection: str = DEFAULT_COLLECTION,
        docling: bool = False,
        on_file: Callable[[str, AddReport], None] | None = None,
        may_empty: Callable[[Path, int], bool] | None = None,
    ) -> AddReport:
        """Add files and folders, or what has changed in them. Removed are files that were deleted
        from an added folder, and those that came with it and are left out of it now, as by a
        changed `.khaoszignore`. If interrupted, it continues when called again.

        A file that cannot be read is a problem in the report. `docling`: see `load_paths`.
        `may_empty` is asked before all documents of a folder, several, are removed because they are
        left out. Raises `DataError` for a path that does not exist.
        """
        roots = [Path(path).resolve() for path in paths]
        report = AddReport(found=count_files(roots, docling=docling) if on_file is not None else 0)
        named = {str(root) for root in roots if not root.is_dir()}
        seen: set[str] = set()

        def unchanged(path: Path, stat: os.stat_result) -> bool:
            seen.add(str(path))
            stored = self.store.source(collection, str(path))
            current = stat.st_size, stat.st_mtime_ns
            same = stored is not None and (stored.size, stored.mtime_ns) == current
            report.unchanged += same
            return same

        loaded = load_paths(
            roots,
            on_problem=report.problems.append,
            unchanged=unchanged,
            docling=docling,
            on_skip=report.skipped.append,
        )
        for batch in _batches(loaded):
            self._write(collection, batch, report)
            if on_file is not None:
                on_file(batch[-1][0].name, report)
        self._mark_named(collection, named)
        self._remove_missing(collection, roots, seen, report, may_empty)

        def on_chunk(done: int, total: int) -> None:
            report.embedded, report.to_embed = done, total
            if on_file is not None:
                on_file("", report)

        self._embed_missing(on_chunk)
        return report

    def add_text(
        self, text: str, *, name: str, collection: str = DEFAULT_COLLECTION, **metadata: str
    ) -> AddReport:
        """A text without a file; it replaces the one with that name."""
        raw = text.encode("utf-8", errors="replace")
        source = Source(Path(name), name, len(raw), 0, hashlib.sha256(raw).hexdigest())
        document = Document(name, text, name, (), dict(metadata))
        return self.put(source, [document], collection=collection)

    def put(
        self,
        source: Source,
        documents: Sequence[Document],
        *,
        collection: str = DEFAULT_COLLECTION,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> AddReport:
        """What was read of a file (`load_file`); it replaces the documents of that path, unless the
        bytes are the same. `on_chunk` is called with how many of the chunks without a vector are
        embedded, and of how many."""
        report = AddReport()
        self._write(collection, [(source, list(documents))], report)
        self._embed_missing(on_chunk)
        return report

    def _write(self, collection: str, batch: list[Loaded], report: AddReport) -> None:
        prepared = []
        for source, documents in batch:
            file = SourceFile(str(source.path), source.size, source.mtime_ns, source.sha256)
            stored = self.store.source(collection, file.path)
            same = stored is not None and stored.sha256 == file.sha256
            new = None if same else [self._split(document) for document in documents]
            encoding = documents[0].metadata.get("encoding", "") if documents else ""
            if encoding.endswith(GUESS):
                report.guessed[source.name] = encoding.removesuffix(GUESS)
            prepared.append((file, stored, new))
        embedder = self.embedder()
        if embedder is not None and self.store.dimension not in (0, embedder.dimension):
            raise self._other_dimension(embedder, embedder.dimension)
        with self.store.writing():
            if embedder is not None:
                self.store.set("embedder", embedder.name)
                self.store.set("dimension", str(embedder.dimension))
            for file, stored, new in prepared:
                if new is None:  # another time, but the same bytes
                    self.store.touch(collection, file)
                    report.unchanged += 1
                    continue
                self.store.replace(collection, file, new)
                report.added += stored is None
                report.updated += stored is not None
                report.documents += len(new)
                report.chunks += sum(len(document.chunks) for document in new)
                report.characters += sum(document.length for document in new)

    def _split(self, document: Document) -> NewDocument:
        chunks = [
            NewChunk(chunk.start, chunk.end, chunk.text, chunk.headings)
            for chunk in self.splitter.split(document.text)
        ]
        # The store keeps a text as its chunks: there must be no gap between them.
        assert not chunks or (chunks[0].start, chunks[-1].end) == (0, len(document.text))
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        line = {} if document.line is None else {RECORD_LINE: str(document.line)}
        return NewDocument(
            *(document.doc_id, document.name, digest, len(document.text), chunks),
            *(document.pages, document.metadata | line),
        )

    def _embed_missing(self, on_chunk: Callable[[int, int], None] | None = None) -> None:
        """Texts are stored first, so that lexical search finds them at once; their vectors follow
        in small batches, so that hours of embedding can be interrupted."""
        embedder = self.embedder()
        if embedder is None or self.store.vector_count >= self.store.chunk_count:
            return
        missing = [chunk.id for chunk in self.store.unembedded()]
        if on_chunk is not None:
            on_chunk(0, len(missing))
        for first in range(0, len(missing), _EMBED_CHUNKS):
            chunks = self.store.chunks(missing[first : first + _EMBED_CHUNKS])
            texts = [indexed_text(chunk.headings, chunk.text) for chunk in chunks]
            vectors = embedder.passages(texts)
            if vectors.shape != (len(texts), self.store.dimension):
                raise self._other_dimension(embedder, vectors.shape)
            with self.store.writing():
                self.store.set_vectors(
                    (chunk.id, vector) for chunk, vector in zip(chunks, vectors, strict=True)
                )
            if on_chunk is not None:
                on_chunk(first + len(chunks), len(missing))

    def _other_dimension(self, embedder: Embedder, shape: object) -> ConfigError:
        return ConfigError(
            f"{embedder.name} gave vectors {shape}; the knowledge base has"
            f" {self.store.dimension} dimensions",
            hint="khaosz rag reindex --embedder NAME embeds it again",
        )

    def _mark_named(self, collection: str, paths: set[str]) -> None:
        """Files that were added by themselves stay when their folder leaves them out."""
        documents = [each for path in paths for each in self.store.documents_of(collection, path)]
        new = [document for document in documents if NAMED not in document.metadata]
        if new:
            with self.store.writing():
                for document in new:
                    self.store.set_metadata(document.id, document.metadata | {NAMED: "yes"})

    def _remove_missing(
        self,
        collection: str,
        roots: Sequence[Path],
        seen: set[str],
        report: AddReport,
        may_empty: Callable[[Path, int], bool] | None,
    ) -> None:
        left_out = {str(each.path) for each in report.skipped if each.excluded}
        paths = [file.path for owner, file in self.store.sources() if owner == collection]
        doomed: set[str] = set()
        for root in (root for root in roots if root.is_dir()):
            inside = [path for path in paths if Path(path).is_relative_to(root)]
            unseen = [path for path in inside if path not in seen]
            gone = {path for path in unseen if _is_gone(path)}
            excluded = {
                path
                for path in unseen
                if path not in gone
                and not left_out.isdisjoint(map(str, (path, *Path(path).parents)))
                and self._came_with(collection, path, root)
            }
            is_all = len(excluded) > 1 and len(inside) == len(gone) + len(excluded)
            if is_all and may_empty is not None and not may_empty(root, len(excluded)):
                report.kept += len(excluded)
                excluded = set()
            report.excluded += len(excluded - doomed)
            doomed |= gone | excluded
        if not doomed:
            return
        with self.store.writing():
            for path in doomed:
                report.removed += self.store.remove_source(collection, path)

    def _came_with(self, collection: str, path: str, folder: Path) -> bool:
        """Whether a file was added with this folder, not by itself or with another one."""
        name = Path(path).relative_to(folder).as_posix()
        return all(
            document.name.startswith(name) and NAMED not in document.metadata
            for document in self.store.documents_of(collection, path)
        )

    def remove(self, name: str, *, collection: str | None = None) -> int:
        """Removes sources with that path, name or document id, or those of a folder. Returns the
        number of documents. Raises `DataError` if there are none."""
        resolved = Path(name).resolve()
        matches = [
            document
            for document in self.store.documents(collection)
            if name in (document.name, document.doc_id, document.path)
            or Path(document.path).is_relative_to(resolved)
        ]
        if not matches:
            raise DataError(
                f"document {name!r} not found in {self.store.where}", hint="khaosz rag list"
            )
        with self.store.writing():
            for owner, path in {(document.collection, document.path) for document in matches}:
                self.store.remove_source(owner, path)
        return len(matches)

    def reindex(
        self,
        embedder: Embedder | str | None = None,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> None:
        """Rebuild every index from the chunks, and the vectors if `embedder` is another one. If
        interrupted, it continues with the chunks without a vector."""
        if isinstance(embedder, str):
            embedder = open_embedder(embedder)
        with self.store.writing():
            self.store.rebuild_postings()
            if embedder is not None and embedder.name != self.store.get("embedder"):
                self.store.forget_vectors()
                self.store.set("embedder", embedder.name)
                self.store.set("dimension", str(embedder.dimension))
        self._embedder = embedder or self._embedder
        self._index = None
        self._embed_missing(on_chunk)

    # -------------------------------------------------------------------------------------- search

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        mode: Mode | None = None,
        collection: str | None = None,
        name: str | None = None,
        reranker: Reranker | None = None,
    ) -> list[Hit]:
        """At most k passages, best first; hybrid search by default if there is an embedder, else
        lexical."""
        mode = mode or ("hybrid" if self.embedder_name else "lexical")
        embedder = None if mode == "lexical" else self.embedder()
        index = None
        if embedder is not None:
            if self._index is None or self._index.revision != self.store.revision:
                self._index = open_index(self.store)
            index = self._index
        return search(
            self.store, query, k, mode,
            embedder=embedder, index=index, collection=collection, name=name, reranker=reranker,
        )  # fmt: skip

    def first_hits(self, limit: int, *, collection: str | None = None) -> list[Hit]:
        """The first passages, for a question that no passage matches."""
        return first_hits(self.store, limit, collection)

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        return self.store.documents(collection)

    def stats(self) -> dict[str, object]:
        return {
            "path": self.store.where,
            "bytes": self.store.size(),
            **self.store.counts(),
            "embedder": self.store.get("embedder"),
        }


def _batches(loaded: Iterator[Loaded]) -> Iterator[list[Loaded]]:
    batch: list[Loaded] = []
    characters = 0
    for source, documents in loaded:
        batch.append((source, documents))
        characters += sum(len(document.text) for document in documents)
        if len(batch) >= _BATCH_FILES or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_gone(path: str) -> bool:
    """Not where it cannot be known, as in a folder that may not be read."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return os.path.realpath(path) != path  # a link stands in its place
