"""The web page: the files built from `web/`, which are part of the package."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

# Only this server's own files are allowed: a script that a model was tricked into writing cannot
# run or send anything.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
# Not `mimetypes`, which reads the registry on Windows.
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    packed: bytes  # gzip
    kind: str
    etag: str
    headers: dict[str, str]


def page_files(root: Traversable | None = None) -> dict[str, PageFile]:
    """Files by URL path; empty where the page was not built."""
    root = root or files("khaosz.serve") / "page"
    index = root / "index.html"
    if not index.is_file():
        return {}
    pages = {"/": _file(index, "no-cache")}
    # Names of assets contain a hash of the content, so they can be cached for ever.
    for each in (root / "assets").iterdir():
        pages[f"/assets/{each.name}"] = _file(each, "public, max-age=31536000, immutable")
    return pages


def _file(source: Traversable, cache: str) -> PageFile:
    content = source.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    kind = _TYPES[source.name.rpartition(".")[2]]
    headers = {**_HEADERS, "cache-control": cache, "etag": etag, "vary": "accept-encoding"}
    return PageFile(content, gzip.compress(content, mtime=0), kind, etag, headers)


def page_routes() -> APIRouter:
    """One route per file. Files are read once, at the start."""
    router = APIRouter(include_in_schema=False)
    for path, file in page_files().items():
        router.add_api_route(path, _endpoint(file), methods=["GET", "HEAD"])
    return router


def _endpoint(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=file.headers)
        content, headers = file.content, file.headers
        if "gzip" in request.headers.get("accept-encoding", ""):
            content, headers = file.packed, {**headers, "content-encoding": "gzip"}
        return Response(content, media_type=file.kind, headers=headers)

    return answer
