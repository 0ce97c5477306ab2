"""Errors as responses in OpenAI's layout, without paths or stack traces."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from khaosz.database import is_full
from khaosz.errors import (
    ContextLengthError,
    DataError,
    GenerationError,
    KhaoszError,
    NotEnoughMemoryError,
    TokenizerError,
)
from khaosz.files import DISK_FULL
from khaosz.serve.models import UnknownModel
from khaosz.serve.retrieval_models import UnknownName, Unusable
from khaosz.serve.worker import Busy, Failed, Stopping

_log = logging.getLogger("khaosz.serve")

TIMED_OUT = "the answer took longer than the time limit of this server"
FAILED = "the request failed"
_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    503: {"retry-after": "1"},  # seconds; the queue is full or a file in use
    504: {"x-should-retry": "false"},  # it would take as long; OpenAI's client retries by itself
}
# Fields of `SamplingParams` that requests spell otherwise.
_FIELDS = {"json_schema": "response_format", "lark": "tools"}
# Fields of `ChatRequest` that other protocols spell otherwise, by the beginning of their paths.
_TRANSLATED = {
    "/v1/responses": {
        "response_format": "text.format", "messages": "input", "max_tokens": "max_output_tokens",
    },
    "/v1/messages": {"response_format": "output_config.format", "stop": "stop_sequences"},
    "/api/": {"response_format": "format"},
}  # fmt: skip
_ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 503: "overloaded_error",
    504: "timeout_error",
}  # fmt: skip
_DESCRIPTIONS = {
    400: "The request is invalid; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "Not found.",
    408: "The body stopped arriving.",
    409: "It exists already, was changed meanwhile, or cannot be used in its state.",
    413: "The body is too large.",
    415: "Files of this type cannot be read.",
    500: "The request failed; see the server's log.",
    503: "The queue or the memory is full, or a file is in use; see Retry-After.",
    504: "The request took longer than the time limit.",
    507: "The disk is full.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


def errors(*statuses: int, model: type[BaseModel] = Error) -> dict[int | str, dict[str, Any]]:
    """A route's error responses for the OpenAPI document. Key, origin and body size are checked
    before any route, so each has 401, 403 and 413. `model`: the protocol's layout."""
    return {
        status: {"model": model, "description": _DESCRIPTIONS[status]}
        for status in (401, 403, 413, *statuses, 500)
    }


class ApiError(Exception):
    """A request that ends with an error in OpenAI's layout. `param`: the field that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        # The message may quote the request, which may be long.
        message = message if len(message) <= 1000 else message[:1000] + "..."
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def body_for(self, path: str) -> dict[str, Any]:
        """In the layout of the protocol that this path belongs to."""
        error = self.body["error"]
        if path.startswith("/api/"):  # Ollama's
            return {"error": error["message"]}
        if path.startswith("/v1/messages"):  # Anthropic's
            default = "api_error" if self.status >= 500 else "invalid_request_error"
            kind = _ANTHROPIC_KINDS.get(self.status, default)
            return {"type": "error", "error": {"type": kind, "message": error["message"]}}
        return self.body

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        headers = {**_HEADERS.get(self.status, {}), **(headers or {})}
        # ASCII: a message may quote the request, which may not be valid Unicode.
        body = json.dumps(self.body_for(path))
        return Response(body, self.status, headers, "application/json")


@contextmanager
def map_disk_full() -> Iterator[None]:
    """Raises `ApiError` 507 instead of the system's and SQLite's errors of a full disk."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = error.errno in DISK_FULL if isinstance(error, OSError) else is_full(error)
        if not full:
            raise
        raise ApiError(507, "the disk is full", code="disk_full") from None


