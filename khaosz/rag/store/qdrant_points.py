"""Points of a knowledge base in Qdrant: asking for them, and records made into them and back."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from khaosz.errors import DataError
from khaosz.rag.store.protocol import (
    NewDocument,
    SourceFile,
    StoredChunk,
    StoredDocument,
    key_of,
)
from khaosz.rag.terms import terms

Change = tuple[str, SourceFile | None, Sequence[NewDocument]]  # collection; without a file it goes
_SHARED = {"live": "bool", "key": "keyword", "source": "integer", "collection": "keyword"}
INDEXED: dict[str, dict[str, str]] = {
    "records": {**_SHARED, "kind": "keyword", "hash": "keyword"},
    "chunks": {**_SHARED, "name": "keyword", "document": "integer", "words": "keyword"},
    "vectors": {**_SHARED, "name": "keyword"},
}
SENT = 256  # points in one request
_BYTES = 16_000_000  # the same; Qdrant takes 32 MB
READ = 1000  # points with payload in one answer
_NUMBERS = 20_000  # points without
SETTINGS = 0  # the number of their point


class Points:
    """The collections of one base. Raises `DataError` for whatever the server refuses."""

    def __init__(self, client: QdrantClient, name: str, where: str) -> None:
        self.client, self._name, self._where = client, name, where

    def ask(self, verb: str, part: str, **options: Any) -> Any:
        """A method of the client, by its name."""
        try:
            return getattr(self.client, verb)(collection_name=f"{self._name}-{part}", **options)
        except (ApiException, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self._where}: {reason}", hint="is the server running?") from error

    def exists(self, part: str) -> bool:
        return self.ask("collection_exists", part)

    def create(self, part: str, vectors: models.VectorParams | None = None) -> None:
        if self.exists(part):
            return
        self.ask("create_collection", part, vectors_config=vectors or {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # local mode has no indexes, and says so
            for key, kind in INDEXED[part].items():
                self.ask("create_payload_index", part, field_name=key, field_schema=kind)

    def upsert(self, part: str, points: Sequence[models.PointStruct]) -> None:
        batch: list[models.PointStruct] = []
        size = 0
        for one in points:
            # A number is up to 22 characters of JSON, a character up to 6.
            more = 22 * len(one.vector or ()) + 6 * len(str(one.payload))  # type: ignore[arg-type]
            if batch and (len(batch) == SENT or size + more > _BYTES):
                self.ask("upsert", part, points=batch, wait=True)
                batch, size = [], 0
            batch.append(one)
            size += more
        if batch:
            self.ask("upsert", part, points=batch, wait=True)

    def update(self, part: str, *operations: Any) -> None:
        """One request: the operations are done in this order."""
        self.ask("batch_update_points", part, update_operations=list(operations), wait=True)

    def retrieve(self, part: str, ids: Sequence[Any]) -> Iterator[models.Record]:
        """Those that are there."""
        for first in range(0, len(ids), READ):
            yield from self.ask("retrieve", part, ids=list(ids[first : first + READ]))

    def scroll(
        self, part: str, must: list[Any], payload: Any = True, vectors: bool = False
    ) -> Iterator[models.Record]:
        """By number."""
        offset = None
        while True:
            page, offset = self.ask(
                *("scroll", part), scroll_filter=models.Filter(must=must), offset=offset,
                limit=READ if payload else _NUMBERS, with_payload=payload, with_vectors=vectors,
            )  # fmt: skip
            yield from page
            if offset is None:
                return

    def number_of(self, part: str, must: list[Any]) -> int:
        wanted = models.Filter(must=must)
        return self.ask("count", part, count_filter=wanted, exact=True).count


def is_(key: str, value: str | int | bool) -> Any:
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))


def is_any(key: str, values: Sequence[Any]) -> Any:
    return models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))


def live() -> list[Any]:
    """The condition of every read: points that are still being sent are not shown."""
    return [is_("live", True)]


def point(id: Any, payload: dict[str, Any], vector: np.ndarray | None = None) -> models.PointStruct:
    # Python's floats hold float32 exactly, and JSON gives them back.
    values: Any = {} if vector is None else np.asarray(vector, np.float32).astype(float).tolist()
    return models.PointStruct(id=id, vector=values, payload=payload)


def put(points: list[models.PointStruct]) -> Any:
    return models.UpsertOperation(upsert=models.PointsList(points=points))


def drop(ids: list[str]) -> Any:
    return models.DeleteOperation(delete=models.PointIdsList(points=list(ids)))


def delete(must: list[Any], must_not: list[Any]) -> Any:
    gone = models.Filter(must=must, must_not=must_not)
    return models.DeleteOperation(delete=models.FilterSelector(filter=gone))


def show(must: list[Any]) -> Any:
    shown = models.SetPayload(payload={"live": True}, filter=models.Filter(must=must))
    return models.SetPayloadOperation(set_payload=shown)


def assign(id: str, payload: dict[str, Any]) -> Any:
    return models.SetPayloadOperation(set_payload=models.SetPayload(payload=payload, points=[id]))


def settings_point(settings: dict[str, str]) -> models.PointStruct:
    return point(SETTINGS, {"kind": "settings", "settings": settings})


def written(
    number: int,
    collection: str,
    file: SourceFile,
    documents: Sequence[NewDocument],
    following: Callable[[], int],
) -> dict[str, list[models.PointStruct]]:
    """The points of a source by part, not yet shown, and under `source` its own record. Numbers
    are drawn from `following`."""
    key = key_of(collection, file.path)
    points: dict[str, list[models.PointStruct]] = defaultdict(list)
    chunks = total = 0
    for document in documents:
        owner = following()
        common = {
            "live": False, "source": number, "key": key, "collection": collection,
            "name": document.name,
        }  # fmt: skip
        payload = {
            **common, "kind": "document", "doc_id": document.doc_id, "path": file.path,
            "hash": document.hash, "length": document.length, "pages": list(document.pages),
            "metadata": document.metadata,
        }  # fmt: skip
        points["records"].append(point(owner, payload))
        for chunk in document.chunks:
            id, found = following(), terms(chunk.indexed)
            payload = {
                **common, "document": owner, "start": chunk.start, "end": chunk.end,
                "text": chunk.text, "headings": list(chunk.headings), "terms": len(found),
                "words": sorted(set(found)),
            }  # fmt: skip
            points["chunks"].append(point(id, payload))
            chunks += 1
            total += len(found)
            if chunk.vector is not None:
                points["vectors"].append(point(id, common, chunk.vector))
    record = {
        "kind": "source", "collection": collection, "source": number, "path": file.path,
        "size": file.size, "mtime_ns": file.mtime_ns, "sha256": file.sha256,
        "chunks": chunks, "terms": total,
    }  # fmt: skip
    points["source"].append(point(key, record))
    return points


def unfinished(key: str, change: Change, former: dict[str, Any] | None) -> models.PointStruct:
    """The record of a source while it changes. What the base's counts still hold of it stays in it
    until both change at once."""
    collection, file, _ = change
    old = former or {"chunks": 0, "terms": 0, "path": ""}
    payload = {
        "kind": "source", "unfinished": True, "collection": collection, "source": 0,
        "path": file.path if file else old["path"], "chunks": old["chunks"], "terms": old["terms"],
    }  # fmt: skip
    return point(key, payload)


def file_of(payload: dict[str, Any]) -> SourceFile:
    return SourceFile(payload["path"], payload["size"], payload["mtime_ns"], payload["sha256"])


def document_of(record: models.Record) -> StoredDocument:
    p = record.payload or {}
    return StoredDocument(
        *(int(record.id), p["collection"], p["doc_id"], p["name"], p["hash"], p["length"]),
        *(tuple(p["pages"]), p["metadata"], p["path"]),
    )


def chunk_of(record: models.Record) -> StoredChunk:
    p = record.payload or {}
    return StoredChunk(
        *(int(record.id), p["document"], p["start"], p["end"], p["text"]),
        *(tuple(p["headings"]), p["terms"]),
    )
