"""Loops of two tool calls and an answer: by the official client with a random model, whose calls
only a grammar can bring about, and by other projects' clients with a real model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Service
from tool_loop_clients import CLIENTS, SETTINGS

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
ASK = [{"role": "user", "content": "the fox"}]


def tool(name: str, **values: list[Any]) -> dict[str, Any]:
    """Of arguments that have one of these values."""
    properties = {key: {"enum": each} for key, each in values.items()}
    parameters = {
        "type": "object", "properties": properties, "required": list(values),
        "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOK_UP, ADD = tool("look_up", key=["a", "b"]), tool("add", x=[1, 2], y=[3])
ANSWER = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": tool("", total=[4, 5])["function"]["parameters"]},
}


def messages_of(service: Service, streamed: bool, **request: Any) -> Any:
    completions = service.client().chat.completions
    request = {"model": "tiny", "max_tokens": 300, "parallel_tool_calls": False, **request}
    if not streamed:
        return completions.create(**request).choices[0]
    with completions.stream(**request) as events:
        for event in events:
            if event.type == "chunk":
                for choice in event.chunk.choices:
                    calls = choice.delta.tool_calls or ()
                    assert all(call.index == 0 and call.id for call in calls)
        return events.get_final_completion().choices[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_loop_of_a_random_model(service: Service, streamed: bool) -> None:
    history: list[Any] = list(ASK)
    for name, values in (("look_up", {"key": "ab"}), ("add", {"x": (1, 2), "y": (3,)})):
        choice = messages_of(
            service, streamed, messages=history, tools=[LOOK_UP, ADD], seed=1,
            tool_choice={"type": "function", "function": {"name": name}},
        )  # fmt: skip
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        [call] = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", name)
        given = json.loads(call.function.arguments)
        assert given.keys() == values.keys()
        assert all(value in values[key] for key, value in given.items())
        history += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    choice = messages_of(service, streamed, messages=history, response_format=ANSWER, seed=1)
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert json.loads(choice.message.content)["total"] in (4, 5)


def test_required_call_beside_a_response_format(service: Service) -> None:
    """The format is that of a later answer; pydantic-ai sends both."""
    choice = messages_of(
        service, False, messages=ASK, tools=[ADD], tool_choice="required", response_format=ANSWER
    )
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]


def test_call_or_answer_in_a_response_format(service: Service) -> None:
    """Without a choice of tools the model may do either, and nothing else."""
    odd = {**ADD, "function": {**ADD["function"], "parameters": {"type": "nonsense"}}}
    kinds = set()
    for seed in range(12):
        choice = messages_of(
            service, False, messages=ASK, tools=[LOOK_UP, ADD], response_format=ANSWER, seed=seed,
            temperature=1,
        )  # fmt: skip
        calls = choice.message.tool_calls or ()
        kinds.add(bool(calls))
        if calls:
            assert calls[0].function.name in ("look_up", "add") and not choice.message.content
        else:
            assert json.loads(choice.message.content)["total"] in (4, 5)
    assert kinds == {True, False}
    # Schemas that the grammar cannot hold are accepted where no call is required.
    messages_of(service, False, messages=ASK, tools=[odd], response_format=ANSWER)


@pytest.fixture(scope="module")
def real_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `khaosz serve` with Qwen2.5-Coder-0.5B-Instruct."""
    path = Path(os.environ.get("KHAOSZ_QWEN", ""))
    if not path.is_file():
        folder = Path(os.environ.get("KHAOSZ_MODELS", tmp_path_factory.getbasetemp()))
        path = folder / NAME
        script = Path(__file__).parents[3] / "shared" / "tools" / "get_models.py"
        if not path.is_file() and script.is_file():
            subprocess.run([sys.executable, script, NAME, "--to", folder], check=False)
    if not path.is_file():
        pytest.skip(f"KHAOSZ_QWEN does not name {NAME}")
    command = [sys.executable, "-m", "khaosz", "serve", f"qwen={path}", "--port", "0"]
    command += ["--context", "4096", "--data", str(tmp_path_factory.mktemp("loops"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server:
        try:
            assert server.stdout is not None
            first = server.stdout.readline()
            match = re.match(r"qwen: (http://\S+/v1)", first)
            assert match is not None, first
            yield match[1]
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "streamed"])
@pytest.mark.parametrize("client", CLIENTS)
def test_loop_of_a_client(real_service: str, client: str, how: str) -> None:
    if importlib.util.find_spec(client if client != "langchain" else "langchain_openai") is None:
        pytest.skip(f"{client} is not installed")
    script = Path(__file__).with_name("tool_loop_clients.py")
    done = subprocess.run(
        [sys.executable, script, client, how, real_service, "qwen"], capture_output=True,
        encoding="utf-8", timeout=600, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    [[first, looked_up], second] = result["calls"]
    assert first == "price_of" and ("lamp" in looked_up["item"] or "台灯" in looked_up["item"])
    assert second == ["multiply", {"a": 12, "b": 37}]
    assert result["total"] == 12 * 37


@pytest.mark.slow
@pytest.mark.parametrize("question", ["What's the weather in Paris?", "Paris今天天气怎么样？"])
def test_call_that_nothing_requires(real_service: str, question: str) -> None:
    """This model writes calls without the markers of its template."""
    import openai

    weather = tool("get_weather", city=["Paris", "Rome"])
    with openai.OpenAI(base_url=real_service, api_key="none") as client:
        answer = client.chat.completions.create(
            model="qwen", messages=[{"role": "user", "content": question}], tools=[weather],
            **SETTINGS,
        )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls" and not answer.choices[0].message.content
