"""Reasoning and tool calls, by a model that has memorised both, and forced on a random one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import WEATHER, Service, learnt, served

from khaosz.data.tokenizer import load_tokenizer
from khaosz.data.tokenizer.chat import render_chat
from khaosz.serve.schema import ChatRequest
from khaosz.serve.tools import add_tools, call_format, call_grammar

TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
GREEDY: dict[str, Any] = {"model": "taught", "temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module")
def learned(taught: Path) -> Iterator[Service]:
    with served(taught) as running:
        yield running


def user_turn(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def streamed(service: Service, **request: Any) -> tuple[dict[str, Any], str | None]:
    """The message that a client joins from deltas, and the finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    reason = None
    for chunk in service.client().chat.completions.create(**request, stream=True):
        [choice] = chunk.choices
        reason = choice.finish_reason or reason
        message["content"] += choice.delta.content or ""
        message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            known = message["tool_calls"].setdefault(call.index, {"name": "", "arguments": ""})
            assert call.function is not None
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""
    return message, reason


def test_reasoning_is_separated(learned: Service) -> None:
    request = {**GREEDY, "messages": user_turn("think")}
    [choice] = learned.client().chat.completions.create(**request).choices
    assert choice.message.content == "二" and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "一 + 一"  # type: ignore[attr-defined]
    message, reason = streamed(learned, **request)
    assert (message["content"], message["reasoning_content"], reason) == ("二", "一 + 一", "stop")
    plain = learned.client().chat.completions.create(**{**GREEDY, "messages": user_turn("plain")})
    assert plain.choices[0].message.content == "the fox"
    assert not hasattr(plain.choices[0].message, "reasoning_content")


def test_tool_call(learned: Service) -> None:
    request = {**GREEDY, "messages": user_turn("weather"), "tools": [WEATHER]}
    [choice] = learned.client().chat.completions.create(**request).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    [call] = choice.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "北京"}
    message, reason = streamed(learned, **request)
    assert reason == "tool_calls" and message["content"] == "I look."
    assert list(message["tool_calls"]) == [0]
    assert json.loads(message["tool_calls"][0]["arguments"]) == {"city": "北京"}


@pytest.mark.parametrize("stop", ["</tool_call>", "arguments", '"name'])
def test_stop_within_a_call_leaks_no_markup(learned: Service, stop: str) -> None:
    request = {**GREEDY, "messages": user_turn("weather"), "tools": [WEATHER], "stop": [stop]}
    [choice] = learned.client().chat.completions.create(**request).choices
    whole = stop == "</tool_call>"
    assert choice.message.content == "I look." and bool(choice.message.tool_calls) == whole
    message, reason = streamed(learned, **request)
    assert (message["content"], bool(message["tool_calls"])) == ("I look.", whole)
    assert reason == choice.finish_reason == ("tool_calls" if whole else "stop")


@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_tool_calls(learned: Service, parallel: bool) -> None:
    request = {
        **GREEDY, "messages": user_turn("both"), "tools": [WEATHER], "parallel_tool_calls": parallel
    }  # fmt: skip
    [choice] = learned.client().chat.completions.create(**request).choices
    cities = [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls]  # type: ignore[union-attr]
    assert cities == (["北京", "Paris"] if parallel else ["北京"])
    assert len(streamed(learned, **request)[0]["tool_calls"]) == len(cities)


def test_lone_surrogate_in_call(learned: Service) -> None:
    """An escape of a lone surrogate, as a weak model writes it within an emoji."""
    request = {**GREEDY, "messages": user_turn("half"), "tools": [WEATHER]}
    [choice] = learned.client().chat.completions.create(**request).choices
    [call] = choice.message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "?"}
    message, reason = streamed(learned, **request)
    assert (reason, message["tool_calls"][0]["arguments"]) == ("tool_calls", '{"city": "?"}')


def test_no_calls_without_tools(learned: Service) -> None:
    """`none` hides them from the model; markers that it still writes are plain text."""
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        request = {**GREEDY, "messages": user_turn("weather"), **more}
        [choice] = learned.client().chat.completions.create(**request).choices
        assert choice.message.tool_calls is None
        assert choice.finish_reason in ("stop", "length")


def test_tool_result_round_trip(learned: Service) -> None:
    """The client sends the assistant's message back unchanged, with the tool's result."""
    client = learned.client()
    messages = user_turn("weather")
    first = client.chat.completions.create(**{**GREEDY, "tools": [WEATHER], "messages": messages})
    [call] = first.choices[0].message.tool_calls or ()
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "晴"},
    ]
    again = client.chat.completions.create(
        **{**GREEDY, "tools": [WEATHER], "messages": messages, "max_tokens": 5}
    )
    assert again.usage is not None and first.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", "weather", "time"])
