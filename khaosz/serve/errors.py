"""Errors as responses in OpenAI's layout, without paths or stack traces."""

from __future__ import annotations

import errno
import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from khaosz.database import is_full
from khaosz.errors import DataError, GenerationError, KhaoszError, TokenizerError
from khaosz.serve.models import UnknownModel
from khaosz.serve.retrieval_models import UnknownName
from khaosz.serve.worker import Busy, Failed

_log = logging.getLogger("khaosz.serve")

TIMED_OUT = "the answer took longer than the time limit of this server"
FAILED = "the request failed"
RETRY_AFTER = 1  # seconds, when the queue is full or a file in use
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Fields of `SamplingParams` that requests spell otherwise.
_FIELDS = {"json_schema": "response_format", "lark": "tools"}
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


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's error responses for the OpenAPI document. Key, origin and body size are checked
    before any route, so each has 401, 403 and 413."""
    return {
        status: {"model": Error, "description": _DESCRIPTIONS[status]}
        for status in (401, 403, 413, *statuses, 500)
    }


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    # The message may quote the request, which may be long.
    message = message if len(message) <= 1000 else message[:1000] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ApiError(Exception):
    """A request that ends with an error in OpenAI's layout. `param`: the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.body = error_body(message, kind, param, code)


@contextmanager
def map_disk_full() -> Iterator[None]:
    """Raises `ApiError` 507 instead of the system's and SQLite's errors of a full disk."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = error.errno in _DISK_FULL if isinstance(error, OSError) else is_full(error)
        if not full:
            raise
        raise ApiError(507, "the disk is full", "server_error", code="disk_full") from None


def explain_errors(app: FastAPI) -> None:
    """Answer every exception of a route with JSON in OpenAI's layout."""

    def respond(
        status: int, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> Response:
        # ASCII: a message may quote the request, which may not be valid Unicode.
        return Response(json.dumps(body), status, headers, "application/json")

    def model_not_found(message: str) -> Response:
        body = error_body(message, "invalid_request_error", "model", "model_not_found")
        return respond(404, body)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        headers = {"retry-after": str(RETRY_AFTER)} if error.status == 503 else None
        return respond(error.status, error.body, headers)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        body = error_body("the queue is full", "server_error", code="queue_full")
        return respond(503, body, {"retry-after": str(RETRY_AFTER)})

    @app.exception_handler(UnknownModel)
    async def unknown_model(request: Request, error: UnknownModel) -> Response:
        return model_not_found(f"model {str(error)!r} not found; GET /v1/models lists all models")

    @app.exception_handler(UnknownName)
    async def unknown_name(request: Request, error: UnknownName) -> Response:
        known = ", ".join(error.known) or f"none (khaosz serve --{error.kind} NAME=SOURCE)"
        return model_not_found(f"{error.kind} {error.name!r} not found; available: {known}")

    @app.exception_handler(TimeoutError)
    async def timed_out(request: Request, error: TimeoutError) -> Response:
        # A retry would take as long, and OpenAI's client retries by itself.
        body = error_body(TIMED_OUT, "server_error", code="request_timeout")
        return respond(504, body, {"x-should-retry": "false"})

    @app.exception_handler(KhaoszError)
    async def khaosz_error(request: Request, error: KhaoszError) -> Response:
        field: str | None = None
        match error:
            case GenerationError(param=str(param)):
                field = _FIELDS.get(param, param)
                message = f"{field} {error.reason}"
            case GenerationError() | DataError() | TokenizerError():
                message = str(error)
            case _:
                _log.error("%s", error)  # it may name paths, so it is not sent
                return respond(500, error_body(FAILED, "server_error"))
        return respond(400, error_body(message, "invalid_request_error", field))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The deepest: of a union, that is the member that fits best.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        place, *parts = first["loc"]
        param = _param(place, parts, error.body, missing=first["type"] == "missing")
        match first:
            case _ if isinstance(error.body, bytes):
                message = "not sent as JSON: set Content-Type to application/json"
            case {"type": "extra_forbidden"}:
                message = "unknown field"
            case {"type": "value_error", "ctx": {"error": ValueError() as raised}}:
                message = str(raised)  # of our validators, without pydantic's prefix
            case _:
                message = str(first["msg"])
        message = f"{param}: {message}" if param else message
        return respond(400, error_body(message, "invalid_request_error", param))

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> Response:
        # JSON that could be parsed may still be too deep for the code that processes it.
        return respond(400, error_body("values nested too deep", "invalid_request_error"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette lists the methods of a path's first route only
            path = getattr(request.scope.get("route"), "path_format", "")
            methods = app.openapi()["paths"].get(path, {})
            headers |= {"Allow": ", ".join(sorted(map(str.upper, methods)))} if methods else {}
        body = error_body(str(error.detail), "invalid_request_error")
        return respond(error.status_code, body, headers)

    @app.exception_handler(Failed)
    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return respond(500, error_body(FAILED, "server_error"))


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
