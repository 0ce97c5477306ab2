"""Both stores side by side: the same documents, hits and scores; concurrency and failures."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.errors import ConfigError, DataError
from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.store import open_store
from khaosz.rag.store.records import NewChunk, NewDocument, SourceFile, glob_pattern
from khaosz.rag.store.sql import Store

Open = Callable[..., Store]
Openers = Callable[[str], Open]
Hashed = Callable[..., Any]

SAMPLE = Path(__file__).parents[2] / "khaosz" / "data" / "sample"
QUERIES = (
    "民事主体的合法权益受法律保护", "合同", "的", "买卖合同的标的物", "American people and jobs",
    "Ukraine", "health care costs", "法律 law", "nothing like zzqqx",
)  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    """Names and texts in both languages."""
    chinese = (SAMPLE / "statutes_zh.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    english = (SAMPLE / "state_of_the_union_2024.txt").read_text(encoding="utf-8").split("\n\n")
    made = [(f"法{i}.md", line) for i, line in enumerate(chinese)]
    made += [(f"speech{i}.txt", text) for i, text in enumerate(english[:60]) if text.strip()]
    return [pair for both in zip(made[:40], made[40:], strict=False) for pair in both]


def fill(store: Store, documents: list[tuple[str, str]], embedder: Any) -> KnowledgeBase:
    base = KnowledgeBase(store, embedder=embedder, splitter=StructureSplitter(max_chars=200))
    for i, (name, text) in enumerate(documents):
        base.add_text(text, name=name, collection=("even", "odd")[i % 2])
    for name, text in documents[:9]:  # replaced, so that numbers have gaps
        base.add_text(text + " 又 again", name=name, collection="even")
    base.remove(documents[20][0])
    return base


def test_hits_and_scores_are_the_same(
    openers: Openers, hashed: Hashed, documents: list[tuple[str, str]]
) -> None:
    file = fill(openers("sqlite")(), documents, hashed())
    other = fill(openers("postgres")(), documents, hashed())
    assert {k: v for k, v in other.stats().items() if k not in ("path", "bytes")} == {
        k: v for k, v in file.stats().items() if k not in ("path", "bytes")
    }
    filters: list[dict[str, Any]] = [{}, {"collection": "odd"}, {"name": "法[1-3]*.md"}]
    filters += [{"collection": "even", "name": "speech?.txt"}, {"collection": "none"}]
    hits = 0
    for query in QUERIES:
        for only in filters:
            lexical = [base.search(query, 20, mode="lexical", **only) for base in (file, other)]
            assert [fields(hit) for hit in lexical[0]] == [fields(hit) for hit in lexical[1]]
            # One formula over the same texts and counts, in float64.
            assert scores(lexical[1]) == pytest.approx(scores(lexical[0]), rel=1e-12)
            dense = [base.search(query, 20, mode="dense", **only) for base in (file, other)]
            # A dot product of 48 float32, summed in another order: 48 roundings of 2^-24.
            assert scores(dense[1]) == pytest.approx(scores(dense[0]), abs=48 * 2**-24)
            places = {fields(hit): hit.score for hit in dense[0]}
            for hit in dense[1]:
                last = dense[0][-1].score
                assert places.get(fields(hit), last) == pytest.approx(hit.score, abs=48 * 2**-24)
            hits += len(lexical[0]) + len(dense[0])
            both = other.search(query, 20, **only)
            assert {fields(hit) for hit in both} <= {
                fields(hit) for hit in file.search(query, 200, **only)
            }
    assert hits > 500


def fields(hit: Any) -> tuple:
    return hit.doc, hit.doc_id, hit.collection, hit.hash, hit.start, hit.end, hit.text, hit.headings


def scores(hits: list[Any]) -> list[float]:
    return [hit.score for hit in hits]


def document(text: str, name: str = "a") -> NewDocument:
    digest = hashlib.sha256(text.encode()).hexdigest()
    vector = np.ones(3, np.float32) / np.sqrt(np.float32(3))
    return NewDocument(name, name, digest, len(text), [NewChunk(0, len(text), text, (), vector)])


def test_vectors_are_stored_bit_by_bit(opener: Open) -> None:
    store = opener()
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(20, 5)).astype(np.float32)
    vectors[0] = [1e-38, -0.0, 3.4e38, 1 / 3, 1e-45]
    chunks = [NewChunk(i, i + 1, "字", (), vector) for i, vector in enumerate(vectors)]
    with store.writing():
        store.set("dimension", "5")
        store.replace("c", SourceFile("p", 1, 2, "s"), [NewDocument("i", "n", "h", 20, chunks)])
    numbers, matrix = opener().vectors()
    assert matrix.tobytes() == vectors.tobytes() and (np.diff(numbers) > 0).all()
    assert store.dimension == 5 and store.vector_count == 20


def test_documents_are_in_natural_order(opener: Open) -> None:
    with KnowledgeBase(opener("order")) as base:
        for name in ("10.md", "2.md", "第10章.md", "1.md", "第2章.md"):
            base.add_text(f"text of {name}", name=name)
        names = [document.name for document in base.documents()]
    assert names == ["1.md", "2.md", "10.md", "第2章.md", "第10章.md"]


def test_opening_without_new_creates_nothing(opener: Open) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="not found"):
            opener("none", new=False)
    opener("some").close()
    opener("some", new=False)


# A file as the first version wrote it; the index's revision is called generation.
FIRST_VERSION = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sources (
    id INTEGER PRIMARY KEY, collection TEXT NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL, UNIQUE (collection, path));
CREATE TABLE documents (
    id INTEGER PRIMARY KEY, source INTEGER NOT NULL REFERENCES sources ON DELETE CASCADE,
    collection TEXT NOT NULL, doc_id TEXT NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL,
    length INTEGER NOT NULL, pages TEXT NOT NULL, metadata TEXT NOT NULL);
CREATE INDEX documents_of_source ON documents (source);
CREATE INDEX documents_of_collection ON documents (collection, doc_id);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    start INTEGER NOT NULL, "end" INTEGER NOT NULL, text TEXT NOT NULL, headings TEXT NOT NULL,
    terms INTEGER NOT NULL);
CREATE INDEX chunks_of_document ON chunks (document, start);
CREATE TABLE vectors (chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,
    vector BLOB NOT NULL);
CREATE TABLE terms (term TEXT PRIMARY KEY, chunks INTEGER NOT NULL) WITHOUT ROWID;
CREATE VIRTUAL TABLE postings USING fts5(
    terms, content='', detail=none, columnsize=0, tokenize="unicode61 remove_diacritics 0");
INSERT INTO sources VALUES (4, 'default', 'a', 10, 5, 's');
INSERT INTO documents VALUES (4, 4, 'default', 'a', 'a', 'h', 10, '[]', '{"k": "v"}');
INSERT INTO chunks VALUES (7, 4, 0, 5, 'words', '["标题"]', 4);
INSERT INTO chunks VALUES (8, 4, 5, 10, ' word', '[]', 1);
INSERT INTO vectors VALUES (7, x'0000803f00000000');
INSERT INTO terms VALUES ('word', 2), ('标题', 1), ('标', 1), ('题', 1), ('gone', 0);
INSERT INTO postings (rowid, terms) VALUES (7, '标 word 标题 题'), (8, 'word');
INSERT INTO meta VALUES ('version', '1'), ('chunks', '2'), ('terms', '5'), ('generation', '7');
INSERT INTO meta VALUES ('embedder', 'hashed'), ('dimension', '2');
"""


