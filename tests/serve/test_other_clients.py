"""The clients of Anthropic and Ollama, and every field that they can send."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from serving import WEATHER, Service, served

from khaosz.serve.anthropic.schema import MessagesRequest
from khaosz.serve.ollama.schema import (
    GenerateRequest,
    OllamaChatRequest,
    OllamaEmbedRequest,
    OllamaMessage,
    Options,
)
from khaosz.serve.retrieval_models import RetrievalModels

pytestmark = pytest.mark.slow
TAUGHT: dict[str, Any] = {"model": "taught", "max_tokens": 80}
GREEDY: dict[str, Any] = {"num_predict": 80, "temperature": 0}
TOOL: Any = {
    "name": "weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: typing.Literal["北京", "Paris"]


@pytest.fixture(scope="module")
def learned(taught: Path) -> Iterator[Service]:
    with served(taught, key="secret", retrieval=RetrievalModels([f"small={taught}"])) as running:
        yield running


@pytest.fixture(scope="module")
def claude(learned: Service) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    base = f"http://127.0.0.1:{learned.port}"
    with anthropic.Anthropic(base_url=base, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llama(learned: Service) -> Iterator[Any]:
    ollama = pytest.importorskip("ollama")
    headers = {"authorization": "Bearer secret"}
    with ollama.Client(host=f"http://127.0.0.1:{learned.port}", headers=headers) as client:
        yield client


def test_anthropic_knows_every_typed_field(claude: Any) -> None:
    from anthropic.types import message_create_params
    from anthropic.types.beta import message_create_params as beta

    typed = typing.get_type_hints(message_create_params.MessageCreateParamsNonStreaming)
    typed |= typing.get_type_hints(beta.MessageCreateParamsNonStreaming)
    assert typed.keys() - {"betas"} <= MessagesRequest.model_fields.keys()  # betas: a header


def test_anthropic_tool_loop(claude: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    answer = claude.messages.create(messages=messages, tools=[TOOL], **TAUGHT)
    assert answer.stop_reason == "tool_use"
    with claude.messages.stream(messages=messages, tools=[TOOL], **TAUGHT) as stream:
        assert "".join(stream.text_stream) == "I look."
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == answer.content[1].input == {"city": "北京"}
    assert final.usage.output_tokens == answer.usage.output_tokens
    for content in (answer.content, [block.model_dump() for block in final.content]):
        call = answer.content[1] if content is answer.content else final.content[1]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "晴"}
        again = claude.messages.create(
            messages=[*messages, {"role": "assistant", "content": content},
                      {"role": "user", "content": [result, {"type": "text", "text": "plain"}]}],
            tools=[TOOL], **TAUGHT,
        )  # fmt: skip
        assert again.role == "assistant"


def test_anthropic_answers(claude: Any) -> None:
    import anthropic

    messages: list[Any] = [{"role": "user", "content": "think"}]
    enabled = {"type": "enabled", "budget_tokens": 1024}
    whole = claude.messages.create(messages=messages, thinking=enabled, **TAUGHT)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    with claude.messages.stream(messages=messages, thinking=enabled, **TAUGHT) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[1].text == "二"
    kinds = [each.type for each in claude.messages.create(messages=messages, stream=True, **TAUGHT)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    parsed = claude.messages.parse(messages=messages, output_format=City, **TAUGHT)
    assert isinstance(parsed.parsed_output, City)
    beta = claude.beta.messages.create(
        messages=messages, system=[{"type": "text", "text": "x", "cache_control": {
            "type": "ephemeral"}}], betas=["x-1"], context_management={"edits": []}, **TAUGHT,
    )  # fmt: skip
    assert beta.usage.input_tokens > 0
    counted = claude.messages.count_tokens(model="taught", messages=messages)
    assert counted.input_tokens > 0
    assert [model.id for model in claude.models.list()] == ["taught", "small"]
    assert claude.models.retrieve("taught").max_input_tokens == 2048
    with pytest.raises(anthropic.NotFoundError, match="not found"):
        claude.messages.create(model="none", messages=messages, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="images"):
        claude.messages.create(
            messages=[{"role": "user", "content": [{"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "aGk="}}]}], **TAUGHT,
        )  # fmt: skip
    wrong = claude.with_options(api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(messages=messages, **TAUGHT)


def test_ollama_knows_every_typed_field(llama: Any) -> None:
    import ollama._types as types

    for theirs, ours in (
        (types.Options, Options), (types.ChatRequest, OllamaChatRequest),
        (types.GenerateRequest, GenerateRequest), (types.EmbedRequest, OllamaEmbedRequest),
        (types.Message, OllamaMessage),
    ):  # fmt: skip
        assert theirs.model_fields.keys() <= ours.model_fields.keys(), theirs


def test_ollama_tool_loop(llama: Any) -> None:
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
          city: its name
        """
        return f"晴 {city}"

    messages: list[Any] = [{"role": "user", "content": "both"}]
    for tools in ([WEATHER], [weather]):
        answer = llama.chat("taught", messages, tools=tools, options=GREEDY)
        calls = answer.message.tool_calls or []
        # The client leaves out parts of the schema, so the model sees another tool than it learnt.
        assert all(call.function.name == "weather" for call in calls)
        assert calls or tools == [weather]
    found = llama.chat("taught", messages, tools=[WEATHER], options=GREEDY)
    streamed = llama.chat("taught", messages, tools=[WEATHER], options=GREEDY, stream=True)
    parts = [call for part in streamed for call in part.message.tool_calls or []]
    assert parts == found.message.tool_calls
    results = [
        {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
        for call in parts
    ]
    again = llama.chat("taught", [*messages, found.message, *results], options=GREEDY)
    assert again.done and again.message.role == "assistant"


def test_ollama_answers(llama: Any) -> None:
    import ollama

    think = [{"role": "user", "content": "think"}]
    answer = llama.chat("taught", think, options=GREEDY, think=True)
    assert (answer.message.thinking, answer.message.content) == ("一 + 一", "二")
    whole = llama.generate("taught", "plain", options=ollama.Options(**GREEDY))
    assert whole.response == "the fox" and whole.total_duration > 0
    parts = list(llama.generate("taught", "plain", options=GREEDY, stream=True))
    assert "".join(part.response for part in parts) == "the fox" and parts[-1].done
    formed = llama.chat("taught", think, format=City.model_json_schema(), options=GREEDY)
    City.model_validate_json(formed.message.content)
    assert [model.model for model in llama.list().models] == ["taught", "small"]
    shown = llama.show("taught")
    assert "tools" in shown.capabilities and shown.modelinfo["general.architecture"] == "llama"
    assert [model.model for model in llama.ps().models] == ["taught"]
    assert len(llama.embed("small", ["a", "b"]).embeddings) == 2
    assert len(llama.embeddings("small", "a").embedding) > 0
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        llama.chat("none", think)
    assert caught.value.status_code == 404
    for part in (llama.pull, llama.delete):
        with pytest.raises(ollama.ResponseError, match="khaosz pull") as caught:
            part("x")
        assert caught.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="images"):
        list(llama.generate("taught", "x", images=[b"hi"], stream=True))
    assert json.loads(formed.message.content)
