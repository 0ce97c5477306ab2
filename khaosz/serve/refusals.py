"""Refusals and errors as answers of OpenAI's layout: no path, no stack trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from khaosz.errors import DataError, GenerationError, KhaoszError, TokenizerError
from khaosz.serve.answers import error_body
from khaosz.serve.schema import ChatRequest
from khaosz.serve.worker import Busy, Failed

RETRY_AFTER = 1  # seconds, when the queue is full


class Refused(Exception):
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

    @app.exception_handler(Refused)
    async def our_own(request: Request, error: Refused) -> Response:
        return refused(error.status, error.body)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        body = error_body("the queue is full", "server_error", code="queue_full")
        return refused(503, body, {"retry-after": str(RETRY_AFTER)})

    @app.exception_handler(KhaoszError)
    async def out_of_range(request: Request, error: KhaoszError) -> Response:
        if not isinstance(error, GenerationError | DataError | TokenizerError):
            return refused(500, error_body("the request failed", "server_error"))
        # `SamplingParams` begins with the name of what is out of range.
        word = str(error).partition(" ")[0]
        field = "response_format" if word == "json_schema" else word
        param = field if field in ChatRequest.model_fields else None
        return refused(400, error_body(str(error), "invalid_request_error", param))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The deepest: of a union, that is the member that fits best.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        unknown = first["type"] == "extra_forbidden"
        what = "unknown field" if unknown else str(first["msg"])
        param = _path(first["loc"][1:], unknown)
        message = what.removeprefix("Value error, ")
        message = f"{param}: {message}" if param else message
        return refused(400, error_body(message, "invalid_request_error", param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return refused(
            error.status_code, error_body(str(error.detail), "invalid_request_error"), headers
        )

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return refused(500, error_body("the request failed", "server_error"))

    @app.exception_handler(Exception)
    async def surprise(request: Request, error: Exception) -> Response:
        return refused(500, error_body("the request failed", "server_error"))


def _path(parts: Sequence[str | int], unknown: bool) -> str | None:
    """Where a field stands. Of a union pydantic also names the member that it tried, by its type;
    an unknown field may be called like one."""
    last = len(parts) - 1
    kept = [
        str(part)
        for at, part in enumerate(parts)
        if (unknown and at == last) or not (part == "str" or str(part).startswith("list["))
    ]
    return ".".join(kept) or None
