"""`truncation: auto`: the oldest turns of a conversation that does not fit are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import CONTEXT, Service, served

from khaosz.inference.generator import Generator
from khaosz.serve.messages import InputMessage, Message
from khaosz.serve.truncation import last_turns

SYSTEM = {"role": "system", "content": "Be brief."}


def turns(count: int, words: int = 40) -> list[dict[str, str]]:
    """So many answered questions, each with a text of its own, and an open one."""
    messages = []
    for i in range(count):
        messages.append({"role": "user", "content": f"{i} " + "春 fox " * words})
        messages.append({"role": "assistant", "content": f"the quick {i}"})
    return [*messages, {"role": "user", "content": "last"}]


@pytest.fixture(scope="module")
def place(tiny: Path) -> Iterator[Service]:
    with served(tiny) as running:
        yield running


def post(service: Service, **body: Any) -> tuple[int, Any]:
    request = {"model": "tiny", "max_tokens": 4, "temperature": 0, **body}
    status, _, answer = service.ask("POST", "/v1/chat/completions", json.dumps(request))
    return status, answer


def test_oldest_turns_are_left_out(place: Service) -> None:
    messages = [SYSTEM, *turns(30)]
    status, refused = post(place, messages=messages)
    assert status == 400 and refused["error"]["code"] == "context_length_exceeded"
    status, answer = post(place, messages=messages, truncation="auto")
    assert status == 200, answer
    left_out = answer["left_out"]
    assert 0 < left_out < len(messages) - 2 and left_out % 2 == 0
    kept = [SYSTEM, *messages[1 + left_out :]]
    status, same = post(place, messages=kept, truncation="auto")
    assert same["left_out"] == 0
    assert same["choices"] == answer["choices"]
    assert same["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] < CONTEXT


def test_streams_report_it_in_the_first_chunk(place: Service) -> None:
    stream = place.client().chat.completions.create(
        model="tiny", messages=turns(30), max_tokens=4, stream=True,
        extra_body={"truncation": "auto"},
    )  # type: ignore[call-overload]  # fmt: skip
    left_out = [getattr(chunk, "left_out", None) for chunk in stream]
    assert left_out[0] > 0 and set(left_out[1:]) == {None}


def test_nothing_is_left_out_unless_asked(place: Service) -> None:
    for truncation in (None, "disabled"):
        status, answer = post(place, messages=turns(2), truncation=truncation)
        assert status == 200 and "left_out" not in answer
        assert post(place, messages=turns(30), truncation=truncation)[0] == 400
    status, answer = post(place, messages=turns(2), truncation="auto")
    assert status == 200 and answer["left_out"] == 0
    assert post(place, messages=turns(2), truncation="middle")[0] == 400


@pytest.mark.parametrize("limit", [1, 400, 100_000, None])
def test_answer_has_room(place: Service, limit: int | None) -> None:
    """Its limit, but at most a quarter of the context."""
    reserved = min(limit or 1024, CONTEXT // 4)
    body = {"model": "tiny", "messages": turns(30), "truncation": "auto", "max_tokens": limit}
    status, _, tokens = place.ask("POST", "/tokenize", json.dumps(body))
    assert status == 200
    turn = 250  # tokens of one at most, so that no further one would fit
    assert CONTEXT - reserved - turn * 2 < tokens["count"] <= CONTEXT - reserved
    assert len(tokens["tokens"]) == tokens["count"] and tokens["left_out"] > 0


def test_tokenize_counts_what_a_chat_sends(place: Service) -> None:
    body = {"model": "tiny", "messages": turns(30), "truncation": "auto", "max_tokens": 4}
    _, _, tokens = place.ask("POST", "/tokenize", json.dumps(body))
    _, answer = post(place, messages=turns(30), truncation="auto")
    assert tokens["count"] == answer["usage"]["prompt_tokens"]
    assert tokens["left_out"] == answer["left_out"]
    _, _, whole = place.ask("POST", "/tokenize", json.dumps({**body, "truncation": None}))
    assert whole["count"] > CONTEXT and "left_out" not in whole
    body = {"model": "tiny", "prompt": "x", "truncation": "auto"}
    assert place.ask("POST", "/tokenize", json.dumps(body))[0] == 400


def test_last_question_alone_too_long_is_refused(place: Service) -> None:
    messages = [*turns(3)[:-1], {"role": "user", "content": "fox " * CONTEXT}]
    status, answer = post(place, messages=messages, truncation="auto")
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        place.client().chat.completions.create(
            model="tiny", messages=[{"role": "system", "content": "fox " * CONTEXT}, *messages],
            extra_body={"truncation": "auto"},
        )  # type: ignore[call-overload]  # fmt: skip


def test_results_of_tools_stay_with_their_question(place: Service) -> None:
    """A conversation never starts with the result of a call that was left out."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = []
    for question, answer in zip(*[iter(turns(30)[:-1])] * 2, strict=True):
        messages += [question, {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "c", "content": "3"}, answer]
    status, answer = post(place, messages=[*messages, turns(0)[0]], truncation="auto")
    assert status == 200 and answer["left_out"] % 4 == 0 < answer["left_out"]


@pytest.fixture(scope="module")
def generator(tiny: Path) -> Generator:
    return Generator.from_directory(tiny)


def messages_of(raw: list[dict[str, str]]) -> list[Message]:
    answers: list[Any] = [InputMessage.model_validate({**each, "role": "user"}) for each in raw]
    return [
        each.model_copy(update={"role": its["role"]})
        for each, its in zip(answers, raw, strict=True)
    ]


def test_several_of_many_turns_are_left_out_at_once(generator: Generator) -> None:
    """So that the next prompts start alike and are found in the prefix cache."""
    starts = []
    for count in range(40, 72):
        raw = turns(count, 2)
        kept, left_out = last_turns(messages_of(raw), 600, generator)
        assert left_out + len(kept) == len(raw)
        assert len(generator.chat_ids([each.for_template() for each in kept])) <= 600
        starts.append(left_out)
    assert starts == sorted(starts) and starts[-1] > 0
    assert len(set(starts)) <= len(starts) / 3


def test_turns_of_unusual_conversations(generator: Generator) -> None:
    def kept_roles(roles: str, room: int) -> str:
        names = {"s": "system", "u": "user", "a": "assistant"}
        raw = [{"role": names[each], "content": "fox " * 20} for each in roles]
        kept, left_out = last_turns(messages_of(raw), room, generator)
        assert len(kept) + left_out == len(roles)
        return "".join(each.role[0] for each in kept)

    for roles, expected in {
        "uaua": "ua", "suauau": "su", "ssuauau": "ssu", "auauau": "u", "u": "u", "ss": "ss",
        "aaa": "aaa", "suasuau": "su", "uauua": "ua",
    }.items():  # fmt: skip
        assert kept_roles(roles, 1) == expected
        assert kept_roles(roles, 10_000) == roles
