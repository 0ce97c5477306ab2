"""Knowledge bases with failing embedders, full disks, damaged files and concurrent requests."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from knowledge_helpers import BASES, EmbeddingServer, KnowledgeClient, serve_knowledge
from make_documents import pdf_bytes
from serving import Service, wait_until

from khaosz.errors import ConfigError
from khaosz.rag import KnowledgeBase
from khaosz.serve.knowledge.catalogue import FileRow
from khaosz.serve.knowledge.library import Library
from khaosz.serve.retrieval_models import RetrievalModels

# 64 passages are embedded at once.
LONG = "\n\n".join(f"Paragraph {i} of the long text. " + "word " * 250 for i in range(100)).encode()


@pytest.fixture(scope="module")
def shared_letters() -> Iterator[EmbeddingServer]:
    server = EmbeddingServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(tiny: Path, data: Path, shared_letters: EmbeddingServer) -> Iterator[KnowledgeClient]:
    with serve_knowledge(tiny, data, embedders=[f"letters={shared_letters.url}"]) as running:
        yield running


@pytest.fixture
def letters(shared_letters: EmbeddingServer) -> EmbeddingServer:
    shared_letters.received.clear()
    return shared_letters


@pytest.fixture
def bases(server: KnowledgeClient, shared_letters: EmbeddingServer) -> Iterator[KnowledgeClient]:
    """Without knowledge bases."""
    yield server
    shared_letters.open.set()
    shared_letters.failing = False
    for base in server.ask("GET")[1]["data"]:
        server.ask("DELETE", f"/{base['id']}")
    wait_until(lambda: all(thread.name != "khaosz-delete" for thread in threading.enumerate()))


def test_progress_while_embedding(bases: KnowledgeClient, letters: EmbeddingServer) -> None:
    bases.create("slow", "letters")
    bases.create("plain")
    bases.ready("slow", bases.upload("slow", "first.md", b"The first file."))
    letters.open.clear()
    sent = bases.upload("slow", "long.md", LONG)
    queued = bases.upload("slow", "last.md", b"The last file.")
    wait_until(lambda: bases.file("slow", sent["id"])["status"] == "embedding")
    file = bases.file("slow", sent["id"])
    assert file["chunks"] > 64 and file["embedded"] == 0
    assert bases.file("slow", queued["id"])["status"] == "queued"
    counted = bases.ask("GET", "/slow")[1]
    assert (counted["chunks"], counted["embedded"]) == (file["chunks"] + 1, 1)
    # Lexical search finds its passages already, while the base is being written.
    assert bases.search("slow", "long text", mode="lexical")[0]["doc"] == "long.md"
    bases.ready("plain", bases.upload("plain", "a.md", b"Another base."))
    assert bases.search("plain", "another base")[0]["doc"] == "a.md"
    assert bases.service.ask("GET", "/health/live")[0] == 200
    letters.open.set()
    long, last = bases.ready("slow", sent, queued)
    assert long["embedded"] == long["chunks"] == file["chunks"] and last["embedded"] == 1
    hits = bases.search("slow", "the first file", mode="dense", k=3)
    assert hits[0]["doc"] == "first.md" and hits[0]["legs"].keys() == {"dense"}
    both = bases.search("slow", "the last file")
    assert both[0]["legs"].keys() == {"lexical", "dense"}


def test_empty_base_in_every_mode(bases: KnowledgeClient) -> None:
    bases.create("new", "letters")
    for mode in (None, "lexical", "dense", "hybrid"):
        assert bases.search("new", "anything", mode=mode) == []


def upload_and_block(bases: KnowledgeClient, letters: EmbeddingServer, name: str) -> Any:
    """A file whose first batch of vectors is blocked."""
    # A new embedder's first batch tells the vectors' length.
    bases.ready("a", bases.upload("a", "first.md", b"The first file."))
    letters.open.clear()
    sent = bases.upload("a", name, LONG)
    wait_until(lambda: bases.file("a", sent["id"])["status"] == "embedding")
    return sent


@pytest.mark.parametrize("what", ["file", "base"])
def test_delete_while_embedding(
    bases: KnowledgeClient, letters: EmbeddingServer, data: Path, what: str
) -> None:
    bases.create("a", "letters")
    sent = upload_and_block(bases, letters, "long.md")
    path = f"/a/files/{sent['id']}" if what == "file" else "/a"
    assert bases.ask("DELETE", path)[0] == 200
    assert bases.ask("GET", path)[0] == 404
    assert not (data / "uploads" / sent["sha256"]).exists()
    if what == "file":
        assert bases.search("a", "long text", mode="lexical") == []
        letters.open.set()
        bases.ready("a", bases.upload("a", "other.md", b"Another text."))
        assert not any("Paragraph 99 " in text for text in letters.received)
        assert bases.search("a", "long text", mode="lexical", k=50)[0]["doc"] == "other.md"
        assert bases.ask("GET", "/a")[1]["chunks"] == 2
        return
    # Its thread is still running, so the name is still taken.
    assert bases.ask("POST", "", json.dumps({"name": "a"}))[0] == 409
    assert bases.ask("GET")[1]["data"] == []
    letters.open.set()
    wait_until(lambda: not list((data / "bases").iterdir()))
    wait_until(lambda: bases.ask("POST", "", json.dumps({"name": "a"}))[0] == 201)
    assert bases.ask("GET", "/a/files")[1]["data"] == []


def test_delete_before_first_write(
    tiny: Path, tmp_path: Path, shared_letters: EmbeddingServer
) -> None:
    """A new embedder's first batch tells the vectors' length; the base is written after it."""
    letters = shared_letters
    letters.received.clear()
    with serve_knowledge(tiny, tmp_path, embedders=[f"letters={letters.url}"]) as bases:
        bases.create("a", "letters")
        letters.open.clear()
        sent = bases.upload("a", "long.md", LONG)
        wait_until(lambda: bool(letters.received))
        assert bases.file("a", sent["id"])["status"] == "reading"
        assert bases.ask("DELETE", f"/a/files/{sent['id']}")[0] == 200
        letters.open.set()
        bases.ready("a", bases.upload("a", "other.md", b"Another text."))
        hits = bases.search("a", "long text", mode="lexical")
        assert {hit["doc"] for hit in hits} == {"other.md"}
        assert not any("Paragraph 0 " in text for text in letters.received)


def test_replace_while_embedding(bases: KnowledgeClient, letters: EmbeddingServer) -> None:
    bases.create("a", "letters")
    upload_and_block(bases, letters, "a.md")
    new = bases.upload("a", "a.md", b"A short text instead.")
    letters.open.set()
    (file,) = bases.ready("a", new)
    assert file["chunks"] == 1 and bases.ask("GET", "/a")[1]["chunks"] == 2
    assert [hit["text"] for hit in bases.search("a", "long text", mode="lexical")] == [
        "A short text instead."
    ]


def test_failing_embedder(bases: KnowledgeClient, letters: EmbeddingServer) -> None:
    bases.create("a", "letters")
    letters.failing = True
    sent = bases.upload("a", "a.md", b"A text.")
    (file,) = bases.ready("a", sent, status="failed")
    assert file["error"] == "the embedder 'letters' failed" and file["code"] == "embedder_failed"
    assert bases.search("a", "text", mode="lexical") == []
    status, answer = bases.ask("POST", "/a/search", json.dumps({"query": "text"}))
    assert status == 409 and letters.url.split("#")[0] not in answer["error"]["message"]
    letters.failing = False
    bases.ready("a", bases.upload("a", "a.md", b"A text."))
    assert bases.search("a", "text")[0]["doc"] == "a.md"


def test_names_of_bases(bases: KnowledgeClient) -> None:
    def make(**request: Any) -> tuple[int, Any]:
        status, answer = bases.ask("POST", "", json.dumps(request))
        return status, answer["error"]["param"] if status >= 400 else answer["id"]

    status, answer = bases.ask("POST", "", json.dumps({"name": "x", "embedder": "none"}))
    assert status == 400 and "available: letters" in answer["error"]["message"]
    for name in ("", " a", "a ", ".a", "a/b", "a\\b", "a\x00", "a\n", "x" * 65, "..", "𠀀" * 64):
        assert make(name=name) == (400, "name"), name
    assert make(name="a", more=1) == (400, "more")
    assert make(name=1) == (400, "name")
    for name in ("笔记 1", "x" * 64, "a.b-c_d", "Ünï", "CAPS"):
        assert make(name=name) == (201, name)
    assert make(name="caps") == make(name="CAPS") == (409, "name")
    assert make(name="U\u0308ni\u0308") == (409, "name"), "the same name in another normal form"
    assert bases.ask("GET", "/U\u0308ni\u0308")[1]["id"] == "Ünï"


def test_concurrent_requests(bases: KnowledgeClient, data: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(
            lambda _: bases.ask("POST", "", json.dumps({"name": "a"}))[0], range(8)
        ))  # fmt: skip
        assert sorted(made) == [201] + [409] * 7
        sent = list(threads.map(lambda _: bases.upload("a", "a.md", b"One text."), range(8)))
        assert len({file["id"] for file in sent}) == 1
        bases.ready("a", sent[0])
        assert len(list((data / "uploads").iterdir())) == 2  # it and .partial
        many = list(threads.map(
            lambda i: bases.upload("a", f"{i}.md", f"Text {i}.".encode()), range(40)
        ))  # fmt: skip
        bases.ready("a", *many)
        gone = list(threads.map(
            lambda _: bases.ask("DELETE", f"/a/files/{many[0]['id']}")[0], range(8)
        ))  # fmt: skip
        assert sorted(gone) == [200] + [404] * 7
        gone = list(threads.map(lambda _: bases.ask("DELETE", "/a")[0], range(8)))
        assert sorted(gone) == [200] + [404] * 7
    assert len(list((data / "uploads").iterdir())) == 1


def test_refuses_invalid_search(bases: KnowledgeClient) -> None:
    bases.create("a")
    (file,) = bases.ready("a", bases.upload("a", "a.md", b"A text."))
    for request, status, param in (
        ({"query": ""}, 400, "query"),
        ({"query": "  "}, 400, "query"),
        ({"query": "x" * 8001}, 400, "query"),
        ({}, 400, "query"),
        ({"query": "x", "k": 0}, 400, "k"),
        ({"query": "x", "k": 101}, 400, "k"),
        ({"query": "x", "mode": "dense"}, 400, "mode"),
        ({"query": "x", "mode": "other"}, 400, "mode"),
        ({"query": "x", "reranker": "none"}, 400, "reranker"),
        ({"query": "x", "name": "x" * 201}, 400, "name"),
        ({"query": "x", "depth": 1}, 400, "depth"),
    ):
        found, answer = bases.ask("POST", "/a/search", json.dumps(request))
        assert (found, answer["error"]["param"]) == (status, param), answer
    assert bases.search("a", "\x00 text \ufffd", name="[*\x00") == []
    digest = bases.search("a", "text")[0]["hash"]
    for place, status in (
        (f"{digest}?start=2&end=1", 400),
        (f"{digest}?start=0&end=8", 400),
        (f"{digest}?start=-1", 400),
        (f"{digest}?around=100001", 400),
        (f"{'0' * 64}", 404),
        (f"{digest}?start=7&end=7&around=0", 200),
    ):
        assert bases.ask("GET", f"/a/documents/{place}")[0] == status, place
    for method, path in (
        ("GET", "/none"), ("DELETE", "/none"), ("GET", "/none/files"), ("GET", "/a/files/none"),
        ("DELETE", "/a/files/none"), ("DELETE", f"/none/files/{file['id']}"),
    ):  # fmt: skip
        assert bases.ask(method, path)[0] == 404


def test_method_not_allowed(bases: KnowledgeClient) -> None:
    for path, allowed in (("", "GET, POST"), ("/a", "DELETE, GET"), ("/a/search", "POST")):
        status, headers, _ = bases.service.ask("PATCH", BASES + path, b"")
        assert (status, headers["allow"]) == (405, allowed)


def test_damaged_base_leaves_others_usable(tiny: Path, tmp_path: Path) -> None:
    with serve_knowledge(tiny, tmp_path) as running:
        for name in ("good", "bad", "lost"):
            running.create(name)
            running.ready(name, running.upload(name, "a.md", b"A text."))
    (tmp_path / "bases/bad.kb").write_bytes(b"no database at all " * 1000)
    (tmp_path / "bases/lost.kb").unlink()
    with serve_knowledge(tiny, tmp_path) as running:
        wait_until(lambda: running.ask("GET", "/bad")[1]["error"] is not None)
        by_name = {base["id"]: base for base in running.ask("GET")[1]["data"]}
        assert by_name["bad"]["error"].startswith("cannot be read") and by_name["bad"]["files"] == 1
        assert by_name["bad"]["code"] == "base_unreadable"
        assert by_name["good"]["error"] is by_name["lost"]["error"] is None
        for method, path, body in (
            ("POST", "/bad/search", json.dumps({"query": "text"})),
            ("GET", f"/bad/documents/{'0' * 64}", None),
            ("PUT", "/bad/files/b.md", b"x"),
        ):
            status, answer = running.ask(method, path, body)
            assert status == 409 and str(tmp_path) not in json.dumps(answer), answer
        # The lost one is ingested again from the upload. At first its file is still "ready".
        wait_until(lambda: running.search("lost", "text") != [])
        wait_until(lambda: running.ask("GET", "/lost/files")[1]["data"][0]["status"] == "ready")
        for name in ("good", "lost"):
            assert running.search(name, "text")[0]["doc"] == "a.md"
        assert running.ask("DELETE", "/bad")[0] == 200
        running.create("bad")
        running.ready("bad", running.upload("bad", "a.md", b"A text."))


def test_missing_documents_are_ingested_again(tiny: Path, tmp_path: Path) -> None:
    """As after a power cut, which may undo SQLite's last writes."""
    embedders = [f"small={tiny}"]
    with serve_knowledge(tiny, tmp_path, embedders=embedders) as running:
        running.create("a", "small")
        sent = [running.upload("a", f"{i}.md", f"Text {i}.".encode()) for i in range(3)]
        running.ready("a", *sent)
    with KnowledgeBase(tmp_path / "bases/a.kb") as base:
        base.add_text("A stray document.", name="stray.md")
        with base.store.writing():
            base.store.remove_source("default", "0.md")
            base.store._db.execute("DELETE FROM vectors WHERE chunk = 2")  # type: ignore[attr-defined]
    with serve_knowledge(tiny, tmp_path, embedders=embedders) as running:
        wait_until(lambda: running.ask("GET", "/a")[1]["embedded"] == 3)
        running.ready("a", *sent)
        assert {hit["doc"] for hit in running.search("a", "text", k=9)} == {
            "0.md", "1.md", "2.md"
        }  # fmt: skip
        assert running.search("a", "stray", mode="lexical") == []
    with KnowledgeBase(tmp_path / "bases/a.kb") as base:
        assert base.store.chunk_count == base.store.vector_count == 3


