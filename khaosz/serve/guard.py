"""Checks of Host, Origin, key and body size, before a route sees the request.

A web page can make a browser send requests to this machine. It cannot choose the Host and Origin
that the browser sends, so those identify it, even when its name was rebound to a loopback address
(CVE-2024-28224).
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from khaosz.errors import ConfigError
from khaosz.serve.errors import ApiError

MAX_BODY = 4 << 20  # bytes
_DRAINED = 32 << 20  # bytes read of a body too large, so that its sender reads the response
# These routes stream the body, and have a limit of their own.
_STREAMED = re.compile(r"PUT /v1/knowledge_bases/[^/]+/files/[^/]+")
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, PUT, DELETE",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware: Host and Origin, the key, the size of the body."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: tuple[str, ...] | None,
        origins: Sequence[str] = (),
    ) -> None:
        """`key` None: no key is needed. `hosts`: accepted names of this server; None: any.
        `origins`: SCHEME://HOST[:PORT] of other pages that may use it, and of proxies in front of
        it. Raises `ConfigError` for an invalid one."""
        self.app = app
        self.origins = frozenset(map(_origin, origins))
        names = [_hostname(origin.partition(":")[2]) or "" for origin in self.origins]
        self.hosts = None if hosts is None else (*hosts, *names)
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[str, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), value)
        origin = headers.get("origin", b"").decode("latin-1")
        if origin in self.origins:
            send = _allow_origin(origin, send)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, send)
                return
        error = self._check(scope["path"], headers)
        if error is None and _STREAMED.fullmatch(f"{scope['method']} {scope['path']}"):
            await self.app(scope, receive, send)
            return
        if error is None:
            body = await _body(receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
                return
            message = f"the request's body has more than {MAX_BODY:,} bytes"
            error = ApiError(413, message, code="body_too_large")
        # Closed: the rest of the body is not read.
        await error.response({"connection": "close"})(scope, receive, send)

    def _check(self, path: str, headers: dict[str, bytes]) -> ApiError | None:
        """None for a request that may pass."""
        host = headers.get("host", b"").decode("latin-1")
        if self.hosts is not None and _hostname(f"//{host}") not in self.hosts:
            message = "the name in the Host header is not a name of this server"
            return ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin", b"").decode("latin-1")
        if origin and origin not in self.origins and origin.partition("://")[2] != host:
            message = "pages of other origins may not use this server"
            return ApiError(403, message, code="origin_not_allowed")
        # The page itself is public: it asks for the key.
        if self._key is None or path == "/" or path.startswith(("/health/", "/assets/")):
            return None
        scheme, _, key = headers.get("authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
        return ApiError(401, message, code="invalid_api_key")


def _origin(text: str) -> str:
    try:
        parts = urlsplit(text)
        whole = f"{parts.scheme}://{parts.netloc}"
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = whole = ""
    if not usable or text.rstrip("/") != whole or "@" in whole:
        raise ConfigError(f"--origin {text!r} is not SCHEME://HOST[:PORT]")
    return whole.lower()


def _allow_origin(origin: str, send: Send) -> Send:
    """Let a page of this origin read the response. No cookies: the key is in a header."""
    headers = [(b"access-control-allow-origin", origin.encode()), (b"vary", b"origin")]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_with_headers


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def _body(receive: Receive) -> bytes | None:
    """The whole body, None if it is too large."""
    parts: list[bytes] = []
    size = 0
    while size <= _DRAINED:
        message = await receive()
        if message["type"] != "http.request":  # the client left
            break
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY:
            parts.append(part)
        if not message.get("more_body", False):
            break
    return b"".join(parts) if size <= MAX_BODY else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body that was read, then what follows it."""
    done = False

    async def replay() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