def test_required_tool_call(tiny: Path, service: Service, choice: str, seed: int) -> None:
    """By a model with random weights, which would not call a tool by itself."""
    named = {"type": "function", "function": {"name": choice}}
    request: dict[str, Any] = {
        "model": "tiny", "messages": user_turn("the fox"), "tools": [WEATHER, TIME], "seed": seed,
        "tool_choice": "required" if choice == "required" else named, "max_tokens": 1500,
        "parallel_tool_calls": False,
    }  # fmt: skip
    [answer] = service.client().chat.completions.create(**request).choices
    if answer.finish_reason == "length":  # a `time` without a schema may have any arguments
        assert choice != "weather"
        return
    if answer.finish_reason == "stop":  # or a number beyond float64, which is not sent on
        text = (answer.message.content or "").removeprefix("<tool_call>")
        assert choice != "weather" and "inf" in str(json.loads(text.removesuffix("</tool_call>")))
        return
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    [call] = answer.message.tool_calls or ()
    given = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert given in ({"city": "北京"}, {"city": "Paris"})
    assert choice in ("required", call.function.name)
    message, reason = streamed(service, **request)
    assert reason == "tool_calls"
    assert message["tool_calls"][0] == call.function.model_dump()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, None),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {
            "type": "nonsense"}}}], "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "x", "arguments": {}}}]}]},
         "messages.0.tool_calls.0.function.arguments"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]}}}, None),
    ],
)  # fmt: skip
def test_error_names_tool_field(service: Service, more: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        service.client().chat.completions.create(
            **{"model": "tiny", "messages": user_turn("x"), **more}
        )
    assert caught.value.param == param
    assert "tool" in str(caught.value)


def test_refuses_deep_nesting(service: Service) -> None:
    """Shallow enough for the JSON parser, too deep for the chat template."""
    deep = '{"a": ' * 900 + "1" + "}" * 900
    tool = '{"type": "function", "function": {"name": "f", "parameters": ' + deep + "}}"
    call = {"id": "a", "function": {"name": "f", "arguments": deep}}
    called = json.dumps({"role": "assistant", "tool_calls": [call]})
    for path, more in (
        ("/v1/chat/completions", f'"messages": {json.dumps(user_turn("x"))}, "tools": [{tool}]'),
        ("/v1/chat/completions", f'"messages": [{called}]'),
        ("/tokenize", f'"messages": [{called}]'),
    ):
        status, _, answer = service.ask("POST", path, f'{{"model": "tiny", {more}}}')
        assert (status, answer["error"]["message"]) == (400, "values nested too deep")


def test_template_without_tools(tiny: Path, tmp_path: Path) -> None:
    """Tools become part of the system message, since the template would ignore them."""
    tokenizer = load_tokenizer(tiny)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "time", "arguments": {}}}]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    ]  # fmt: skip
    assert add_tools(turns, [WEATHER], tokenizer) == (turns, [WEATHER])
    tokenizer.config["chat_template"] = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    messages, tools = add_tools(turns, [WEATHER], tokenizer)
    assert tools is None
    assert messages[0]["content"].startswith("Be brief.\n\nYou may call")
    assert json.dumps(WEATHER, ensure_ascii=False) in messages[0]["content"]
    assert messages[2]["content"] == '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert messages[3] == {
        "role": "user", "content": "<tool_response>\nnoon\n</tool_response>"
    }  # fmt: skip
    assert "weather" in render_chat(tokenizer, messages, tools)
    assert "weather" in render_chat(tokenizer, *add_tools(turns, [], tokenizer))


