"""/openapi.json, compared with real responses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import WEATHER, Service, served

from khaosz.serve.app import record_routes
from khaosz.serve.knowledge.library import MAX_UPLOAD, Library
from khaosz.serve.replies import ChatCompletion, TextCompletion
from khaosz.serve.retrieval_models import RetrievalModels

HELLO: list[Any] = [{"role": "user", "content": "the fox"}]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2},
        {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_chat_matches_schema(service: Service, more: dict[str, Any]) -> None:
    """Nothing else checks them, since they are written as plain JSON."""
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 16, "seed": 1, **more})
    status, _, answer = service.ask("POST", "/v1/chat/completions", body)
    assert status == 200
    ChatCompletion.model_validate(answer)


def test_completion_matches_schema(service: Service) -> None:
    body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 4})
    status, _, answer = service.ask("POST", "/v1/completions", body)
    assert status == 200
    TextCompletion.model_validate(answer)


def test_document_names_models_and_no_422(service: Service) -> None:
    document = service.ask("GET", "/openapi.json")[2]
    model = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]
    assert model["enum"] == ["tiny"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert {"401", "403", "500"} <= operation["responses"].keys(), (method, path)
            assert "422" not in operation["responses"], (method, path)


def test_405_lists_allowed_methods(tiny: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with served(tiny, runs=runs, routers=record_routes(tmp_path, runs)) as service:
        for path, operations in service.ask("GET", "/openapi.json")[2]["paths"].items():
            filled = re.sub(r"{\w+}", "00000000-0000-4000-8000-000000000000", path)
            status, headers, _ = service.ask("TRACE", filled)
            assert status == 405, path
            documented = sorted(method.upper() for method in operations)
            assert headers["allow"].split(", ") == documented, path


@pytest.mark.slow
def test_responses_match_document(tiny: Path, tmp_path: Path) -> None:
    """Five minutes of schemathesis: no 5xx, no status, header or body that the document lacks. Not
    asked: that what fits the schemas is taken (some fields only go together, which they can't
    say), and how a body over 4 MB is refused (413, which schemathesis takes for acceptance)."""
    tool = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("pip install schemathesis")
    retrieval = RetrievalModels([f"small={tiny}"], [f"judge={tiny}"])
    library = Library(tmp_path, retrieval, max_upload=MAX_UPLOAD)
    routers = record_routes(tmp_path, tmp_path / "runs")
    with served(tiny, retrieval=retrieval, library=library, routers=routers) as service:
        settings = tmp_path / "schemathesis.toml"
        statuses = "[400, 401, 403, 404, 405, 409, 413, 415]"
        settings.write_text(f"[checks.negative_data_rejection]\nexpected-statuses = {statuses}\n")
        command = [
            tool, "--config-file", str(settings), "run", "--max-time", "300", "--no-color",
            "--phases", "examples,coverage,fuzzing", "--exclude-checks", "positive_data_acceptance",
            "--request-timeout", "60",  # a busy machine may need longer than 10 for 1,024 tokens
            f"http://127.0.0.1:{service.port}/openapi.json",
        ]  # fmt: skip
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-6000:]
