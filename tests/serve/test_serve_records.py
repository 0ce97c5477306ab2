"""What the command keeps below --data and shows of --runs, over a kill and a start."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def command(model: Path, folder: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    program = [sys.executable, "-m", "khaosz", "serve", str(model), "--port", "0"]
    program += ["--device", "cpu", "--data", str(folder / "data"), "--runs", str(folder / "runs")]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield int(line.rpartition(":")[2].split("/")[0]) if line else 0, process
        finally:
            process.kill()


def ask(port: int, method: str, path: str, body: Any = None) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    kind = {"Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), kind)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    assert answer.status < 300, found
    return found


@pytest.mark.skipif(os.name == "nt", reason="modes of folders")
def test_the_command_keeps_records(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo" / "pt"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    id = str(uuid.uuid4())
    asked = [{"role": "user", "content": "你是谁？"}]
    with command(tiny, tmp_path) as (port, process):
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
        assert [each["id"] for each in ask(port, "GET", "/v1/runs")["data"]] == ["demo/pt"]
        ask(port, "PUT", f"/v1/conversations/{id}", {"title": "一", "nodes": []})
        ask(port, "POST", "/v1/preferences", {"messages": asked, "ranked": ["a", "b"]})
        process.kill()
    with command(tiny, tmp_path) as (port, _):
        assert ask(port, "GET", f"/v1/conversations/{id}")["title"] == "一"
        assert ask(port, "GET", "/v1/preferences")["count"] == 1
    with sqlite3.connect(tmp_path / "data" / "conversations.db") as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with command(tiny, tmp_path) as (_, process):
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "conversations.db has layout version 9, this program supports 1" in said
    assert "Traceback" not in said
