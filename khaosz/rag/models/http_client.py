"""A client of servers with an OpenAI-style API."""

from __future__ import annotations

import codecs
import ipaddress
import json
import os
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from itertools import chain
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from khaosz.errors import ConfigError, ServerError

KEYS = ("KHAOSZ_API_KEY", "OPENAI_API_KEY")  # environment variables; see `_authorization`
_CHUNK = 1 << 16  # bytes of a stream that are read together at most
_MAX_ERROR = 1 << 20  # bytes of an error's body that are read


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key to any host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
# A proxy from the environment cannot reach servers on this machine.
_DIRECT = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))


def split_address(name: str) -> tuple[str, str] | None:
    """(URL, model) of `http://host/v1#model`; None for a name that is not an http address."""
    if not name.startswith(("http://", "https://")):
        return None
    url, _, model = name.partition("#")
    return url, model or "default"


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises `ConfigError` if it is not an http address."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(letter.isspace() for letter in url):
        raise ConfigError(
            f"{url!r} is not an http address", hint="for example http://127.0.0.1:8000/v1"
        )
    return url.rstrip("/")


@contextmanager
def open_url(
    address: str, body: dict[str, Any] | None = None, *, seconds: float
) -> Iterator[HTTPResponse]:
    """The response to a GET, or to a POST of `body`, to be read within the block. The API key is
    read from the environment (`KEYS`). Raises `ServerError`, also for errors within the block."""
    local = _is_loopback(urlsplit(address).hostname)
    headers = {"Content-Type": "application/json", **_authorization(local)}
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(address, data, headers)
        opener = _DIRECT if local else _OPENER
        with opener.open(request, timeout=seconds) as response:
            yield response
    except HTTPError as error:
        with error:
            raise _server_error(address, error) from None
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise ServerError(f"{address}: {text}", hint="is the server running?") from error


def read_json(address: str, body: dict[str, Any] | None = None, *, seconds: float = 30) -> Any:
    with open_url(address, body, seconds=seconds) as response:
        return json.load(response)


def read_events(
    address: str, body: dict[str, Any], *, seconds: float = 300
) -> Iterator[dict[str, Any]]:
    """Server-sent events up to [DONE], each a JSON object; `seconds` is how long one may take.

    A stream that ends without [DONE] is complete if every choice has its finish reason. A server
    that ignores `stream` sends one JSON object, which is yielded. Raises `ServerError` for an
    event with an error, and for a stream that ends early."""
    open_choices: set[Any] = {None}  # unknown until the first event
    with open_url(address, body, seconds=seconds) as response:
        if "json" in (response.headers.get_content_type() or ""):
            yield _event(address, response.read())
            return
        for data in event_data(iter(lambda: response.read1(_CHUNK), b"")):
            if data.strip() == "[DONE]":
                return
            event = _event(address, data)
            for choice in event.get("choices") or ():
                if isinstance(choice, dict):
                    open_choices.discard(None)
                    index = choice.get("index", 0)
                    ended = bool(choice.get("finish_reason"))  # some servers send ""
                    (open_choices.discard if ended else open_choices.add)(index)
            yield event
        if open_choices:
            raise ServerError(
                f"{address}: the answer broke off", hint="is the server still running?"
            )


def event_data(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event, its `data` lines joined by line feeds
    (https://html.spec.whatwg.org/multipage/server-sent-events.html). Lines end with CR LF, LF or
    CR; chunks may end anywhere. An event without its blank line at the end of the stream counts,
    since servers forget it."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    rest, data, after_cr = "", list[str](), False
    for chunk in chain(chunks, (None,)):
        text = decoder.decode(chunk or b"", final=chunk is None)
        if text:
            part = text.removeprefix("\n") if after_cr else text  # CR LF is one line end
            after_cr = text.endswith("\r")
            rest += part.replace("\r\n", "\n").replace("\r", "\n")
        *lines, rest = rest.split("\n")
        if chunk is None:
            lines += [rest, ""]
        for line in lines:
            name, _, value = line.partition(":")
            if name == "data":
                data.append(value.removeprefix(" "))
            elif not line:
                if any(map(str.strip, data)):
                    yield "\n".join(data)
                data = []


def _event(address: str, data: str | bytes) -> dict[str, Any]:
    event = json.loads(data)
    if not isinstance(event, dict):
        raise ServerError(f"{address}: an event is not a JSON object")
    if event.get("error"):
        raise ServerError(f"{address}: {_message(event)}")
    return event


def deltas(event: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """(delta, finish reason) of the choices in an event of a chat, or in a whole answer."""
    for choice in event.get("choices") or ():
        if isinstance(choice, dict):
            yield choice.get("delta") or choice.get("message") or {}, choice.get("finish_reason")


def _authorization(local: bool) -> dict[str, str]:
    """The first of `KEYS` that is set for a server on this machine, else the last: if both are set,
    the key of our own server is not sent to a provider."""
    for name in KEYS if local else reversed(KEYS):
        if key := os.environ.get(name):
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(
                    f"the key in {name} has characters that are not allowed in a header",
                    hint="it is one line of ASCII",
                )
            return {"Authorization": f"Bearer {key}"}
    return {}


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _server_error(address: str, error: HTTPError) -> ServerError:
    code = None
    message = f"{error.code} {error.reason}"
    try:
        body = json.loads(error.read(_MAX_ERROR))
        message = _message(body) or message
        value = body["error"]["code"]
        code = value if isinstance(value, str) else None
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        pass  # not every server reports errors in JSON
    hint = None
    match error.code:
        case 401 | 403:
            hint = f"set the server's key in {KEYS[0]}"
        # The path is missing, not a model, whose name the message would quote.
        case 404 if "not found" in message.lower() and not {"'", '"'} & set(message):
            hint = "does the address end in /v1?"
        case 429 | 503:
            hint = "the server is busy: try again in a moment"
        case 301 | 302 | 307 | 308:
            hint = f"it redirects to {error.headers.get('Location')}: use that address"
    if str(error.code) not in message:
        message = f"{message} ({error.code})"
    return ServerError(f"{address}: {message}", hint=hint, status=error.code, code=code)


def _message(body: Any) -> str | None:
    """The message in an error's JSON, in OpenAI's layout or a similar one."""
    error = body.get("error", body) if isinstance(body, dict) else None
    text = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return text.strip().splitlines()[0][:500] if isinstance(text, str) and text.strip() else None
