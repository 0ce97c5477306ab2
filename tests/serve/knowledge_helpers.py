"""Knowledge bases of a real server, for their tests."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serving import Service, served, wait_until

from khaosz.serve.knowledge.library import MAX_UPLOAD, Library
from khaosz.serve.retrieval_models import RetrievalModels

sys.path.append(str(Path(__file__).parents[1] / "rag" / "load"))  # makers of PDF and DOCX files

BASES = "/v1/knowledge_bases"


class KnowledgeClient:
    """A client of the knowledge bases of a service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(self, method: str, path: str = "", body: Any = None, **headers: str) -> Any:
        """Status and JSON; `path`: below /v1/knowledge_bases."""
        status, _, answer = self.service.ask(method, BASES + quote(path, "/?=&"), body, **headers)
        return status, answer

    def create(self, name: str, embedder: str | None = None) -> Any:
        status, answer = self.ask("POST", "", json.dumps({"name": name, "embedder": embedder}))
        assert status == 201, answer
        return answer

    def upload(self, base: str, name: str, content: bytes) -> Any:
        status, answer = self.ask("PUT", f"/{base}/files/{name}", content)
        assert status == 202, answer
        return answer

    def file(self, base: str, file_id: str) -> Any:
        status, answer = self.ask("GET", f"/{base}/files/{file_id}")
        assert status == 200, answer
        return answer

    def ready(self, base: str, *files: Any, status: str = "ready") -> list[Any]:
        """These files when ingesting has ended with `status`."""
        rows: list[Any] = []

        def settled() -> bool:
            rows[:] = [self.file(base, file["id"]) for file in files]
            return all(row["status"] in ("ready", "failed") for row in rows)

        wait_until(settled, seconds=60)
        assert [row["status"] for row in rows] == [status] * len(files), rows
        return rows

    def search(self, base: str, query: str, **more: Any) -> list[Any]:
        body = json.dumps({"query": query, **more})
        status, answer = self.ask("POST", f"/{base}/search", body)
        assert status == 200, answer
        return answer["hits"]


@contextmanager
def serve_knowledge(
    model: Path,
    data: Path,
    *,
    embedders: list[str] | None = None,
    rerankers: list[str] | None = None,
    max_upload: int = MAX_UPLOAD,
    key: str | None = None,
) -> Iterator[KnowledgeClient]:
    retrieval = RetrievalModels(embedders or [], rerankers or [])
    library = Library(data, retrieval, max_upload=max_upload)
    with served(model, retrieval=retrieval, library=library, key=key) as service:
        yield KnowledgeClient(service)


class EmbeddingServer:
    """A real /v1/embeddings for `HttpEmbedder`: vectors of length 8 from the texts' letters.
    Batches wait until `open` is set; with `failing`, they get status 500."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.failing = False
        self.received: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.received += body["input"]
                outer.open.wait(60)
                rows = [
                    {"index": i, "embedding": outer.vector(text)}
                    for i, text in enumerate(body["input"])
                ]
                with suppress(OSError):  # the client may have disconnected
                    self.send_response(500 if outer.failing else 200)
                    self.end_headers()
                    self.wfile.write(json.dumps({"data": rows}).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1#letters"

    @staticmethod
    def vector(text: str) -> list[float]:
        counts = [1.0] * 8
        for letter in text:
            counts[ord(letter) % 8] += 1.0
        return counts

    def close(self) -> None:
        self.open.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
