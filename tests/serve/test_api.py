"""The API, by OpenAI's client."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import openai
import pytest
from serving import Service

from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams

HELLO: list[Any] = [{"role": "user", "content": "春眠不觉晓 the fox"}]


def collect(stream: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """Text and finish reason of every choice, and the usage, of a stream of chat chunks."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons, "something came after the end"
            if choice.index not in texts:
                assert choice.delta.role == "assistant"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_chat_matches_engine(service: Service, tiny: Any) -> None:
    alone = Generator.from_directory(tiny)
    expected = alone.chat(HELLO, SamplingParams(max_tokens=24, temperature=0.0))
    answer = service.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=24, temperature=0
    )
    assert answer.object == "chat.completion" and answer.model == "tiny"
    [choice] = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(alone.chat_ids(HELLO))
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


@pytest.mark.parametrize("n", [1, 3])
def test_stream_matches_whole_answer(service: Service, n: int) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": HELLO, "max_completion_tokens": 24, "n": n, "seed": 5,
        "temperature": 0 if n == 1 else 1,
    }  # fmt: skip
    client = service.client()
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = collect(stream)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(set(texts.values())) == n
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 24 * n
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_event_stream_format(service: Service) -> None:
    """Blank lines between events, and OpenAI's end of a stream."""
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 4, "stream": True})
    connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    *events, done, rest = answer.read().decode().split("\n\n")
    connection.close()
    assert done == "data: [DONE]" and rest == ""
    for event in events:
        assert "\n" not in event
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_stream_has_no_usage_by_default(service: Service) -> None:
    stream = service.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, stream=True
    )
    assert collect(stream)[2] is None


def test_seed_and_stop(service: Service) -> None:
    def answer_of(**more: Any) -> Any:
        answer = service.client().chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=32, **more
        )
        return answer.choices[0]

    one = answer_of(seed=1)
    assert (
        one.message.content
        == answer_of(seed=1).message.content
        != answer_of(seed=2).message.content
    )
    for seed in (-1, -(2**63), 2**64 + 1, -(10**40)):  # any integer; its lowest 64 bits count
        assert answer_of(seed=seed).message.content == answer_of(seed=seed % 2**64).message.content
    assert answer_of(seed=2**64 + 1).message.content == one.message.content
    text = one.message.content
    # Two characters, so that the stop string spans tokens.
    stop = text[8:10]
    cut = answer_of(seed=1, stop=[stop, "不在里面"])
    assert cut.finish_reason == "stop"
    assert cut.message.content == text[: text.index(stop)]


def test_logprobs_match_tokens(service: Service) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0,
        "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    answer = service.client().chat.completions.create(**asked)
    [choice] = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 8
    raw = b"".join(bytes(each.bytes or ()) for each in choice.logprobs.content)
    assert raw.decode(errors="replace") == choice.message.content
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob < 0  # greedy
    streamed = [
        each
        for chunk in service.client().chat.completions.create(**asked, stream=True)
        for part in chunk.choices
        if part.logprobs is not None
        for each in part.logprobs.content or []
    ]
    assert [each.token for each in streamed] == [e.token for e in choice.logprobs.content]


@pytest.mark.parametrize(
    "field", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"top_p": 0.3}]
)
def test_sampling_parameters(service: Service, tiny: Any, field: dict[str, Any]) -> None:
    alone = Generator.from_directory(tiny)
    plain = SamplingParams(max_tokens=48, temperature=0.7, seed=3)
    expected = alone.chat(HELLO, replace(plain, **field)).text
    assert expected != alone.chat(HELLO, plain).text
    answer = service.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=48, temperature=0.7, seed=3, **field
    )
    assert answer.choices[0].message.content == expected


def test_logit_bias(service: Service) -> None:
    token = service.generator.tokenizer.encode("q")[0]
    answer = service.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, logit_bias={str(token): 100}
    )
    assert answer.choices[0].message.content == "qqqqqq"


