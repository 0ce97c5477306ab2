"""The routes of knowledge bases, their files, and searches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import IO, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from starlette.requests import ClientDisconnect

from khaosz.serve.errors import ApiError, errors, map_disk_full
from khaosz.serve.knowledge.catalogue import FileRow
from khaosz.serve.knowledge.ingest import Base
from khaosz.serve.knowledge.library import MAX_NAME, Library, file_name
from khaosz.serve.knowledge.search import (
    MAX_AROUND,
    SearchRequest,
    hit_bodies,
    passage,
    searcher,
    with_quote,
)
from khaosz.serve.knowledge.uploads import BLOCK, TooLarge
from khaosz.serve.messages import RequestModel
from khaosz.serve.replies import (
    BaseList,
    BaseReply,
    Deleted,
    FileList,
    FileReply,
    PassageReply,
    SearchReply,
)

IDLE_TIMEOUT = 60.0  # seconds between two parts of a body
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


class NewBase(RequestModel):
    """embedder: its name on this server; without one, search is lexical."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    embedder: str | None = None


def knowledge_routes(library: Library) -> APIRouter:
    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        await asyncio.to_thread(library.start)
        yield
        await asyncio.to_thread(library.stop)

    router = APIRouter(prefix="/v1/knowledge_bases", lifespan=lifespan)

    # --------------------------------------------------------------------------------------- bases

    @router.get("", response_model=BaseList, responses=errors())
    def list_bases() -> dict[str, Any]:
        return {"object": "list", "data": [base_body(each) for each in library.bases()]}

    @router.post("", status_code=201, response_model=BaseReply, responses=errors(400, 409, 507))
    def create_base(request: NewBase) -> dict[str, Any]:
        with map_disk_full():
            return base_body(library.create(request.name, request.embedder))

    @router.get("/{kb}", response_model=BaseReply, responses=errors(404))
    def one_base(kb: str) -> dict[str, Any]:
        return base_body(library.base(kb))

    @router.delete("/{kb}", response_model=Deleted, responses=errors(404, 507))
    def delete_base(kb: str) -> dict[str, Any]:
        with map_disk_full():
            library.delete(kb)
        return {"id": kb, "object": "knowledge_base", "deleted": True}

    def base_body(base: Base) -> dict[str, Any]:
        files = library.files(base)
        return {
            "id": base.name,
            "object": "knowledge_base",
            "created": base.created,
            "embedder": base.embedder,
            "files": len(files),
            "chunks": sum(file.chunks for file in files),
            "embedded": sum(file.embedded for file in files),
            "bytes": sum(file.size for file in files),
            "error": base.error and base.error.message,
            "code": base.error and base.error.code,
        }

    # --------------------------------------------------------------------------------------- files

    @router.get("/{kb}/files", response_model=FileList, responses=errors(404))
    def list_files(kb: str) -> dict[str, Any]:
        base = library.base(kb)
        return {"object": "list", "data": [file_body(each) for each in library.files(base)]}

    @router.put(
        "/{kb}/files/{file}",
        status_code=202,
        response_model=FileReply,
        responses=errors(400, 404, 408, 409, 415, 507),
        openapi_extra={"requestBody": {"required": True, "content": _BYTES}},
    )
    async def upload(kb: str, file: str, request: Request) -> Any:
        """A file's bytes, under the name in the path; it replaces the file of that name. It is
        ingested in the background: see its status."""
        try:
            name, base = await asyncio.to_thread(check_upload, kb, file, request)
            with map_disk_full():
                received = await library.uploads.receive(_parts(request), library.max_upload)
        except ClientDisconnect:
            return Response(status_code=499)
        except TooLarge:
            raise too_large() from None
        try:
            with map_disk_full():
                return file_body(await asyncio.to_thread(library.add, base, name, received))
        finally:
            await asyncio.to_thread(received.discard)

    def check_upload(kb: str, file: str, request: Request) -> tuple[str, Base]:
        base = library.base(kb)
        name = file_name(file)
        if base.embedder is not None and base.embedder not in library.retrieval.embedders:
            message = f"{base.embedder!r}, the embedder of {base.name!r}, is not available"
            raise ApiError(409, message, code="embedder_unusable")
        if base.error is not None:
            base.try_again()
        if int(request.headers.get("content-length", 0)) > library.max_upload:
            raise too_large()
        return name, base

    def too_large() -> ApiError:
        return ApiError(
            413, f"a file has at most {library.max_upload:,} bytes", code="file_too_large"
        )

    @router.get("/{kb}/files/{file}", response_model=FileReply, responses=errors(404))
    def one_file(kb: str, file: str) -> dict[str, Any]:
        return file_body(library.file(kb, file))

    @router.delete("/{kb}/files/{file}", response_model=Deleted, responses=errors(404, 507))
    def delete_file(kb: str, file: str) -> dict[str, Any]:
        with map_disk_full():
            library.remove(kb, file)
        return {"id": file, "object": "file", "deleted": True}

    @router.get(
        "/{kb}/files/{file}/content",
        response_class=Response,
        responses={200: {"content": _BYTES}, **errors(404)},
    )
    def content(kb: str, file: str) -> Response:
        """The uploaded bytes, as a download: never shown in the browser."""
        row = library.file(kb, file)
        try:
            opened = open(library.uploads.path(row.sha256), "rb")  # noqa: SIM115 (closed when sent)
        except OSError:
            raise ApiError(404, f"file {file!r} not found in {kb!r}") from None
        return _Download(opened, row)

    # -------------------------------------------------------------------------------------- search

    @router.post("/{kb}/search", response_model=SearchReply, responses=errors(400, 404, 409))
    async def search(kb: str, request: SearchRequest) -> dict[str, Any]:
        """Passages for a query, best first, and the sentence that answers it, without a model."""
        base = await asyncio.to_thread(library.base, kb)
        checked = await searcher(base, request, library.retrieval)
        hits, quote = await checked.run(request.query, with_quote(request.query), request.name)
        return {
            "object": "search",
            "query": request.query,
            "mode": checked.mode,
            "hits": hit_bodies(hits),
            "quote": quote,
        }

    @router.get(
        "/{kb}/documents/{digest}", response_model=PassageReply, responses=errors(400, 404, 409)
    )
    async def document(
        kb: str,
        digest: str,
        start: Annotated[int, Query(ge=0)] = 0,
        end: Annotated[int | None, Query(ge=0)] = None,
        around: Annotated[int, Query(ge=0, le=MAX_AROUND)] = 2000,
    ) -> dict[str, Any]:
        """The text of a document around a passage of it."""
        base = await asyncio.to_thread(library.base, kb)
        return await base.read(lambda opened: passage(opened, digest, start, end, around))

    return router


def file_body(row: FileRow) -> dict[str, Any]:
    body = {"object": "file", "bytes": row.size, **asdict(row)}
    return {name: body[name] for name in FileReply.model_fields}


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """A streamed body. Raises `ClientDisconnect`, and `ApiError` if it stops arriving."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT):
                part = await anext(stream, None)
        except TimeoutError:
            raise ApiError(408, f"no data for {IDLE_TIMEOUT:g} seconds") from None
        if part is None:
            return
        yield part


class _Download(StreamingResponse):
    def __init__(self, file: IO[bytes], row: FileRow) -> None:
        self._file = file
        headers = {
            "content-length": str(row.size),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(row.name, safe='')}",
            "x-content-type-options": "nosniff",
        }
        blocks = iter(lambda: file.read(BLOCK), b"")
        super().__init__(blocks, media_type="application/octet-stream", headers=headers)

    async def __call__(self, *asgi: Any) -> None:
        with self._file:
            await super().__call__(*asgi)