def test_embedder_no_longer_available(tiny: Path, tmp_path: Path) -> None:
    with serve_knowledge(tiny, tmp_path, embedders=[f"small={tiny}"]) as running:
        running.create("a", "small")
        running.ready("a", running.upload("a", "a.md", b"A text."))
    with serve_knowledge(tiny, tmp_path, embedders=[f"other={tiny}"]) as running:
        assert running.search("a", "text", mode="lexical")[0]["doc"] == "a.md"
        assert running.ask("POST", "/a/search", json.dumps({"query": "text"}))[0] == 409
        status, answer = running.ask("PUT", "/a/files/b.md", b"x")
        assert status == 409 and "'small'" in answer["error"]["message"]
        assert running.ask("GET", "/a")[1]["embedder"] == "small"


def test_failing_reranker(tiny: Path, tmp_path: Path) -> None:
    """The query does not fit into its context."""
    with serve_knowledge(tiny, tmp_path, rerankers=[f"judge={tiny}"]) as running:
        running.create("a")
        running.ready("a", running.upload("a", "a.md", "春眠不觉晓。".encode()))
        assert running.search("a", "春眠", reranker="judge")[0]["legs"]["rerank"]["rank"] == 1
        body = json.dumps({"query": "春眠不觉晓。" + "𠀀" * 3000, "reranker": "judge"})
        status, answer = running.ask("POST", "/a/search", body)
        assert (status, answer["error"]["param"]) == (409, "reranker"), answer


