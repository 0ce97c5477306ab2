"""Conversations: storage, revisions, search in both languages, import and export, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Service, served

from khaosz.errors import DataError
from khaosz.serve.records.conversation_store import (
    VERSION,
    ConversationStore,
    Entry,
    _snippet,
    folded,
)
from khaosz.serve.records.conversations import MAX_NODES, conversation_routes


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversations") / "conversations.db"


@pytest.fixture(scope="module")
def server(tiny: Path, database: Path) -> Iterator[tuple[Service, ConversationStore]]:
    store = ConversationStore(database)
    with served(tiny, routers=[conversation_routes(store)]) as running:
        yield running, store


@pytest.fixture
def service(server: tuple[Service, ConversationStore]) -> Iterator[Service]:
    """Without conversations."""
    running, store = server
    yield running
    for id in store.ids():
        store.delete(id)


def new_id() -> str:
    return str(uuid.uuid4())


def node(content: str, parent: str | None = None, **more: Any) -> dict[str, Any]:
    role = "user" if parent is None else "assistant"
    fields = {"id": new_id(), "parent": parent, "role": role, "content": content, "created": 1}
    return {**fields, **more}


def chat(title: str, *texts: str, **more: Any) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    for text in texts:
        nodes.append(node(text, nodes[-1]["id"] if nodes else None))
    return {"title": title, "nodes": nodes, **more}


def put(service: Service, id: str, body: dict[str, Any]) -> tuple[int, Any]:
    status, _, answer = service.ask("PUT", f"/v1/conversations/{id}", json.dumps(body))
    return status, answer


def get(service: Service, path: str) -> tuple[int, Any]:
    status, _, answer = service.ask("GET", f"/v1/conversations{path}")
    return status, answer


def store_all(service: Service, *conversations: dict[str, Any]) -> list[str]:
    ids = []
    for body in conversations:
        ids.append(new_id())
        assert put(service, ids[-1], body)[0] == 200
    return ids


def titles(service: Service, query: str) -> list[str]:
    return [each["title"] for each in get(service, f"?{query}")[1]["data"]]


# ----------------------------------------------------------------------------------------- store


def test_put_get_delete(service: Service) -> None:
    question = node("春眠不觉晓？")
    first, second = (node(text, question["id"], model="tiny") for text in ("处处", "闻啼鸟"))
    second |= {
        "reasoning": "想一想\n",
        "citations": [{"number": 1, "hash": "ab", "page": None, "score": 0.5}],
        "retrieval": {"query": "春眠", "found": True, "hits": []},
        "left_out": 2,
        "sampling": {"temperature": 0.7, "top_k": 20, "thinking": False},
        "finish_reason": "stop",
    }
    body = {
        "title": "春晓 \u0000 🌸",
        "system": "Be brief.",
        "settings": {"temperature": 0.7, "nested": {"a": [1, None, True]}},
        "knowledge_base": "诗",
        "nodes": [question, first, second],
        "selected": second["id"],
    }
    id = new_id()
    status, summary = put(service, id, body)
    assert status == 200
    assert {**summary, "created": 0, "updated": 0} == {
        "object": "conversation", "id": id, "title": body["title"], "created": 0, "updated": 0,
        "messages": 3, "revision": 1,
    }  # fmt: skip
    status, found = get(service, f"/{id}")
    assert status == 200
    unset = {"reasoning": None, "citations": None, "retrieval": None, "model": None}
    unset |= {"left_out": None, "sampling": None}
    filled = [{**unset, "finish_reason": None, **each} for each in body["nodes"]]  # type: ignore[attr-defined]
    assert found == {**summary, **body, "nodes": filled}
    status, _, gone = service.ask("DELETE", f"/v1/conversations/{id}")
    assert (status, gone) == (200, {"object": "conversation.deleted", "id": id, "deleted": True})
    assert get(service, f"/{id}")[0] == 404
    assert service.ask("DELETE", f"/v1/conversations/{id}")[0] == 404


def test_revision_conflict(service: Service) -> None:
    id, mine, theirs = new_id(), chat("mine", "a"), chat("theirs", "a", "b")
    assert put(service, id, {**mine, "revision": 1})[0] == 409  # it was deleted meanwhile
    assert put(service, id, {**mine, "revision": 0})[1]["revision"] == 1
    assert put(service, id, {**theirs, "revision": 1})[1]["revision"] == 2
    for stale in (0, 1, 3):
        status, answer = put(service, id, {**mine, "revision": stale})
        assert status == 409 and answer["error"]["code"] == "revision_conflict"
        assert f"at revision 2, not {stale}" in answer["error"]["message"]
    assert get(service, f"/{id}")[1]["title"] == "theirs"
    # A retry whose first response was lost: the content is equal, so it succeeds.
    assert put(service, id, {**theirs, "revision": 1}) == put(
        service, id, {**theirs, "revision": 1}
    )
    assert put(service, id, theirs)[1]["revision"] == 3  # without a revision


def test_refuses_messages_that_are_not_a_tree(service: Service) -> None:
    a, b, c = node("a"), node("b"), node("c")
    for nodes, field, named in (
        ([a, {**b, "parent": c["id"]}], "nodes.1.parent", b["id"]),
        ([{**a, "parent": b["id"]}, {**b, "parent": a["id"]}], "nodes.0.parent", a["id"]),
        ([c, {**a, "parent": a["id"]}], "nodes.1.parent", a["id"]),
        ([a, a], "nodes.1.id", a["id"]),
    ):
        status, answer = put(service, new_id(), {"title": "", "nodes": nodes})
        assert status == 400 and answer["error"]["param"] == field, answer
        assert named in answer["error"]["message"]
    # Parents may follow their children, and a long path does not recurse.
    long = [node("x")]
    for _ in range(MAX_NODES - 1):
        long.append(node("x", long[-1]["id"]))
    assert put(service, new_id(), {"title": "", "nodes": long[::-1]})[0] == 200
    status, answer = put(service, new_id(), {"title": "", "nodes": [*long, node("x")]})
    assert status == 400 and answer["error"]["param"] == "nodes"
    status, answer = put(service, new_id(), {"title": "", "nodes": [a], "selected": b["id"]})
    assert status == 400 and answer["error"]["param"] == "selected"


@pytest.mark.parametrize(
    "wrong",
    [
        {"more": 1},
        {"title": 5},
        {"title": "x" * 513},
        {"nodes": [{**node("a"), "role": "system"}]},
        {"nodes": [{**node("a"), "id": "../../etc"}]},
        {"nodes": [{**node("a"), "created": -1}]},
        {"nodes": [{**node("a"), "left_out": -1}]},
        {"settings": {"x": float("nan")}},
        {"settings": {"x": float("inf")}},
        {"title": "\ud800"},
        {"settings": {"\udfff": 1}},
        {"revision": -1},
    ],
)
def test_refuses_invalid_conversation(service: Service, wrong: dict[str, Any]) -> None:
    status, answer = put(service, new_id(), {**chat("", "a"), **wrong})
    assert status == 400, answer
    assert get(service, "")[1]["data"] == []


def test_unusual_requests(service: Service) -> None:
    status, headers, _ = service.ask("POST", f"/v1/conversations/{new_id()}", "{}")
    assert (status, headers["allow"]) == (405, "DELETE, GET, PUT")
    for depth in (200, 500, 990, 5000, 200_000):
        deep = '{"title": "", "nodes": [], "settings": {"a": ' + "[" * depth + "]" * depth + "}}"
        id = new_id()
        status, _, _ = service.ask("PUT", f"/v1/conversations/{id}", deep)
        assert status in (200, 400)
        assert get(service, f"/{id}")[0] == (404 if status == 400 else 200), depth
    assert status == 400
    lines(service)
    for path in ("?limit=0", "?limit=x", "?more=1", "?after=x"):
        assert get(service, path)[0] == 400, path
    assert get(service, "/abc")[0] == 404
    for method in ("PUT", "DELETE"):
        assert service.ask(method, "/v1/conversations/export")[0] == 405
    id = new_id()
    put(service, id.upper(), chat("one", "x"))
    assert get(service, f"/{id}")[1]["id"] == id
    status, answer = get(service, f"?after={new_id()}")
    assert (status, answer["error"]["param"]) == (404, "after")
    assert get(service, f"/{new_id()}")[0] == 404


# ---------------------------------------------------------------------------------------- search


def test_search(service: Service) -> None:
    store_all(
        service,
        chat("天气", "明天北京会下雨吗？", "可能会，带上雨伞。"),
        chat("Straße", "The Quick brown FOX", "jumps 100% over_it"),
        chat("full width", "ＨＥＬＬＯ　ｗｏｒｌｄ", "a\u0000bc"),
    )
    for query, expected in (
        ("雨", ["天气"]),
        ("天", ["天气"]),
        ("京会下", ["天气"]),
        ("quick BROWN", ["Straße"]),
        ("STRASSE", ["Straße"]),
        ("hello world", ["full width"]),
        ("Ｑｕｉｃｋ", ["Straße"]),
        ("100%", ["Straße"]),
        ("%", ["Straße"]),
        ("_", ["Straße"]),
        ("100_", []),
        ("quick%fox", []),
        ("*", []),
        ('"', []),
        ("伞。明", []),  # not across two messages
        ("b", ["full width", "Straße"]),
        ("bc", ["full width"]),
    ):
        assert titles(service, f"q={quote(query)}") == expected, query


def test_snippet(service: Service) -> None:
    before, after = "甲" * 100, "乙" * 100
    store_all(service, chat("雨伞", f"{before}雨  \n 伞{after}", "雨伞"), chat("没有雨", "x"))
    title, message = get(service, "?q=%E9%9B%A8")[1]["data"]
    assert title["snippet"] == "没有雨"
    assert message["snippet"] == f"…{'甲' * 40}雨 伞{'乙' * 35}…"
    assert "snippet" not in get(service, "")[1]["data"][0]


@settings(deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=3))
def test_every_substring_is_in_its_snippet(text: str, part: str) -> None:
    for at in range(len(text)):
        needle = folded(text[at : at + 3])
        assert needle in folded(text)
        snippet = _snippet(text, needle)
        assert folded(" ".join(text[at : at + 3].split())) in folded(snippet)
    assert folded(text + part) == folded(text) + folded(part)


def test_pagination(service: Service, database: Path) -> None:
    ids = store_all(service, *(chat(f"t{i}", "x") for i in range(7)))
    # With equal times, and one in the past.
    with sqlite3.connect(database) as db:
        db.execute("UPDATE conversations SET updated = 5 WHERE id = ?", (ids[6],))
    db.close()
    expected = [ids[i] for i in (5, 4, 3, 2, 1, 0, 6)]
    found: list[str] = []
    after = ""
    while True:
        page = get(service, f"?limit=3{after}")[1]
        found += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={found[-1]}"
    assert found == expected
    assert get(service, f"?q=t&limit=2&after={ids[3]}")[1]["data"][0]["id"] == ids[2]
    put(service, ids[0], chat("t0", "y"))
    assert get(service, "?limit=1")[1]["data"][0]["id"] == ids[0]


# ------------------------------------------------------------------------------- export and import


def lines(service: Service) -> list[dict[str, Any]]:
    status, text = service.text("/v1/conversations/export")
    assert status == 200
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_export_and_import(service: Service, tiny: Path, tmp_path: Path) -> None:
    store_all(service, chat("一", "甲\u2028乙", "丙"), chat("two", "x", system="s"))
    exported = lines(service)
    assert [each["title"] for each in exported] == ["一", "two"]
    other = ConversationStore(tmp_path / "other.db")
    with served(tiny, routers=[conversation_routes(other)]) as second:
        for _ in range(2):  # the second one replaces
            body = json.dumps({"conversations": exported})
            status, _, answer = second.ask("POST", "/v1/conversations/import", body)
            assert (status, answer["imported"]) == (200, 2)
        again = [{**each, "revision": 1} for each in lines(second)]
        assert again == exported
        assert [each["revision"] for each in lines(second)] == [2, 2]
        assert titles(second, "q=%E7%94%B2") == ["一"]


def test_import_is_atomic(service: Service) -> None:
    store_all(service, chat("here", "x"))
    good = {"id": new_id(), **chat("good", "x")}
    bad = {"id": new_id(), **chat("bad", "x")}
    bad["nodes"][0]["parent"] = new_id()
    body = json.dumps({"conversations": [good, bad]})
    status, _, answer = service.ask("POST", "/v1/conversations/import", body)
    assert status == 400 and answer["error"]["param"] == "conversations.1.nodes.0.parent"
    assert [each["title"] for each in lines(service)] == ["here"]


def test_failed_import_is_rolled_back(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "c.db")
    entries = [Entry(new_id(), "t", {"nodes": [{"content": "x"}]}) for _ in range(3)]
    entries[2].body["nodes"][0]["content"] = "\ud800"  # invalid as text in SQLite
    with pytest.raises(UnicodeEncodeError):
        store.put_all(entries)
    assert store.ids() == []
    store.put_all(entries[:2])
    assert len(store.ids()) == 2
    store.close()


# ------------------------------------------------------------------------------------------ file


def test_refuses_unusable_file(tmp_path: Path) -> None:
    path = tmp_path / "conversations.db"
    ConversationStore(path).close()
    ConversationStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(
        DataError, match=f"version {VERSION + 1}, this program supports {VERSION}"
    ) as newer:
        ConversationStore(path)
    assert newer.value.hint is not None and "upgrade" in newer.value.hint
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="cannot be used"):
        ConversationStore(path)
    with pytest.raises(DataError, match="cannot be used"):
        ConversationStore(tmp_path / "nowhere" / "c.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    with pytest.raises(DataError, match="layout version 0"):
        ConversationStore(tmp_path / "other.db")


def test_full_disk(tiny: Path, tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "c.db")
    with served(tiny, routers=[conversation_routes(store)]) as service:
        ids = store_all(service, chat("before", "x"))
        store._writer.execute("PRAGMA max_page_count = 40")
        status, answer = put(service, ids[0], chat("large", "x" * 500_000))
        assert (status, answer["error"]["message"]) == (507, "the disk is full")
        assert get(service, f"/{ids[0]}")[1]["title"] == "before"
        store._writer.execute("PRAGMA max_page_count = 100000")
        assert put(service, ids[0], chat("large", "x" * 500_000))[0] == 200


def test_file_locked_by_another_program(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khaosz.serve.records.conversation_store._BUSY_S", 0.1)
    path = tmp_path / "c.db"
    store = ConversationStore(path)
    with served(tiny, routers=[conversation_routes(store)]) as service:
        (id,) = store_all(service, chat("before", "x"))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for method, body in (("PUT", json.dumps(chat("after", "x"))), ("DELETE", None)):
                status, headers, answer = service.ask(method, f"/v1/conversations/{id}", body)
                assert (status, answer["error"]["code"]) == (503, "file_busy")
                assert "another program is writing to c.db" in answer["error"]["message"]
                assert int(headers["retry-after"]) >= 1
            assert get(service, f"/{id}")[1]["title"] == "before"
            with pytest.raises(DataError, match="in use by another process"):
                ConversationStore(path)
        assert put(service, id, chat("after", "x"))[0] == 200


def test_concurrent_writes(service: Service) -> None:
    ids = [new_id() for _ in range(4)]
    wrong: list[Any] = []

    def work(number: int) -> None:
        for i in range(15):
            id = ids[(number + i) % 4]
            for status, answer in (
                put(service, id, chat(f"{number} {i}", "雨" * 50, "x")),
                get(service, f"/{id}"),
                get(service, "?q=%E9%9B%A8%E9%9B%A8"),
            ):
                if status != 200:
                    wrong.append(answer)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(get(service, f"/{id}")[1]["revision"] for id in ids) == 8 * 15


# ----------------------------------------------------------------------------------------- kills


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_answered_writes_survive_kills(tmp_path: Path, kills: int) -> None:
    """The server is killed during PUTs from four clients, repeatedly. Answered writes are there;
    unanswered ones are complete or absent."""
    random_ = random.Random(0)
    answered: dict[str, int] = {}  # id -> the highest number answered with 200
    program = [sys.executable, str(Path(__file__).with_name("killed_server.py"))]
    with subprocess.Popen(
        [*program, str(tmp_path / "c.db")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as servers:
        assert servers.stdin is not None and servers.stdout is not None
        for round_ in range(kills + 1):
            servers.stdin.write("another\n")
            servers.stdin.flush()
            port, process = map(int, servers.stdout.readline().split())
            ids = list(answered)
            # All of them at the end, else those of the round before.
            check_all(port, {id: answered[id] for id in (ids if round_ == kills else ids[-4:])})
            threads = [
                threading.Thread(target=storm, args=(port, answered, f"{i:08x}-{new_id()[9:]}"))
                for i in range(4)
            ]
            for thread in threads:
                thread.start()
            threads[0].join(random_.uniform(0.01, 0.3))
            os.kill(process, signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert servers.stdout.readline() == "gone\n"
        servers.stdin.close()
    assert len(answered) > kills / 2 and max(answered.values()) > 3, answered


def written(id: str, number: int) -> dict[str, Any]:
    """The conversation of its `number`-th PUT; some are large."""
    text = f"{number} " * (40_000 if number % 5 == 4 else 300)
    body = chat(f"{id} {number}", text, text)
    for i, each in enumerate(body["nodes"]):
        each["id"] = f"{i:08x}{id[8:]}"
    body["nodes"][1]["parent"] = body["nodes"][0]["id"]
    return body


def storm(port: int, answered: dict[str, int], id: str) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        for number in range(10_000):
            body = json.dumps(written(id, number))
            kind = {"Content-Type": "application/json"}
            connection.request("PUT", f"/v1/conversations/{id}", body, kind)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            answered[id] = number
    except (OSError, HTTPException):
        return  # the kill
    finally:
        connection.close()


def check_all(port: int, answered: dict[str, int]) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/v1/conversations?limit=1")  # waits until the server runs
    connection.getresponse().read()
    for id, number in answered.items():
        connection.request("GET", f"/v1/conversations/{id}")
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert answer.status == 200, body
        stored = int(body["title"].split()[1])
        assert stored in (number, number + 1)
        expected = written(id, stored)["nodes"]
        assert [(n["id"], n["parent"], n["content"]) for n in body["nodes"]] == [
            (n["id"], n["parent"], n["content"]) for n in expected
        ]
    connection.close()
