"""Every field that the openai package can send, and its own answers sent back as history."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
from openai.types import completion_create_params as completions
from openai.types import embedding_create_params as embeddings
from openai.types.chat import completion_create_params as chats
from pydantic import BaseModel
from serving import WEATHER, Service, served
from tiny_models import TEXTS, random_model

from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.interop.huggingface import save_model

HELLO = [{"role": "user", "content": "the fox"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the fox", "max_tokens": 3}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}

# A value of each field, and of those that are refused by name.
SHARED: dict[str, Any] = {
    "model": "tiny", "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"5": 1},
    "max_tokens": 3, "n": 2, "seed": 1, "stop": ["x"], "stream_options": None, "temperature": 0.5,
    "top_p": 0, "user": "me",
}  # fmt: skip
CHAT_FIELDS: dict[str, Any] = {
    **SHARED, "messages": HELLO, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": None,
    "metadata": {"a": "b"}, "modalities": ["text"], "moderation": {"model": "x"},
    "parallel_tool_calls": True, "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "x", "prompt_cache_options": {}, "prompt_cache_retention": "24h",
    "reasoning_effort": "low", "response_format": {"type": "text"}, "safety_identifier": "x",
    "service_tier": "auto", "store": True, "tool_choice": "auto", "tools": [], "verbosity": "low",
}  # fmt: skip
CHAT_REFUSED: dict[str, Any] = {
    "audio": {"voice": "x", "format": "wav"}, "function_call": "auto", "functions": [FUNCTION],
    "web_search_options": {"search_context_size": "low"},
}  # fmt: skip
TEXT_FIELDS: dict[str, Any] = {**SHARED, "prompt": ["the fox", [5, 6]], "best_of": 1, "echo": False}
TEXT_REFUSED: dict[str, Any] = {"best_of": 3, "echo": True, "logprobs": 1, "suffix": "x"}
VECTOR_FIELDS = {"model", "input", "dimensions", "encoding_format", "user"}  # see test_vectors.py


def test_every_typed_field_is_known() -> None:
    """New fields of the package want a decision."""
    typed = typing.get_type_hints(chats.CompletionCreateParamsNonStreaming)
    assert typed.keys() - {"stream"} == CHAT_FIELDS.keys() | CHAT_REFUSED.keys()
    typed = typing.get_type_hints(completions.CompletionCreateParamsNonStreaming)
    assert typed.keys() - {"stream"} == TEXT_FIELDS.keys() | TEXT_REFUSED.keys()
    assert typing.get_type_hints(embeddings.EmbeddingCreateParams).keys() == VECTOR_FIELDS


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_typed_fields(service: Service, path: str) -> None:
    chat = path.startswith("chat")
    base, fields, refused = (
        (CHAT, CHAT_FIELDS, CHAT_REFUSED) if chat else (TEXT, TEXT_FIELDS, TEXT_REFUSED)
    )
    for name, value in fields.items():
        status, _, answer = service.ask("POST", f"/v1/{path}", json.dumps({**base, name: value}))
        assert status == 200, (name, answer)
    nothing = {**base, **dict.fromkeys(refused)}
    assert service.ask("POST", f"/v1/{path}", json.dumps(nothing))[0] == 200
    for name, value in refused.items():
        status, _, answer = service.ask("POST", f"/v1/{path}", json.dumps({**base, name: value}))
        error = answer["error"]
        assert (status, error["param"]) == (400, name), (name, answer)
        assert name in error["message"] and len(error["message"]) < 100


def test_media_are_refused_in_words(service: Service) -> None:
    for kind, name in (("image_url", "images"), ("input_audio", "sound"), ("file", "files")):
        parts = [{"type": "text", "text": "what is it?"}, {"type": kind, kind: {"url": "x"}}]
        body = {**CHAT, "messages": [{"role": "user", "content": parts}]}
        status, _, answer = service.ask("POST", "/v1/chat/completions", json.dumps(body))
        assert status == 400 and answer["error"]["param"] == "messages.0.content"
        assert f"reads text only: {name}" in answer["error"]["message"]


def test_zero_top_p_takes_the_most_likely_token(service: Service) -> None:
    client = service.client()
    greedy = client.chat.completions.create(**{**CHAT, "max_tokens": 12}, temperature=0)
    nucleus = client.chat.completions.create(**{**CHAT, "max_tokens": 12}, top_p=0, temperature=1)
    assert nucleus.choices[0].message.content == greedy.choices[0].message.content


def test_the_newer_token_limit_counts(service: Service) -> None:
    answer = service.client().chat.completions.create(
        **{**CHAT, "max_tokens": 9}, max_completion_tokens=2, temperature=0
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 2


@pytest.mark.parametrize("n", [1, 2])
def test_list_of_prompts(service: Service, n: int) -> None:
    client, prompts = service.client(), ["the fox", "春眠", "x"]
    more: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "n": n, "seed": 4}
    together = client.completions.create(prompt=prompts, **more)
    alone = [client.completions.create(prompt=prompt, **more) for prompt in prompts]
    assert [c.index for c in together.choices] == list(range(3 * n))
    texts = [choice.text for each in alone for choice in each.choices]
    assert [choice.text for choice in together.choices] == texts
    assert together.usage is not None and all(each.usage is not None for each in alone)
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(together.usage, field) == sum(getattr(e.usage, field) for e in alone)
    pieces = [""] * len(texts)
    for chunk in client.completions.create(prompt=prompts, stream=True, **more):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == texts


class City(BaseModel):
    name: str
    size: int


def test_answers_are_accepted_as_history(service: Service) -> None:
    """Messages as the client's objects dump them, with every field that it adds."""
    client, tool = service.client(), {"type": "function", "function": FUNCTION}
    parsed = client.chat.completions.parse(
        **{**CHAT, "max_tokens": 400}, response_format=City, temperature=0,
        extra_body={"logit_bias": {}},
    )  # fmt: skip
    called = client.chat.completions.create(
        **{**CHAT, "max_tokens": 200}, tools=[WEATHER], tool_choice="required", temperature=0
    ).choices[0].message  # fmt: skip
    assert called.tool_calls
    plain = client.chat.completions.create(**CHAT).choices[0].message
    dumped = parsed.choices[0].message.model_dump(warnings=False)
    assert "parsed" in dumped
    call = {**called.tool_calls[0].model_dump(), "index": 0}
    empty = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    answered = [{"role": "tool", "tool_call_id": id, "content": "5"} for id in (call["id"], "c")]
    nothing = {"role": "assistant", "content": None, "annotations": None, "tool_calls": []}
    history: list[Any] = [
        *HELLO, dumped, *HELLO, plain.model_dump(), *HELLO, plain, *HELLO, called, answered[0],
        {**called.model_dump(), "tool_calls": [
            {**call, "function": {**call["function"], "parsed_arguments": {"city": "Paris"}}}
        ]}, answered[0],
        {"role": "assistant", "content": "", "tool_calls": [empty], "refusal": "no"}, answered[1],
        nothing, {"role": "user", "name": "bob", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"},
                                          {"type": "refusal", "refusal": "b"}]}, *HELLO,
    ]  # fmt: skip
    for tools in ({"tools": [WEATHER, tool]}, {}):
        client.chat.completions.create(**{**CHAT, "messages": history}, **tools)