def test_end_token_is_counted_but_not_returned(service: Service) -> None:
    answer = service.client().chat.completions.create(
        model="tiny",
        messages=HELLO,
        logprobs=True,
        logit_bias={str(service.generator.tokenizer.end_id): 100},
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop" and choice.message.content == ""
    assert choice.logprobs is not None and choice.logprobs.content == []
    assert answer.usage is not None and answer.usage.completion_tokens == 1


def test_json_schema(service: Service) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["北京", "Paris"]}, "n": {"enum": [1, 2]}},
        "required": ["city", "n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = service.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, seed=1, response_format=form
    )
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content or "")
    assert found["city"] in ("北京", "Paris") and found["n"] in (1, 2)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_declared_name_that_a_pattern_matches_too(service: Service, seed: int | None) -> None:
    """llguidance alone allows a comma after it, and then no name: the answer failed."""
    schema = {
        "type": "object",
        "properties": {"score": {"type": "integer", "maximum": 99}},
        "required": ["score"],
        "additionalProperties": False,
        "patternProperties": {"^score$": {"type": "integer", "minimum": 7}},
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = service.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=200, response_format=form,
        seed=seed, temperature=0 if seed is None else 1,
    )  # fmt: skip
    assert 7 <= json.loads(answer.choices[0].message.content or "")["score"] <= 99


def test_completions_of_text_and_ids(service: Service) -> None:
    client = service.client()
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, prompt="the quick")
    ids = service.generator.prompt_ids("the quick")
    by_ids = client.completions.create(**asked, prompt=ids)
    assert whole.choices[0].text == by_ids.choices[0].text
    assert whole.usage is not None and whole.usage.prompt_tokens == len(ids)
    stream = client.completions.create(**asked, prompt="the quick", stream=True)
    parts = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert parts[-1].finish_reason == "length"


def test_models_and_health(service: Service) -> None:
    client = service.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "khaosz"
    assert service.ask("GET", "/health/live")[0] == service.ask("GET", "/health/ready")[0] == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 99, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"fox": 1}}, "logit_bias.fox"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages.0.content"),
        ({"stop": 1}, "stop"),
        ({"extra_body": {"str": 1}}, "str"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "type": "nonsense"}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
                "not": {}}}}, "stream": True},
            "response_format",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
                "properties": {"a": {"const": 2**53 + 1}}}}}], "tool_choice": "required"},
            "tools",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {
                "type": "string"}}}], "tool_choice": "required"},
            "tools",
        ),
        ({"seed": 1.5}, "seed"),
    ],
)  # fmt: skip
def test_error_names_field(service: Service, more: dict[str, Any], param: str) -> None:
    asked = {"model": "tiny", "messages": HELLO, **more}
    with pytest.raises(openai.BadRequestError) as caught:
        service.client().chat.completions.create(**asked)
    assert caught.value.param == param
    assert param.split(".")[-1] in str(caught.value) or param == "response_format"
    assert caught.value.type == "invalid_request_error"


def test_an_empty_prompt_is_named(service: Service) -> None:
    for prompt in ([], [[]], ["x", []]):
        body = json.dumps({"model": "tiny", "prompt": prompt})
        status, _, answer = service.ask("POST", "/v1/completions", body)
        error = answer["error"]
        assert (status, error["param"].split(".")[0]) == (400, "prompt"), error
        if prompt == []:
            assert error["message"] == (
                "prompt: is empty: send a text, token ids, or a list of either"
            )


def test_other_errors(service: Service) -> None:
    client = service.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    long: Any = [{"role": "user", "content": "x " * 5000}]
    with pytest.raises(openai.BadRequestError) as full:
        client.chat.completions.create(model="tiny", messages=long)
    assert full.value.code == "context_length_exceeded"
    odd = '{"model": "\\ud800", "messages": [], "\\ud800": 1}'
    for body in ("{", "[]", "null", "[" * 100_000, odd):
        status, _, answer = service.ask("POST", "/v1/chat/completions", body)
        assert status == 400 and answer["error"]["message"], body[:20]
    asked = json.dumps({"model": "tiny", "messages": HELLO})
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):  # curl's without a -H
        headers = {"Content-Type": kind}
        status, _, answer = service.ask("POST", "/v1/chat/completions", asked, **headers)
        assert status == 400 and "Content-Type" in answer["error"]["message"], kind
    surrogate = '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert service.ask("POST", "/v1/chat/completions", surrogate)[0] == 400
    assert service.ask("GET", "/v1/nothing")[2]["error"]["type"] == "invalid_request_error"
    assert service.ask("GET", "/v1/chat/completions")[0] == 405


def test_concurrent_requests(service: Service) -> None:
    def answer_of(content: str) -> str | None:
        messages: Any = [{"role": "user", "content": content}]
        answer = service.client().chat.completions.create(
            model="tiny", messages=messages, max_tokens=48, temperature=0
        )
        return answer.choices[0].message.content

    questions = [f"question {i} 春" for i in range(6)]
    alone = [answer_of(question) for question in questions]
    assert len(set(alone)) == len(alone)
    together: dict[str, str | None] = {}

    def ask(question: str) -> None:
        together[question] = answer_of(question)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[question] for question in questions] == alone
