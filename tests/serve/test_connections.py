"""Half-open connections, slow clients, and the modes of the service's files."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, RemoteDisconnected
from pathlib import Path
from typing import Any

import pytest
from serving import open_requests, served, wait_until

from khaosz.serve import guard
from khaosz.serve.connections import limited_protocol

HALF = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-"


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Waits until the server sends something or closes."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def live(port: int) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health/live")
        return connection.getresponse().status
    finally:
        connection.close()


@contextlib.contextmanager
def process(model: Path, data: Path, **options: Any) -> Iterator[tuple[list[str], list[str]]]:
    """`khaosz serve`: what it prints up to the page's address; its messages when it has ended."""
    command = [
        sys.executable, "-m", "khaosz", "serve", str(model), "--port", "0", "--device", "cpu",
        "--data", str(data),
    ]  # fmt: skip
    pipe, messages = subprocess.PIPE, list[str]()
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options) as running:
        try:
            assert running.stdout is not None and running.stderr is not None
            lines = [running.stdout.readline()]
            while lines[-1] and not lines[-1].startswith("page:"):
                lines.append(running.stdout.readline())
            yield lines, messages
        finally:
            running.terminate()
            messages.append(running.stderr.read())


BODY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
BEGINNINGS = {"a head": HALF, "a body": BODY, "nothing": b"", "no HTTP": b"\x16\x03\x01\xff" * 50}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_NOFILE")
def test_half_open_connections_leave_room_for_others(tiny: Path, tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    with process(tiny, tmp_path / "data", preexec_fn=limit) as (lines, messages):
        port = int(lines[-1].rpartition(":")[2].strip("/\n"))
        for beginning in BEGINNINGS.values():
            with contextlib.ExitStack() as sockets:
                for _ in range(300):
                    sockets.enter_context(connect(port, beginning))
                assert live(port) == 200
    assert "out of system resource" not in messages[0] and "Traceback" not in messages[0]


def test_longest_waiting_connection_is_closed_for_a_new_one(tiny: Path) -> None:
    with served(tiny, http=limited_protocol(3)) as service, contextlib.ExitStack() as sockets:
        answering = HTTPConnection("127.0.0.1", service.port, timeout=30)
        body = '{"model": "tiny", "prompt": "x", "max_tokens": 1900, "stream": true}'
        answering.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = answering.getresponse()
        first, second = (sockets.enter_context(connect(service.port, HALF)) for _ in range(2))
        assert live(service.port) == 200
        assert is_closed(first)
        second.sendall(b"A: b\r\nConnection: close\r\n\r\n")
        assert second.recv(12) == b"HTTP/1.1 200"
        assert response.read(6) == b"data: "  # an answer is never cut off
        answering.close()
        wait_until(lambda: open_requests(service) == 0)


def test_request_must_begin_and_arrive_in_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with served(tiny, http=limited_protocol(seconds=0.2)) as service:
        with connect(service.port) as silent, connect(service.port, HALF) as half:
            assert is_closed(silent) and is_closed(half)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        with connect(service.port, head) as slow:
            assert slow.recv(12) == b"HTTP/1.1 408"
        assert live(service.port) == 200


def answers(port: int) -> bool:
    try:
        return live(port) == 200
    except (ConnectionResetError, RemoteDisconnected):
        return False


@pytest.mark.parametrize(
    "request_bytes", [BODY, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200]
)
def test_slow_body_and_unread_answer_make_room(tiny: Path, request_bytes: bytes) -> None:
    """Connections that have a request, but wait for their clients."""
    with (
        served(tiny, http=limited_protocol(1)) as service,
        connect(service.port, request_bytes),
    ):
        wait_until(lambda: answers(service.port), seconds=60)


def test_body_has_a_time_for_all_its_parts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WHOLE_BODY_SECONDS", 0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n"
    with served(tiny) as service, connect(service.port, head) as slow:
        slow.setblocking(False)
        while True:
            with contextlib.suppress(BlockingIOError):
                assert slow.recv(12) == b"HTTP/1.1 408"
                break
            slow.send(b" ")
            time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_data_folder_is_private(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    data.chmod(0o755)
    old = data / "inner" / "notes.txt"
    old.write_text("x")
    old.chmod(0o644)
    sqlite3.connect(data / "conversations.db").close()
    (data / "conversations.db").chmod(0o644)
    for was_open in (True, False):
        with process(tiny, data) as (lines, _):
            files = {path.name: path for path in data.rglob("*")}
            modes = {name: path.stat().st_mode & 0o777 for name, path in files.items()}
        assert ("could be read by other users" in lines[0]) == was_open
        assert data.stat().st_mode & 0o777 == 0o700
        assert {"conversations.db", "catalogue.db-wal", "notes.txt", "inner"} < modes.keys()
        assert all(
            mode == (0o700 if files[name].is_dir() else 0o600) for name, mode in modes.items()
        )
