"""Knowledge bases of a real server, for their tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serving import Service, served, wait_until

from khaosz.serve.knowledge.library import MAX_UPLOAD, Library
from khaosz.serve.offered import Offered

sys.path.append(str(Path(__file__).parents[1] / "rag" / "load"))  # makers of PDF and DOCX files

BASES = "/v1/knowledge_bases"


class Knowing:
    """What a client of it does."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(self, method: str, path: str = "", body: Any = None, **headers: str) -> Any:
        """Status and JSON; `path` below that of the bases."""
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
        """These files when reading them has ended as `status`."""
        found: list[Any] = []

        def settled() -> bool:
            found[:] = [self.file(base, file["id"]) for file in files]
            return all(file["status"] in ("ready", "failed") for file in found)

        wait_until(settled, seconds=60)
        assert [file["status"] for file in found] == [status] * len(files), found
        return found

    def search(self, base: str, query: str, **more: Any) -> list[Any]:
        body = json.dumps({"query": query, **more})
        status, answer = self.ask("POST", f"/{base}/search", body)
        assert status == 200, answer
        return answer["hits"]


@contextmanager
def knowing(
    model: Path,
    data: Path,
    *,
    embedders: list[str] | None = None,
    rerankers: list[str] | None = None,
    max_upload: int = MAX_UPLOAD,
    key: str | None = None,
) -> Iterator[Knowing]:
    offered = Offered(embedders or [], rerankers or [])
    library = Library(data, offered, max_upload=max_upload)
    with served(model, offered=offered, library=library, key=key) as service:
        yield Knowing(service)
