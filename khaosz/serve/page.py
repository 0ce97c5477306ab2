"""The page: files that `web/` was built into, as they lie in the package."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

# Everything the page needs comes from here, and nothing else is let in: an answer that a model
# was tricked into writing can neither run nor send anything away.
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
# Not by `mimetypes`, which on Windows asks the registry.
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
    """By the path that they are asked for with; none where the page was not built."""
    root = root or files("khaosz.serve") / "page"
    index = root / "index.html"
    if not index.is_file():
        return {}
    # The name of an asset holds a hash of its content, so it never changes.
    assets = {f"/assets/{each.name}": each for each in (root / "assets").iterdir()}
    found = {"/": _file(index, "no-cache")}
    for path, each in assets.items():
        found[path] = _file(each, "public, max-age=31536000, immutable")
    return found


def _file(source: Traversable, cache: str) -> PageFile:
    content = source.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    kind = _TYPES[source.name.rpartition(".")[2]]
    headers = {**_HEADERS, "cache-control": cache, "etag": etag, "vary": "accept-encoding"}
    return PageFile(content, gzip.compress(content, mtime=0), kind, etag, headers)


def page_routes() -> APIRouter:
    """Read once, at the start; a path that is none of them is no file."""
    router = APIRouter(include_in_schema=False)
    for path, file in page_files().items():
        router.add_api_route(path, _answering(file), methods=["GET", "HEAD"])
    return router


def _answering(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=file.headers)
        content, headers = file.content, file.headers
        if "gzip" in request.headers.get("accept-encoding", ""):
            content, headers = file.packed, {**headers, "content-encoding": "gzip"}
        return Response(content, media_type=file.kind, headers=headers)

    return answer
