"""OpenAI's Responses API, with the official client."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import response_create_params as responses
from pydantic import BaseModel
from serving import WEATHER, Service, served, slowed

from khaosz.serve.openai.response_schema import ResponseReply

BASE: dict[str, Any] = {"model": "tiny", "input": "the fox", "max_output_tokens": 6}
FUNCTION: dict[str, Any] = {"type": "function", **WEATHER["function"]}
TAUGHT: dict[str, Any] = {"model": "taught", "temperature": 0, "max_output_tokens": 80}

# A value of each field, and of those that are refused by name.
FIELDS: dict[str, Any] = {
    "access_programs": {"cyber": "standard"}, "background": False, "background_options": {},
    "context_management": [{"type": "compaction"}], "image": {"context_compression": "auto"},
    "include": ["reasoning.encrypted_content"], "input": [{"role": "user", "content": "the fox"}],
    "instructions": "Be brief.", "max_output_tokens": 3, "max_tool_calls": 2,
    "metadata": {"a": "b"}, "model": "tiny", "moderation": {"model": "x"},
    "parallel_tool_calls": False, "prompt_cache_key": "x", "prompt_cache_options": {},
    "prompt_cache_retention": "24h", "reasoning": {"effort": "low", "summary": "auto"},
    "safety_identifier": "x", "service_tier": "auto", "store": True,
    "stream_options": {"include_obfuscation": False}, "temperature": 0.5,
    "text": {"format": {"type": "text"}, "verbosity": "low"}, "tool_choice": "auto",
    "tools": [FUNCTION], "top_logprobs": 2, "top_p": 0.5, "truncation": "auto", "user": "me",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "background": True, "conversation": "conv_1", "previous_response_id": "resp_1",
    "prompt": {"id": "x"},
}  # fmt: skip


@pytest.fixture(scope="module")
def learned(taught: Path) -> Iterator[Service]:
    with served(taught) as running:
        yield running


def test_every_typed_field_is_known() -> None:
    typed = typing.get_type_hints(responses.ResponseCreateParamsNonStreaming)
    assert typed.keys() - {"stream"} == FIELDS.keys() | REFUSED.keys()


def test_typed_fields(service: Service) -> None:
    for name, value in FIELDS.items():
        status, _, answer = service.ask("POST", "/v1/responses", json.dumps({**BASE, name: value}))
        assert status == 200, (name, answer)
        ResponseReply.model_validate(answer)
    for name, value in REFUSED.items():
        status, _, answer = service.ask("POST", "/v1/responses", json.dumps({**BASE, name: value}))
        assert (status, answer["error"]["param"]) == (400, name), (name, answer)
        assert name in answer["error"]["message"] and len(answer["error"]["message"]) < 100


def test_whole_and_streamed_answers_are_the_same(service: Service) -> None:
    client = service.client()
    more: Any = {**BASE, "temperature": 0, "instructions": "x", "metadata": {"a": "b"}}
    whole = client.responses.create(**more)
    assert whole.status == "incomplete" and whole.incomplete_details
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and whole.usage.output_tokens == 6 and whole.metadata == {"a": "b"}
    chat = client.chat.completions.create(
        model="tiny", temperature=0, max_tokens=6,
        messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "the fox"}],
    )  # fmt: skip
    assert whole.output_text == chat.choices[0].message.content
    assert chat.usage and whole.usage.input_tokens == chat.usage.prompt_tokens
    events = list(client.responses.create(stream=True, **more))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.incomplete" and text == last.response.output_text
    assert text == whole.output_text
    ResponseReply.model_validate(last.response.model_dump(exclude_unset=True))


class City(BaseModel):
    name: typing.Literal["北京", "Paris"]
    large: bool


def test_parsed_answers(service: Service) -> None:
    client = service.client()
    more: Any = {"model": "tiny", "input": "x", "max_output_tokens": 300, "temperature": 0}
    parsed = client.responses.parse(text_format=City, **more)
    assert isinstance(parsed.output_parsed, City)
    with client.responses.stream(text_format=City, **more) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    loose = client.responses.create(text={"format": {"type": "json_object"}}, **more)
    assert loose.output_text.startswith("{")


def test_tool_calls(learned: Service) -> None:
    """Their items are sent back, with the results."""
    client = learned.client()
    more: Any = {**TAUGHT, "tools": [FUNCTION]}
    items: list[Any] = [{"role": "user", "content": "both"}]
    first = client.responses.create(input=items, **more)
    assert first.status == "completed"
    calls = [item for item in first.output if item.type == "function_call"]
    cities = [json.loads(call.arguments)["city"] for call in calls]
    assert cities == ["北京", "Paris"] and len({call.call_id for call in calls}) == 2
    with client.responses.stream(input=items, **more) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert [json.loads(delta)["city"] for delta in deltas] == cities
    assert [item.type for item in final.output] == [item.type for item in first.output]
    items += first.output
    items += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "晴"} for call in calls
    ]
    again = client.responses.create(input=items, **more)
    dumped = [item if isinstance(item, dict) else item.model_dump() for item in items]
    same = client.responses.create(input=dumped, **more)
    assert again.usage and same.usage and again.usage.input_tokens == same.usage.input_tokens
    one = client.responses.create(
        input=[{"role": "user", "content": "both"}], parallel_tool_calls=False, **more
    )
    assert len(one.output) == 1


def test_items_are_the_messages_of_a_chat(learned: Service) -> None:
    """Reasoning, text and calls that follow one another are one message."""
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": None}]},
        {"type": "function_call", "call_id": "a", "id": "fc_1", **call, "caller": None},
        {"type": "function_call_output", "call_id": "a", "output": "晴"},
        {"role": "assistant", "content": "sunny"},
        {"role": "user", "content": "and now"},
    ]  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather"},
        {"role": "assistant", "reasoning_content": "hm", "content": "I look.",
         "tool_calls": [{"id": "a", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "a", "content": "晴"},
        {"role": "assistant", "content": "sunny"},
        {"role": "user", "content": "and now"},
    ]  # fmt: skip
    client = learned.client()
    counted = client.responses.input_tokens.count(model="taught", input=items)  # type: ignore[arg-type]
    chat = client.chat.completions.create(model="taught", messages=messages, max_tokens=1)  # type: ignore[arg-type]
    assert chat.usage and counted.input_tokens == chat.usage.prompt_tokens


def test_reasoning_items(learned: Service) -> None:
    client = learned.client()
    whole = client.responses.create(input="think", **TAUGHT)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "一 + 一"  # type: ignore[union-attr,index]
    assert whole.output_text == "二"
    assert whole.usage and whole.usage.output_tokens_details.reasoning_tokens > 0
    with client.responses.stream(input="think", **TAUGHT) as stream:
        deltas = [e.delta for e in stream if e.type == "response.reasoning_text.delta"]
        assert stream.get_final_response().output_text == "二"
    assert "".join(deltas) == "一 + 一"
    items: list[Any] = [{"role": "user", "content": "think"}, *whole.output]
    client.responses.create(input=[*items, {"role": "user", "content": "plain"}], **TAUGHT)
    hidden = client.responses.create(input="think", reasoning={"effort": "none"}, **TAUGHT)
    assert [item.type for item in hidden.output] == ["message"]


def test_required_tool(service: Service) -> None:
    more: Any = {**BASE, "tools": [FUNCTION], "max_output_tokens": 300}
    for choice in (
        "required", {"type": "function", "name": "weather"},
        {"type": "allowed_tools", "mode": "required",
         "tools": [{"type": "function", "name": "weather"}]},
    ):  # fmt: skip
        answer = service.client().responses.create(tool_choice=choice, **more)  # type: ignore[call-overload]
        assert {item.type for item in answer.output} == {"function_call"}, choice


def test_logprobs(service: Service) -> None:
    more: Any = {**BASE, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    more["temperature"] = 0
    whole = service.client().responses.create(**more)
    logprobs = whole.output[0].content[0].logprobs  # type: ignore[union-attr,index]
    assert len(logprobs) == 6 and len(logprobs[0].top_logprobs) == 2  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content", "reads text only: images"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "stores no responses"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0", "'web_search_call'"),
        ({"input": []}, "input", "at least 1"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice",
         "names a tool"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "odd"}}}},
         "text.format", "text.format"),
        ({"previous_response_id": "x"}, "previous_response_id", "send the earlier items"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"input": "x" * 20_000}, "input", "context"),
        ({"nonsense": 1}, "nonsense", "unknown field"),
    ],
)  # fmt: skip
def test_refused(service: Service, more: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.client().responses.create(**BASE, extra_body=more)
    assert caught.value.param == param and words in str(caught.value)


def test_nothing_is_stored(service: Service) -> None:
    client = service.client()
    answer = client.responses.create(**BASE, store=True)
    assert answer.model_extra is not None and answer.to_dict()["store"] is False
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            call(answer.id)


def test_silence_and_late_errors(tiny: Path) -> None:
    """A stream is open before the answer is; an error is then its last event."""
    with served(tiny, heartbeat=0.05, timeout=0.5) as service:
        slowed(service, "tiny")
        service.engine.step_tokens = 16
        client = service.client()
        more: Any = {**BASE, "input": "fox " * 300, "stream": True, "temperature": 0}
        with client.responses.with_streaming_response.create(**more) as response:
            text = response.read().decode()
        assert ": waiting\n\n" in text
        events = list(client.responses.create(**{**more, "max_output_tokens": 2000}))
        assert [events[0].type, events[-1].type] == ["response.created", "response.failed"]
        assert events[-1].response.error.message.startswith("the answer took longer")  # type: ignore[union-attr]
