"""Answers that belong to the server: generated without a client, stored as they grow, read from an
offset, stopped, continued, and still there after kills."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from knowledge_helpers import KnowledgeClient
from serving import Service, served, slowed, wait_until

from khaosz.serve.app import record_routes
from khaosz.serve.generations.routes import generation_routes
from khaosz.serve.knowledge.library import MAX_UPLOAD, Library
from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import conversation_routes
from khaosz.serve.retrieval_models import RetrievalModels

ENDLESS = {"model": "tiny", "temperature": 0, "max_tokens": 1900}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generations")


@pytest.fixture(scope="module")
def place(taught: Path, tiny: Path, folder: Path) -> Iterator[Service]:
    with served(taught, tiny, routers=record_routes(folder, folder / "runs")) as running:
        slowed(running, "tiny")
        yield running


def new_id() -> str:
    return str(uuid.uuid4())


def call(
    service: Service, method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[int, Any]:
    sent = None if body is None else json.dumps(body)
    status, _, answer = service.ask(method, f"/v1{path}", sent)
    return status, answer


def conversation(service: Service, text: str = "plain") -> tuple[str, str]:
    """A new conversation of one question; its id, and the question's."""
    id, question = new_id(), new_id()
    node = {"id": question, "parent": None, "role": "user", "content": text, "created": 1}
    body = {"title": text, "nodes": [node], "selected": question}
    assert call(service, "PUT", f"/conversations/{id}", body)[0] == 200
    return id, question


def begin(service: Service, text: str = "plain", **more: Any) -> tuple[str, str]:
    """Start an answer in a new conversation; the ids of both."""
    id, question = conversation(service, text)
    body = {"parent": question, "messages": [{"role": "user", "content": text}]}
    status, answer = call(
        service, "POST", f"/conversations/{id}/generations", {"model": "taught", **body, **more}
    )
    assert status == 201, answer
    assert answer["state"] in ("queued", "running"), answer
    return id, answer["id"]


def read(service: Service, id: str) -> dict[str, Any]:
    status, answer = call(service, "GET", f"/generations/{id}")
    assert status == 200, answer
    return dict(answer)


def ended(service: Service, id: str) -> dict[str, Any]:
    wait_until(lambda: read(service, id)["state"] not in ("queued", "running"), 30)
    return read(service, id)


def grown(service: Service, id: str, length: int = 5) -> dict[str, Any]:
    wait_until(lambda: read(service, id)["length"] >= length, 30)
    return read(service, id)


def stop(service: Service, id: str) -> dict[str, Any]:
    status, answer = call(service, "POST", f"/generations/{id}/stop")
    assert status == 200, answer
    return dict(answer)


def stored_node(service: Service, conversation: str, id: str) -> dict[str, Any]:
    nodes = call(service, "GET", f"/conversations/{conversation}")[1]["nodes"]
    return next(each for each in nodes if each["id"] == id)


