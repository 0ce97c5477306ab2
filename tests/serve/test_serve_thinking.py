"""Thoughts by request: switched, with an effort, with a budget, in every protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Service, served

from khaosz.data.tokenizer.chat_template import CHAT_TEMPLATE

THINK = [{"role": "user", "content": "think"}]
BASE: dict[str, Any] = {"model": "switched", "messages": THINK, "temperature": 0, "max_tokens": 60}
_MARKER = "{{- '<|assistant|>' }}\n{%- endif %}\n"
_SWITCH = """\
{{- '<|assistant|>' }}
    {%- if reasoning_effort %}{{- reasoning_effort }}{%- endif %}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def switched_model(taught: Path, folder: Path) -> Path:
    shutil.copytree(taught, folder)
    assert CHAT_TEMPLATE.endswith(_MARKER)
    template = CHAT_TEMPLATE.removesuffix(_MARKER) + _SWITCH
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    recommended = {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    return folder


@pytest.fixture(scope="module")
def switched(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The taught model, which thinks, with a switch in its template."""
    folder = switched_model(taught, tmp_path_factory.mktemp("thinking") / "switched")
    record = {"name": "smollm2-135m", "reference": "", "source": "", "revision": None}
    record |= {"licence": None, "model": "", "bytes": 1}  # an English model
    (folder / "pulled.json").write_text(json.dumps(record))
    with served(f"switched={folder}", taught) as running:
        yield running


def ask(service: Service, path: str, **body: Any) -> Any:
    status, _, answer = service.ask("POST", path, json.dumps(body))
    assert status == 200, answer
    return answer


def prompt(service: Service, **body: Any) -> str:
    """The prompt of a chat, as text."""
    ids = ask(service, "/tokenize", model="switched", messages=THINK, **body)["tokens"]
    return service.generator.tokenizer.decode(ids)


def test_models_say_what_they_do(switched: Service) -> None:
    cards = {card["id"]: card for card in switched.ask("GET", "/v1/models")[2]["data"]}
    card = cards["switched"]
    assert card["thinking"] == "switch_on"
    assert card["sampling"] == {
        "temperature": 0.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1,
    }  # fmt: skip
    assert (card["languages"], cards["taught"]["languages"]) == (["en"], None)
    assert cards["taught"]["thinking"] == "none"
    assert cards["taught"]["sampling"] == {"temperature": 0.8, "top_p": 0.95}


def test_the_switch(switched: Service) -> None:
    message = ask(switched, "/v1/chat/completions", **BASE)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("一 + 一", "二")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt(switched, **off) == prompt(switched) + "<think>\n\n</think>\n\n"
    counts = {
        name: ask(switched, "/v1/chat/completions", **BASE, **more)["usage"]["prompt_tokens"]
        for name, more in {
            "default": {}, "off": off, "none": {"reasoning_effort": "none"},
            "low": {"reasoning_effort": "low"},
            "on": {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
        }.items()
    }  # fmt: skip
    assert counts["off"] == counts["none"] > counts["default"] == counts["on"]
    assert counts["low"] == counts["default"] + len(switched.generator.tokenizer.encode("low"))


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "eos_token"])
def test_reserved_variables(switched: Service, name: str) -> None:
    body = json.dumps({**BASE, "chat_template_kwargs": {name: 1}})
    status, _, answer = switched.ask("POST", "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == "chat_template_kwargs"
    assert name in answer["error"]["message"]


def test_other_protocols_switch_and_bound_thoughts(switched: Service) -> None:
    """The prompt's tokens tell which one it was; the budget closes thoughts after one token."""
    off = len(switched.generator.tokenizer.encode("<think>\n\n</think>\n\n"))
    on = ask(switched, "/v1/chat/completions", **BASE)["usage"]["prompt_tokens"]

    item: dict[str, Any] = {"model": "switched", "input": "think", "temperature": 0}
    item |= {"max_output_tokens": 60}
    for more, count in (({"reasoning": {"effort": "none"}}, on + off), ({}, on)):
        answer = ask(switched, "/v1/responses", **item, **more)
        assert answer["usage"]["input_tokens"] == count
    bounded = ask(switched, "/v1/responses", **item, thinking_budget=1)
    assert bounded["output"][0]["content"][0]["text"] == "一"

    options = {"num_predict": 60, "temperature": 0}
    chat: dict[str, Any] = {"model": "switched", "messages": THINK, "options": options}
    chat |= {"stream": False}
    assert ask(switched, "/api/chat", **chat, think=False)["prompt_eval_count"] == on + off
    assert ask(switched, "/api/chat", **chat, think=True)["prompt_eval_count"] == on
    bounded = ask(switched, "/api/chat", **chat, thinking_budget=1)
    assert bounded["message"]["thinking"] == "一"

    claude: dict[str, Any] = {"model": "switched", "messages": THINK, "max_tokens": 60}
    claude |= {"temperature": 0}
    usage = ask(switched, "/v1/messages", **claude)["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == on + off
    enabled = {"type": "enabled", "budget_tokens": 1}
    bounded = ask(switched, "/v1/messages", **claude, thinking=enabled)
    assert bounded["content"][0]["thinking"] == "一"


def test_a_budget_in_a_stream(switched: Service) -> None:
    body = {**BASE, "stream": True, "thinking_budget": 1}
    text = switched.raw("POST", "/v1/chat/completions", json.dumps(body))
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "一"
    assert not any("think>" in delta.get("content", "") for delta in deltas)


def test_a_language_that_the_model_lacks(switched: Service) -> None:
    """Said at the first message in it, in every protocol, and in the first chunk of a stream."""
    question = [{"role": "user", "content": "你好，你是谁？"}]
    body = {**BASE, "messages": question, "max_tokens": 4}
    warning = ask(switched, "/v1/chat/completions", **body)["warning"]
    assert warning["code"] == "language" and warning["language"] == "zh"
    assert warning["model"] in warning["message"] and "中文" in warning["message"]
    text = switched.raw("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}))
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [chunk.get("warning") for chunk in chunks[:2]] == [warning, None]
    claude = {"model": "switched", "messages": question, "max_tokens": 4}
    assert ask(switched, "/v1/messages", **claude)["warning"] == warning
    item = {"model": "switched", "input": question[0]["content"], "max_output_tokens": 4}
    assert ask(switched, "/v1/responses", **item)["warning"] == warning
    options = {"model": "switched", "messages": question, "stream": False}
    assert ask(switched, "/api/chat", **options)["warning"] == warning
    again = [*question, {"role": "assistant", "content": "?"}, *question]
    for messages in (again, THINK):
        answer = ask(switched, "/v1/chat/completions", **{**body, "messages": messages})
        assert "warning" not in answer
    plain = ask(switched, "/v1/chat/completions", **{**body, "model": "taught"})
    assert "warning" not in plain  # nothing is known of it
