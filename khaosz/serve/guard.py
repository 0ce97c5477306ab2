"""Checks of Host, Origin, key and body size, before a route sees the request.

A web page can make a browser send requests to this machine. It cannot choose the Host and Origin
that the browser sends, so those identify it, even when its name was rebound to a loopback address
(CVE-2024-28224).
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from khaosz.errors import ConfigError
from khaosz.serve.errors import ApiError

MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 30.0  # that the next part of a body may take
WHOLE_BODY_SECONDS = 120.0  # that a body may take which is not streamed to its route
_DRAINED = 32 << 20  # bytes read of a body too large, so that its sender reads the response
# These routes stream the body, and have a limit of their own.
_STREAMED = re.compile(r"PUT /v1/knowledge_bases/[^/]+/files/[^/]+")
_PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, PUT, DELETE",
    "access-control-max-age": "600",
}
# What a browser may ask for: names of headers, separated by commas.
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:[ \t]*,[ \t]*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
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
        `origins`: SCHEME://HOST[:PORT] of other pages that may use it, of any scheme (desktop
        applications and browser extensions have their own), and of proxies in front of it. Raises
        `ConfigError` for an invalid one."""
        self.app = app
        self.origins = frozenset(map(_origin, origins))
        proxies = [origin for origin in self.origins if origin.startswith(("http:", "https:"))]
        names = [_hostname(origin.partition(":")[2]) or "" for origin in proxies]
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
        if origin.lower() in self.origins:
            send = _allow_origin(origin, send)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await Response(status_code=204, headers=_preflight(headers))(scope, receive, send)
                return
        has_key = self._has_key(headers)
        error = self._check(scope["path"], headers, has_key)
        scope = {**scope, "state": {**scope.get("state", {}), "has_key": has_key}}
        if error is None and _STREAMED.fullmatch(f"{scope['method']} {scope['path']}"):
            await self.app(scope, receive, send)
            return
        if error is None:
            try:
                body = await _body(receive)
            except TimeoutError:
                error = ApiError(408, "the request's body stopped arriving", code="body_timeout")
        if error is None:
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
                return
            message = f"the request's body has more than {MAX_BODY:,} bytes"
            error = ApiError(413, message, code="body_too_large")
        # Closed: the rest of the body is not read.
        await error.response(scope["path"], {"connection": "close"})(scope, receive, send)

    def _has_key(self, headers: dict[str, bytes]) -> bool:
        if self._key is None:
            return True
        scheme, _, bearer = headers.get("authorization", b"").partition(b" ")
        keys = [headers.get("x-api-key", b"")]  # of Anthropic's clients
        keys += [bearer.strip()] if scheme.lower() == b"bearer" else []
        return any([hmac.compare_digest(key, self._key) for key in keys])

    def _check(self, path: str, headers: dict[str, bytes], has_key: bool) -> ApiError | None:
        """None for a request that may pass."""
        host = headers.get("host", b"").decode("latin-1")
        if self.hosts is not None and _hostname(f"//{host}") not in self.hosts:
            message = "the name in the Host header is not a name of this server"
            return ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin", b"").decode("latin-1")
        known = origin.lower() in self.origins
        if origin and not known and origin.partition("://")[2] != host:
            message = "pages of other origins may not use this server"
            return ApiError(403, message, code="origin_not_allowed")
        # The page itself is public: it asks for the key.
        if has_key or path == "/" or path.startswith(("/health/", "/assets/")):
            return None
        message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
        return ApiError(401, message, code="invalid_api_key")


def _origin(text: str) -> str:
    try:
        parts = urlsplit(text)
        whole = f"{parts.scheme}://{parts.netloc}"
        usable = _SCHEME.fullmatch(parts.scheme) and parts.hostname and parts.port != 0
    except ValueError:
        usable = whole = ""
    # `urlsplit` gives the scheme in lower case.
    if not usable or text.rstrip("/").lower() != whole.lower() or "@" in whole:
        raise ConfigError(
            f"--origin {text!r} is not SCHEME://HOST[:PORT]",
            hint="for example https://chat.example.org or app://obsidian.md",
        )
    return whole.lower()


def _preflight(headers: dict[str, bytes]) -> dict[str, str]:
    """What an allowed page may send: the headers it asks for, since clients add their own (such as
    OpenAI's x-stainless-*), and requests from a public page to this private address."""
    names = headers.get("access-control-request-headers", b"").decode("latin-1").strip()
    allowed = dict(_PREFLIGHT)
    if _HEADER_NAMES.fullmatch(names):
        allowed["access-control-allow-headers"] = names
    if headers.get("access-control-request-private-network") == b"true":
        allowed["access-control-allow-private-network"] = "true"
    return allowed


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
    """The whole body, None if it is too large. Raises TimeoutError when no more of it arrives."""
    parts: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WHOLE_BODY_SECONDS
    while size <= _DRAINED:
        async with asyncio.timeout_at(min(deadline, loop.time() + BODY_SECONDS)):
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