def explain_errors(app: FastAPI) -> None:
    """Answer every exception of a route with JSON in the layout of its protocol."""

    async def explain(request: Request, error: Exception) -> Response:
        path = request.url.path
        return as_api_error(error, path).response(path)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette lists the methods of a path's first route only
            path = getattr(request.scope.get("route"), "path_format", "")
            methods = app.openapi()["paths"].get(path, {})
            headers |= {"Allow": ", ".join(sorted(map(str.upper, methods)))} if methods else {}
        return ApiError(error.status_code, str(error.detail)).response(request.url.path, headers)

    app.add_exception_handler(HTTPException, http)
    for kind in (
        ApiError, Busy, UnknownModel, UnknownName, TimeoutError, KhaoszError, RecursionError,
        RequestValidationError, Failed, Exception,
    ):  # fmt: skip
        app.add_exception_handler(kind, explain)


def as_api_error(error: Exception, path: str) -> ApiError:
    """`path`: of the request; its protocol names the fields."""
    translated = next((to for prefix, to in _TRANSLATED.items() if path.startswith(prefix)), {})
    match error:
        case ApiError(param=str(param)) if param in translated:
            field = translated[param]
            message = str(error).replace(param, field)
            return ApiError(error.status, message, param=field, code=error.code)
        case ApiError():
            return error
        case Busy():
            return ApiError(503, "the queue is full", code="queue_full")
        case Stopping():
            return ApiError(503, "the server is shutting down", code="shutting_down")
        case UnknownModel():
            message = f"model {str(error)!r} not found; GET /v1/models lists all models"
            return ApiError(404, message, param="model", code="model_not_found")
        case UnknownName():
            known = ", ".join(error.known) or f"none (khaosz serve --{error.kind} NAME=SOURCE)"
            message = f"{error.kind} {error.name!r} not found; available: {known}"
            return ApiError(404, message, param="model", code="model_not_found")
        case TimeoutError():
            return ApiError(504, TIMED_OUT, code="request_timeout")
        case ContextLengthError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case GenerationError(param=str(param)):
            field = _FIELDS.get(param, param)
            field = translated.get(field, field)
            return ApiError(400, f"{field} {error.reason}", param=field)
        case GenerationError() | DataError() | TokenizerError():
            return ApiError(400, str(error))
        case NotEnoughMemoryError():
            _log.error("%s; %s", error, error.hint)
            return ApiError(503, "not enough memory for this model", code="not_enough_memory")
        case Unusable(kind=kind, name=name):
            _log.error("%s", error)  # it may name paths, so it is not sent
            message = f"{kind} {name!r} cannot be opened; the log of this server says why"
            return ApiError(503, message, param="model", code="model_unusable")
        case KhaoszError():
            _log.error("%s", error)
        case RequestValidationError():
            return _invalid_request(error)
        case RecursionError():
            # JSON that could be parsed may still be too deep for the code that processes it.
            return ApiError(400, "values nested too deep")
    return ApiError(500, FAILED)


def _invalid_request(error: RequestValidationError) -> ApiError:
    # The deepest, rather not of another type: of a union, that is the member that fits best.
    first = max(
        error.errors(), key=lambda each: (len(each["loc"]), not each["type"].endswith("_type"))
    )
    place, *parts = first["loc"]
    param = _param(place, parts, error.body, missing=first["type"] == "missing")
    match first:
        case {"type": "json_invalid", "ctx": {"error": why}}:
            return ApiError(400, f"the body is not valid JSON at character {parts[0]}: {why}")
        case _ if isinstance(error.body, bytes):
            message = "not sent as JSON: set Content-Type to application/json"
        case {"type": "extra_forbidden"}:
            message = "unknown field"
        case {"type": "value_error", "ctx": {"error": ValueError() as raised}}:
            message = str(raised)  # of our validators, without pydantic's prefix
        case _:
            message = str(first["msg"])
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _param(place: str | int, parts: Sequence[str | int], body: Any, *, missing: bool) -> str | None:
    """The path of a field in the body, as "messages.0.content"; a missing one's where it belongs.
    For unions, pydantic's path also names the member it tried, which is left out."""
    if place != "body":
        return ".".join(map(str, parts)) or None
    path: list[str] = []
    for i, part in enumerate(parts):
        try:
            body = body[part]
        except (LookupError, TypeError):
            if not missing or i < len(parts) - 1:
                continue
        path.append(str(part))
    return ".".join(path) or None