def test_different_embedder_under_same_name(tiny: Path, tmp_path: Path) -> None:
    """Its vectors cannot be compared with the stored ones."""
    with serve_knowledge(tiny, tmp_path, embedders=[f"small={tiny}"]) as running:
        running.create("a", "small")
        sent = running.upload("a", "a.md", b"A text.")
        running.ready("a", sent)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    with serve_knowledge(tiny, tmp_path, embedders=[f"small={copy}"]) as running:
        assert running.search("a", "text", mode="lexical")[0]["doc"] == "a.md"
        status, answer = running.ask("POST", "/a/search", json.dumps({"query": "text"}))
        assert status == 409 and str(tiny) not in answer["error"]["message"]
        later = running.upload("a", "b.md", b"Another text.")
        wait_until(lambda: running.ask("GET", "/a")[1]["error"] is not None)
        assert running.ask("PUT", "/a/files/c.md", b"x")[0] == 409
        assert running.ask("DELETE", f"/a/files/{sent['id']}")[0] == 200
        assert running.search("a", "text", mode="lexical") == []
    with serve_knowledge(tiny, tmp_path, embedders=[f"small={tiny}"]) as running:
        running.ready("a", later)
        assert [hit["doc"] for hit in running.search("a", "text")] == ["b.md"]


