"""A server that is killed while files come in and while it reads them: what it answered 202 to is
there, whole, and becomes ready."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from knowledge_helpers import BASES, KnowledgeClient
from make_documents import pdf_bytes
from serving import Service, wait_until

from khaosz.rag import KnowledgeBase

FILES = f"{BASES}/k/files"


@contextmanager
def process(tiny: Path, data: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`khaosz serve` and its port."""
    command = [sys.executable, "-m", "khaosz", "serve", str(tiny), "--port", "0", "--device", "cpu"]
    command += ["--data", str(data), "--embedder", f"small={tiny}"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        line = running.stdout.readline()
        yield running, int(line.rsplit(":", 1)[1].split("/")[0])
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def some_file(chance: random.Random, number: int) -> tuple[str, bytes]:
    word = f"marker{number}x"
    if number % 5 == 0:
        return f"文件 {number}.pdf", pdf_bytes([[(72, 700, f"A page about {word}.")]])
    paragraphs = [f"{word} paragraph {i}: the quick brown fox. 春眠不觉晓。" for i in range(
        chance.randrange(1, 120)
    )]  # fmt: skip
    return f"file {number}.md", "\n\n".join(paragraphs).encode()


def put(port: int, name: str, content: bytes) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("PUT", f"{FILES}/{quote(name)}", content)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert answer.status == 202, body
        assert body["sha256"] == hashlib.sha256(content).hexdigest()
    finally:
        connection.close()


def half_a_file(port: int) -> socket.socket:
    """An upload that will never end."""
    head = f"PUT {FILES}/never.txt HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + b"x" * 2_000_000)
    return connection


def kill_amid(port: int, server: subprocess.Popen[str], sent: dict[str, bytes], seed: int) -> None:
    """Send files until the server is killed; `sent` gets those that it answered 202."""
    chance = random.Random(seed)
    began = threading.Event()

    def send() -> None:
        with suppress(OSError, HTTPException):
            for number in range(1000 * seed, 1000 * seed + 1000):
                name, content = some_file(chance, number)
                put(port, name, content)
                sent[name] = content
                began.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert began.wait(30)
    half = half_a_file(port)
    threading.Event().wait(random.Random(-seed).random() * 0.5)
    server.send_signal(signal.SIGKILL)
    server.wait()
    sender.join()
    half.close()


def check_all_there(tiny: Path, data: Path, sent: dict[str, bytes]) -> None:
    with process(tiny, data) as (_, port):
        client = KnowledgeClient(Service(port, None))  # type: ignore[arg-type]

        def files() -> list[Any]:
            return client.ask("GET", "/k/files")[1]["data"]

        wait_until(lambda: all(f["status"] in ("ready", "failed") for f in files()), 600)
        found = {file["name"]: file for file in files()}
        assert found.keys() >= sent.keys()
        for name, content in sent.items():
            assert found[name]["status"] == "ready", found[name]
            assert found[name]["chunks"] == found[name]["embedded"] > 0
            word = name.split()[1].split(".")[0]
            hits = client.search("k", f"marker{word}x", mode="lexical", k=1)
            assert [hit["doc"] for hit in hits] == [name]
            assert found[name]["sha256"] == hashlib.sha256(content).hexdigest()
    uploads = {path.name for path in (data / "uploads").iterdir() if path.is_file()}
    assert uploads == {file["sha256"] for file in found.values()}
    for upload in uploads:
        assert hashlib.sha256((data / "uploads" / upload).read_bytes()).hexdigest() == upload
    assert not list((data / "uploads/.partial").iterdir())
    with KnowledgeBase(data / "bases/k.kb") as base:
        assert {document.name for document in base.documents()} == found.keys()
        assert base.store.chunk_count == base.store.vector_count
        assert base.store.chunk_count == sum(file["chunks"] for file in found.values())
    with sqlite3.connect(data / "bases/k.kb") as opened:
        assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    opened.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_what_was_taken_on_survives(tiny: Path, tmp_path: Path, kills: int) -> None:
    sent: dict[str, bytes] = {}
    amid_reading = 0
    for seed in range(1, kills + 1):
        with process(tiny, tmp_path) as (server, port):
            if seed == 1:
                KnowledgeClient(Service(port, None)).create("k", "small")  # type: ignore[arg-type]
            kill_amid(port, server, sent, seed)
        left = sqlite3.connect(tmp_path / "catalogue.db")
        (queued,) = left.execute("SELECT count(*) FROM files WHERE status = 'queued'").fetchone()
        left.close()
        amid_reading += queued > 0
    assert len(sent) >= kills and amid_reading, "no kill came amid the work"
    check_all_there(tiny, tmp_path, sent)
