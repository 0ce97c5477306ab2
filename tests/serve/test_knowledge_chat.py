"""Chats with a knowledge base: passages in the prompt, citations in the answer, whole and
streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from knowledge_helpers import KnowledgeClient, serve_knowledge

from khaosz.data.tokenizer import load_tokenizer
from khaosz.inference.request import Output
from khaosz.rag.prompt import Prompt
from khaosz.rag.search.hit import Hit
from khaosz.serve.answering import Answer
from khaosz.serve.knowledge.grounding import RetrievalContext
from khaosz.serve.openai.completion_output import CompletionLayout
from khaosz.serve.prompts import ResponseFormat
from khaosz.serve.replies import ChatCompletion

PENGUINS = "Penguins live in the south.\n\n" + "企鹅住在南极，企鹅不会飞。\n"
ASKED = {"role": "user", "content": "Do penguins live in the south?"}
# The model is random, so a schema determines its answer.
OUTPUT = "They live there [1], [9] 【1，12】 and [not here]. [1"
CONTENT = "They live there [1],  [1] and [not here]. [1"


@pytest.fixture(scope="module")
def zoo(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeClient]:
    data = tmp_path_factory.mktemp("data")
    with serve_knowledge(
        tiny, data, embedders=[f"small={tiny}"], rerankers=[f"judge={tiny}"]
    ) as running:
        running.create("zoo")
        running.create("both", "small")
        for base in ("zoo", "both"):
            files = [
                running.upload(base, "企鹅.md", PENGUINS.encode()),
                running.upload(base, "whales.txt", b"The blue whale is the largest animal."),
            ]
            running.ready(base, *files)
        yield running


def chat(zoo: KnowledgeClient, *messages: dict[str, Any], **more: Any) -> tuple[int, Any]:
    body = {
        "model": "tiny", "knowledge_base": "zoo", "messages": messages or [ASKED],
        "max_tokens": 300, "temperature": 0, **more,
    }  # fmt: skip
    status, _, answer = zoo.service.ask("POST", "/v1/chat/completions", json.dumps(body))
    return status, answer


def constrained_to(text: str) -> dict[str, Any]:
    form = {"name": "a", "schema": {"enum": [text]}}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def test_answer_with_citations(zoo: KnowledgeClient) -> None:
    status, answer = chat(zoo, **constrained_to(OUTPUT))
    assert status == 200, answer
    ChatCompletion.model_validate(answer)
    message, retrieval = answer["choices"][0]["message"], answer["retrieval"]
    assert json.loads(message["content"]) == CONTENT
    hit, whales = retrieval["hits"]
    (citation,) = message["citations"]
    assert citation == {
        "number": 1, "hash": hit["hash"], "start": hit["start"], "end": hit["end"],
        "doc": "企鹅.md", "doc_id": "企鹅.md", "page": None, "page_end": None,
        "line": hit["line"], "line_end": hit["line_end"], "headings": hit["headings"],
        "text": hit["text"],
    }  # fmt: skip
    assert PENGUINS[citation["start"] : citation["end"]] == citation["text"]
    assert retrieval["query"] == ASKED["content"] and retrieval["found"]
    assert (hit["number"], whales["number"]) == (1, 2) and hit["legs"].keys() == {"lexical"}
    assert "Penguins live in the south." in retrieval["prompt"]
    assert retrieval["prompt"].endswith("Question: Do penguins live in the south?")
    tokens = zoo.service.generator.chat_ids([{"role": "user", "content": retrieval["prompt"]}])
    assert answer["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("question", [ASKED["content"], "zebras and giraffes"])
def test_other_protocols_use_knowledge_bases(zoo: KnowledgeClient, question: str) -> None:
    schema, base = {"enum": [OUTPUT]}, {"model": "tiny", "knowledge_base": "zoo"}
    _, chat_answer = chat(zoo, {"role": "user", "content": question}, **constrained_to(OUTPUT))
    message = chat_answer["choices"][0]["message"]
    asked = [{"role": "user", "content": question}]
    form = {"type": "json_schema", "name": "a", "schema": schema}
    for path, body in (
        ("/v1/responses", {"input": asked, "text": {"format": form}, "max_output_tokens": 300}),
        ("/v1/messages", {"messages": asked, "output_config": {"format": {
            "type": "json_schema", "schema": schema}}, "max_tokens": 300}),
        ("/api/chat", {"messages": asked, "format": schema}),
        ("/api/generate", {"prompt": question, "format": schema}),
    ):  # fmt: skip
        sent = json.dumps({**base, **body, "stream": False})
        status, _, answer = zoo.service.ask("POST", path, sent)
        assert status == 200, answer
        assert answer["retrieval"] == chat_answer["retrieval"]
        assert answer["citations"] == message["citations"]
        assert json.dumps(message["content"], ensure_ascii=False)[1:-1] in json.dumps(
            answer, ensure_ascii=False
        )
        for line in zoo.service.raw(
            "POST", path, json.dumps({**base, **body, "stream": True})
        ).split("\n"):
            if '"retrieval"' in line:
                assert json.loads(line.removeprefix("data: "))
                break
        else:
            raise AssertionError(f"no retrieval in the stream of {path}")


def test_stream_matches_whole_answer(zoo: KnowledgeClient) -> None:
    _, whole = chat(zoo, **constrained_to(OUTPUT), n=2)
    client = zoo.service.client()
    chunks = [
        chunk.model_dump(exclude_unset=True)
        for chunk in client.chat.completions.create(
            model="tiny", messages=[ASKED], max_tokens=300, temperature=0, n=2, stream=True,  # type: ignore[list-item,arg-type]
            extra_body={"knowledge_base": "zoo"}, **constrained_to(OUTPUT),
        )
    ]  # fmt: skip
    assert chunks[0]["retrieval"] == whole["retrieval"]
    assert not any("retrieval" in chunk for chunk in chunks[1:])
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        text = "".join(each["delta"].get("content") or "" for each in mine)
        assert text == choice["message"]["content"]
        assert mine[-1]["delta"] == {"citations": choice["message"]["citations"]}
        assert not any("citations" in each["delta"] for each in mine[:-1])


def test_citation_split_over_outputs(tiny: Path) -> None:
    """Split anywhere, and incomplete at the end."""
    passage = Hit(1, "a.md", "a.md", "0" * 64, 5, 9, "text", (), 1.0, {})
    prompt = Prompt("...", (passage,), 0, "en")
    form = ResponseFormat(True, context=RetrievalContext([], "q", [passage], prompt, "no"))
    text = "Yes [1], [2] and 【 1 】. [1"

    async def answered(sizes: list[int]) -> dict[str, Any]:
        answer = Answer(form, "m", load_tokenizer(tiny), set(), pieces(sizes))
        whole = await CompletionLayout(chat=True).whole(answer)
        assert whole is not None
        message: dict[str, Any] = whole["choices"][0]["message"]
        return message

    async def pieces(sizes: list[int]) -> AsyncIterator[Output]:
        at = 0
        for size in sizes:
            yield Output(0, 0, text[at : at + size], (), 1, 1, 0)
            at += size
        yield Output(0, 0, text[at:], (), 2, 1, 0, finish_reason="stop")

    for sizes in ([], [1] * len(text), *([cut] for cut in range(len(text)))):
        message = asyncio.run(answered(sizes))
        assert message["content"] == "Yes [1],  and [1]. [1", sizes
        (citation,) = message["citations"]
        assert (citation["number"], citation["start"], citation["text"]) == (1, 5, "text")


def test_embedder_and_reranker(zoo: KnowledgeClient) -> None:
    for mode, legs in ((None, {"lexical", "dense"}), ("dense", {"dense"})):
        more = {"k": 2, "mode": mode, "reranker": "judge"}
        status, answer = chat(
            zoo, knowledge_base="both", retrieval=more, **constrained_to("[2][1]")
        )
        assert status == 200, answer
        hits = answer["retrieval"]["hits"]
        assert {leg for hit in hits for leg in hit["legs"]} == legs | {"rerank"}
        numbers = [each["number"] for each in answer["choices"][0]["message"]["citations"]]
        assert numbers == [2, 1]
        by_number = {hit["number"]: hit["hash"] for hit in hits}
        for citation in answer["choices"][0]["message"]["citations"]:
            assert by_number[citation["number"]] == citation["hash"]


@pytest.mark.parametrize(
    ("question", "refusal"),
    [
        ("What is a quasar?", "The documents do not contain the answer."),
        ("类星体是什么？", "资料中没有找到答案。"),
    ],
)
def test_refusal_where_nothing_is_found(zoo: KnowledgeClient, question: str, refusal: str) -> None:
    asked = {"role": "user", "content": question}
    status, answer = chat(zoo, asked, n=2)
    assert status == 200, answer
    ChatCompletion.model_validate(answer)
    assert answer["retrieval"]["found"] is False and answer["retrieval"]["prompt"] is None
    for choice in answer["choices"]:
        assert choice["message"]["content"] == refusal and choice["finish_reason"] == "stop"
        assert choice["message"]["citations"] == []
    assert len(answer["choices"]) == 2 and answer["usage"]["total_tokens"] == 0
    stream = zoo.service.client().chat.completions.create(
        model="tiny", messages=[asked], stream=True, extra_body={"knowledge_base": "zoo"}  # type: ignore[list-item]
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == refusal
    assert not zoo.service.engine.unfinished


def test_model_can_be_asked_anyway(zoo: KnowledgeClient) -> None:
    asked = {"role": "user", "content": "What is a quasar?"}
    _, before = chat(zoo, asked)
    assert before["retrieval"]["asked"] is False and before["retrieval"]["hits"]
    assert before["choices"][0]["message"]["not_found"] is True
    more = {"retrieval": {"ask_anyway": True}, **constrained_to("A star [1].")}
    status, answer = chat(zoo, asked, **more)
    assert status == 200, answer
    ChatCompletion.model_validate(answer)
    retrieval, message = answer["retrieval"], answer["choices"][0]["message"]
    assert retrieval["asked"] is True and retrieval["found"] is False and retrieval["prompt"]
    assert json.loads(message["content"]) == "A star [1]." and len(message["citations"]) == 1
    assert "not_found" not in message
    # A refusal by the model is marked, whole and streamed.
    refusal = constrained_to("The documents do not contain the answer.")
    _, answer = chat(zoo, **refusal)
    assert answer["retrieval"]["found"] and answer["choices"][0]["message"]["not_found"] is True
    stream = zoo.service.client().chat.completions.create(
        model="tiny", messages=[ASKED], max_tokens=300, temperature=0, stream=True,  # type: ignore[list-item,arg-type]
        extra_body={"knowledge_base": "zoo"}, **refusal,
    )  # fmt: skip
    *_, last = (chunk.model_dump(exclude_unset=True) for chunk in stream)
    assert last["choices"][0]["delta"] == {"citations": [], "not_found": True}


def test_follow_up_question(zoo: KnowledgeClient) -> None:
    history = [ASKED, {"role": "assistant", "content": "In the south [1].", "citations": []}]
    status, answer = chat(
        zoo,
        {"role": "system", "content": "Be short."},
        *history,
        {"role": "user", "content": "And do they fly?"},
        **constrained_to("No [1]."),
    )
    assert status == 200, answer
    lines = answer["retrieval"]["query"].splitlines()
    # Between them is the random model's rewritten query, which may be empty.
    assert lines[0] == "And do they fly?" and lines[-1] == ASKED["content"]
    assert answer["retrieval"]["found"]
    assert answer["choices"][0]["message"]["citations"][0]["doc"] == "企鹅.md"
    # A system message is not a previous question.
    _, alone = chat(zoo, {"role": "system", "content": "Be short."}, ASKED, **constrained_to("x"))
    assert alone["retrieval"]["query"] == ASKED["content"]
    prompt = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": alone["retrieval"]["prompt"]},
    ]
    assert alone["usage"]["prompt_tokens"] == len(zoo.service.generator.chat_ids(prompt))


ROOM = {**constrained_to("x"), "max_tokens": 1000}


def test_passages_beyond_context_are_left_out(zoo: KnowledgeClient) -> None:
    zoo.create("much")
    text = "Penguins in the south. " + "quartz " * 60
    files = [zoo.upload("much", f"{i}.md", f"{i} {text}".encode()) for i in range(6)]
    zoo.ready("much", *files)
    asked = {"role": "user", "content": "penguins in the south"}
    status, answer = chat(zoo, asked, knowledge_base="much", retrieval={"k": 6}, **ROOM)
    assert status == 200, answer
    retrieval = answer["retrieval"]
    assert len(retrieval["hits"]) == 6 and 0 < retrieval["left_out"] < 6
    assert sorted(hit["number"] for hit in retrieval["hits"]) == [1, 2, 3, 4, 5, 6]
    assert retrieval["prompt"].count("<passage id=") == 6 - retrieval["left_out"]
    status, answer = chat(zoo, asked, knowledge_base="much", max_tokens=2040)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded", answer


def test_old_turns_leave_room_for_passages(zoo: KnowledgeClient) -> None:
    turn = [{"role": "user", "content": "fox " * 100}, {"role": "assistant", "content": "the"}]
    messages = [*turn * 30, ASKED]
    status, answer = chat(zoo, *messages)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded", answer
    status, answer = chat(zoo, *messages, **ROOM | {"max_tokens": 2040}, truncation="auto")
    assert status == 200, answer
    assert 0 < answer["left_out"] < 60 and answer["left_out"] % 2 == 0
    assert answer["retrieval"]["found"] and answer["retrieval"]["left_out"] == 0
    assert answer["choices"][0]["finish_reason"] == "stop"
    ChatCompletion.model_validate(answer)


def test_refuses_invalid_request(zoo: KnowledgeClient) -> None:
    for changed, status, param in (
        ({"knowledge_base": "none"}, 404, None),
        ({"knowledge_base": None, "retrieval": {}}, 400, None),
        ({"retrieval": {"k": 0}}, 400, "retrieval.k"),
        ({"retrieval": {"k": 101}}, 400, "retrieval.k"),
        ({"retrieval": {"mode": "dense"}}, 400, "mode"),
        ({"retrieval": {"reranker": "none"}}, 400, "reranker"),
        ({"retrieval": {"depth": 1}}, 400, "retrieval.depth"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
    ):
        found, answer = chat(zoo, **changed)
        assert (found, answer["error"]["param"]) == (status, param), answer
    with pytest.raises(openai.NotFoundError):
        zoo.service.client().chat.completions.create(
            model="none", messages=[ASKED], extra_body={"knowledge_base": "zoo"}  # type: ignore[list-item]
        )  # fmt: skip
