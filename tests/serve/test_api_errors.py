"""Error responses: `param` is a field of the exception, not a word of its message."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from serving import Service

from khaosz.errors import (
    DataError,
    GenerationError,
    KhaoszError,
    ModelError,
    TokenizerError,
)
from khaosz.inference.sampling import SamplingParams
from khaosz.serve.errors import ApiError, explain_errors, map_disk_full


def response(error: KhaoszError) -> tuple[int, dict[str, Any]]:
    """Status and error of the response to this exception."""
    app = FastAPI()
    explain_errors(app)
    handler: Callable[..., Any] = app.exception_handlers[KhaoszError]
    request = Request({"type": "http", "path": "/v1/chat/completions", "headers": []})
    answer = asyncio.run(handler(request, error))
    return answer.status_code, json.loads(answer.body)["error"]


@pytest.mark.parametrize(
    ("error", "status", "param", "message"),
    [
        (GenerationError("is odd", param="top_p"), 400, "top_p", "top_p is odd"),
        (GenerationError("is odd", param="json_schema"), 400, "response_format",
         "response_format is odd"),
        (GenerationError("is odd", param="lark"), 400, "tools", "tools is odd"),
        # The first words are names of fields.
        (GenerationError("temperature is odd"), 400, None, "temperature is odd"),
        (DataError("messages are odd"), 400, None, "messages are odd"),
        (TokenizerError("stop is odd"), 400, None, "stop is odd"),
        (ModelError("/secret/path is odd"), 500, None, "the request failed"),
    ],
)  # fmt: skip
def test_param_is_a_field_of_the_exception(
    error: KhaoszError, status: int, param: str | None, message: str
) -> None:
    found_status, body = response(error)
    assert (found_status, body["param"], body["message"]) == (status, param, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1),
        ("top_p", 0.0), ("min_p", 1.0), ("typical_p", 0.0), ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0), ("frequency_penalty", -3.0), ("logit_bias", {1: 101.0}),
        ("seed", -1), ("n", 0), ("stop", ("",)), ("logprobs", 21),
    ],
)  # fmt: skip
def test_sampling_errors_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(GenerationError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert str(caught.value) == f"{field} {caught.value.reason}"


def test_param_does_not_depend_on_wording(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = GenerationError.__init__

    def reworded(self: GenerationError, reason: str, **more: Any) -> None:
        init(self, "seed of another sentence", **more)
        self.args = (self.reason,)  # without the field

    monkeypatch.setattr(GenerationError, "__init__", reworded)
    nonsense = {"type": "nonsense"}
    function = {"name": "f", "parameters": nonsense}
    for fields, param in (
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"name": "x", "schema": nonsense}}},
         "response_format"),
        ({"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
         "tools"),
    ):  # fmt: skip
        messages = [{"role": "user", "content": "x"}]
        body = json.dumps({"model": "tiny", "messages": messages, **fields})
        status, _, answer = service.ask("POST", "/v1/chat/completions", body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert answer["error"]["message"] == f"{param} seed of another sentence"


def test_body_that_is_not_json(service: Service) -> None:
    status, _, answer = service.ask("POST", "/v1/chat/completions", '{"model": "tiny", "n": 01}')
    assert (status, answer["error"]["param"]) == (400, None)
    assert answer["error"]["message"].startswith("the body is not valid JSON at character 24: ")


def test_full_disk_is_507(tmp_path: Path) -> None:
    with pytest.raises(ApiError) as caught, map_disk_full():
        raise OSError(errno.ENOSPC, "reworded")
    assert caught.value.status == 507 and caught.value.body["error"]["code"] == "disk_full"
    db = sqlite3.connect(tmp_path / "full.db", isolation_level=None)
    db.execute("CREATE TABLE texts (text)")
    db.execute("PRAGMA max_page_count = 3")
    with pytest.raises(ApiError), map_disk_full():
        db.execute("INSERT INTO texts VALUES (?)", ("x" * 100_000,))
    with pytest.raises(sqlite3.OperationalError), map_disk_full():
        db.execute("SELECT * FROM full")
    with pytest.raises(OSError, match="disk is full"), map_disk_full():
        raise OSError(errno.EACCES, "disk is full")
    db.close()
