"""Ollama's API, without its client: see test_other_clients.py for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import WEATHER, Service, served, slowed

from khaosz.serve.ollama.schema import GenerateReply, OllamaChatReply, Shown, Tags
from khaosz.serve.retrieval_models import RetrievalModels

HELLO = [{"role": "user", "content": "the fox"}]
SHORT: dict[str, Any] = {"num_predict": 6, "temperature": 0}
BASE: dict[str, Any] = {"model": "tiny", "messages": HELLO, "options": SHORT}
TAUGHT: dict[str, Any] = {"model": "taught", "options": {"num_predict": 80, "temperature": 0}}
# Of the client's type; see test_other_clients.py.
OPTIONS: dict[str, Any] = {
    "embedding_only": False, "f16_kv": True, "frequency_penalty": 0.5, "logits_all": False,
    "low_vram": False, "main_gpu": 0, "mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0,
    "num_batch": 8, "num_ctx": 100_000, "num_gpu": 1, "num_keep": 4, "num_predict": -1,
    "num_thread": 2, "numa": False, "penalize_newline": True, "presence_penalty": 0.5,
    "repeat_last_n": 64, "repeat_penalty": 1.1, "seed": -1, "stop": ["x"], "temperature": 0.5,
    "tfs_z": 1.0, "top_k": -1, "top_p": 0.5, "typical_p": 0.5, "use_mlock": False, "use_mmap": True,
    "vocab_only": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def learned(taught: Path) -> Iterator[Service]:
    with served(taught, retrieval=RetrievalModels([f"small={taught}"])) as running:
        yield running


def ask(service: Service, path: str, **body: Any) -> tuple[int, Any]:
    status, _, answer = service.ask("POST", f"/api/{path}", json.dumps({"stream": False, **body}))
    return status, answer


def lines(service: Service, path: str, **body: Any) -> list[dict[str, Any]]:
    """Streaming is the default."""
    text = service.raw("POST", f"/api/{path}", json.dumps(body))
    return [json.loads(line) for line in text.splitlines()]


def test_whole_and_streamed_answers_are_the_same(service: Service) -> None:
    status, whole = ask(service, "chat", **BASE)
    assert status == 200
    OllamaChatReply.model_validate(whole)
    chat = service.client().chat.completions.create(
        model="tiny",
        temperature=0,
        max_tokens=6,
        messages=HELLO,  # type: ignore[arg-type]
    )
    assert whole["message"] == {"role": "assistant", "content": chat.choices[0].message.content}
    assert (whole["done"], whole["done_reason"], whole["eval_count"]) == (True, "length", 6)
    assert chat.usage is not None and whole["prompt_eval_count"] == chat.usage.prompt_tokens
    durations = [value for name, value in whole.items() if name.endswith("_duration")]
    assert len(durations) == 4 and all(value >= 0 for value in durations)
    parts = whole["load_duration"] + whole["prompt_eval_duration"] + whole["eval_duration"]
    assert 0 < parts <= whole["total_duration"]
    *pieces, last = lines(service, "chat", **BASE)
    assert "".join(piece["message"]["content"] for piece in pieces) == whole["message"]["content"]
    assert not any(piece["done"] for piece in pieces) and last["message"]["content"] == ""
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 6)
    OllamaChatReply.model_validate(last)


def test_generate(service: Service) -> None:
    more: dict[str, Any] = {"model": "tiny", "prompt": "the fox", "options": SHORT}
    status, whole = ask(service, "generate", **more)
    assert status == 200
    GenerateReply.model_validate(whole)
    assert whole["response"] == ask(service, "chat", **BASE)[1]["message"]["content"]
    *pieces, last = lines(service, "generate", **more)
    assert "".join(piece["response"] for piece in pieces) == whole["response"]
    GenerateReply.model_validate(last)
    raw = ask(service, "generate", **more, raw=True)[1]
    plain = service.client().completions.create(
        model="tiny", prompt="the fox", max_tokens=6, temperature=0
    )
    assert raw["response"] == plain.choices[0].text
    system = ask(service, "generate", **more, system="Be brief.")[1]
    assert system["prompt_eval_count"] > whole["prompt_eval_count"]


def test_requests_without_a_prompt_load_the_model(service: Service) -> None:
    for path in ("generate", "chat"):
        body = json.dumps({"model": "tiny", "keep_alive": "5m", "stream": False})
        status, headers, answer = service.ask("POST", f"/api/{path}", body)
        assert headers["content-type"] == "application/json"
        assert (status, answer["done"], answer["done_reason"]) == (200, True, "load")
        [line] = lines(service, path, model="tiny")
        assert line["done_reason"] == "load"


def test_every_option_is_known(service: Service) -> None:
    for name, value in OPTIONS.items():
        body = {**BASE, "options": {"num_predict": 3, name: value}}
        if name == "num_predict":
            body["options"]["stop"] = ["e", "o", "a", " "]  # it would fill the context
        status, answer = ask(service, "chat", **body)
        assert status == 200, (name, answer)
    for name, value in (("mirostat", 2), ("tfs_z", 0.5)):
        status, answer = ask(service, "chat", **{**BASE, "options": {name: value}})
        assert (status, answer) == (400, {"error": f"options.{name}: not supported by this server"})
    for name, value in (("temperature", -1), ("min_p", 1), ("nonsense", 1), ("stop", 5)):
        status, answer = ask(service, "chat", **{**BASE, "options": {name: value}})
        assert status == 400 and answer["error"].startswith(f"options.{name}: ")


def test_options_are_those_of_a_chat(service: Service) -> None:
    same = {"seed": 5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5}
    options = {**same, "repeat_penalty": 1.3, "num_predict": 12, "stop": "zz"}
    ours = {**same, "repetition_penalty": 1.3, "max_tokens": 12, "stop": "zz"}
    _, answer = ask(service, "chat", **{**BASE, "options": options})
    body = json.dumps({"model": "tiny", "messages": HELLO, **ours})
    _, _, chat = service.ask("POST", "/v1/chat/completions", body)
    assert answer["message"]["content"] == chat["choices"][0]["message"]["content"]
    _, off = ask(service, "chat", **{**BASE, "options": {**options, "repeat_last_n": 0}})
    _, none = ask(service, "chat", **{**BASE, "options": {**options, "repeat_penalty": 1.0}})
    assert off["message"] == none["message"]


def test_formats(service: Service) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["北京", "Paris"]}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    body = {**BASE, "options": {"num_predict": 200, "temperature": 0}}
    _, answer = ask(service, "chat", **body, format=schema)
    assert json.loads(answer["message"]["content"])["city"] in ("北京", "Paris")
    _, answer = ask(service, "chat", **body, format="json")
    assert answer["message"]["content"].startswith("{")
    assert ask(service, "chat", **body, format="")[0] == 200


def test_tool_calls(learned: Service) -> None:
    """The messages are sent back as they are, with the results, without ids."""
    more: Any = {**TAUGHT, "tools": [WEATHER]}
    both: list[Any] = [{"role": "user", "content": "both"}]
    _, whole = ask(learned, "chat", messages=both, **more)
    calls = whole["message"]["tool_calls"]
    arguments = [call["function"]["arguments"] for call in calls]
    assert arguments == [{"city": "北京"}, {"city": "Paris"}] and whole["done_reason"] == "stop"
    *pieces, _ = lines(learned, "chat", messages=both, **more)
    streamed = [call for piece in pieces for call in piece["message"].get("tool_calls", ())]
    assert [call["function"]["arguments"] for call in streamed] == arguments
    plain = [{"function": call["function"]} for call in calls]
    for history in (
        [*both, whole["message"], {"role": "tool", "content": "晴", "tool_name": "weather"}],
        [*both, {"role": "assistant", "content": "", "tool_calls": plain},
         {"role": "tool", "content": "晴"}, {"role": "tool", "content": "雨"}],
    ):  # fmt: skip
        status, answer = ask(learned, "chat", messages=[*history, both[0]], **more)
        assert status == 200, answer


def test_thinking(learned: Service) -> None:
    think: list[Any] = [{"role": "user", "content": "think"}]
    _, whole = ask(learned, "chat", messages=think, **TAUGHT)
    assert (whole["message"]["thinking"], whole["message"]["content"]) == ("一 + 一", "二")
    *pieces, _ = lines(learned, "chat", messages=think, think=True, **TAUGHT)
    thoughts = "".join(piece["message"].get("thinking", "") for piece in pieces)
    assert thoughts == "一 + 一"
    _, hidden = ask(learned, "chat", messages=think, think=False, **TAUGHT)
    assert hidden["message"] == {"role": "assistant", "content": "二"}
    _, answer = ask(learned, "generate", prompt="think", **TAUGHT)
    assert (answer["thinking"], answer["response"]) == ("一 + 一", "二")


def test_old_turns_are_left_out(service: Service) -> None:
    """As by Ollama, unless `truncate` is false."""
    messages = [{"role": "user", "content": "fox " * 400}, *HELLO] * 8
    status, answer = ask(service, "chat", **{**BASE, "messages": messages})
    assert status == 200 and answer["left_out"] > 0
    status, answer = ask(service, "chat", **{**BASE, "messages": messages}, truncate=False)
    assert status == 400 and "context" in answer["error"]


def test_embeddings(learned: Service) -> None:
    """`retrieval` has one embedder, named small."""
    status, answer = ask_embed(learned, model="small", input=["a", "b"])
    assert status == 200 and len(answer["embeddings"]) == 2
    [ours] = (
        learned.client().embeddings.create(model="small", input="a", encoding_format="float").data
    )
    assert answer["embeddings"][0] == pytest.approx(
        ours.embedding,
        abs=1e-6,  # another batch rounds otherwise
    )
    assert ask_embed(learned, model="small:latest", input="")[1]["embeddings"] == []
    body = json.dumps({"model": "small", "prompt": "a"})
    assert learned.ask("POST", "/api/embeddings", body)[2]["embedding"] == pytest.approx(
        ours.embedding, abs=1e-6
    )
    status, answer = ask_embed(learned, model="none", input="a")
    assert status == 404 and "'none' not found" in answer["error"]
    assert ask_embed(learned, model="small", input="a", dimensions=3)[0] == 400
    assert ask_embed(learned, model="small", input="a", truncate=False)[0] == 400


def ask_embed(service: Service, **body: Any) -> tuple[int, Any]:
    status, _, answer = service.ask("POST", "/api/embed", json.dumps(body))
    return status, answer


def test_models_are_described(learned: Service) -> None:
    _, _, tags = learned.ask("GET", "/api/tags")
    Tags.model_validate(tags)
    assert [each["name"] for each in tags["models"]] == ["taught", "small"]
    tag = tags["models"][0]
    assert tag["details"]["family"] == "llama" and tag["details"]["quantization_level"] == "F32"
    source = learned.models.all[0].source
    assert tag["size"] == sum(path.stat().st_size for path in source.iterdir())
    for name in ("taught", "taught:latest"):
        status, _, shown = learned.ask("POST", "/api/show", json.dumps({"model": name}))
        assert status == 200
        Shown.model_validate(shown)
        assert shown["capabilities"] == ["completion", "tools", "thinking"]
        info = shown["model_info"]
        assert info["general.architecture"] == "llama" and info["llama.context_length"] == 2048
        runner = learned.engine.runner
        assert info["llama.embedding_length"] == runner.config.hidden_size
    shown = learned.ask("POST", "/api/show", json.dumps({"name": "small"}))[2]
    assert shown["capabilities"] == ["embedding"]
    [loaded] = learned.ask("GET", "/api/ps")[2]["models"]
    assert loaded["name"] == "taught" and loaded["size"] > 0
    assert learned.ask("GET", "/api/version")[2]["version"].count(".") == 2
    assert learned.ask("POST", "/api/show", json.dumps({"model": "none"}))[0] == 404
    assert ask(learned, "chat", **{**TAUGHT, "model": "taught:latest"}, messages=HELLO)[0] == 200


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
         "messages.0.images: this model reads text only"),
        ("generate", {"prompt": "x", "images": ["aGk="]}, "images: this model reads text only"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template: not supported"),
        ("generate", {"prompt": "x", "context": [1, 2]}, "context: not supported"),
        ("generate", {"prompt": "x", "width": 64}, "width: not supported"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix: this model cannot fill in a gap"),
        ("generate", {"prompt": "x", "raw": True, "format": "json"}, "format: not supported with"),
        ("chat", {"messages": HELLO, "format": {"type": "odd"}}, "format "),
        ("chat", {"messages": HELLO, "nonsense": 1}, "nonsense: unknown field"),
        ("chat", {"messages": [{"role": "odd"}]}, "messages.0.role"),
    ],
)  # fmt: skip
def test_refused(service: Service, path: str, more: dict[str, Any], words: str) -> None:
    status, answer = ask(service, path, model="tiny", **more)
    assert status == 400 and list(answer) == ["error"] and words in answer["error"], answer


def test_models_are_managed_elsewhere(service: Service) -> None:
    for method, path in (
        ("POST", "pull"), ("POST", "push"), ("POST", "create"), ("POST", "copy"),
        ("DELETE", "delete"), ("POST", "blobs/sha256:0"),
    ):  # fmt: skip
        status, _, answer = service.ask(method, f"/api/{path}", json.dumps({"model": "x"}))
        assert (status, list(answer)) == (501, ["error"]) and "khaosz pull" in answer["error"]
    status, _, answer = service.ask("POST", "/api/none", "{}")
    assert (status, answer) == (404, {"error": "Not Found"})
    status, answer = ask(service, "chat", **{**BASE, "model": "none"})
    assert status == 404 and "not found" in answer["error"]


def test_waiting_lines_and_late_errors(tiny: Path) -> None:
    """JSON lines have no comments: a piece without text keeps the connection open."""
    with served(tiny, heartbeat=0.05, timeout=0.5) as service:
        slowed(service, "tiny")
        service.engine.step_tokens = 16
        found = lines(
            service, "chat", model="tiny", options={"num_predict": 2000, "temperature": 0},
            messages=[{"role": "user", "content": "fox " * 300}],
        )  # fmt: skip
        assert found[0]["message"] == {"role": "assistant", "content": ""}
        assert list(found[-1]) == ["error"] and "longer" in found[-1]["error"]