def test_templates_see_a_request_as_it_was_sent(tiny: Path) -> None:
    """Absent fields stay absent, tools keep their keys; arguments are objects, as in vLLM."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.config["chat_template"] = (
        "{% for m in messages %}{{ m | tojson(sort_keys=true) }}\n"
        "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
        "{{ tools | tojson }}"
    )
    tool = {"function": {"parameters": None, "strict": True, "name": "f"}, "type": "function"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "a", "reasoning_content": "t"},
        {"role": "user", "content": parts},
    ]
    request = ChatRequest.model_validate({"model": "m", "messages": messages, "tools": [tool]})
    sent = [message.for_template() for message in request.messages]
    lines = render_chat(tokenizer, *add_tools(sent, request.allowed_tools, tokenizer)).split("\n")
    assert lines[0] == '{"content": "q", "name": "Ann", "role": "user"}'
    assert json.loads(lines[1]) == {
        "role": "assistant",
        "tool_calls": [{**call, "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    assert lines[2] == '{"a": 1}' + json.dumps(messages[2], sort_keys=True)
    assert json.loads(lines[3]) == {**messages[3], "thinking": "t"}
    assert json.loads(lines[4]) == {"role": "user", "content": parts}
    assert lines[5] == json.dumps([tool])


FORECAST: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "forecast",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
# As MiniCPM5 and Qwen3.5 write a call.
CALLS = {
    "attributes": '<function name="forecast"><param name="city"><![CDATA[<5>]]></param>'
    '<param name="days">3</param></function>',
    "tags": "<tool_call>\n<function=forecast>\n<parameter=city>\n<5>\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
}


@pytest.fixture(scope="module")
def xml_caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    lessons = [
        ([*user_turn(name), {"role": "assistant", "content": f"So: {call}"}], [FORECAST])
        for name, call in CALLS.items()
    ]
    model = learnt(lessons, tmp_path_factory.mktemp("xml") / "taught")
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] += '{# <function name="f"><param name="x">1</param></function> #}'
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with served(model) as running:
        yield running


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_xml(xml_caller: Service, name: str) -> None:
    request = {**GREEDY, "messages": user_turn(name), "tools": [FORECAST]}
    [choice] = xml_caller.client().chat.completions.create(**request).choices
    [call] = choice.message.tool_calls or ()
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So:")
    assert json.loads(call.function.arguments) == {"city": "<5>", "days": 3}
    message, reason = streamed(xml_caller, **request)
    assert (reason, message["content"]) == ("tool_calls", "So:")
    assert json.loads(message["tool_calls"][0]["arguments"]) == {"city": "<5>", "days": 3}
    [cut] = xml_caller.client().chat.completions.create(**{**request, "max_tokens": 12}).choices
    assert cut.finish_reason == "length" and cut.message.content == "So:"


# The ends of a template that writes XML, and special tokens as MiniCPM5's tokenizer has them.
DIALECTS = {
    "attributes": ('{# <function name="f"> #}', ("<function", "</function>", "<param", "</param>")),
    "tags": ("{# <tool_call> <function=f> #}", ("<tool_call>", "</tool_call>")),
}


@pytest.fixture(scope="module")
def xml_forced(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = [tmp_path_factory.mktemp("xml") / name for name in DIALECTS]
    for model, (template, names) in zip(models, DIALECTS.values(), strict=True):
        shutil.copytree(tiny, model)
        tokenizer = (model / "tokenizer.json").read_text(encoding="utf-8")
        for i, name in enumerate(names):
            tokenizer = tokenizer.replace(f"<|reserved_{i}|>", name)
        (model / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        config["chat_template"] += template
        (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with served(*models) as running:
        yield running


PLACE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "place",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 8},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["name", "days", "tags"],
        },
    },
}


@pytest.mark.parametrize("name", DIALECTS)
def test_forced_calls_in_xml(xml_forced: Service, name: str) -> None:
    """By random weights: the call is always complete and its arguments fit their schema. A schema
    that XML cannot hold is forced as JSON."""
    validator = pytest.importorskip("jsonschema_rs").Draft202012Validator
    code = {"type": "string", "pattern": "^[A-Z]{3}$"}
    parameters = {"type": "object", "properties": {"code": code}, "required": ["code"]}
    parameters["additionalProperties"] = False
    airport = {"name": "airport", "parameters": parameters}
    tools = {"place": PLACE, "airport": {"type": "function", "function": airport}}
    for seed, chosen in enumerate(["place", "airport", None]):
        named = {"type": "function", "function": {"name": chosen}}
        request: dict[str, Any] = {
            "model": name, "messages": user_turn("the fox"), "tools": [*tools.values()],
            "seed": seed, "tool_choice": named if chosen else "required", "max_tokens": 1500,
            "parallel_tool_calls": False,
        }  # fmt: skip
        [choice] = xml_forced.client().chat.completions.create(**request).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        [call] = choice.message.tool_calls or ()
        assert call.type == "function" and call.function.name in ([chosen] if chosen else tools)
        parameters = tools[call.function.name]["function"]["parameters"]
        validator(parameters).validate(json.loads(call.function.arguments))
    message, reason = streamed(xml_forced, **request)
    assert reason == "tool_calls" and message["content"] == ""
    assert message["tool_calls"][0] == call.function.model_dump()


def test_a_model_is_forced_to_its_own_form_of_calls(xml_forced: Service) -> None:
    for name, start in (("attributes", '<[{<function}]> " name=\\"place\\">"'),
                        ("tags", '"<function=place>\\n"')):  # fmt: skip
        model = next(each for each in xml_forced.models.all if each.name == name)
        assert model.loaded is not None
        tokenizer = model.loaded.generator.tokenizer
        for token, i in tokenizer.special_ids.items():
            start = start.replace(f"{{{token}}}", str(i))
        assert f"f0: {start} " in call_grammar([PLACE], tokenizer, several=True)


def test_chat_template_decides_how_calls_are_written(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    for template, calls in (
        ('{{ tools }}<function name="{{ name }}"><param name="x">', "functions"),
        ("{{ tools }}<tool_call>\n<function={{ name }}>", "marked"),
        ("{{ tools }}<tool_call>\n{{ call | tojson }}", "marked"),
        ("{{ tools }}", "bare"),
        ("{{ messages }}", "marked"),
    ):
        tokenizer.config["chat_template"] = template
        assert call_format(tokenizer) == calls
