"""A question to a server with an OpenAI-style API, at the address that the user names."""

from __future__ import annotations

import json
import os
import urllib.request
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from khaosz.errors import ConfigError


class _Here(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would go on to any host with the key in its hand."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Here)


def checked(url: str) -> str:
    """Without a slash at its end. Raises `ConfigError` for what is no http address."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is no http address", hint="http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def post(address: str, body: dict[str, Any], seconds: float) -> HTTPResponse:
    """The answer, to be closed; a key comes from `OPENAI_API_KEY`. Raises `OSError`."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    answer: HTTPResponse = _OPENER.open(request, timeout=seconds)
    return answer
