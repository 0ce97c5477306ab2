"""Anthropic's Messages API, without its client: see test_other_clients.py for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import WEATHER, Service, served, slowed

from khaosz.serve.anthropic.schema import MessageReply

HELLO = [{"role": "user", "content": "the fox"}]
BASE: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 6}
TAUGHT: dict[str, Any] = {"model": "taught", "temperature": 0, "max_tokens": 80}
TOOL = {
    "name": "weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}


@pytest.fixture(scope="module")
def learned(taught: Path) -> Iterator[Service]:
    with served(taught) as running:
        yield running


def ask(service: Service, path: str = "", **body: Any) -> tuple[int, Any]:
    status, _, answer = service.ask("POST", f"/v1/messages{path}", json.dumps(body))
    return status, answer


def answered(service: Service, **body: Any) -> Any:
    status, answer = ask(service, **body)
    assert status == 200, answer
    MessageReply.model_validate(answer)
    return answer


def events(service: Service, **body: Any) -> list[dict[str, Any]]:
    text = service.raw("POST", "/v1/messages", json.dumps({**body, "stream": True}))
    found = []
    for each in text.removesuffix("\n\n").split("\n\n"):
        kind, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def joined(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content blocks of a stream, as the client puts them together."""
    blocks: list[dict[str, Any]] = []
    for each in found:
        match each:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert index == len(blocks)
                blocks.append(dict(block))
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert index == len(blocks) - 1
                match delta:
                    case {"type": "input_json_delta", "partial_json": text}:
                        blocks[-1]["input"] = json.loads(text)
                    case {"type": kind}:
                        field = kind.removesuffix("_delta")
                        blocks[-1][field] += delta[field]
    return blocks


def test_whole_and_streamed_answers_are_the_same(service: Service) -> None:
    more: Any = {**BASE, "temperature": 0, "system": [{"type": "text", "text": "x"}]}
    whole = answered(service, **more)
    chat = service.client().chat.completions.create(
        model="tiny", temperature=0, max_tokens=6,
        messages=[{"role": "system", "content": "x"}, *HELLO],  # type: ignore[list-item]
    )  # fmt: skip
    [block] = whole["content"]
    assert block["text"] == chat.choices[0].message.content
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("max_tokens", None)
    found = events(service, **more)
    kinds = [each["type"] for each in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert joined(found) == whole["content"]
    start, end = found[0]["message"], found[-2]
    assert chat.usage is not None
    assert start["usage"]["input_tokens"] == chat.usage.prompt_tokens
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    for usage in (whole["usage"], end["usage"]):
        assert usage["output_tokens"] == 6
        total = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert total == chat.usage.prompt_tokens
    _, counted = ask(service, "/count_tokens", model="tiny", messages=HELLO, system="x")
    assert counted == {"input_tokens": chat.usage.prompt_tokens}


def test_long_prompts_are_counted(service: Service) -> None:
    messages = [{"role": "user", "content": "fox " * 3000}]
    status, answer = ask(service, "/count_tokens", model="tiny", messages=messages)
    assert status == 200 and answer["input_tokens"] > 2048


def test_requests_are_counted_by_route(service: Service) -> None:
    answered(service, **BASE)
    assert 'khaosz_requests_total{route="/v1/messages",status="200"}' in service.text("/metrics")[1]


def test_stop_sequence_is_named(service: Service) -> None:
    more: Any = {**BASE, "temperature": 0, "max_tokens": 20}
    text = answered(service, **more)["content"][0]["text"]
    stop = text[4:7]
    whole = answered(service, **more, stop_sequences=["not in it", stop])
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", stop)
    assert whole["content"][0]["text"] == text[: text.index(stop)]
    delta = events(service, **more, stop_sequences=[stop])[-2]["delta"]
    assert delta == {"stop_reason": "stop_sequence", "stop_sequence": stop}


def test_tool_calls(learned: Service) -> None:
    """The answer is sent back as it is, with the results."""
    more: Any = {**TAUGHT, "tools": [TOOL]}
    ask_both: list[Any] = [{"role": "user", "content": "weather"}]
    whole = answered(learned, messages=ask_both, **more)
    assert whole["stop_reason"] == "tool_use"
    text, call = whole["content"]
    assert text["text"] == "I look." and call["input"] == {"city": "北京"}
    found = events(learned, messages=ask_both, **more)
    blocks = joined(found)
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert [{**each, "id": ""} for each in blocks] == [
        {**e, "id": ""} for e in whole["content"]
    ] or (blocks[0] == text and {**blocks[1], "id": call["id"]} == call)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "晴", "is_error": False}
    history = [
        *ask_both, {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "plain"}]},
    ]  # fmt: skip
    assert answered(learned, messages=history, **more)
    chat = learned.client().chat.completions.create(
        model="taught", max_tokens=1, tools=[WEATHER],
        messages=[
            {"role": "user", "content": "weather"},
            {"role": "assistant", "content": "I look.", "tool_calls": [
                {"id": "a", "type": "function", "function": {
                    "name": "weather", "arguments": '{"city": "北京"}'}}]},
            {"role": "tool", "tool_call_id": "a", "content": "晴"},
            {"role": "user", "content": "plain"},
        ],
    )  # fmt: skip
    _, counted = ask(learned, "/count_tokens", model="taught", messages=history, tools=[TOOL])
    assert chat.usage is not None and counted["input_tokens"] == chat.usage.prompt_tokens
    both: list[Any] = [{"role": "user", "content": "both"}]
    assert len(answered(learned, messages=both, **more)["content"]) == 2
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(answered(learned, messages=both, tool_choice=one, **more)["content"]) == 1


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_required_tool(service: Service, choice: dict[str, Any]) -> None:
    whole = answered(service, **{**BASE, "max_tokens": 900}, tools=[TOOL], tool_choice=choice)
    assert whole["stop_reason"] == "tool_use"
    assert {block["type"] for block in whole["content"]} == {"tool_use"}


