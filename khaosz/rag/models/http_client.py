"""Questions to a server with an OpenAI-style API, at the address that the user names."""

from __future__ import annotations

import ipaddress
import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from khaosz.errors import ConfigError, ServerError

KEYS = ("KHAOSZ_API_KEY", "OPENAI_API_KEY")  # environment variables; see `_authorization`
_LONGEST = 1 << 20  # bytes of an error's body that are read


class _Here(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would go on to any host with the key in its hand."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Here)
# A proxy of the environment's can't reach this machine's own servers.
_DIRECT = urllib.request.build_opener(_Here, urllib.request.ProxyHandler({}))


def checked(url: str) -> str:
    """Without a slash at its end. Raises `ConfigError` for what is no http address."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(letter.isspace() for letter in url):
        raise ConfigError(f"{url!r} is no http address", hint="http://127.0.0.1:8000/v1")
    return url.rstrip("/")


@contextmanager
def asked(
    address: str, body: dict[str, Any] | None = None, *, seconds: float
) -> Iterator[HTTPResponse]:
    """The answer to a GET, or to a POST of `body`, to be read within the block. A key comes from
    the environment (`KEYS`). Raises `ServerError`, also for what goes wrong within the block."""
    local = _is_loopback(urlsplit(address).hostname)
    headers = {"Content-Type": "application/json", **_authorization(local)}
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(address, data, headers)
        opener = _DIRECT if local else _OPENER
        with opener.open(request, timeout=seconds) as answer:
            yield answer
    except HTTPError as error:
        with error:
            raise _refusal(address, error) from None
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise ServerError(f"{address}: {why}", hint="is the server running there?") from error


def read_json(address: str, body: dict[str, Any] | None = None, *, seconds: float = 30) -> Any:
    with asked(address, body, seconds=seconds) as answer:
        return json.load(answer)


def read_events(
    address: str, body: dict[str, Any], *, seconds: float = 300
) -> Iterator[dict[str, Any]]:
    """Server-sent events up to [DONE], each a JSON object; `seconds` is how long one may take.
    An event that holds an error raises it, and so does an end that comes too early."""
    with asked(address, body, seconds=seconds) as answer:
        for line in answer:
            name, _, data = line.decode("utf-8").strip().partition(":")
            if name != "data" or not data.strip():
                continue
            if data.strip() == "[DONE]":
                return
            event = json.loads(data)
            if event.get("error"):
                raise ServerError(f"{address}: {_message(event)}")
            yield event
        raise ServerError(f"{address}: the answer broke off", hint="is the server still running?")


def deltas(event: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """(delta, finish reason) of the choices in an event of a chat."""
    for choice in event.get("choices") or ():
        if isinstance(choice, dict):
            yield choice.get("delta") or {}, choice.get("finish_reason")


def _authorization(local: bool) -> dict[str, str]:
    """Of `KEYS` the first that is set, for a server of this machine; for another's the last: where
    both are set, a provider is not sent the key of our own server."""
    for name in KEYS if local else reversed(KEYS):
        if key := os.environ.get(name):
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(
                    f"the key in {name} has letters that no header may hold",
                    hint="it is one line of ASCII",
                )
            return {"Authorization": f"Bearer {key}"}
    return {}


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _refusal(address: str, error: HTTPError) -> ServerError:
    code = None
    message = f"{error.code} {error.reason}"
    try:
        body = json.loads(error.read(_LONGEST))
        message = _message(body) or message
        found = body["error"]["code"]
        code = found if isinstance(found, str) else None
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        pass  # not every server says why in JSON
    hint = None
    match error.code:
        case 401 | 403:
            hint = f"its key belongs into {KEYS[0]}"
        case 404 if "not found" in message.lower():  # what is missing has no name: the path
            hint = "does the address end in /v1?"
        case 429 | 503:
            hint = "it is busy: try again in a moment"
        case 301 | 302 | 307 | 308:
            hint = f"it points to {error.headers.get('Location')}: name that address"
    if str(error.code) not in message:
        message = f"{message} ({error.code})"
    return ServerError(f"{address}: {message}", hint=hint, status=error.code, code=code)


def _message(body: Any) -> str | None:
    """What an error's JSON says, in OpenAI's layout or one like it."""
    error = body.get("error", body) if isinstance(body, dict) else None
    said = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return said.strip().splitlines()[0][:500] if isinstance(said, str) and said.strip() else None
