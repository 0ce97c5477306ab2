"""Kills a server during uploads and ingestion: every upload that it answered with 202 is there,
complete, and becomes ready."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sqlite3
import threading
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fork_server import Command, ForkServer
from knowledge_helpers import BASES, KnowledgeClient
from make_documents import pdf_bytes
from serving import Service, wait_until

from khaosz.rag import KnowledgeBase

FILES = f"{BASES}/k/files"


def random_file(random_: random.Random, number: int) -> tuple[str, bytes]:
    word = f"marker{number}x"
    if number % 5 == 0:
        return f"文件 {number}.pdf", pdf_bytes([[(72, 700, f"A page about {word}.")]])
    count = random_.randrange(1, 120)
    paragraphs = [f"{word} paragraph {i}: the quick brown fox. 春眠不觉晓。" for i in range(count)]
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


def start_upload(port: int) -> socket.socket:
    """An upload that never ends."""
    head = f"PUT {FILES}/never.txt HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + b"x" * 2_000_000)
    return connection


def kill_during_uploads(server: Command, sent: dict[str, bytes], seed: int) -> None:
    """Send files until the server is killed; `sent` gets those that it answered with 202."""
    random_ = random.Random(seed)
    first_answer = threading.Event()

    def send() -> None:
        with suppress(OSError, HTTPException):
            for number in range(1000 * seed, 1000 * seed + 1000):
                name, content = random_file(random_, number)
                put(server.port, name, content)
                sent[name] = content
                first_answer.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert first_answer.wait(30)
    partial = start_upload(server.port)
    threading.Event().wait(random.Random(-seed).random() * 0.2)
    server.kill()
    sender.join()
    partial.close()


def check_uploads(port: int, sent: dict[str, bytes]) -> list[Any]:
    """All files, when they are ingested."""
    client = KnowledgeClient(Service(port, None))  # type: ignore[arg-type]

    def files() -> list[Any]:
        return client.ask("GET", "/k/files")[1]["data"]

    wait_until(lambda: all(f["status"] in ("ready", "failed") for f in files()), 600)
    by_name = {file["name"]: file for file in files()}
    assert by_name.keys() >= sent.keys()
    for name, content in sent.items():
        assert by_name[name]["status"] == "ready", by_name[name]
        assert by_name[name]["chunks"] == by_name[name]["embedded"] > 0
        word = name.split()[1].split(".")[0]
        hits = client.search("k", f"marker{word}x", mode="lexical", k=1)
        assert [hit["doc"] for hit in hits] == [name]
        assert by_name[name]["sha256"] == hashlib.sha256(content).hexdigest()
    return list(by_name.values())


def check_folder(data: Path, files: list[Any]) -> None:
    uploads = {path.name for path in (data / "uploads").iterdir() if path.is_file()}
    assert uploads == {file["sha256"] for file in files}
    for upload in uploads:
        assert hashlib.sha256((data / "uploads" / upload).read_bytes()).hexdigest() == upload
    assert not list((data / "uploads/.partial").iterdir())
    with KnowledgeBase(data / "bases/k.kb") as base:
        assert {document.name for document in base.documents()} == {file["name"] for file in files}
        assert base.store.chunk_count == base.store.vector_count
        assert base.store.chunk_count == sum(file["chunks"] for file in files)
    with closing(sqlite3.connect(data / "bases/k.kb")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_accepted_uploads_survive_kills(
    fork_server: ForkServer, tiny: Path, tmp_path: Path, kills: int
) -> None:
    arguments = (tiny, "--data", tmp_path, "--embedder", f"small={tiny}")
    sent: dict[str, bytes] = {}
    killed_while_ingesting = 0
    for seed in range(1, kills + 1):
        with fork_server.khaosz(*arguments) as server:
            if seed == 1:
                service = Service(server.port, None)  # type: ignore[arg-type]
                KnowledgeClient(service).create("k", "small")
            kill_during_uploads(server, sent, seed)
        with closing(sqlite3.connect(tmp_path / "catalogue.db")) as db:
            (queued,) = db.execute("SELECT count(*) FROM files WHERE status = 'queued'").fetchone()
        killed_while_ingesting += queued > 0
    assert len(sent) >= kills and killed_while_ingesting
    with fork_server.khaosz(*arguments) as server:
        files = check_uploads(server.port, sent)
    check_folder(tmp_path, files)
