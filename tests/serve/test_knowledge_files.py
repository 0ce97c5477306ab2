"""Uploads to a knowledge base: file types, damaged files, names, limits and interruptions."""

from __future__ import annotations

import hashlib
import json
import socket
import unicodedata
import zipfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from knowledge_helpers import BASES, KnowledgeClient, serve_knowledge
from make_documents import pdf_bytes, word, write_docx
from serving import wait_until

from khaosz.serve.knowledge import routes

LIMIT = 300_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def files(tiny: Path, data: Path) -> Iterator[KnowledgeClient]:
    with serve_knowledge(tiny, data, max_upload=LIMIT) as running:
        yield running


@pytest.fixture
def base(files: KnowledgeClient, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty knowledge base, deleted with its uploads after the test."""
    name = request.node.name.partition("[")[0][:64]
    files.create(name)
    yield name
    files.ask("DELETE", f"/{name}")


def uploads(data: Path) -> set[str]:
    """The stored uploads; none may be partial."""
    assert not list((data / "uploads/.partial").iterdir())
    return {path.name for path in (data / "uploads").iterdir() if path.is_file()}


def test_every_file_type_in_both_languages(
    files: KnowledgeClient, base: str, tmp_path: Path
) -> None:
    pages = [
        [(72, 700, "The harbour of the first page.")],
        [(72, 700, "The lighthouse of the second page.")],
    ]
    chinese = pdf_bytes([[(72, 700, "第一页讲的是港口。")], [(72, 700, "第二页讲的是灯塔。")]])
    body = word("航海手册", "1") + word("风暴来临时要收帆。")
    sent = [
        files.upload(base, "sea.pdf", pdf_bytes(pages)),  # type: ignore[arg-type]
        files.upload(base, "海.pdf", chinese),
        files.upload(base, "手册.docx", write_docx(tmp_path / "a.docx", body).read_bytes()),
        files.upload(base, "page.html", "<h1>罗盘</h1><p>罗盘指向北方。</p>".encode()),
        files.upload(base, "旧.txt", "潮汐由月亮引起。".encode("gb18030")),
        files.upload(base, "lines.jsonl", '{"id": "锚", "text": "锚有三吨重。"}'.encode()),
        files.upload(base, "README", b"The crew has twelve sailors."),
    ]
    ready = files.ready(base, *sent)
    assert [file["error"] for file in ready] == [None] * len(sent)
    for query, doc, page in (
        ("lighthouse", "sea.pdf", 2),
        ("灯塔", "海.pdf", 2),
        ("风暴", "手册.docx", None),
        ("罗盘", "page.html", None),
        ("月亮", "旧.txt", None),
        ("三吨", "lines.jsonl#锚", None),
        ("sailors", "README", None),
    ):
        hit = files.search(base, query)[0]
        assert hit["doc"] == doc, query
        at = hit["start"] + hit["text"].index(query)
        place = f"/{base}/documents/{hit['hash']}?start={at}&end={at + len(query)}&around=0"
        status, found = files.ask("GET", place)
        assert status == 200 and found["text"] == query
        assert (found["doc"], found["page"]) == (doc, page)


def bomb(path: Path) -> bytes:
    """A DOCX whose document is a hundred million spaces."""
    write_docx(path, "", {"word/document.xml": b""})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as container:
        container.writestr("[Content_Types].xml", "<Types/>")
        container.writestr("word/document.xml", b" " * 100_000_000)
    return path.read_bytes()


def test_bad_file_fails_alone(
    files: KnowledgeClient, base: str, tmp_path: Path, data: Path
) -> None:
    bad = {
        "broken.pdf": b"%PDF-1.7\nnothing of it",
        "torn.docx": write_docx(tmp_path / "b.docx", word("x")).read_bytes()[:500],
        "bomb.docx": bomb(tmp_path / "c.docx"),
        "picture.pdf": pdf_bytes([[]]),
        "empty.md": b"",
        "spaces.txt": b" \n \n",
        "none.jsonl": b"not JSON\n",
    }
    sent = [files.upload(base, name, content) for name, content in bad.items()]
    good = files.upload(base, "good.md", b"A good file.")
    failed = files.ready(base, *sent, status="failed")
    files.ready(base, good)
    for file in failed:
        assert file["error"] and "\n" not in file["error"] and len(file["error"]) < 300, file
        assert file["chunks"] == 0
        for private in (str(data), file["sha256"], "Traceback", ".py"):
            assert private not in file["error"], file
    codes = [file["code"] for file in failed]
    assert codes == ["damaged", "damaged", "unsafe", "no_text", "no_text", "no_text", "no_text"]
    assert "damaged" in failed[0]["error"] and failed[4]["error"] == "has no text in it"
    assert [hit["doc"] for hit in files.search(base, "good file")] == ["good.md"]
    counted = files.ask("GET", f"/{base}")[1]
    assert (counted["files"], counted["chunks"]) == (len(bad) + 1, 1)
    # Uploading the same bytes reads them again.
    again = files.upload(base, "broken.pdf", bad["broken.pdf"])
    assert again["id"] == failed[0]["id"] and again["status"] in ("queued", "reading")


def test_partly_unreadable_file(files: KnowledgeClient, base: str) -> None:
    lines = b'{"id": "a", "text": "One good line."}\nnot JSON\n'
    (file,) = files.ready(base, files.upload(base, "a.jsonl", lines))
    assert file["chunks"] == 1 and file["error"].startswith("1 line is not a document; line 2")
    assert file["code"] == "partly"


def test_same_name_is_replaced(files: KnowledgeClient, base: str, data: Path) -> None:
    (first,) = files.ready(base, files.upload(base, "a.md", b"The old cat."))
    assert files.upload(base, "a.md", b"The old cat.") == first, "it is there already"
    (second,) = files.ready(base, files.upload(base, "a.md", b"The new dog."))
    assert second["id"] != first["id"]
    assert files.ask("GET", f"/{base}/files")[1]["data"] == [second]
    assert files.ask("GET", f"/{base}/files/{first['id']}")[0] == 404
    assert files.search(base, "cat") == []
    assert files.search(base, "dog")[0]["doc"] == "a.md"
    assert uploads(data) == {second["sha256"]}
    # An unreadable file replaces the readable one: search results match the list.
    broken = files.upload(base, "a.md", b"")
    files.ready(base, broken, status="failed")
    assert files.search(base, "dog") == []


def test_same_bytes_are_stored_once(files: KnowledgeClient, base: str, data: Path) -> None:
    content = b"The same bytes."
    sent = [files.upload(base, name, content) for name in ("a.md", "b.txt")]
    first, second = files.ready(base, *sent)
    assert first["sha256"] == second["sha256"] and first["id"] != second["id"]
    assert uploads(data) == {first["sha256"]}
    assert files.ask("DELETE", f"/{base}/files/{first['id']}")[0] == 200
    assert uploads(data) == {second["sha256"]}
    assert [hit["doc"] for hit in files.search(base, "same bytes")] == ["b.txt"]
    assert files.ask("DELETE", f"/{base}/files/{second['id']}")[0] == 200
    assert uploads(data) == set()
    assert files.ask("DELETE", f"/{base}/files/{second['id']}")[0] == 404


def test_content_is_a_download(files: KnowledgeClient, base: str) -> None:
    content = b"<script>alert(1)</script>"
    (file,) = files.ready(base, files.upload(base, "页 1.html", content), status="failed")
    connection = HTTPConnection("127.0.0.1", files.service.port, timeout=30)
    connection.request("GET", quote(f"{BASES}/{base}/files/{file['id']}/content"))
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, content)
    assert answer.getheader("content-type") == "application/octet-stream"
    assert answer.getheader("x-content-type-options") == "nosniff"
    assert answer.getheader("content-disposition") == (
        f"attachment; filename*=UTF-8''{quote('页 1.html')}"
    )
    connection.close()
    assert files.ask("GET", f"/{base}/files/none/content")[0] == 404


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("..%2F..%2Fevil.md", 404),
        ("..%5Cevil.md", 400),
        ("a%00.md", 400),
        ("a%0A.md", 400),
        ("%E2%80%AEdm.exe.md", 400),
        ("%FF%FE.md", 400),
        ("x" * 253 + ".md", 400),
        ("a.exe", 415),
        ("a.doc", 415),
        ("noname", 415),
        (".md", 415),
        ("..", 400),
    ],
)
def test_refuses_invalid_file_name(
    files: KnowledgeClient, base: str, data: Path, name: str, status: int
) -> None:
    path = f"{BASES}/{base}/files/{name}"
    # The client sends the whole body before it reads the response.
    found, _, answer = files.service.ask("PUT", path, b"x" * 2_000_000)
    assert found == status, answer
    if status == 415:
        assert ".md .markdown" in answer["error"]["message"]
    assert uploads(data) == set() and not list(data.parent.rglob("evil*"))


def test_file_name_is_normalised(files: KnowledgeClient, base: str) -> None:
    name = "Über résumé ガ.md"
    for form in ("NFD", "NFC"):
        file = files.upload(base, unicodedata.normalize(form, name), b"One text.")  # type: ignore[arg-type]
        assert file["name"] == name
    assert len(files.ask("GET", f"/{base}/files")[1]["data"]) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_refuses_too_large_file(
    files: KnowledgeClient, base: str, data: Path, chunked: bool
) -> None:
    """The client gets the response after it has sent the whole body."""
    connection = HTTPConnection("127.0.0.1", files.service.port, timeout=30)
    body: Any = b"x" * 20_000_000
    connection.request(
        "PUT", f"{BASES}/{base}/files/a.txt", iter([body]) if chunked else body,
        encode_chunked=chunked, headers={"Transfer-Encoding": "chunked"} if chunked else {},
    )  # fmt: skip
    answer = connection.getresponse()
    message = json.loads(answer.read())["error"]["message"]
    assert (answer.status, message) == (413, "a file has at most 300,000 bytes")
    connection.close()
    assert uploads(data) == set()
    (kept,) = files.ready(base, files.upload(base, "a.txt", b"x" * LIMIT))
    assert kept["bytes"] == LIMIT


def head_of(base: str, length: int, *more: str) -> bytes:
    lines = (f"PUT {BASES}/{base}/files/a.txt HTTP/1.1", "Host: localhost", *more)
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_interrupted_upload_leaves_nothing(files: KnowledgeClient, base: str, data: Path) -> None:
    partial = data / "uploads/.partial"
    for sent in (0, 1, 150_000):
        connection = socket.create_connection(("127.0.0.1", files.service.port))
        connection.sendall(head_of(base, 200_000) + b"x" * sent)
        wait_until(lambda: len(list(partial.iterdir())) == 1)
        connection.close()
        wait_until(lambda: not list(partial.iterdir()))
    assert uploads(data) == set() and files.ask("GET", f"/{base}/files")[1]["data"] == []


def test_error_before_body_is_sent(files: KnowledgeClient, base: str) -> None:
    """Clients that wait for 100 Continue, as curl does, do not send the body."""
    for head, status in (
        (head_of(base, LIMIT + 1, "Expect: 100-continue"), b"413"),
        (head_of("none", 10, "Expect: 100-continue"), b"404"),
        (head_of(base, 10, "Expect: 100-continue").replace(b"a.txt", b"a.exe"), b"415"),
        (head_of(base, 10, "Origin: https://evil.example"), b"403"),
        (head_of(base, 10).replace(b"localhost", b"evil.example"), b"403"),
    ):
        with socket.create_connection(("127.0.0.1", files.service.port)) as connection:
            connection.settimeout(30)
            connection.sendall(head)
            assert connection.recv(1000).split()[1] == status


def test_key_is_checked_before_upload(tiny: Path, tmp_path: Path) -> None:
    with (
        serve_knowledge(tiny, tmp_path, key="sesame") as guarded,
        socket.create_connection(("127.0.0.1", guarded.service.port)) as connection,
    ):
        connection.settimeout(30)
        connection.sendall(head_of("base", 10))
        assert connection.recv(1000).split()[1] == b"401"
        assert not list((tmp_path / "uploads/.partial").iterdir())


def test_large_upload_is_complete(tiny: Path, tmp_path: Path) -> None:
    """Larger than the limit of other bodies."""
    content = b"".join(b"%d\n" % number for number in range(1_000_000))
    with serve_knowledge(tiny, tmp_path) as running:
        running.create("a")
        # An invalid PDF, so that it is not split into passages: only the upload is tested.
        file = running.upload("a", "a.pdf", content)
        assert file["bytes"] == len(content) > 4 << 20
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert (tmp_path / "uploads" / file["sha256"]).read_bytes() == content


def test_stalled_upload_times_out(
    files: KnowledgeClient, base: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "IDLE_TIMEOUT", 0.2)
    with socket.create_connection(("127.0.0.1", files.service.port)) as connection:
        connection.settimeout(30)
        connection.sendall(head_of(base, 200_000) + b"x" * 1000)
        assert connection.recv(1000).split()[1] == b"408"
    assert uploads(data) == set()
