"""The command keeps records in --data over a kill, and serves the runs of --runs."""

from __future__ import annotations

import json
import sqlite3
import uuid
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from fork_server import ForkServer

from khaosz.serve.records.conversation_store import VERSION


def ask(port: int, method: str, path: str, body: Any = None) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    kind = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), kind)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    assert answer.status < 300, body
    return body


def test_records_survive_kill(fork_server: ForkServer, tiny: Path, tmp_path: Path) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    arguments = (tiny, "--data", data, "--runs", runs)
    run = runs / "demo" / "pt"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    id = str(uuid.uuid4())
    asked = [{"role": "user", "content": "你是谁？"}]
    with fork_server.khaosz(*arguments) as server:
        port = server.port
        assert data.stat().st_mode & 0o777 == 0o700
        assert [each["id"] for each in ask(port, "GET", "/v1/runs")["data"]] == ["demo/pt"]
        ask(port, "PUT", f"/v1/conversations/{id}", {"title": "一", "nodes": []})
        ask(port, "POST", "/v1/preferences", {"messages": asked, "ranked": ["a", "b"]})
    with fork_server.khaosz(*arguments) as server:
        port = server.port
        assert ask(port, "GET", f"/v1/conversations/{id}")["title"] == "一"
        assert ask(port, "GET", "/v1/preferences")["count"] == 1
    with closing(sqlite3.connect(data / "conversations.db", isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 9")
    with fork_server.khaosz(*arguments) as server:
        stderr = server.stderr.read_text()
    assert (server.port, server.exit_code) == (0, 1)
    assert f"conversations.db has layout version 9, this program supports {VERSION}" in stderr
    assert "Traceback" not in stderr
