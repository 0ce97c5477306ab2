"""A knowledge base in Qdrant: three collections of points.

    NAME-records    the settings (one point), a point for each source and for each document
    NAME-chunks     start, end, text, heading path and terms; no vectors
    NAME-vectors    vectors, by their chunks' numbers; made anew for another dimension

Qdrant has no transactions. What holds instead:

- What is in one `with store.writing()` is sent when the block ends. When something is raised in it,
  nothing is.
- New points are sent first and not shown. Then their source is marked as unfinished and its former
  documents go, their chunks are replaced, the new documents are shown, and last comes its record,
  in one request with the counts. A source whose change broke off counts as not there until it is
  written again, which `rag add` and `rag move` do when they are called again. No document is ever
  shown in part.
- `reading` is no snapshot: a search that runs while a source changes may miss that source.
- Nothing keeps two writers apart. They may write different sources, but the counts that scores are
  made of may then be off by one writer's change, until `rag reindex` counts anew.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models

from khaosz.errors import ConfigError, DataError
from khaosz.rag.store.protocol import (
    Counted,
    NewChunk,
    NewDocument,
    SourceFile,
    StoredChunk,
    StoredDocument,
    glob_pattern,
    key_of,
    whole_text,
)
from khaosz.rag.store.qdrant_points import (
    SENT,
    SETTINGS,
    Change,
    Points,
    assign,
    chunk_of,
    delete,
    document_of,
    drop,
    file_of,
    is_,
    is_any,
    live,
    point,
    put,
    settings_point,
    show,
    unfinished,
    written,
)
from khaosz.rag.terms import terms

VERSION = "1"
_TIMEOUT_S = 60
_TERMS = 1_000_000  # distinct ones that are counted
_AT_ONCE = 8  # questions about the terms of a query: Qdrant takes one term at a time


def open_qdrant(address: str, *, new: bool = True) -> QdrantStore:
    """`qdrant+http://host:6333/NAME` or `qdrant+https://`; a key is read from QDRANT_API_KEY."""
    parts = urlsplit(address.removeprefix("qdrant+"))
    name = parts.path.strip("/")
    if not parts.hostname or not re.fullmatch(r"[\w.-]+", name) or parts.query or parts.fragment:
        raise ConfigError(
            f"{address} is no address of a base in Qdrant", hint="qdrant+http://host:6333/NAME"
        )
    client = QdrantClient(
        url=f"{parts.scheme}://{parts.netloc}",
        port=parts.port or 6333,
        api_key=os.environ.get("QDRANT_API_KEY"),
        timeout=_TIMEOUT_S,
        check_compatibility=False,  # an old server says so when it is asked for what it lacks
    )
    with ExitStack() as opened:
        opened.callback(client.close)
        store = QdrantStore(client, name, where=address, new=new, owned=True)
        opened.pop_all()
    return store


class QdrantStore(Counted):
    """owned: the client is closed with the store. Raises `DataError` for a server that is not
    there, a base that is not there and not `new`, and for a later version."""

    def __init__(
        self,
        client: QdrantClient,
        name: str,
        *,
        where: str = "",
        new: bool = True,
        owned: bool = False,
    ) -> None:
        self.where = where or f"qdrant:{name}"
        self._points, self._owned = Points(client, name, self.where), owned
        self._staged: dict[str, Change] | None = None  # by key, inside `writing`
        self._touched: dict[str, dict[str, int]] = {}  # the same
        self._settings: dict[str, str] = {}  # inside `writing`
        self._last = 0
        if not self._points.exists("records") or not (found := self._read_settings()):
            if not new:
                raise DataError(
                    f"there is no knowledge base {self.where}",
                    hint=f"khaosz rag add FILES --kb {self.where}",
                )
            for part in ("chunks", "records"):
                self._points.create(part)
            self._points.upsert("records", [settings_point(found := {"version": VERSION})])
        if found["version"] != VERSION:
            raise DataError(
                f"{self.where} has version {found['version']} of the layout, this program {VERSION}"
            )

    def close(self) -> None:
        if self._owned:
            self._points.client.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Sends the changes when the block ends, and none when something is raised in it."""
        assert self._staged is None, "writing inside writing"
        self._staged, self._touched, self._settings = {}, {}, self._read_settings()
        try:
            yield
            self._send(self._staged)
        finally:
            self._staged = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """No snapshot: see the top of this file."""
        yield

    # ------------------------------------------------------------------------------------ settings

    def _read_settings(self) -> dict[str, str]:
        found = self._points.ask("retrieve", "records", ids=[SETTINGS])
        return {} if not found else dict((found[0].payload or {})["settings"])

    def settings(self) -> dict[str, str]:
        return dict(self._settings) if self._staged is not None else self._read_settings()

    def get(self, key: str) -> str | None:
        return self.settings().get(key)

    def set(self, key: str, value: str) -> None:
        assert self._staged is not None, "set outside writing"
        self._settings[key] = value

    def unset(self, key: str) -> None:
        self._settings.pop(key, None)

    def _count(self, key: str, by: int) -> None:
        self._settings[key] = str(int(self._settings.get(key, 0)) + by)

    @property
    def vector_count(self) -> int:
        return self._points.number_of("vectors", live()) if self._points.exists("vectors") else 0

    # --------------------------------------------------------------------------------------- write

    def replace(
        self, collection: str, source: SourceFile, documents: Sequence[NewDocument]
    ) -> None:
        assert self._staged is not None, "replace outside writing"
        self._staged[key_of(collection, source.path)] = collection, source, documents

    def touch(self, collection: str, source: SourceFile) -> None:
        values = {"size": source.size, "mtime_ns": source.mtime_ns}
        self._touched[key_of(collection, source.path)] = values

    def remove_source(self, collection: str, path: str) -> bool:
        assert self._staged is not None, "remove_source outside writing"
        key = key_of(collection, path)
        before = self._staged.get(key)
        self._staged[key] = collection, None, ()
        return before[1] is not None if before else bool(self._records([key]))

    def _send(self, staged: dict[str, Change]) -> None:
        """The order is what the top of this file promises."""
        former = self._records(list(staged))
        records: list[models.PointStruct] = []
        numbers: list[int] = []
        points: dict[str, list[models.PointStruct]] = defaultdict(list)
        for collection, file, documents in staged.values():
            if file is not None:
                numbers.append(self._next())
                made = written(numbers[-1], collection, file, documents, self._next)
                records.append(made.pop("source")[0])
                for part, some in made.items():
                    points[part] += some
        if points["vectors"]:
            self._make_vectors()
        for part, some in points.items():
            self._points.upsert(part, some)
        if staged:
            of_keys = is_any("key", list(staged))
            new = [is_any("source", numbers or [0])]  # 0 is no number
            changing = [unfinished(key, change, former.get(key)) for key, change in staged.items()]
            self._points.update("records", put(changing), delete([of_keys], new))
            for part in ("chunks", "vectors"):
                if self._points.exists(part):
                    self._points.update(part, delete([of_keys], new), show([of_keys, *new]))
            self._points.update("records", show([of_keys, *new]))
        for key in ("chunks", "terms"):
            self._count(key, sum((record.payload or {})[key] for record in records))
            self._count(key, -sum(payload[key] for payload in former.values()))
        self._count("generation", len(staged))
        removed = [key for key, (_, file, _) in staged.items() if file is None]
        self._points.update(
            "records",
            put([*records, settings_point(self._settings)]),
            *([drop(removed)] if removed else []),
            *(assign(key, values) for key, values in self._touched.items()),
        )

    def _next(self) -> int:
        """A new number: microseconds, so that writers on two machines do not meet, and then 12 bits
        to count in. Below 2^63."""
        self._last = max(self._last + 1, time.time_ns() // 1000 << 12)
        return self._last

    def rebuild_postings(self) -> None:
        """Sent at once: it changes nothing that it would not change again."""
        count: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        batch: list[models.PointStruct] = []
        for record in self._points.scroll("chunks", live()):
            payload = dict(record.payload or {})
            found = terms("\n".join((*payload["headings"], payload["text"])))
            count[payload["key"]][0] += 1
            count[payload["key"]][1] += len(found)
            payload |= {"terms": len(found), "words": sorted(set(found))}
            batch.append(point(record.id, payload))
            if len(batch) == SENT:
                self._points.upsert("chunks", batch)
                batch = []
        self._points.upsert("chunks", batch)
        records = [
            point(r.id, {**(r.payload or {}), "chunks": count[str(r.id)][0],
                          "terms": count[str(r.id)][1]})
            for r in self._points.scroll("records", [is_("kind", "source")])
        ]  # fmt: skip
        self._points.upsert("records", records)
        self._settings["chunks"] = str(sum(chunks for chunks, _ in count.values()))
        self._settings["terms"] = str(sum(total for _, total in count.values()))
        self._count("generation", 1)

    def set_vectors(self, vectors: Iterable[tuple[int, np.ndarray]]) -> None:
        """Sent at once, as `rebuild_postings` is."""
        given = dict(vectors)
        kept = ["live", "source", "key", "collection", "name"]
        owners = self._points.ask("retrieve", "chunks", ids=list(given), with_payload=kept)
        self._make_vectors()
        self._points.upsert(
            "vectors", [point(o.id, o.payload or {}, given[int(o.id)]) for o in owners]
        )
        self._count("generation", 1)

    def forget_vectors(self) -> None:
        if self._points.exists("vectors"):
            self._points.ask("delete_collection", "vectors")
        self._count("generation", 1)

    def _make_vectors(self) -> None:
        # Vectors have length 1: the dot product is the cosine, and Qdrant keeps them as they are.
        size = int(self._settings["dimension"])
        self._points.create("vectors", models.VectorParams(size=size, distance=models.Distance.DOT))

    # ---------------------------------------------------------------------------------------- read

    def _records(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """Payloads of sources by key, unfinished ones too."""
        found = self._points.retrieve("records", keys)
        return {str(record.id): record.payload or {} for record in found}

    def source(self, collection: str, path: str) -> SourceFile | None:
        found = self._records([key_of(collection, path)])
        whole = [payload for payload in found.values() if "unfinished" not in payload]
        return file_of(whole[0]) if whole else None

    def source_paths(self, collection: str) -> list[str]:
        must = [is_("kind", "source"), is_("collection", collection)]
        return [(record.payload or {})["path"] for record in self._points.scroll("records", must)]

    def sources(self) -> Iterator[tuple[str, SourceFile]]:
        found = [
            record.payload or {}
            for record in self._points.scroll("records", [is_("kind", "source")])
        ]
        for payload in sorted(found, key=lambda payload: payload["source"]):
            if "unfinished" not in payload:
                yield payload["collection"], file_of(payload)

    def contents(self, collection: str, path: str) -> list[NewDocument]:
        of = [*live(), is_("key", key_of(collection, path))]
        vectors: dict[Any, np.ndarray] = {}
        if self._points.exists("vectors"):
            for record in self._points.scroll("vectors", of, vectors=True):
                vectors[record.id] = np.asarray(record.vector, np.float32)
        chunks: dict[int, list[NewChunk]] = defaultdict(list)
        for record in self._points.scroll("chunks", of):
            chunk = chunk_of(record)
            chunks[chunk.document].append(
                NewChunk(
                    *(chunk.start, chunk.end, chunk.text, chunk.headings), vectors.get(record.id)
                )
            )
        documents = map(document_of, self._points.scroll("records", of))
        return [document.with_chunks(chunks[document.id]) for document in documents]

    def counts(self) -> dict[str, int]:
        whole = models.Filter(must=[is_("kind", "source")], must_not=[is_("unfinished", True)])
        sources = self._points.ask("count", "records", count_filter=whole, exact=True).count
        words = self._points.ask("facet", "chunks", key="words", limit=_TERMS,
            facet_filter=models.Filter(must=live()),
        )  # fmt: skip
        return {
            "sources": sources,
            "documents": self._points.number_of("records", [*live(), is_("kind", "document")]),
            "chunks": self._points.number_of("chunks", live()),
            "vectors": self.vector_count,
            "terms": len(words.hits),
        }

    def size(self) -> int:
        return 0

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        must = [*live(), is_("kind", "document")]
        if collection is not None:
            must.append(is_("collection", collection))
        found = map(document_of, self._points.scroll("records", must))
        return sorted(found, key=lambda document: (document.collection, document.name, document.id))

    def owners(self, numbers: Sequence[int]) -> dict[int, StoredDocument]:
        wanted = sorted({int(number) for number in numbers})
        found = self._points.retrieve("records", wanted)
        return {int(r.id): document_of(r) for r in found if (r.payload or {}).get("live")}

    def document_by_hash(self, digest: str) -> StoredDocument | None:
        must = [*live(), is_("hash", digest)]
        return next(map(document_of, self._points.scroll("records", must)), None)

    def text(self, document: int) -> str:
        return whole_text(self.chunks_of(document))

    def chunks(self, numbers: Sequence[int]) -> list[StoredChunk]:
        wanted = [int(number) for number in numbers]
        found = self._points.retrieve("chunks", wanted)
        rows = {int(r.id): chunk_of(r) for r in found if (r.payload or {})["live"]}
        return [rows[number] for number in wanted if number in rows]

    def chunks_of(self, document: int) -> list[StoredChunk]:
        found = map(
            chunk_of, self._points.scroll("chunks", [*live(), is_("document", int(document))])
        )
        return sorted(found, key=lambda chunk: chunk.start)

    def chunk_numbers(
        self, *, collection: str | None = None, name: str | None = None
    ) -> np.ndarray:
        must = self._only(collection, name)
        found = [] if must is None else self._points.scroll("chunks", must, payload=False)
        return np.fromiter((int(record.id) for record in found), np.int64)

    def _only(self, collection: str | None, name: str | None) -> list[Any] | None:
        """Conditions for what a filter lets through; None where that is nothing."""
        must = live()
        if collection is not None:
            must.append(is_("collection", collection))
        if name is not None:  # Qdrant knows no patterns
            fits = re.compile(glob_pattern(name), re.DOTALL)
            of = [*must, is_("kind", "document")]
            found = {
                (r.payload or {})["name"] for r in self._points.scroll("records", of, ["name"])
            }
            names = [name for name in sorted(found) if fits.fullmatch(name)]
            if not names:
                return None
            must.append(is_any("name", names))
        return must

    def unembedded(self) -> Iterator[StoredChunk]:
        there = set()
        if self._points.exists("vectors"):
            there = {record.id for record in self._points.scroll("vectors", live(), payload=False)}
        for record in self._points.scroll("chunks", live()):
            if record.id not in there:
                yield chunk_of(record)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        found = []
        if self._points.exists("vectors"):
            found = list(self._points.scroll("vectors", live(), vectors=True))
        numbers = np.array([record.id for record in found], np.int64)
        matrix = np.array([record.vector for record in found], np.float32)
        return numbers, matrix.reshape(len(found), self.dimension)

    def document_frequencies(self, wanted: Sequence[str]) -> dict[str, int]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            counts = pool.map(lambda term: self._points.number_of("chunks", _holding(term)), wanted)
            found = dict(zip(wanted, counts, strict=True))
        return {term: count for term, count in found.items() if count > 0}

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._holders, wanted))

    def _holders(self, term: str) -> np.ndarray:
        found = self._points.scroll("chunks", _holding(term), payload=False)
        return np.fromiter((int(record.id) for record in found), np.int64)

    def nearest(
        self,
        query: np.ndarray,
        limit: int,
        allowed: np.ndarray | None = None,
        *,
        collection: str | None = None,
        name: str | None = None,
    ) -> list[tuple[int, float]]:
        """Chunk numbers and cosines, best first. The server filters; `allowed` is not read."""
        must = self._only(collection, name)
        if must is None or not self._points.exists("vectors"):
            return []
        found = self._points.ask("query_points", "vectors", query=query.astype(float).tolist(),
            query_filter=models.Filter(must=must), limit=limit, with_payload=False,
        )  # fmt: skip
        pairs = [(int(point.id), float(point.score)) for point in found.points]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _holding(term: str) -> list[Any]:
    return [*live(), is_("words", term)]
