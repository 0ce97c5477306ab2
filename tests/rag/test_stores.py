"""The three stores beside each other: the same documents, hits and scores; and what breaks."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.errors import ConfigError, DataError
from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.store import NewChunk, NewDocument, SourceFile, Store, open_store
from khaosz.rag.store.protocol import glob_pattern

Open = Callable[..., Store]
Homes = Callable[[str], Open]
Hashed = Callable[..., Any]

SAMPLE = Path(__file__).parents[2] / "khaosz" / "data" / "sample"
OTHERS = ("postgres", "qdrant", "qdrant-server")
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
    for name, text in documents[:9]:  # written again, so that numbers have holes
        base.add_text(text + " 又 again", name=name, collection="even")
    base.remove(documents[20][0])
    return base


@pytest.mark.parametrize("kind", OTHERS)
def test_hits_and_scores_are_the_same(
    kind: str, homes: Homes, hashed: Hashed, documents: list[tuple[str, str]]
) -> None:
    file = fill(homes("sqlite")(), documents, hashed())
    other = fill(homes(kind)(), documents, hashed())
    assert {k: v for k, v in other.stats().items() if k not in ("path", "bytes")} == {
        k: v for k, v in file.stats().items() if k not in ("path", "bytes")
    }
    filters: list[dict[str, Any]] = [{}, {"collection": "odd"}, {"name": "法[1-3]*.md"}]
    filters += [{"collection": "even", "name": "speech?.txt"}, {"collection": "none"}]
    found = 0
    for query in QUERIES:
        for only in filters:
            lexical = [base.search(query, 20, mode="lexical", **only) for base in (file, other)]
            assert [told(hit) for hit in lexical[0]] == [told(hit) for hit in lexical[1]]
            # One formula over the same texts and counts, in float64.
            assert scores(lexical[1]) == pytest.approx(scores(lexical[0]), rel=1e-12)
            dense = [base.search(query, 20, mode="dense", **only) for base in (file, other)]
            # A dot product of 48 float32, summed in another order: 48 roundings of 2^-24.
            assert scores(dense[1]) == pytest.approx(scores(dense[0]), abs=48 * 2**-24)
            places = {told(hit): hit.score for hit in dense[0]}
            for hit in dense[1]:
                last = dense[0][-1].score
                assert places.get(told(hit), last) == pytest.approx(hit.score, abs=48 * 2**-24)
            found += len(lexical[0]) + len(dense[0])
            both = other.search(query, 20, **only)
            assert {told(hit) for hit in both} <= {
                told(hit) for hit in file.search(query, 200, **only)
            }
    assert found > 500


def told(hit: Any) -> tuple:
    return hit.doc, hit.doc_id, hit.collection, hit.hash, hit.start, hit.end, hit.text, hit.headings


def scores(hits: list[Any]) -> list[float]:
    return [hit.score for hit in hits]


def document(text: str, name: str = "a") -> NewDocument:
    digest = hashlib.sha256(text.encode()).hexdigest()
    vector = np.ones(3, np.float32) / np.sqrt(np.float32(3))
    return NewDocument(name, name, digest, len(text), [NewChunk(0, len(text), text, (), vector)])


def test_an_embedders_vectors_come_back_bit_by_bit(opened: Open) -> None:
    store = opened()
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(20, 5)).astype(np.float32)
    vectors[0] = [1e-38, -0.0, 3.4e38, 1 / 3, 1e-45]
    chunks = [NewChunk(i, i + 1, "字", (), vector) for i, vector in enumerate(vectors)]
    with store.writing():
        store.set("dimension", "5")
        store.replace("c", SourceFile("p", 1, 2, "s"), [NewDocument("i", "n", "h", 20, chunks)])
    numbers, matrix = opened().vectors()
    assert matrix.tobytes() == vectors.tobytes() and (np.diff(numbers) > 0).all()
    assert store.dimension == 5 and store.vector_count == 20


def test_looking_begins_no_base(opened: Open) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="there is no knowledge base"):
            opened("none", new=False)
    opened("some").close()
    opened("some", new=False)


def test_two_writers_lose_nothing(homes: Homes) -> None:
    """At once where the store keeps them apart, in turn where it says that it does not."""
    for kind in ("sqlite", "postgres"):
        store = homes(kind)()

        def write(who: str, where: str = store.where) -> None:
            with KnowledgeBase(where) as base:
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
    one, two = (KnowledgeBase(homes("qdrant")()) for _ in "ab")
    for i in range(10):
        one.add_text(f"shared word a{i}", name=f"a{i}")
        two.add_text(f"shared word b{i}", name=f"b{i}")
    assert one.store.chunk_count == one.store.counts()["chunks"] == 20


def test_a_writer_that_dies_leaves_nothing(homes: Homes) -> None:
    home = homes("postgres")
    first, second = home(), home()
    file = SourceFile("p", 1, 2, "s")
    with pytest.raises(DataError, match=r"clos|terminat"), first.writing():
        first.set("dimension", "3")
        first.replace("c", file, [document("字 word")])
        pid = first._db.info.backend_pid  # type: ignore[attr-defined]
        second._run("SELECT pg_terminate_backend(%s, 5000)", (pid,))  # type: ignore[attr-defined]
        first.replace("c", file, [document("more")])
    assert second.counts() == dict.fromkeys(
        ("sources", "documents", "chunks", "vectors", "terms"), 0
    )
    with second.writing():  # the lock went with it
        second.set("dimension", "3")
        second.replace("c", file, [document("字 word")])
    assert second.document_frequencies(["word"]) == {"word": 1}


def test_a_waiting_writer_gives_up(homes: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("khaosz.rag.store.postgres._BUSY", "100ms")
    home = homes("postgres")
    first, second = home(), home()
    with first.writing(), pytest.raises(DataError, match="written by another"), second.writing():
        pass
    with second.writing():
        pass


def test_a_role_that_may_make_no_schema(homes: Homes, postgres_url: str) -> None:
    admin: Any = homes("postgres")()
    role = f"r{admin._schema}"[:60]
    admin._run(f"CREATE ROLE {role} LOGIN")
    address = f"{postgres_url.replace('postgres:@', f'{role}@')}#{role}"
    with pytest.raises(DataError, match="permission denied"):
        open_store(address)
    admin._run(f"CREATE SCHEMA {role} AUTHORIZATION {role}")
    with KnowledgeBase(address) as base:
        base.add_text("字 word", name="a")
        assert base.search("字", 1)[0].doc == "a"


def test_an_old_pgvector_is_refused(homes: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    home = homes("postgres")
    home()
    monkeypatch.setattr("khaosz.rag.store.postgres_server.PGVECTOR", (99, 0))
    with pytest.raises(DataError, match=r"has pgvector 0\."):
        home()


class Broken(Exception):
    pass


def breaking(ask: Any, stop: int, count: list[int]) -> Any:
    """`ask`, until `stop` changes were made; the operations of one request are several."""

    def counted() -> None:
        count[0] += 1
        if count[0] > stop:
            raise Broken

    def failing(verb: str, part: str, **options: Any) -> Any:
        if verb == "upsert":
            counted()
        for operation in options.get("update_operations", ()):
            counted()
            ask(verb, part, update_operations=[operation], wait=True)
        return None if verb == "batch_update_points" else ask(verb, part, **options)

    return failing


def test_a_change_of_qdrant_that_breaks_off_is_noticed(homes: Homes) -> None:
    """After each request in turn: no document in part, and adding again mends everything."""
    home = homes("qdrant")
    old, new = "old text 旧。\n\nsecond old", "new text 新。\n\nsecond new"
    splitter = StructureSplitter(max_chars=12)
    seen = set()
    for stop in range(100):
        base = KnowledgeBase(home(f"s{stop}"), splitter=splitter)
        base.add_text("another 别的", name="other")
        base.add_text(old, name="doc")
        points = base.store._points  # type: ignore[attr-defined]
        ask = points.ask

        points.ask = breaking(ask, stop, [0])
        try:
            base.add_text(new, name="doc")
            whole = True
        except Broken:
            whole = False
        points.ask = ask
        again = KnowledgeBase(home(f"s{stop}"), splitter=splitter)
        for found in again.documents():
            text = again.store.text(found.id)
            assert hashlib.sha256(text.encode()).hexdigest() == found.hash, stop
        state = again.store.source("default", "doc")
        seen.add((whole, state is not None))
        again.search("old new text another", 9)
        again.add_text(new, name="doc")
        assert sorted(d.name for d in again.documents()) == ["doc", "other"]
        assert again.search("new 新", 1)[0].doc == "doc" and not again.search("old 旧", 1)
        counts, store = again.store.counts(), again.store
        assert store.chunk_count == counts["chunks"] == 3, stop
        held = [chunk.terms for d in again.documents() for chunk in store.chunks_of(d.id)]
        assert store.term_count == sum(held), stop
        if whole:
            break
    assert whole and stop > 5 and (False, False) in seen and (False, True) in seen


@pytest.mark.parametrize("dimension", [8, 24])
def test_postgres_finds_through_a_graph(
    homes: Homes, hashed: Hashed, monkeypatch: pytest.MonkeyPatch, dimension: int
) -> None:
    monkeypatch.setattr("khaosz.rag.store.postgres.EXACT_UP_TO", 100)
    base = KnowledgeBase(homes("postgres")(), embedder=hashed("first", 48))
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
        found = store.nearest(queries[0], 100, allowed, **only)  # a third of what the graph gives
        assert len(found) == 100 and {n for n, _ in found} <= set(allowed.tolist())


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


def sqlite_fits(pattern: str, name: str) -> bool:
    return bool(
        sqlite3.connect(":memory:").execute("SELECT ? GLOB ?", (name, pattern)).fetchone()[0]
    )


alphabet = st.text(alphabet="ab-z[]^*?\\.法 \n", max_size=7)


@settings(max_examples=400)
@given(alphabet, alphabet)
def test_patterns_are_sqlites(pattern: str, name: str) -> None:
    fits = re.fullmatch(glob_pattern(pattern), name, re.DOTALL) is not None
    assert fits == sqlite_fits(pattern, name)


@pytest.mark.parametrize("kind", OTHERS)
def test_patterns_mean_the_same_in_every_store(kind: str, homes: Homes) -> None:
    store = homes(kind)()
    with store.writing():
        for name in NAMES:
            chunk = NewChunk(0, 1, "字", ())
            made = NewDocument("i", name, "h", 1, [chunk])
            store.replace("c", SourceFile(f"/{name}", 1, 2, "s"), [made])
    for pattern in GLOBS:
        found = store.chunk_numbers(name=pattern)
        owners = store.owners([chunk.document for chunk in store.chunks(found.tolist())])
        names = {owner.name for owner in owners.values()}
        assert names == {name for name in NAMES if sqlite_fits(pattern, name)}, pattern


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/db", DataError, "127.0.0.1"),
        ("postgresql:///db?host=/nowhere&password=secret", DataError, "nowhere"),
        ("postgresql://127.0.0.1/db#Bad-Name", ConfigError, "schema"),
        ("qdrant+http://127.0.0.1:1/name", DataError, "127.0.0.1"),
        ("qdrant+http://127.0.0.1:6333", ConfigError, "address"),
        ("qdrant+http://127.0.0.1:6333/a/b", ConfigError, "address"),
        ("qdrant:folder", ConfigError, "server"),
        ("mysql://127.0.0.1/db", ConfigError, "address"),
    ],
)
def test_a_bad_address_is_one_line(address: str, error: type, words: str) -> None:
    if address.startswith("postgresql"):
        pytest.importorskip("psycopg")
    if address.startswith("qdrant+"):
        pytest.importorskip("qdrant_client")
    with pytest.raises(error) as caught:
        open_store(address)
    message = str(caught.value)
    assert words in message and "\n" not in message and "secret" not in message
    assert caught.value.hint and "secret" not in caught.value.hint


@pytest.mark.parametrize(
    ("address", "extra"), [("postgresql://h/d", "postgres"), ("qdrant+http://h/n", "qdrant")]
)
def test_a_missing_client_is_named(
    address: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not installed") as caught:
        open_store(address)
    assert caught.value.hint == f"pip install 'khaosz[{extra}]'"


def test_clients_are_imported_for_their_bases_alone(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom khaosz.rag import KnowledgeBase\nimport khaosz.rag.store.copy\n"
        f"base = KnowledgeBase({str(tmp_path / 'a.kb')!r})\n"
        "base.add_text('a', name='a')\nbase.search('a')\n"
        "assert not {'psycopg', 'qdrant_client', 'grpc', 'httpx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