def test_allowed_tools_restrict_the_choice(service: Service) -> None:
    names = [{"type": "function", "function": {"name": "weather"}}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    tools = [{"type": "function", "function": FUNCTION}, WEATHER]
    more: Any = {"tools": tools, "tool_choice": allowed, "max_tokens": 200}
    for seed in range(3):
        answer = service.client().chat.completions.create(**{**CHAT, **more}, seed=seed)
        calls = answer.choices[0].message.tool_calls or ()
        assert {call.function.name for call in calls} == {"weather"}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Tokenizer]]:
    """A model whose tokenizer has the tokens of a gap to fill."""
    folder = tmp_path_factory.mktemp("fill") / "filler"
    plain = train_tokenizer(iter(TEXTS), 300)
    backend = tokenizers.Tokenizer.from_str(plain.serialized.decode())
    backend.add_special_tokens(["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"])
    tokenizer = Tokenizer(backend.to_str().encode(), plain.config)
    tokenizer.save(folder)
    save_model(random_model(303), folder, bos_id=tokenizer.bos_id, eos_ids=[tokenizer.eos_id])
    with served(folder) as service:
        yield service, tokenizer


def test_suffix_is_the_text_after_the_gap(filler: tuple[Service, Tokenizer]) -> None:
    service, tokenizer = filler
    client, ids = service.client(), tokenizer.special_ids
    more: dict[str, Any] = {"model": "filler", "max_tokens": 8, "temperature": 0}
    gap = client.completions.create(prompt="the quick", suffix=" fox", **more)
    prompt = [ids["<|fim_prefix|>"], *tokenizer.encode("the quick"), ids["<|fim_suffix|>"]]
    prompt += [*tokenizer.encode(" fox"), ids["<|fim_middle|>"]]
    same = client.completions.create(prompt=prompt, **more)
    assert gap.choices[0].text == same.choices[0].text
    assert gap.usage is not None and gap.usage.prompt_tokens == len(prompt)
