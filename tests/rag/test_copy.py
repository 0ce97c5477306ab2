"""Copying between stores, in both directions: complete, resumable and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import DataError
from khaosz.rag import KnowledgeBase
from khaosz.rag.store.copy import copy_store
from khaosz.rag.store.records import NewChunk, NewDocument, SourceFile
from khaosz.rag.store.sql import Store

Open = Callable[..., Store]
Openers = Callable[[str], Open]
Hashed = Callable[..., Any]


def fill(store: Store) -> None:
    """Awkward contents: special characters, gaps, duplicates, empty documents, long names."""
    chance = np.random.default_rng(1)

    def chunk(start: int, text: str, vector: bool = True) -> NewChunk:
        drawn = chance.normal(size=4).astype(np.float32)
        headings = ("标题\0", 'a "b" \\ \x1b0')
        return NewChunk(start, start + len(text), text, headings, drawn if vector else None)

    odd = (
        "NUL \0 ESC \x1b \x1b0 \x1be tab\t \\0 \\ 'q' \"q\" {a,b} %s 😀 \u2028 \U0002000b ﬁ \r\n x"
    )
    texts = [odd, "", "字" * 3000, "x" * 9000, "两个 two"]
    for number, path in enumerate(["/a/文件.md", "relative", "/" + "p" * 5000, "/nul\0", "/b"]):
        documents = []
        for i in range(number):
            text = texts[(number + i) % len(texts)]
            chunks = [chunk(0, text[:2], vector=i != 2), chunk(1, text[1:])] if text else []
            metadata = {"键.key": "值\0", "": odd, str(i): ""}
            documents.append(
                NewDocument(f"id{i}\0", odd, f"hash{number}", len(text), chunks, (3, 9), metadata)
            )
        file = SourceFile(path, 2**40 + number, 2**62 + number, "s" * 64)
        for collection in ("default", "二"):
            with store.writing():
                store.set("dimension", "4")
                store.set("embedder", "http://h/v1#m")
                store.replace(collection, file, documents)
    with store.writing():
        store.remove_source("二", "relative")
        store.touch("default", SourceFile("/a/文件.md", 5, -7, "s" * 64))


def everything(store: Store) -> list[Any]:
    compared = [(k, v) for k, v in sorted(store.settings().items()) if k != "generation"]
    rows: list[Any] = [compared, store.counts()]
    for collection, file in store.sources():
        rows.append((collection, file))
        for document in store.contents(collection, file.path):
            chunks = [
                (replace(c, vector=None), None if c.vector is None else c.vector.tobytes())
                for c in document.chunks
            ]
            rows.append((replace(document, chunks=()), chunks))
    return rows


def test_copies_to_postgres_and_back_are_equal(openers: Openers) -> None:
    first, there, back = openers("sqlite")("a"), openers("postgres")("b"), openers("sqlite")("c")
    fill(first)
    before = everything(first)
    steps: list[tuple[int, int]] = []
    counts = copy_store(first, there, lambda *step: steps.append(step))
    assert steps[-1] == (9, 9) and counts["documents"] == 19
    assert everything(there) == before
    copy_store(there, back)
    assert everything(back) == before == everything(first)
    frequencies = there.document_frequencies(["two", "esc", "字"])
    assert frequencies == first.document_frequencies(["two", "esc", "字"]) and len(frequencies) == 3


def test_add_updates_files_after_a_move(openers: Openers, hashed: Hashed, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(5):
        (docs / f"{i}.md").write_text(f"# 标题\n\n文件 {i} says word{i}.\n", encoding="utf-8")
    with KnowledgeBase(openers("sqlite")(), embedder=hashed()) as base:
        base.add([docs])
        copy_store(base.store, openers("postgres")())
        hits = base.search("word3 文件", 5)
    with KnowledgeBase(openers("postgres")(), embedder=hashed()) as base:
        copied = base.search("word3 文件", 5)
        assert [replace(h, chunk=0, legs={}) for h in copied] == [
            replace(h, chunk=0, legs={}) for h in hits
        ]
        (docs / "1.md").unlink()
        (docs / "2.md").write_text("changed", encoding="utf-8")
        os.utime(docs / "3.md", ns=(1, 1))
        report = base.add([docs])
        assert (report.unchanged, report.updated, report.removed, report.added) == (3, 1, 1, 0)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_interrupted_copy_continues(
    kind: str, openers: Openers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khaosz.rag.store.copy._SOURCES", 2)
    source, target = openers("sqlite")("a"), openers(kind)("b")
    fill(source)
    written: list[str] = []
    plain = target.replace

    def failing(collection: str, file: SourceFile, documents: Any) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(file.path)
        plain(collection, file, documents)

    target.replace = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        copy_store(source, target)
    assert target.counts()["sources"] == 4  # whole transactions
    target.replace = plain  # type: ignore[method-assign]
    with pytest.raises(DataError, match="is an incomplete copy of"):
        KnowledgeBase(openers(kind)("b"))
    with pytest.raises(DataError, match="is an incomplete copy of"):
        copy_store(target, openers("sqlite")("c"))
    with source.writing():  # meanwhile
        source.remove_source("default", "/a/文件.md")
        source.replace("default", SourceFile("relative", 1, 1, "new"), [])
    with pytest.raises(DataError, match="is not empty"):
        copy_store(openers("sqlite")("other"), target)
    target = openers(kind)("b")
    copy_store(source, target)
    assert everything(target) == everything(source)
    assert KnowledgeBase(target).documents()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_refuses_target_with_contents(kind: str, openers: Openers) -> None:
    source, target = openers("sqlite")("a"), openers(kind)("b")
    fill(source)
    KnowledgeBase(target).add_text("mine", name="mine")
    before = everything(target)
    with pytest.raises(DataError, match="is not empty"):
        copy_store(source, target)
    assert everything(target) == before


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_emptied_target_is_accepted(
    kind: str, embedded: bool, openers: Openers, hashed: Hashed
) -> None:
    source, target = openers("sqlite")("a"), openers(kind)("b")
    base = KnowledgeBase(target, embedder=hashed("other", 7))
    base.add_text("mine", name="mine")
    base.remove("mine")
    if embedded:
        fill(source)
    else:
        KnowledgeBase(source).add_text("lexical", name="a")
    copy_store(source, target)
    assert everything(target) == everything(source)


LOSSES: dict[str, Callable[[NewDocument], NewDocument]] = {
    "a vector's last bit": lambda d: replace(d, chunks=[nudged(d.chunks[0]), *d.chunks[1:]]),
    "a chunk": lambda d: replace(d, chunks=d.chunks[:-1]),
    "metadata": lambda d: replace(d, metadata={}),
    "pages": lambda d: replace(d, pages=()),
    "a heading": lambda d: replace(d, chunks=[replace(d.chunks[0], headings=()), *d.chunks[1:]]),
    "a character": lambda d: replace(d, chunks=[replace(d.chunks[0], text="y"), *d.chunks[1:]]),
}


def nudged(chunk: NewChunk) -> NewChunk:
    assert chunk.vector is not None
    return replace(chunk, vector=np.nextafter(chunk.vector, np.float32(9)))


@pytest.mark.parametrize("loss", LOSSES)
def test_detects_every_loss(loss: str, openers: Openers) -> None:
    source, target = openers("sqlite")("a"), openers("sqlite")("b")
    fill(source)
    plain, lost = target.replace, []

    def losing(collection: str, file: SourceFile, documents: Any) -> None:
        if not lost and documents and documents[0].chunks:
            lost.append(file.path)
            documents = [LOSSES[loss](documents[0]), *documents[1:]]
        plain(collection, file, documents)

    target.replace = losing  # type: ignore[method-assign]
    with pytest.raises(DataError, match="differs from what"):
        copy_store(source, target)
    assert lost
    with pytest.raises(DataError, match="is an incomplete copy of"):
        KnowledgeBase(openers("sqlite")("b"))


def test_command_line_moves_and_searches(
    openers: Openers, postgres_url: str, tmp_path: Path
) -> None:
    server = openers("postgres")("cli").where
    file, back = str(tmp_path / "a.kb"), str(tmp_path / "b.kb")
    (tmp_path / "企鹅.md").write_text("企鹅住在南极。Penguins swim.\n", encoding="utf-8")

    def run(*arguments: str, exit_code: int = 0) -> str:
        result = CliRunner().invoke(app, ["rag", *arguments])
        assert result.exit_code == exit_code, result.output
        return result.stdout

    run("add", str(tmp_path / "企鹅.md"), "--kb", file)
    moved = json.loads(run("move", "--from", file, "--to", server, "--json"))
    assert moved == {"to": server, "sources": 1, "documents": 1, "chunks": 1, "vectors": 0,
                     "terms": moved["terms"]}  # fmt: skip
    assert "企鹅住在南极" in run("search", "南极", "--kb", server)
    assert "the same as in" in run("move", "--from", server, "--to", back)
    hits = [
        json.loads(run("search", "penguin", "--kb", kb, "--json")) for kb in (file, server, back)
    ]
    assert hits[0] == hits[1] == hits[2] and len(hits[0]) == 1
    assert json.loads(run("stats", "--kb", server, "--json"))["bytes"] > 0
    run("remove", "企鹅.md", "--kb", server)
    assert run("search", "南极", "--kb", server) == "nothing found\n"
    result = CliRunner().invoke(app, ["rag", "search", "x", "--kb", f"{postgres_url}#not_there"])
    assert isinstance(result.exception, DataError)
    assert "not found" in str(result.exception)
