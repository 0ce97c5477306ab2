"""Refusals and errors as answers of OpenAI's layout: no path, no stack trace."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from khaosz.errors import DataError, GenerationError, KhaoszError, TokenizerError
from khaosz.serve.models import UnknownModel
from khaosz.serve.retrieval_models import UnknownName
from khaosz.serve.schema import ChatRequest
from khaosz.serve.worker import Busy, Failed

_log = logging.getLogger("khaosz.serve")

TOO_LATE = "the answer took longer than this server gives a request"
RETRY_AFTER = 1  # seconds, when the queue is full or a file in use
_MEANINGS = {
    400: "What was asked is wrong; `param` names the field.",
    404: "There is no such thing here.",
    408: "The body stopped coming.",
    409: "It is there already, has changed meanwhile, or cannot be used as it is.",
    413: "The body is too large.",
    415: "A file of a kind that can't be read.",
    500: "The request failed; the server's log has more.",
    503: "The queue is full, a model has no room, or a file is in use; see Retry-After.",
    504: "The request took longer than it may.",
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
    """What a route answers beside its good answer, for the OpenAPI document. Who may ask and how
    large a body may be is checked before any route: 401, 403, 413."""
    always = {401: "The key is missing or wrong.", 403: "Not from there.", 413: _MEANINGS[413]}
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": text} for status, text in always.items()
    }
    for status in (*statuses, 500):
        found[status] = {"model": Error, "description": _MEANINGS[status]}
    return found


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    # It may repeat what was sent, which may be long.
    message = message if len(message) <= 1000 else message[:1000] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ApiError(Exception):
    """A request that ends with an error of OpenAI's layout."""

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
        self.status = status
        self.body = error_body(message, kind, param, code)


def explain_errors(app: FastAPI) -> None:
    def refused(
        status: int,
        body: dict[str, Any],
        headers: dict[str, str] | None = None,
    ) -> Response:
        # ASCII: what a client sent and a message repeats may not be valid Unicode.
        return Response(json.dumps(body), status, headers, "application/json")

    @app.exception_handler(ApiError)
    async def our_own(request: Request, error: ApiError) -> Response:
        headers = {"retry-after": str(RETRY_AFTER)} if error.status == 503 else None
        return refused(error.status, error.body, headers)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        body = error_body("the queue is full", "server_error", code="queue_full")
        return refused(503, body, {"retry-after": str(RETRY_AFTER)})

    @app.exception_handler(UnknownModel)
    async def unknown_model(request: Request, error: UnknownModel) -> Response:
        message = f"the model {str(error)!r} does not exist; GET /v1/models lists what does"
        body = error_body(message, "invalid_request_error", "model", "model_not_found")
        return refused(404, body)

    @app.exception_handler(UnknownName)
    async def unknown_name(request: Request, error: UnknownName) -> Response:
        known = ", ".join(error.known) or f"none (khaosz serve --{error.kind} NAME=SOURCE)"
        message = f"there is no {error.kind} {error.name!r} here; there are: {known}"
        body = error_body(message, "invalid_request_error", "model", "model_not_found")
        return refused(404, body)

    @app.exception_handler(TimeoutError)
    async def too_late(request: Request, error: TimeoutError) -> Response:
        # RequestModel again it would take as long, and OpenAI's client asks again by itself.
        body = error_body(TOO_LATE, "server_error", code="request_timeout")
        return refused(504, body, {"x-should-retry": "false"})

    @app.exception_handler(KhaoszError)
    async def out_of_range(request: Request, error: KhaoszError) -> Response:
        if not isinstance(error, GenerationError | DataError | TokenizerError):
            _log.error("%s", error)  # it may name paths, so not to the client
            return refused(500, error_body("the request failed", "server_error"))
        # `SamplingParams` begins with the name of what is out of range.
        word, _, rest = str(error).partition(" ")
        field = {"json_schema": "response_format", "lark": "tools"}.get(word, word)
        known = field in ChatRequest.model_fields
        message = f"{field} {rest}" if known else str(error)
        body = error_body(message, "invalid_request_error", field if known else None)
        return refused(400, body)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The deepest: of a union, that is the member that fits best.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        unknown = first["type"] == "extra_forbidden"
        what = "unknown field" if unknown else str(first["msg"])
        where, *parts = first["loc"]
        missing = first["type"] == "missing"
        param = _path(where, parts, error.body, missing)
        if isinstance(error.body, bytes):
            what = "not sent as JSON: Content-Type is to be application/json"
        message = what.removeprefix("Value error, ")
        message = f"{param}: {message}" if param else message
        return refused(400, error_body(message, "invalid_request_error", param))

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> Response:
        # JSON that could be read may still be too deep for what goes through it.
        return refused(400, error_body("values nested too deep", "invalid_request_error"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # of several routes of a path, only the first was asked
            asked = getattr(request.scope.get("route"), "path_format", "")
            path = app.openapi()["paths"].get(asked, {})
            headers |= {"Allow": ", ".join(sorted(map(str.upper, path)))} if path else {}
        return refused(
            error.status_code, error_body(str(error.detail), "invalid_request_error"), headers
        )

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return refused(500, error_body("the request failed", "server_error"))

    @app.exception_handler(Exception)
    async def surprise(request: Request, error: Exception) -> Response:
        return refused(500, error_body("the request failed", "server_error"))


def _path(where: str | int, parts: Sequence[str | int], body: Any, missing: bool) -> str | None:
    """Where a field stands, or would stand. Of a union pydantic also names the member that it
    tried, which is no part of the body."""
    if where != "body":
        return ".".join(map(str, parts)) or None
    kept: list[str] = []
    for at, part in enumerate(parts):
        try:
            body = body[part]
        except (LookupError, TypeError):
            if not missing or at < len(parts) - 1:
                continue
        kept.append(str(part))
    return ".".join(kept) or None