def test_late_removal_keeps_newer_file(tmp_path: Path) -> None:
    """As when a slow search delays the removal of a file that is uploaded again meanwhile."""
    library = Library(tmp_path, RetrievalModels())
    library.start()

    def added() -> FileRow:
        received = asyncio.run(library.uploads.receive(body(), 100))
        row = library.add(base, "a.md", received)
        wait_until(lambda: library.file("a", row.id).status == "ready")
        return row

    async def body() -> AsyncIterator[bytes]:
        yield b"A text."

    try:
        base = library.create("a", None)
        old = added()
        assert library._catalogue.mark_removed(old)
        new = added()
        assert new.number != old.number
        base.remove(old)
        with KnowledgeBase(tmp_path / "bases/a.kb") as opened:
            assert [hit.doc for hit in opened.search("text")] == ["a.md"]
        base.remove(new)
        with KnowledgeBase(tmp_path / "bases/a.kb") as opened:
            assert [hit.doc for hit in opened.search("text")] == ["a.md"]  # not marked as removed
    finally:
        library.stop()


def test_one_server_at_a_time(tmp_path: Path) -> None:
    first = Library(tmp_path, RetrievalModels())
    with pytest.raises(ConfigError, match="in use by another khaosz serve"):
        Library(tmp_path, RetrievalModels())
    first.stop()
    Library(tmp_path, RetrievalModels()).stop()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used"):
        Library(tmp_path / "file", RetrievalModels())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/catalogue.db").write_bytes(b"no database " * 1000)
    with pytest.raises(ConfigError, match="cannot be used"):
        Library(tmp_path / "broken", RetrievalModels())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
