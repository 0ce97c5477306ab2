"""A knowledge base end to end: adding files, searching, following changes, surviving kills."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import ConfigError, DataError
from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.load import Limits, WorkerPool, load_file
from khaosz.rag.search.bm25 import K1, B, lexical_search
from khaosz.rag.search.search import merge_neighbours
from khaosz.rag.store.index import ExactIndex, GraphIndex
from khaosz.rag.store.sql import Store
from khaosz.rag.store.sqlite import SqliteStore
from khaosz.rag.terms import terms

Open = Callable[..., Store]  # see conftest.py
Hashed = Callable[..., Any]

TEXTS = {
    "城市.md": "# 北京\n\n北京是中国的首都，有故宫和长城。\n\n"
    "# 上海\n\n上海在长江的入海口，是最大的港口。\n",
    "birds.txt": "Penguins are birds that swim. They cannot fly.\n\nOwls hunt at night.\n",
    "law.md": "# 第一章\n\n为了保护民事主体的合法权益，制定本法。\n\n"
    "民事主体的人身权利受法律保护。\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in TEXTS.items():
        (docs / name).write_text(text, encoding="utf-8")
    return docs


@pytest.fixture
def base(opener: Open, folder: Path) -> KnowledgeBase:
    made = KnowledgeBase(opener(), splitter=StructureSplitter(max_chars=40))
    made.add([folder])
    return made


@pytest.mark.parametrize(
    ("query", "name"),
    [("中国的首都", "城市.md"), ("港口", "城市.md"), ("penguin", "birds.txt"), ("权益", "law.md")],
)
def test_search_finds_documents(base: KnowledgeBase, query: str, name: str) -> None:
    hit = base.search(query, 1)[0]
    assert hit.doc == name
    text = TEXTS[name]
    assert hit.text == text[hit.start : hit.end]
    document = base.store.document_by_hash(hit.hash)
    assert document is not None and base.store.text(document.id) == text


def test_searches_headings_outside_the_text(base: KnowledgeBase) -> None:
    hits = base.search("上海 港口", 1)
    assert hits[0].headings == ("上海",)


def test_scores_are_bm25(base: KnowledgeBase) -> None:
    """Against the formula, computed from the chunks in float64."""
    chunks = [c for d in base.documents() for c in base.store.chunks_of(d.id)]
    bags = {c.id: Counter(terms("\n".join((*c.headings, c.text)))) for c in chunks}
    average = sum(sum(bag.values()) for bag in bags.values()) / len(bags)
    for query in ("民事主体的权利", "birds that fly", "长江"):
        expected = {}
        for number, bag in bags.items():
            score = 0.0
            for term in terms(query):
                df = sum(term in other for other in bags.values())
                idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
                idf *= 0.5 if len(term) == 1 and "一" <= term <= "龥" else 1
                norm = K1 * (1 - B + B * sum(bag.values()) / average)
                score += idf * bag[term] * (K1 + 1) / (bag[term] + norm)
            if score:
                expected[number] = score
        scores = dict(lexical_search(base.store, query, 100))
        assert scores == pytest.approx(expected, rel=1e-12)
        assert list(scores) == sorted(expected, key=lambda n: (-expected[n], n))


def test_add_skips_unchanged_files(base: KnowledgeBase, folder: Path) -> None:
    before = base.store.revision
    report = base.add([folder])
    assert (report.unchanged, report.added, report.updated) == (3, 0, 0)
    os.utime(folder / "birds.txt", ns=(1, 1))  # touched: read, but not changed
    report = base.add([folder])
    assert (report.unchanged, report.updated) == (3, 0)
    assert base.store.revision == before
    source = base.store.source("default", str((folder / "birds.txt").resolve()))
    assert source is not None and source.mtime_ns == 1  # so it is not read the next time


def test_add_updates_changed_and_deleted_files(base: KnowledgeBase, folder: Path) -> None:
    (folder / "birds.txt").write_text("Emus run.\n", encoding="utf-8")
    (folder / "law.md").unlink()
    report = base.add([folder])
    assert (report.updated, report.removed, report.unchanged) == (1, 1, 1)
    assert not base.search("penguin", 5) and not base.search("权益", 5)
    assert base.search("emus", 1)[0].doc == "birds.txt"
    consistent(base)


def consistent(base: KnowledgeBase) -> None:
    """Every count and index agrees with the chunks."""
    chunks = [c for d in base.documents() for c in base.store.chunks_of(d.id)]
    bags = [set(terms("\n".join((*c.headings, c.text)))) for c in chunks]
    frequency = Counter(term for bag in bags for term in bag)
    assert base.store.document_frequencies(list(frequency)) == frequency
    some = list(frequency)[:50]
    for term, numbers in zip(some, base.store.postings(some), strict=True):
        expected = sorted(c.id for c, bag in zip(chunks, bags, strict=True) if term in bag)
        assert numbers.tolist() == expected
    assert base.store.chunk_count == len(chunks)
    assert base.store.term_count == sum(c.terms for c in chunks)
    for document in base.documents():
        assert len(base.store.text(document.id)) == document.length
    assert base.store.counts()["terms"] == len(frequency)
    if isinstance(base.store, SqliteStore):
        db = sqlite3.connect(base.store.path)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not db.execute("SELECT term FROM terms WHERE chunks < 0").fetchall()
        db.close()


def test_remove(base: KnowledgeBase) -> None:
    assert base.remove("birds.txt") == 1
    assert not base.search("penguin", 5)
    consistent(base)
    with pytest.raises(DataError, match=r"document 'birds\.txt' not found"):
        base.remove("birds.txt")


def test_reindex_changes_no_hits(base: KnowledgeBase) -> None:
    before = base.search("北京的长城", 5)
    base.reindex()
    assert base.search("北京的长城", 5) == before
    consistent(base)


def test_filters_by_collection_and_name(base: KnowledgeBase, folder: Path) -> None:
    base.add_text("北京的冬天很冷。", name="冬天", collection="notes")
    assert {h.doc for h in base.search("北京", 9)} == {"城市.md", "冬天"}
    assert {h.doc for h in base.search("北京", 9, collection="notes")} == {"冬天"}
    assert {h.doc for h in base.search("北京", 9, name="*.md")} == {"城市.md"}
    assert base.search("北京", 9, collection="none") == []


def test_json_lines_file_has_a_document_per_line(tmp_path: Path, base: KnowledgeBase) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"id": "p1", "text": "鲸是哺乳动物。"}\n{"id": "p2", "text": "鲨是鱼。"}\n')
    base.add([file])
    assert [h.doc_id for h in base.search("鲸", 1)] == ["p1"]


def test_search_deduplicates_passages(base: KnowledgeBase) -> None:
    for i in range(3):
        base.add_text("乌鸦是黑色的鸟。", name=f"crow{i}")
    assert len(base.search("乌鸦", 9)) == 1


def test_merges_neighbouring_passages(base: KnowledgeBase) -> None:
    text = TEXTS["law.md"]
    merged = merge_neighbours(base.search("民事主体的合法权益 人身权利受法律保护", 9))
    (hit,) = [h for h in merged if h.doc == "law.md"]
    assert hit.text == text[hit.start : hit.end] and "制定" in hit.text and "人身" in hit.text


# --------------------------------------------------------------------------------------- embedders


def test_dense_and_hybrid_search(opener: Open, hashed: Hashed, folder: Path) -> None:
    base = KnowledgeBase(opener(), embedder=hashed())
    base.add([folder])
    for mode in ("dense", "hybrid"):
        hit = base.search("penguins swim", 1, mode=mode)[0]
        assert hit.doc == "birds.txt" and "dense" in hit.legs
    hit = base.search("penguins swim", 1)[0]
    assert set(hit.legs) == {"lexical", "dense"}
    assert hit.score == pytest.approx(sum(1 / (60 + leg.rank) for leg in hit.legs.values()))
    assert base.search("penguins", 1, mode="lexical")[0].legs.keys() == {"lexical"}


def test_refuses_another_embedder(opener: Open, hashed: Hashed, folder: Path) -> None:
    with KnowledgeBase(opener(), embedder=hashed()) as base:
        base.add([folder])
    with pytest.raises(ConfigError, match="was embedded by hashed"):
        KnowledgeBase(opener(), embedder=hashed("other"))
    with KnowledgeBase(opener(), embedder=hashed(dimension=9)) as base:
        with pytest.raises(ConfigError, match="9"):
            base.add_text("new", name="new")
        assert all(document.name != "new" for document in base.documents())


def test_lexical_base_can_be_embedded_later(
    base: KnowledgeBase, opener: Open, hashed: Hashed
) -> None:
    with pytest.raises(ConfigError, match="this knowledge base is lexical"):
        base.search("北京", mode="dense")
    with pytest.raises(ConfigError, match="is lexical"):
        KnowledgeBase(opener(), embedder=hashed())
    base.reindex(hashed())
    assert base.search("北京", 1, mode="dense")[0].doc == "城市.md"
    by = hashed("other", 16)
    base.reindex(by)
    assert by.calls == base.store.chunk_count
    by.calls = 0
    base.reindex(by)
    assert by.calls == 0  # none is missing


def test_interrupted_embedding_continues(
    opener: Open, hashed: Hashed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khaosz.rag.knowledge_base._EMBED_CHUNKS", 2)
    by = hashed()
    embed, left = by.passages, [2]

    def failing(texts: list[str]) -> np.ndarray:
        if not left[0]:
            raise ConnectionError("the server is gone")
        left[0] -= 1
        return embed(texts)

    by.passages = failing
    base = KnowledgeBase(opener(), embedder=by, splitter=StructureSplitter(max_chars=40))
    with pytest.raises(ConnectionError):
        base.add([folder])
    chunks = base.store.chunk_count
    assert base.store.vector_count == 4 < chunks and len(base.documents()) == 3
    assert base.search("penguins", 1, mode="lexical")  # lexical search does not wait for vectors
    left[0], by.calls = 100, 0
    seen: list[tuple[int, int]] = []
    report = base.add([folder], on_file=lambda _, r: seen.append((r.embedded, r.to_embed)))
    assert report.unchanged == 3 and by.calls == chunks - 4 == report.embedded
    assert seen[-1] == (chunks - 4, chunks - 4)
    assert base.store.vector_count == chunks
    base.add([folder])
    assert by.calls == chunks - 4


def test_rebuilds_outdated_or_damaged_graph(tmp_path: Path, hashed: Hashed) -> None:
    pytest.importorskip("usearch")
    base = KnowledgeBase(tmp_path / "a.kb", embedder=hashed())
    for i in range(300):
        base.add_text(f"word{i} other{i % 7} 第{i}条", name=str(i))
    exact = ExactIndex(base.store)
    queries = hashed().queries([f"word{i}" for i in range(40)])
    path = tmp_path / "a.kb.usearch"
    for state in ("new", "saved", "damaged", "missing", "outdated"):
        if state == "damaged":
            path.write_bytes(path.read_bytes()[:-100])
        elif state == "missing":
            path.unlink()
        elif state == "outdated":
            base.add_text("word40 late", name="late")
            exact = ExactIndex(base.store)
        graph = GraphIndex(base.store)
        # By cosine, since half precision (11 bits) changes the order of close vectors.
        near = sum(
            cosine >= exact.nearest(q, 10)[-1][1] - 2**-9
            for q in queries
            for _, cosine in graph.nearest(q, 10)
        )
        assert near >= 0.97 * 400, state
        allowed = base.store.chunk_numbers(name="1*")
        assert {n for n, _ in graph.nearest(queries[0], 20, allowed)} <= set(allowed.tolist())
        assert len(graph.nearest(queries[0], 20, allowed)) == 20
        del graph


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("query", ["", "  \n"])
def test_refuses_empty_queries(base: KnowledgeBase, query: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        base.search(query)


@pytest.mark.parametrize("query", ['"', "NEAR(", "a AND", "*", "。。。", "北\x00京", "' OR 1=1 --"])
def test_queries_are_plain_text(base: KnowledgeBase, query: str) -> None:
    base.search(query, 5)


def test_refuses_file_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    path.write_bytes(b"this is text, not a database" * 50)
    with pytest.raises(DataError, match="cannot be used"):
        KnowledgeBase(path)


def test_refuses_later_version(base: KnowledgeBase, opener: Open) -> None:
    with base.store.writing():
        base.store.set("version", "99")
    with pytest.raises(DataError, match="version 99"):
        opener()


def test_readers_see_one_state_during_a_write(base: KnowledgeBase, opener: Open) -> None:
    reader = KnowledgeBase(opener())
    with reader.store.reading():
        count = len(reader.documents())
        base.add_text("new", name="new")
        assert len(reader.documents()) == count
    assert len(reader.documents()) == count + 1


def test_failed_change_is_rolled_back(base: KnowledgeBase) -> None:
    with pytest.raises(ZeroDivisionError), base.store.writing():
        base.store.remove_source("default", base.documents()[0].path)
        raise ZeroDivisionError
    assert len(base.documents()) == 3
    consistent(base)


@pytest.mark.parametrize("opener", ["sqlite"], indirect=True)
def test_full_disk_loses_nothing(base: KnowledgeBase) -> None:
    assert isinstance(base.store, SqliteStore)
    pages = base.store._db.execute("PRAGMA page_count").fetchone()[0]
    base.store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(DataError, match="full"):
        base.add_text("字" * 400_000, name="big")
    base.store._db.execute("PRAGMA max_page_count = 1000000")
    assert all(document.name != "big" for document in base.documents())
    consistent(base)


ADDER = """
import sys
from khaosz.rag import KnowledgeBase
base = KnowledgeBase(sys.argv[1])
import khaosz.rag.knowledge_base as kb
kb._FILES = 3
print("ready", flush=True)
base.add([sys.argv[2]])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_survives_a_hundred_kills(tmp_path: Path) -> None:
    """After each kill, committed documents exist exactly once, and adding can be completed."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(60):
        (docs / f"{i:02}.txt").write_text(f"文件{i}说明第{i}号规则。" * 60, encoding="utf-8")
    path = tmp_path / "a.kb"
    chance = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(100):
        process = subprocess.Popen(
            [sys.executable, "-c", ADDER, str(path), str(docs)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(chance.uniform(0, 0.06)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with KnowledgeBase(path) as base:
            names = [document.name for document in base.documents()]
            assert len(names) == len(set(names))
            assert seen <= set(names)
            seen = set(names)
            if len(seen) == 60:  # give the next runs work: remove a third, change another
                for i in range(20):
                    base.remove(f"{i:02}.txt")
                    text = f"改{chance.integers(1000)}。" * 99
                    (docs / f"{20 + i}.txt").write_text(text, encoding="utf-8")
                seen -= {f"{i:02}.txt" for i in range(20)}
            consistent(base)
    with KnowledgeBase(path) as base:
        base.add([docs])
        assert len(base.documents()) == 60
        consistent(base)


def test_budget_leaves_hits_for_a_filter(
    base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rare term occurs only outside the filter; the common term must still be read."""
    for i in range(30):
        base.add_text(f"common word {i} " + "rare " * (i < 3), name=f"n{i}", collection="crowd")
    base.add_text("common here", name="match", collection="mine")
    monkeypatch.setattr("khaosz.rag.search.bm25.BUDGET", 5)
    assert [h.doc for h in base.search("rare common", 5, collection="mine")] == ["match"]