def test_opens_a_file_of_the_first_version(tmp_path: Path, hashed: Hashed) -> None:
    with closing(sqlite3.connect(tmp_path / "a.kb")) as db:
        db.executescript(FIRST_VERSION)
    with KnowledgeBase(tmp_path / "a.kb", embedder=hashed(dimension=2)) as base:
        store = base.store
        assert (store.revision, store.chunk_count, store.dimension) == (7, 2, 2)
        assert [hit.chunk for hit in base.search("标题", 5, mode="lexical")] == [7]
        assert store.vectors()[1].tolist() == [[1.0, 0.0]]
        (content,) = store.contents("default", "a")
        assert content.metadata == {"k": "v"} and content.chunks[0].headings == ("标题",)
        base.add_text("more words", name="b")
        assert store.revision > 7 and store.chunk_count == 3
        assert [chunk.id for chunk in store.chunks(list(range(20)))] == [7, 8, 9]
        base.remove("a")
        assert store.settings()["generation"] == str(store.revision)
        assert store.document_frequencies(["word", "标题"]) == {"word": 1}
        assert (store.chunk_count, store.term_count) == (1, 2)


def test_revision_is_stored_as_generation(opener: Open) -> None:
    store = opener()
    with store.writing():
        store.set("generation", "7")
    assert store.revision == 7
    with store.writing():
        store.set("dimension", "3")
        store.replace("c", SourceFile("p", 1, 2, "s"), [document("字 word")])
    assert opener().revision == store.revision == int(store.get("generation") or 0) > 7


