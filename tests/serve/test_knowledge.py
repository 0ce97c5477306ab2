"""Knowledge bases over HTTP: created, filled, searched, read, deleted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from knowledge_helpers import KnowledgeClient, serve_knowledge

BIRDS = b"# Birds\n\nPenguins are birds that swim. They cannot fly.\n\nOwls hunt at night.\n"
CITIES = "# 城市\n\n北京是中国的首都，有故宫和长城。\n\n上海是最大的港口。\n".encode()


@pytest.fixture
def bases(tiny: Path, tmp_path: Path) -> Iterator[KnowledgeClient]:
    with serve_knowledge(tiny, tmp_path / "data") as running:
        yield running


def test_life_of_a_knowledge_base(bases: KnowledgeClient, tmp_path: Path) -> None:
    made = bases.create("笔记 1")
    assert made == {
        "id": "笔记 1", "object": "knowledge_base", "created": made["created"], "embedder": None,
        "files": 0, "chunks": 0, "embedded": 0, "bytes": 0, "error": None, "code": None,
    }  # fmt: skip
    sent = bases.upload("笔记 1", "鸟 birds.md", BIRDS)
    (birds,) = bases.ready("笔记 1", sent)
    assert birds == {
        "id": sent["id"], "object": "file", "name": "鸟 birds.md", "bytes": len(BIRDS),
        "sha256": hashlib.sha256(BIRDS).hexdigest(), "status": "ready", "error": None, "code": None,
        "chunks": 1, "embedded": 0, "created": sent["created"],
    }  # fmt: skip
    (cities,) = bases.ready("笔记 1", bases.upload("笔记 1", "城市.md", CITIES))
    assert bases.ask("GET", "/笔记 1/files")[1]["data"] == [birds, cities]
    counted = {"files": 2, "chunks": 2, "bytes": len(BIRDS + CITIES)}
    assert bases.ask("GET", "/笔记 1")[1] == {**made, **counted}
    assert bases.ask("GET")[1] == {"object": "list", "data": [{**made, **counted}]}

    (hit,) = bases.search("笔记 1", "中国的首都")
    assert (hit["number"], hit["doc"], hit["headings"]) == (1, "城市.md", ["城市"])
    assert hit["legs"]["lexical"]["rank"] == 1
    text = CITIES.decode()
    assert text[hit["start"] : hit["end"]] == hit["text"] and "故宫" in hit["text"]
    start = text.index("长城")
    place = f"/笔记 1/documents/{hit['hash']}?start={start}&end={start + 2}&around=3"
    assert bases.ask("GET", place)[1] == {
        "hash": hit["hash"], "doc": "城市.md", "length": len(text), "page": None, "start": start,
        "end": start + 2, "text_start": start - 3, "text": text[start - 3 : start + 5],
    }  # fmt: skip
    _, found = bases.ask("POST", "/笔记 1/search", json.dumps({"query": "故宫在哪里？"}))
    quote = found["quote"]
    assert text[quote["start"] : quote["end"]] == quote["text"] == quote["answer"]
    assert (quote["doc"], quote["number"], "故宫" in quote["text"]) == ("城市.md", 1, True)
    assert quote["text"] != hit["text"]
    _, found = bases.ask("POST", "/笔记 1/search", json.dumps({"query": "Who won the match?"}))
    assert found["quote"] is None
    assert bases.search("笔记 1", "penguins", name="城*") == []
    assert [hit["doc"] for hit in bases.search("笔记 1", "penguins", name="*.md")] == [
        "鸟 birds.md"
    ]

    deleted = {"id": cities["id"], "object": "file", "deleted": True}
    assert bases.ask("DELETE", f"/笔记 1/files/{cities['id']}") == (200, deleted)
    assert bases.search("笔记 1", "中国的首都") == []
    assert bases.ask("GET", f"/笔记 1/files/{cities['id']}")[0] == 404
    assert bases.ask("DELETE", "/笔记 1")[0] == 200
    assert bases.ask("GET", "/笔记 1")[0] == bases.ask("DELETE", "/笔记 1")[0] == 404
    assert [path for path in (tmp_path / "data/uploads").iterdir() if path.is_file()] == []
    assert list((tmp_path / "data/bases").iterdir()) == []
    bases.create("笔记 1")
    assert bases.search("笔记 1", "penguins") == []