def test_thinking_blocks_on_request(learned: Service) -> None:
    think: Any = [{"role": "user", "content": "think"}]
    enabled = {"type": "enabled", "budget_tokens": 1024}
    whole = answered(learned, messages=think, thinking=enabled, **TAUGHT)
    assert [block["type"] for block in whole["content"]] == ["thinking", "text"]
    assert whole["content"][0]["thinking"] == "一 + 一"
    assert joined(events(learned, messages=think, thinking=enabled, **TAUGHT)) == whole["content"]
    history = [*think, {"role": "assistant", "content": whole["content"]}, HELLO[0]]
    answered(learned, messages=history, **TAUGHT)
    for more in ({}, {"thinking": {"type": "disabled"}}):
        [block] = answered(learned, messages=think, **more, **TAUGHT)["content"]
        assert block["text"] == "二"


def test_json_schema(service: Service) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["北京", "Paris"]}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    format = {"type": "json_schema", "schema": schema}
    for more in ({"output_config": {"format": format}}, {"output_format": format}):
        whole = answered(service, **{**BASE, "max_tokens": 100}, **more)
        assert json.loads(whole["content"][0]["text"])["city"] in ("北京", "Paris")


def test_last_assistant_message_is_continued(learned: Service) -> None:
    """Known as prefill."""
    messages = [{"role": "user", "content": "plain"}, {"role": "assistant", "content": "the"}]
    assert answered(learned, messages=messages, **TAUGHT)["content"][0]["text"] == " fox"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages.0.content: this model reads text only: images"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
         "reads text only: files"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]}]},
         "reads text only: images"),
        ({"messages": []}, "messages"),
        ({"max_tokens": None}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         "'web_search_20250305' are not supported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "names a tool"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}},
         "output_config.format"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: not supported"),
        ({"container": "x"}, "container: not supported"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "context"),
        ({"nonsense": 1}, "nonsense: unknown field"),
    ],
)  # fmt: skip
def test_refused(service: Service, more: dict[str, Any], words: str) -> None:
    status, answer = ask(service, **{**BASE, **more})
    assert status == 400 and answer["type"] == "error", answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert words in answer["error"]["message"]


def test_errors_have_the_layout_of_the_protocol(service: Service, tiny: Path) -> None:
    status, answer = ask(service, **{**BASE, "model": "none"})
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    with served(tiny, key="secret") as locked:
        status, answer = ask(locked, **BASE)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
        for header in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
            body = json.dumps(BASE)
            assert locked.ask("POST", "/v1/messages?beta=true", body, **header)[0] == 200
        wrong = {"x-api-key": "wrong"}
        assert locked.ask("POST", "/v1/messages", json.dumps(BASE), **wrong)[0] == 401


def test_models_in_the_layout_of_the_protocol(service: Service) -> None:
    version = {"anthropic-version": "2023-06-01"}
    _, _, page = service.ask("GET", "/v1/models?limit=20", **version)
    assert [each["id"] for each in page["data"]] == ["tiny"] and page["has_more"] is False
    _, _, one = service.ask("GET", "/v1/models/tiny", **version)
    assert one == page["data"][0] and one["max_input_tokens"] == 2048
    assert service.ask("GET", "/v1/models")[2]["object"] == "list"


def test_pings_and_late_errors(tiny: Path) -> None:
    with served(tiny, heartbeat=0.05, timeout=0.5) as service:
        slowed(service, "tiny")
        service.engine.step_tokens = 16
        messages = [{"role": "user", "content": "fox " * 300}]
        found = events(
            service, **{**BASE, "messages": messages, "max_tokens": 2000, "temperature": 0}
        )
        assert {"type": "ping"} in found
        assert found[-1]["type"] == "error" and found[-1]["error"]["type"] == "timeout_error"
