"""Answers drawn by the server to be ranked blind, of its own models and of other servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from serving import Service, served, wait_until

from khaosz.data.records.preference import to_pairs
from khaosz.errors import ConfigError, DataError
from khaosz.serve.records import drawn_answers
from khaosz.serve.records.drawn_answers import DrawnFile, Peer, answer_routes, named_peers
from khaosz.serve.records.preferences import PreferenceFile, preference_routes

PROMPT = [{"role": "user", "content": "fox"}]
NAMES = ["tiny", "elsewhere", "gone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def server(tiny: Path, folder: Path) -> Iterator[Service]:
    """`far` of another server is `elsewhere` here; nothing listens at `gone`."""
    preferences, drawn = PreferenceFile(folder / "p.jsonl"), DrawnFile(folder / "a.jsonl")
    with served(f"far={tiny}") as other:
        url = f"http://127.0.0.1:{other.port}/v1"
        peers = [Peer("elsewhere", url, "far"), Peer("gone", "http://127.0.0.1:9/v1", "x")]
        routers: list[Any] = [
            preference_routes(preferences, [peer.name for peer in peers]),
            partial(answer_routes, preferences, drawn, peers),
        ]
        with served(tiny, routers=routers) as running:
            yield running


def draw(service: Service, **more: Any) -> dict[str, Any]:
    body = {"messages": PROMPT, "models": NAMES, "n": 2, "sampling": {"max_tokens": 8}, **more}
    while True:
        status, _, answer = service.ask("POST", "/v1/preferences/answers", json.dumps(body))
        assert status == 200, answer
        if answer["done"]:
            return dict(answer)
        time.sleep(0.02)


def rank(service: Service, id: str, ranked: list[Any], **more: Any) -> tuple[int, Any]:
    path = f"/v1/preferences/answers/{id}/ranking"
    status, _, answer = service.ask("POST", path, json.dumps({"ranked": ranked, **more}))
    return status, answer


def test_annotators_rank_the_same_answers_blind(server: Service, folder: Path) -> None:
    assert server.ask("GET", "/v1/preferences")[2]["peers"] == ["elsewhere", "gone"]
    mine = draw(server, annotator="ann")
    theirs = draw(server, annotator="李", models=NAMES[::-1])
    assert (mine["ready"], mine["total"], mine["id"]) == (4, 6, theirs["id"])
    ids = [answer["id"] for answer in mine["answers"]]
    assert {*ids} == {answer["id"] for answer in theirs["answers"]}
    # Neither model nor number of an answer is in what the client gets; what failed is a line.
    [problem] = mine["problems"]
    assert problem.startswith("gone: ") and "refused" in problem and "http" not in problem
    assert not any(name in json.dumps(mine["answers"]) for name in ("tiny", "elsewhere", "far"))

    status, answer = rank(server, mine["id"], [ids[0], ids[1:]], annotator="ann")
    assert (status, answer["count"], answer["pairs"]) == (201, 1, len(ids) - 1), answer
    [record] = map(json.loads, (folder / "p.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["prompt"] == PROMPT and record["annotator"] == "ann" and to_pairs(record)
    assert record["answers"] == [each["text"] for each in mine["answers"]]
    stored = json.loads((folder / "a.jsonl").read_text(encoding="utf-8").splitlines()[0])
    models = {each["id"]: each["sources"] for each in stored["answers"]}
    assert record["sources"] == [models[id] for id in ids]
    assert {each["model"] for same in record["sources"] for each in same} == {*NAMES[:2]}
    # A model here and the same one elsewhere: each writes what its recorded seed gives.
    for text, same in zip(record["answers"], record["sources"], strict=True):
        for source in same:
            if source["model"] != "elsewhere":
                continue
            body = {"model": "tiny", "messages": PROMPT, **source["sampling"]}
            again = server.ask("POST", "/v1/chat/completions", json.dumps(body))[2]
            assert again["choices"][0]["message"]["content"] == text

    for wrong in ([ids[0], ids[1]], [ids[0], [*ids]], [[*ids], "0" * 16]):
        assert rank(server, mine["id"], wrong)[0] == 400
    assert rank(server, "0" * 32, ids)[0] == 404
    prompts = [PROMPT, [{"role": "user", "content": "other"}]]
    for annotator, ranked in (("ann", [True, False]), ("李", [False, False])):
        body = json.dumps({"prompts": prompts, "annotator": annotator})
        shown = server.ask("POST", "/v1/preferences/ranked", body)[2]
        assert shown == {"object": "preferences.ranked", "ranked": ranked}


def test_answers_are_kept_after_a_restart(server: Service, folder: Path, tiny: Path) -> None:
    before = draw(server, annotator="ann")
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"prompt": [{"role"')  # killed while it wrote
    drawn = DrawnFile(folder / "a.jsonl")
    # The peers are gone, and so are their answers if they have to be drawn again.
    preferences = PreferenceFile(folder / "p2.jsonl")
    peers = [Peer(name, "http://127.0.0.1:9/v1", "x") for name in NAMES[1:]]
    routers: list[Any] = [partial(answer_routes, preferences, drawn, peers)]
    with served(tiny, routers=routers) as again:
        assert draw(again, annotator="ann") == before
        other = draw(again, seed=1)
        assert other["id"] != before["id"] and len(other["problems"]) == 2


def test_refuses_unusable_requests(server: Service, tmp_path: Path) -> None:
    for wrong, status in (
        ({"models": ["absent", "tiny"]}, 404),
        ({"models": ["tiny", "tiny"]}, 400),
        ({"models": ["tiny"], "n": 1}, 400),
        ({"n": 26}, 400),
        ({"messages": [{"role": "system", "content": "x"}]}, 400),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400),
    ):
        body = json.dumps({"messages": PROMPT, "models": NAMES, **wrong})
        assert server.ask("POST", "/v1/preferences/answers", body)[0] == status, wrong
    for peer in ("x", "x=y", "=http://h/v1#m", "x=http://#m"):
        with pytest.raises(ConfigError):
            named_peers([peer])
    with pytest.raises(ConfigError, match="two peers"):
        named_peers(["a=http://h/v1#m", "a=http://h/v1#n"])
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        DrawnFile(tmp_path / "a.jsonl")


def test_stops_a_draw_without_requests(
    server: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_answers, "ABANDONED", 0.0)
    stored = (folder / "a.jsonl").read_bytes() if (folder / "a.jsonl").exists() else b""
    body = {"messages": PROMPT, "models": ["tiny"], "n": 4, "sampling": {"max_tokens": 1900}}
    status, _, answer = server.ask("POST", "/v1/preferences/answers", json.dumps(body))
    assert status == 200 and not answer["done"]
    loaded = server.models.find("tiny").loaded
    assert loaded is not None
    wait_until(lambda: loaded.worker.open_requests > 0)
    wait_until(lambda: loaded.worker.open_requests == 0)
    path = folder / "a.jsonl"
    assert (path.read_bytes() if path.exists() else b"") == stored