class Stream:
    """The events of a generation, as a client gets them."""

    def __init__(self, service: Service, id: str, query: str = "", **headers: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
        self._connection.request("GET", f"/v1/generations/{id}?stream=true{query}", headers=headers)
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200, self._answer.read()
        self.last_id = ""

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Leaves when they end, or when the caller does."""
        try:
            for line in self._answer:
                if line.startswith(b"id: "):
                    self.last_id = line[4:].decode().strip()
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])
        finally:
            self._answer.close()
            self._connection.close()

    def text(self, length: int = 1 << 30) -> str:
        """Of the whole stream, or at least so many characters."""
        text = ""
        for chunk in self.chunks():
            for choice in chunk.get("choices", ()):
                delta = choice["delta"]
                text += delta.get("reasoning_content", "") + delta.get("content", "")
            if len(text) >= length:
                break
        return text


def test_answer_completes_without_a_client(place: Service) -> None:
    id, answer = begin(place, "think")
    whole = ended(place, answer)
    assert (whole["state"], whole["finish_reason"]) == ("complete", "stop")
    assert (whole["reasoning"], whole["content"]) == ("一 + 一", "二")
    assert whole["usage"]["completion_tokens"] > 3 and whole["timings"]["wait_seconds"] > 0
    assert not whole["can_continue"]
    node = stored_node(place, id, answer)
    assert (node["content"], node["reasoning"], node["finish_reason"]) == ("二", "一 + 一", "stop")
    assert node["model"] == "taught"
    found = call(place, "GET", "/conversations?q=%E4%BA%8C")[1]["data"]
    assert id in [each["id"] for each in found]  # the answer is searched


def test_reads_from_an_offset(place: Service) -> None:
    _, answer = begin(place, "think")
    whole = ended(place, answer)
    text = whole["reasoning"] + whole["content"]
    for offset in range(len(text) + 1):
        part = call(place, "GET", f"/generations/{answer}?offset={offset}")[1]
        assert part["reasoning"] + part["content"] == text[offset:]
        assert Stream(place, answer, f"&offset={offset}").text() == text[offset:]
        assert Stream(place, answer, **{"Last-Event-ID": str(offset)}).text() == text[offset:]
    for query in ("", "&stream=true"):
        status, error = call(place, "GET", f"/generations/{answer}?offset=99{query}")
        assert (status, error["error"]["code"]) == (400, "offset_out_of_range")
    first, *_, last = Stream(place, answer).chunks()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"] == whole["usage"] and last["timings"] == whole["timings"]


def test_readers_see_the_same_answer_as_it_grows(place: Service) -> None:
    """One reads from the start, one joins late, one leaves and returns where it was."""
    _, answer = begin(place, "x", **{**ENDLESS, "max_tokens": 300})
    first, leaving = Stream(place, answer), Stream(place, answer)
    part = leaving.text(20)
    assert len(part) < read(place, answer)["length"] + 1
    grown(place, answer, 60)
    late = Stream(place, answer)
    returned = Stream(place, answer, **{"Last-Event-ID": leaving.last_id})
    texts = [first.text(), late.text(), part + returned.text()]
    whole = read(place, answer)
    assert whole["state"] == "complete" and whole["finish_reason"] == "length"
    assert texts == [whole["content"]] * 3


def test_answer_continues_when_its_reader_leaves(place: Service) -> None:
    id, answer = begin(place, "x", **{**ENDLESS, "max_tokens": 200})
    reader = Stream(place, answer)
    reader.text(5)
    whole = ended(place, answer)
    assert whole["usage"]["completion_tokens"] == 200
    assert stored_node(place, id, answer)["content"] == whole["content"]


def test_stop_keeps_the_text(place: Service) -> None:
    id, answer = begin(place, "x", **ENDLESS)
    grown(place, answer)
    stopped = stop(place, answer)
    assert (stopped["state"], stopped["finish_reason"]) == ("stopped", "stopped")
    assert stopped["length"] == len(stopped["content"]) >= 5
    assert stored_node(place, id, answer)["content"] == stopped["content"]
    assert stored_node(place, id, answer)["finish_reason"] == "stopped"
    assert engine_is_idle(place)
    assert stop(place, answer) == stopped
    assert Stream(place, answer).text() == stopped["content"]


def engine_is_idle(service: Service) -> bool:
    loaded = service.models.find("tiny").loaded
    assert loaded is not None
    return loaded.worker.open_requests == 0


@pytest.mark.parametrize("what", ["conversation", "message"])
def test_deletion_ends_a_growing_answer(place: Service, what: str) -> None:
    id, answer = begin(place, "x", **ENDLESS)
    grown(place, answer)
    reader = Stream(place, answer)
    if what == "conversation":
        assert call(place, "DELETE", f"/conversations/{id}")[0] == 200
    else:
        body = {"title": "x", "nodes": []}
        assert call(place, "PUT", f"/conversations/{id}", body)[0] == 200
    wait_until(lambda: engine_is_idle(place))
    *_, last = reader.chunks()
    assert last["error"]["code"] == "generation_deleted"
    for method, path in (("GET", ""), ("POST", "/stop"), ("POST", "/continue")):
        assert call(place, method, f"/generations/{answer}{path}")[0] == 404
    status, left = call(place, "GET", f"/conversations/{id}")
    assert status == 404 if what == "conversation" else left["nodes"] == []


def test_deletion_of_a_conversation_deletes_its_answers(place: Service, folder: Path) -> None:
    id, answer = begin(place)
    ended(place, answer)
    assert call(place, "DELETE", f"/conversations/{id}")[0] == 200
    assert call(place, "GET", f"/generations/{answer}")[0] == 404
    assert call(place, "GET", f"/conversations/{id}/generations")[0] == 404
    with closing(sqlite3.connect(folder / "conversations.db")) as db:
        query = "SELECT count(*) FROM generation_parts WHERE generation = ?"
        assert db.execute(query, (answer,)).fetchone() == (0,)


def test_saving_a_conversation_keeps_its_answers(place: Service) -> None:
    """Also while one grows: the end is written into the newest revision."""
    id, answer = begin(place, "x", **{**ENDLESS, "max_tokens": 150})
    before = call(place, "GET", f"/conversations/{id}")[1]
    nodes = [{**each, "finish_reason": None} for each in before["nodes"]]
    body = {"title": "renamed", "nodes": nodes, "revision": before["revision"]}
    assert call(place, "PUT", f"/conversations/{id}", body)[0] == 200
    whole = ended(place, answer)
    after = call(place, "GET", f"/conversations/{id}")[1]
    assert after["title"] == "renamed"
    assert after["nodes"][1]["content"] == whole["content"] != ""
    # What a client saves that has not seen the end does not replace it.
    assert call(place, "PUT", f"/conversations/{id}", {**body, "revision": 3})[0] == 409


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("text", ["plain", "think"])
def test_continue_at_the_token_limit(place: Service, text: str, tokens: int) -> None:
    """In the reasoning too; a continued stream starts after the last character."""
    id, answer = begin(place, text, max_tokens=tokens)
    part = ended(place, answer)
    for _ in range(20):
        if part["finish_reason"] != "length":
            break
        assert part["can_continue"]
        assert stored_node(place, id, answer)["finish_reason"] == "length"
        assert call(place, "POST", f"/generations/{answer}/continue")[0] == 200
        rest = Stream(place, answer, f"&offset={part['length']}").text()
        before, part = part, ended(place, answer)
        texts = [each["reasoning"] + each["content"] for each in (before, part)]
        assert texts[0] + rest == texts[1]
        assert part["usage"]["completion_tokens"] > before["usage"]["completion_tokens"]
    expected = ("一 + 一", "二") if text == "think" else ("", "the fox")
    assert (part["reasoning"], part["content"]) == expected
    assert (part["state"], part["finish_reason"]) == ("complete", "stop")
    node = stored_node(place, id, answer)
    assert (node["content"], node["finish_reason"]) == (expected[1], "stop")


def test_continue_a_stopped_answer(place: Service) -> None:
    id, answer = begin(place, "x", **ENDLESS)
    grown(place, answer)
    part = stop(place, answer)
    status, again = call(place, "POST", f"/generations/{answer}/continue")
    assert status == 200 and again["state"] == "queued" and again["finish_reason"] is None
    status, error = call(place, "POST", f"/generations/{answer}/continue")
    assert (status, error["error"]["code"]) == (409, "generation_running")
    grown(place, answer, part["length"] + 5)
    whole = stop(place, answer)
    assert whole["content"].startswith(part["content"])
    assert stored_node(place, id, answer)["content"] == whole["content"]


def test_what_cannot_be_continued(place: Service) -> None:
    _, complete = begin(place)
    ended(place, complete)
    _, formatted = begin(place, max_tokens=2, response_format={"type": "json_object"})
    assert ended(place, formatted)["finish_reason"] == "length"
    for answer in (complete, formatted):
        assert not read(place, answer)["can_continue"]
        status, error = call(place, "POST", f"/generations/{answer}/continue")
        assert (status, error["error"]["code"]) == (409, "generation_complete")


def test_several_chats_answer_at_once(place: Service) -> None:
    texts = ["plain", "think", "plain", "think", "plain"]
    started = [begin(place, text) for text in texts]
    endless = begin(place, "x", **ENDLESS)
    for text, (id, answer) in zip(texts, started, strict=True):
        assert ended(place, answer)["content"] == ("二" if text == "think" else "the fox")
        assert stored_node(place, id, answer)["finish_reason"] == "stop"
    assert read(place, endless[1])["state"] in ("queued", "running")
    stop(place, endless[1])


def test_two_answers_to_one_conversation(place: Service) -> None:
    """Of two windows, to two questions: neither is lost."""
    id, question = conversation(place, "plain")
    other = {**stored_node(place, id, question), "id": new_id(), "content": "think"}
    nodes = [*call(place, "GET", f"/conversations/{id}")[1]["nodes"], other]
    assert call(place, "PUT", f"/conversations/{id}", {"title": "", "nodes": nodes})[0] == 200
    answers = []
    for parent, text in ((question, "plain"), (other["id"], "think")):
        body = {"model": "taught", "messages": [{"role": "user", "content": text}]}
        status, answer = call(
            place, "POST", f"/conversations/{id}/generations", {**body, "parent": parent}
        )
        assert status == 201
        answers.append(answer["id"])
    assert [ended(place, each)["content"] for each in answers] == ["the fox", "二"]
    contents = [each["content"] for each in call(place, "GET", f"/conversations/{id}")[1]["nodes"]]
    assert contents == ["plain", "think", "the fox", "二"]
    listed = call(place, "GET", f"/conversations/{id}/generations?limit=1")[1]
    assert [each["id"] for each in listed["data"]] == answers[1:] and listed["has_more"]
    path = f"/conversations/{id}/generations?limit=1&after={answers[1]}"
    listed = call(place, "GET", path)[1]
    assert [each["id"] for each in listed["data"]] == answers[:1] and not listed["has_more"]
    assert "content" not in listed["data"][0]


def test_refusals(place: Service) -> None:
    id, question = conversation(place)
    body = {
        "model": "taught", "parent": question, "message": new_id(),
        "messages": [{"role": "user", "content": "plain"}],
    }  # fmt: skip
    path = f"/conversations/{id}/generations"
    for change, status, param in (
        ({"parent": new_id()}, 404, "parent"),
        ({"parent": "x"}, 400, "parent"),
        ({"message": question}, 409, "message"),
        ({"model": "other"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"temperature": 9}, 400, "temperature"),
        ({"more": 1}, 400, "more"),
    ):
        found, error = call(place, "POST", path, {**body, **change})
        assert (found, error["error"]["param"]) == (status, param), error
    assert call(place, "POST", f"/conversations/{new_id()}/generations", body)[0] == 404
    assert call(place, "POST", path, body)[0] == 201
    status, error = call(place, "POST", path, body)
    assert (status, error["error"]["code"]) == (409, "generation_exists")
    assert len(call(place, "GET", f"/conversations/{id}")[1]["nodes"]) == 2
    for wrong in ("?limit=0", "?limit=101", "?after=x", "?more=1"):
        assert call(place, "GET", path + wrong)[0] == 400, wrong
    assert call(place, "GET", f"{path}?after={new_id()}")[0] == 404
    for wrong in ("?offset=-1", "?stream=x", "?more=1"):
        assert call(place, "GET", f"/generations/{body['message']}{wrong}")[0] == 400, wrong


def test_error_ends_an_answer(place: Service) -> None:
    """It is found after the request was accepted."""
    id, answer = begin(place, "plain", messages=[{"role": "user", "content": "春 " * 3000}])
    whole = ended(place, answer)
    assert (whole["state"], whole["finish_reason"]) == ("failed", "error")
    assert whole["error"]["code"] == "context_length_exceeded"
    *_, last = Stream(place, answer).chunks()
    assert last["error"]["code"] == "context_length_exceeded"
    assert stored_node(place, id, answer)["finish_reason"] == "error"


def test_size_of_an_answer_is_limited(place: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("khaosz.serve.generations.growing.MAX_BYTES", 101)
    id, answer = begin(place, "x", **ENDLESS)
    whole = ended(place, answer)
    assert (whole["state"], whole["finish_reason"]) == ("complete", "size_limit")
    assert 97 < len(whole["content"].encode()) <= 101  # a character has at most four bytes
    assert not whole["can_continue"]
    node = stored_node(place, id, answer)
    assert (node["content"], node["finish_reason"]) == (whole["content"], "size_limit")
    assert engine_is_idle(place)


def test_number_of_growing_answers_is_limited(
    place: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khaosz.serve.generations.growing.MAX_RUNNING", 1)
    _, answer = begin(place, "x", **ENDLESS)
    id, question = conversation(place)
    body = {"model": "taught", "messages": [{"role": "user", "content": "x"}], "parent": question}
    status, error = call(place, "POST", f"/conversations/{id}/generations", body)
    assert (status, error["error"]["code"]) == (503, "queue_full")
    assert len(call(place, "GET", f"/conversations/{id}")[1]["nodes"]) == 1
    stop(place, answer)
    assert call(place, "POST", f"/conversations/{id}/generations", body)[0] == 201


def test_key_is_required(tiny: Path, tmp_path: Path) -> None:
    with served(tiny, routers=record_routes(tmp_path, tmp_path / "runs"), key="k") as service:
        path = f"/conversations/{new_id()}/generations"
        for method, each in (
            ("GET", path), ("POST", path), ("GET", f"/generations/{new_id()}"),
            ("POST", f"/generations/{new_id()}/stop"),
            ("POST", f"/generations/{new_id()}/continue"),
        ):  # fmt: skip
            assert call(service, method, each)[0] == 401


def stored_length(data: Path, id: str) -> int:
    with closing(sqlite3.connect(data / "conversations.db")) as db:
        query = "SELECT sum(length(content)) FROM generation_parts WHERE generation = ?"
        return int(db.execute(query, (id,)).fetchone()[0] or 0)


def test_interrupted_by_a_kill_and_continued(
    fork_server: ForkServer, tiny: Path, tmp_path: Path
) -> None:
    with fork_server.khaosz(tiny, "--data", tmp_path) as server:
        service = Service(server.port, None)  # type: ignore[arg-type]
        id, answer = begin(service, "x", **ENDLESS)
        reader = Stream(service, answer)
        wait_until(lambda: stored_length(tmp_path, answer) > 0)
        server.kill()
    stored = stored_length(tmp_path, answer)
    with fork_server.khaosz(tiny, "--data", tmp_path) as server:
        service = Service(server.port, None)  # type: ignore[arg-type]
        part = read(service, answer)
        assert (part["state"], part["finish_reason"]) == ("interrupted", "interrupted")
        assert part["length"] == stored and part["can_continue"]
        assert part["usage"]["completion_tokens"] > 0
        assert reader.text().startswith(part["content"])
        node = stored_node(service, id, answer)
        assert (node["content"], node["finish_reason"]) == (part["content"], "interrupted")
        assert call(service, "POST", f"/generations/{answer}/continue")[0] == 200
        grown(service, answer, stored + 5)
        whole = stop(service, answer)
        assert whole["content"].startswith(part["content"])
        assert stored_node(service, id, answer)["content"] == whole["content"]


def test_growing_answers_are_interrupted_when_the_server_stops(tiny: Path, tmp_path: Path) -> None:
    with served(tiny, routers=record_routes(tmp_path, tmp_path / "runs")) as service:
        slowed(service, "tiny")
        id, answer = begin(service, "x", **ENDLESS)
        part = grown(service, answer)
    with served(tiny, routers=record_routes(tmp_path, tmp_path / "runs")) as service:
        whole = read(service, answer)
        assert whole["state"] == "interrupted" and whole["can_continue"]
        assert whole["content"].startswith(part["content"])
        assert stored_node(service, id, answer)["content"] == whole["content"]


def test_full_disk_keeps_the_answer_in_memory(tiny: Path, tmp_path: Path) -> None:
    """And it is stored when there is space again."""
    store = ConversationStore(tmp_path / "c.db")
    routers = [conversation_routes(store), partial(generation_routes, store)]
    with served(tiny, routers=routers) as service:
        id, answer = begin(service, "x", **{**ENDLESS, "max_tokens": 1})
        ended(service, answer)
        id, question = conversation(service, "x" * 400)
        pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
        body = {"messages": [{"role": "user", "content": "x"}], "parent": question, **ENDLESS}
        status, answer = call(service, "POST", f"/conversations/{id}/generations", body)
        assert status == 201
        store._writer.execute(f"PRAGMA max_page_count = {pages}")
        whole = ended(service, answer["id"])
        assert whole["finish_reason"] == "length" and len(whole["content"]) > 1000
        assert stored_node(service, id, answer["id"])["content"] == ""
        store._writer.execute("PRAGMA max_page_count = 100000")
        wait_until(lambda: stored_node(service, id, answer["id"])["content"] == whole["content"])
        assert read(service, answer["id"]) == whole


def test_continued_answer_keeps_its_passages(tiny: Path, tmp_path: Path) -> None:
    """Also when its documents are gone: the numbers in its text are those of its passages."""
    library = Library(tmp_path, RetrievalModels(), max_upload=MAX_UPLOAD)
    routers = record_routes(tmp_path, tmp_path / "runs")
    with served(tiny, library=library, routers=routers) as service:
        client = KnowledgeClient(service)
        client.create("notes")
        client.create("empty")
        client.ready("notes", client.upload("notes", "fox.txt", b"The quick brown fox is here."))
        more = {"model": "tiny", "temperature": 0, "max_tokens": 4, "knowledge_base": "notes"}
        id, answer = begin(service, "Where is the quick brown fox?", **more)
        part = ended(service, answer)
        assert part["finish_reason"] == "length", part["error"]
        assert part["retrieval"]["found"] and part["retrieval"]["knowledge_base"] == "notes"
        assert client.ask("DELETE", "/notes")[0] == 200
        assert call(service, "POST", f"/generations/{answer}/continue")[0] == 200
        whole = ended(service, answer)
        assert whole["finish_reason"] == "length" and whole["error"] is None
        assert whole["retrieval"] == part["retrieval"]
        assert whole["usage"]["prompt_tokens"] > part["usage"]["prompt_tokens"]
        _, refused = begin(service, "Where is the moon?", **{**more, "knowledge_base": "empty"})
        refusal = ended(service, refused)
        assert refusal["not_found"] and not whole["not_found"]
        *_, last = Stream(service, refused).chunks()
        assert last["choices"][0]["delta"]["not_found"]
        assert stored_node(service, id, answer)["retrieval"] == part["retrieval"]


VERSION_1 = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL,
    messages INTEGER NOT NULL, revision INTEGER NOT NULL, written INTEGER NOT NULL UNIQUE,
    body TEXT NOT NULL);
CREATE INDEX conversations_by_time ON conversations (updated, written);
CREATE TABLE texts (
    conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE, at INTEGER NOT NULL,
    folded TEXT NOT NULL, PRIMARY KEY (conversation, at)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


def test_reads_the_database_of_earlier_versions(tiny: Path, tmp_path: Path) -> None:
    id, question = new_id(), new_id()
    node = {"id": question, "parent": None, "role": "user", "content": "Fox", "created": 1}
    body = {"system": None, "settings": {}, "knowledge_base": None, "nodes": [node],
            "selected": question}  # fmt: skip
    with closing(sqlite3.connect(tmp_path / "conversations.db", isolation_level=None)) as db:
        db.executescript(VERSION_1)
        row = (id, "Fox", 1, 2, 1, 7, 1, json.dumps(body))
        db.execute("INSERT INTO conversations VALUES (?,?,?,?,?,?,?,?)", row)
        db.executemany("INSERT INTO texts VALUES (?,?,?)", [(id, 0, "fox"), (id, 1, "fox")])
    for _ in range(2):
        with served(tiny, routers=record_routes(tmp_path, tmp_path / "runs")) as service:
            found = call(service, "GET", f"/conversations/{id}")[1]
            assert found["nodes"][0] == node and found["revision"] >= 7
            assert call(service, "GET", "/conversations?q=fox")[1]["data"][0]["id"] == id
            sent = {"model": "tiny", "messages": [{"role": "user", "content": "x"}],
                    "max_tokens": 2, "parent": question}  # fmt: skip
            status, answer = call(service, "POST", f"/conversations/{id}/generations", sent)
            assert status == 201
            assert ended(service, answer["id"])["content"]