def test_wrong_path_creates_no_base(tmp_path: Path) -> None:
    kb = tmp_path / "a.kb"
    result = CliRunner().invoke(app, ["rag", "add", str(tmp_path / "none"), "--kb", str(kb)])
    assert isinstance(result.exception, DataError) and not kb.exists()


def test_put_replaces_documents_by_name(tmp_path: Path, hashed: Hashed) -> None:
    with KnowledgeBase(tmp_path / "a.kb", embedder=hashed()) as base:
        assert base.search("anything") == [], "there is nothing yet"
        seen: list[tuple[int, int]] = []

        def put(content: str, name: str) -> Any:
            upload = tmp_path / "upload"
            upload.write_text(content, encoding="utf-8")
            with WorkerPool(Limits(workers=1)) as pool:
                source, documents = load_file(upload, name, pool=pool, on_problem=print)
            return base.put(source, documents, on_chunk=lambda *done: seen.append(done))

        report = put("企鹅住在南极。", "鸟.md")
        assert (report.added, report.chunks, seen) == (1, 1, [(0, 1), (1, 1)])
        assert put("企鹅住在南极。", "鸟.md").unchanged == 1
        assert put("企鹅住在南极。", "同样.md").added == 1
        assert put("鲸鱼住在海里。", "鸟.md").updated == 1
        assert {document.name: document.path for document in base.documents()} == {
            "鸟.md": "鸟.md", "同样.md": "同样.md"
        }  # fmt: skip
        assert base.search("企鹅", mode="lexical")[0].doc == "同样.md"
        assert base.store.vector_count == base.store.chunk_count == 2
        with base.store.writing():
            assert base.store.remove_source("default", "鸟.md")
        assert [document.name for document in base.documents()] == ["同样.md"]