def test_vectors_of_removed_chunks_are_skipped(opener: Open) -> None:
    store = opener()
    with store.writing():
        store.set("dimension", "3")
        for path in ("removed", "stays"):
            store.replace("c", SourceFile(path, 1, 2, "s"), [document("字 word")])
        store.forget_vectors()
    numbers = [chunk.id for chunk in store.unembedded()]
    with store.writing():
        store.remove_source("c", "removed")
    with store.writing():
        store.set_vectors((number, np.ones(3, np.float32)) for number in numbers)
    assert store.vector_count == len(numbers) // 2 > 0


def test_two_writers_at_once_lose_nothing(opener: Open) -> None:
    store = opener()

    def write(who: str) -> None:
        with KnowledgeBase(store.where) as base:
            for i in range(10):
                base.add_text(f"shared word {who}{i}", name=f"{who}{i}")

    threads = [threading.Thread(target=write, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert store.counts()["documents"] == 20
    assert store.document_frequencies(["shared", "word"]) == {"shared": 20, "word": 20}
    assert (store.chunk_count, len(store.postings(["shared"])[0])) == (20, 20)


def test_killed_postgres_writer_leaves_nothing(openers: Openers) -> None:
    opener = openers("postgres")
    first, second = opener(), opener()
    file = SourceFile("p", 1, 2, "s")
    with pytest.raises(DataError, match=r"clos|terminat"), first.writing():
        first.set("dimension", "3")
        first.replace("c", file, [document("字 word")])
        pid = first._db.info.backend_pid  # type: ignore[attr-defined]
        second._run("SELECT pg_terminate_backend(?, 5000)", (pid,))  # type: ignore[attr-defined]
        first.replace("c", file, [document("more")])
    assert second.counts() == dict.fromkeys(
        ("sources", "documents", "chunks", "vectors", "terms"), 0
    )
    with second.writing():  # the lock was released
        second.set("dimension", "3")
        second.replace("c", file, [document("字 word")])
    assert second.document_frequencies(["word"]) == {"word": 1}


def test_waiting_postgres_writer_fails(openers: Openers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("khaosz.rag.store.postgres._BUSY", "100ms")
    opener = openers("postgres")
    first, second = opener(), opener()
    with first.writing(), pytest.raises(DataError, match="written by another"), second.writing():
        pass
    with second.writing():
        pass


def test_postgres_role_without_create_schema(openers: Openers, postgres_url: str) -> None:
    admin: Any = openers("postgres")()
    role = f"r{admin._schema}"[:60]
    admin._run(f"CREATE ROLE {role} LOGIN")
    address = f"{postgres_url.replace('postgres:@', f'{role}@')}#{role}"
    with pytest.raises(DataError, match="permission denied"):
        open_store(address)
    admin._run(f"CREATE SCHEMA {role} AUTHORIZATION {role}")
    with KnowledgeBase(address) as base:
        base.add_text("字 word", name="a")
        assert base.search("字", 1)[0].doc == "a"


def test_refuses_old_pgvector(openers: Openers, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = openers("postgres")
    opener()
    monkeypatch.setattr("khaosz.rag.store.postgres_server.PGVECTOR", (99, 0))
    with pytest.raises(DataError, match=r"has pgvector 0\."):
        opener()


@pytest.mark.parametrize("dimension", [8, 24])
def test_postgres_searches_a_graph(
    openers: Openers, hashed: Hashed, monkeypatch: pytest.MonkeyPatch, dimension: int
) -> None:
    monkeypatch.setattr("khaosz.rag.store.postgres.EXACT_UP_TO", 100)
    base = KnowledgeBase(openers("postgres")(), embedder=hashed("first", 48))
    for i in range(400):
        base.add_text(f"word{i} other{i % 7} 第{i}条", name=str(i), collection=f"c{i % 3}")
    by = hashed("second", dimension)
    base.reindex(by)
    store: Any = base.store
    assert store._graph()
    _, matrix = store.vectors()
    queries = by.queries([f"word{i} other" for i in range(40)])
    good = 0
    for query in queries:
        tenth = np.sort(matrix @ query)[-10]
        good += sum(cosine >= tenth - 1e-6 for _, cosine in store.nearest(query, 10))
    assert good >= 0.97 * 400  # HNSW is approximate; ef_search 200 of 400
    with store.reading():
        store._run("SET LOCAL enable_seqscan = off")
        plan = store._run(
            f"EXPLAIN SELECT chunk FROM vectors v WHERE vector_dims(v.vector) = {dimension}"
            f" ORDER BY v.vector::vector({dimension}) <#> %b LIMIT 9",
            (queries[0],),
        )
        assert "vectors_nearest" in str(plan.fetchall())
    for only in ({"collection": "c1"}, {"name": "1*"}):
        allowed = store.chunk_numbers(**only)
        assert len(allowed) > 100
        nearest = store.nearest(queries[0], 100, allowed, **only)  # a third of the graph matches
        assert len(nearest) == 100 and {n for n, _ in nearest} <= set(allowed.tolist())


# ------------------------------------------------------------------------------------------- names

GLOBS = (
    "*", "?", "a*", "*.md", "a?c", "[abc]*", "[^abc]*", "[a-c]x", "[z-a]*", "[]a]*", "[a", "a[",
    "[^]]", "*[0-9].txt", "a.c", "a+b", "(a)", "\\d", "法*", "[一-龥]", "a\nb", "$", "^a", "[-a]",
    "[a-]", "", "[\\d]", "[[a]", "{a,b}", "a|b", "#", "~", "[a^]",
)  # fmt: skip
NAMES = (
    "", "a", "b", "ax", "bx", "zx", "abc", "a.c", "a+b", "(a)", "\\d", "d", "\\", "5", "法律.md",
    "法", "a\nb", "$", "^a", "]", "-", "[", "x3.txt", "{a,b}", "a|b", "#", "~", "a[", "^",
)  # fmt: skip


def sqlite_matches(pattern: str, name: str) -> bool:
    return bool(
        sqlite3.connect(":memory:").execute("SELECT ? GLOB ?", (name, pattern)).fetchone()[0]
    )


alphabet = st.text(alphabet="ab-z[]^*?\\.法 \n", max_size=7)


@settings(max_examples=400)
@given(alphabet, alphabet)
def test_glob_pattern_matches_as_sqlite_does(pattern: str, name: str) -> None:
    fits = re.fullmatch(glob_pattern(pattern), name, re.DOTALL) is not None
    assert fits == sqlite_matches(pattern, name)


def test_postgres_matches_names_as_sqlite_does(openers: Openers) -> None:
    store = openers("postgres")()
    with store.writing():
        for name in NAMES:
            chunk = NewChunk(0, 1, "字", ())
            made = NewDocument("i", name, "h", 1, [chunk])
            store.replace("c", SourceFile(f"/{name}", 1, 2, "s"), [made])
    for pattern in GLOBS:
        numbers = store.chunk_numbers(name=pattern).tolist()
        owners = store.owners([chunk.document for chunk in store.chunks(numbers)])
        names = {owner.name for owner in owners.values()}
        assert names == {name for name in NAMES if sqlite_matches(pattern, name)}, pattern


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/db", DataError, "127.0.0.1"),
        ("postgresql:///db?host=/nowhere&password=secret", DataError, "nowhere"),
        ("postgresql://127.0.0.1/db#Bad-Name", ConfigError, "schema"),
        ("qdrant+http://127.0.0.1:6333/name", ConfigError, "address"),
        ("mysql://127.0.0.1/db", ConfigError, "address"),
    ],
)
def test_bad_address_is_one_line_without_password(address: str, error: type, words: str) -> None:
    if address.startswith("postgresql"):
        pytest.importorskip("psycopg")
    with pytest.raises(error) as caught:
        open_store(address)
    message = str(caught.value)
    assert words in message and "\n" not in message and "secret" not in message
    assert caught.value.hint and "secret" not in caught.value.hint


def test_names_the_missing_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="psycopg is not installed") as caught:
        open_store("postgresql://h/d")
    assert caught.value.hint == "pip install 'khaosz[postgres]'"


def test_sqlite_imports_no_client(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom khaosz.rag import KnowledgeBase\nimport khaosz.rag.store.copy\n"
        f"base = KnowledgeBase({str(tmp_path / 'a.kb')!r})\n"
        "base.add_text('a', name='a')\nbase.search('a')\n"
        "assert not {'psycopg', 'httpx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