def test_full_disk(fork_server: ForkServer, tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    with fork_server.khaosz(tiny, "--data", tmp_path, file_limit=1_000_000) as server:
        client = KnowledgeClient(Service(server.port, None))  # type: ignore[arg-type]
        client.create("a")
        status, answer = client.ask("PUT", "/a/files/b.txt", b"x" * 3_000_000)
        assert status == 507 and answer["error"]["code"] == "disk_full"
        assert not list((tmp_path / "uploads/.partial").iterdir())
        assert client.ask("GET", "/a/files")[1]["data"] == []
        (file,) = client.ready("a", client.upload("a", "small.md", b"A small text."))
        assert (tmp_path / "uploads" / file["sha256"]).exists()
        assert client.search("a", "small text")[0]["doc"] == "small.md"


def test_stop_while_parsing(tiny: Path, tmp_path: Path) -> None:
    """The worker process ends too, which is not an error of the file."""
    pages = [[(72, 760 - 14 * i, f"Line {i} of page {n}.") for i in range(50)] for n in range(400)]
    with serve_knowledge(tiny, tmp_path) as running:
        running.create("a")
        sent = running.upload("a", "long.pdf", pdf_bytes(pages))  # type: ignore[arg-type]
        wait_until(lambda: running.file("a", sent["id"])["status"] == "reading")
    with serve_knowledge(tiny, tmp_path) as running:
        running.ready("a", sent)


def test_stop_while_embedding(tiny: Path, tmp_path: Path) -> None:
    letters = EmbeddingServer()
    try:
        with serve_knowledge(tiny, tmp_path, embedders=[f"letters={letters.url}"]) as running:
            running.create("a", "letters")
            sent = upload_and_block(running, letters, "long.md")
            threading.Timer(0.5, letters.open.set).start()
        with serve_knowledge(tiny, tmp_path, embedders=[f"letters={letters.url}"]) as running:
            (file,) = running.ready("a", sent)
            assert file["chunks"] == file["embedded"] > 64
    finally:
        letters.close()


def test_catalogue_of_version_1_is_upgraded(tiny: Path, tmp_path: Path) -> None:
    with serve_knowledge(tiny, tmp_path) as running:
        running.create("notes")
        kept = running.upload("notes", "a.md", b"A text.")
        running.ready("notes", kept)
    with closing(sqlite3.connect(tmp_path / "catalogue.db")) as db:
        db.execute("ALTER TABLE files DROP COLUMN code")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    for _ in range(2):
        with serve_knowledge(tiny, tmp_path) as running:
            (file,) = running.ask("GET", "/notes/files")[1]["data"]
            assert (file["id"], file["status"], file["code"]) == (kept["id"], "ready", None)
            (bad,) = running.ready("notes", running.upload("notes", "b.md", b""), status="failed")
            assert bad["code"] == "no_text"
            running.ask("DELETE", f"/notes/files/{bad['id']}")
