"""Load, disconnecting clients, failing engines, and access checks."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Service, open_requests, served, slowed, wait_until

import khaosz.serve
from khaosz.errors import ConfigError
from khaosz.inference.request import Sequence
from khaosz.interop.models import default_name
from khaosz.serve.guard import MAX_BODY, Guard
from khaosz.serve.models import Limits
from khaosz.serve.run import Address, is_loopback, listen, serve

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
LONG: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 1900, "temperature": 0}


def raw_request(service: Service, body: dict[str, Any]) -> socket.socket:
    """A chat whose response is not read."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{service.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_while_decoding_frees_slot(service: Service, stream: bool) -> None:
    connection = raw_request(service, {**LONG, "stream": stream})
    wait_until(lambda: any(each.generated for each in service.engine._running))
    connection.close()
    wait_until(lambda: not service.engine.unfinished, seconds=0.5)  # the whole answer takes longer
    assert open_requests(service) == 0


def test_openai_client_disconnects(service: Service) -> None:
    stream = service.client().chat.completions.create(**LONG, stream=True)
    for _ in range(3):
        next(iter(stream))
    stream.close()
    wait_until(lambda: not service.engine.unfinished, seconds=0.5)


def block_steps(service: Service) -> tuple[list[int], threading.Event]:
    """The numbers of chunks of the steps that started, and the event that lets steps run."""
    runner = service.engine.runner
    run, steps, resume = runner.run, [], threading.Event()

    def slow(chunks: Any) -> Any:
        steps.append(len(chunks))
        assert resume.wait(60)
        return run(chunks)

    runner.run = slow  # type: ignore[method-assign]
    return steps, resume


def test_silent_streams_send_comments(tiny: Path) -> None:
    """The engine is blocked in the first request's prompt, and cannot add the second one."""
    short = {**LONG, "max_tokens": 4, "stream": True}
    with served(tiny, heartbeat=0.02) as service:
        steps, resume = block_steps(service)
        connections = [raw_request(service, short)]
        wait_until(lambda: bool(steps))
        connections.append(raw_request(service, short))
        texts = []
        for connection in connections:
            text = b""
            while text.count(b": waiting\n\n") < 3:
                text += connection.recv(1 << 16)
            texts.append(text)
        assert all(b"data:" not in text for text in texts)
        resume.set()
        for connection, text in zip(connections, texts, strict=True):
            while not text.endswith(b"0\r\n\r\n"):
                text += connection.recv(1 << 16)
            assert text.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in text
            connection.close()
        wait_until(lambda: open_requests(service) == 0)
        # Clients skip the comments.
        stream = service.client().chat.completions.create(**short)
        whole = service.client().chat.completions.create(**{**short, "stream": False})
        joined = "".join(c.choices[0].delta.content or "" for c in stream)
        assert joined == whole.choices[0].message.content


def test_error_after_the_stream_began_is_an_event(tiny: Path) -> None:
    with served(tiny, heartbeat=0.001) as service:
        long = [{"role": "user", "content": "春 fox " * 20_000}]  # encoding takes longer
        with pytest.raises(openai.APIError, match="the model's context"):
            list(
                service.client().chat.completions.create(
                    **{**LONG, "messages": long, "stream": True}
                )
            )
        with pytest.raises(openai.BadRequestError, match="the model's context"):
            service.client().chat.completions.create(**{**LONG, "messages": long})
        wait_until(lambda: open_requests(service) == 0)
        loaded = service.models.all[0].loaded
        assert loaded is not None
        wait_until(lambda: loaded.users == 0)


def test_disconnect_during_prefill_frees_slot(tiny: Path) -> None:
    """The engine is blocked in the first part of the prompt until the client has disconnected."""
    with served(tiny, step_tokens=16) as service:
        steps, resume = block_steps(service)
        body = {**LONG, "messages": [{"role": "user", "content": "春 fox " * 200}], "stream": True}
        connection = raw_request(service, body)
        wait_until(lambda: len(steps) == 1)
        connection.close()
        wait_until(lambda: open_requests(service) == 0)
        resume.set()
        wait_until(lambda: not service.engine.unfinished)
        assert len(steps) == 1, "the rest of the prompt was processed"


def test_stalled_reader_loses_slot_at_timeout(tiny: Path) -> None:
    """The answer is larger than the socket buffers, so that the server has to wait for the
    client."""
    with served(tiny, timeout=2) as service:
        loud = {"n": 32, "logprobs": True, "top_logprobs": 20, "stream": True}
        with raw_request(service, {**LONG, **loud}):
            wait_until(lambda: open_requests(service) == 1)
            wait_until(lambda: open_requests(service) == 0, seconds=20)
            loaded = service.models.all[0].loaded
            assert loaded is not None and loaded.users == 0


def test_timeout_includes_waiting_for_engine(tiny: Path) -> None:
    """The engine is blocked in a step, and cannot add a request."""
    with served(tiny, timeout=1) as service:
        steps, resume = block_steps(service)
        connection = raw_request(service, {**LONG, "stream": True})
        try:
            wait_until(lambda: bool(steps))
            with pytest.raises(openai.APIStatusError) as late:
                service.client().chat.completions.create(**LONG)
            assert late.value.status_code == 504 and late.value.code == "request_timeout"
            wait_until(lambda: open_requests(service) == 0)
        finally:
            resume.set()
            connection.close()
        wait_until(lambda: not service.engine.unfinished)
        service.client().chat.completions.create(**{**LONG, "max_tokens": 2})


def test_full_queue_sends_retry_after(tiny: Path) -> None:
    with served(tiny, limits=Limits(max_queue=1)) as service:
        first = raw_request(service, {**LONG, "stream": True})
        wait_until(lambda: service.engine.unfinished)
        with pytest.raises(openai.InternalServerError) as full:
            service.client().chat.completions.create(**LONG)
        assert full.value.status_code == 503 and full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        first.close()
        wait_until(lambda: not service.engine.unfinished)
        service.client().chat.completions.create(**{**LONG, "max_tokens": 2})


def test_engine_recovers_from_failed_step(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tiny) as service:
        run = service.engine.runner.run
        short = {**LONG, "max_tokens": 8, "messages": [{"role": "user", "content": "fox " * 60}]}

        def broken(chunks: Any) -> Any:
            run(chunks)
            for chunk in chunks:  # a failed step may have written anything
                for store in chunk.cache._stores:
                    store.fill_(9.0)
            raise RuntimeError("secret /path")

        client = service.client()
        monkeypatch.setattr(service.engine.runner, "run", broken)
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(**short)
        assert "secret" not in str(failed.value)
        with pytest.raises(openai.APIError, match="the answer failed"):
            list(client.chat.completions.create(**short, stream=True))
        assert "secret /path" in caplog.text  # the log has it
        monkeypatch.setattr(service.engine.runner, "run", run)
        after = client.chat.completions.create(**short).choices[0].message.content
    with served(tiny) as fresh:
        expected = fresh.client().chat.completions.create(**short).choices[0].message.content
    assert after == expected


def test_failure_to_add_request_leaves_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("secret /path")

    monkeypatch.setattr(service.engine, "add", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        service.client().chat.completions.create(**LONG)
    assert "secret" not in str(failed.value)
    monkeypatch.undo()
    service.client().chat.completions.create(**{**LONG, "max_tokens": 2})


def test_ended_engine_thread_fails_requests(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tiny) as service:
        stream = service.client().chat.completions.create(**LONG, stream=True)
        next(iter(stream))
        # No request can cause this; it stands for a defect in the engine.
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(service.engine, "take", None)
        with pytest.raises(openai.APIError, match="the answer failed"):
            list(stream)
        wait_until(lambda: service.ask("GET", "/health/ready")[0] == 503)
        assert service.ask("GET", "/health/live")[0] == 200
        with pytest.raises(openai.InternalServerError, match="the request failed"):
            service.client().chat.completions.create(**LONG)


def test_failed_answer_leaves_its_batch(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from khaosz.errors import GenerationError

    choose = Sequence._choose

    def choosing(sequence: Sequence, logits: Any) -> int:
        if sequence.request.params.seed == 13 and sequence.generated == 5:
            raise GenerationError("the model's output is not finite")
        return choose(sequence, logits)

    asked = {**LONG, "max_tokens": 40}
    expected = service.client().chat.completions.create(**asked).choices[0].message.content
    monkeypatch.setattr(Sequence, "_choose", choosing)
    answers: list[str | None] = []

    def neighbour() -> None:
        answers.append(service.client().chat.completions.create(**asked).choices[0].message.content)

    thread = threading.Thread(target=neighbour)
    thread.start()
    with pytest.raises(openai.APIError, match="not finite"):
        list(service.client().chat.completions.create(**asked, seed=13, stream=True))
    thread.join()
    assert answers == [expected]


def test_host_and_origin_are_checked(service: Service) -> None:
    def status(**headers: str) -> int:
        return service.ask("GET", "/v1/models", **headers)[0]

    here = f"127.0.0.1:{service.port}"
    assert status(Host=here) == status(Host="localhost") == status(Host="[::1]:8000") == 200
    for name in ("evil.example", f"evil.example:{service.port}", "127.0.0.1.evil.example", "[", ""):
        assert status(Host=name) == 403, name
    assert status(Host=here, Origin=f"http://{here}") == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://{here}.evil"):
        assert status(Host=here, Origin=origin) == 403, origin


def test_allowed_origins(tiny: Path) -> None:
    """A page of another origin, or a proxy in front of this server, that --origin names."""
    page = "https://chat.example.org"
    with served(tiny, key="sesame", origins=[page + "/"]) as service:
        key = {"Authorization": "Bearer sesame"}
        status, headers, _ = service.ask("GET", "/v1/models", Origin=page, **key)
        assert status == 200 and headers["access-control-allow-origin"] == page
        assert "access-control-allow-credentials" not in headers
        status, headers, _ = service.ask("GET", "/v1/models", Origin=page)
        assert status == 401 and headers["access-control-allow-origin"] == page
        # The proxy forwards the Host header that it got.
        through = {"Host": "chat.example.org", "Origin": page, **key}
        assert service.ask("GET", "/v1/models", **through)[0] == 200
        for other in (
            "http://chat.example.org",
            "https://chat.example.org:8443",
            "https://evil.example",
        ):
            status, headers, _ = service.ask("GET", "/v1/models", Origin=other, **key)
            assert status == 403 and "access-control-allow-origin" not in headers, other
    for wrong in (
        "*",
        "chat.example.org",
        "https://a/b",
        "https://",
        "https://u@a",
        "https://[",
        "null",
    ):
        with pytest.raises(ConfigError, match="--origin"):
            Guard(None, key=None, hosts=None, origins=[wrong])  # type: ignore[arg-type]


def raw_ask(
    service: Service, method: str, path: str, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.request("GET", "/health/live")  # the connection is still usable
    assert connection.getresponse().read() == b'{"status":"live"}'
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def preflight(service: Service, origin: str, **headers: str) -> tuple[int, dict[str, str]]:
    asked = {"Access-Control-Request-Method": "POST", "Origin": origin}
    asked |= {f"Access-Control-Request-{name}": value for name, value in headers.items()}
    return raw_ask(service, "OPTIONS", "/v1/chat/completions", **asked)[:2]


def test_preflight_allows_the_headers_it_asks_for(tiny: Path) -> None:
    pages = ["https://chat.example.org", "app://obsidian.md", "safari-web-extension://AB-12"]
    # OpenAI's JavaScript client adds headers of its own.
    names = "authorization, content-type,x-stainless-arch,x-stainless-retry-count,http-referer"
    with served(tiny, key="sesame", origins=pages) as service:
        for page in pages:
            status, answer = preflight(service, page, Headers=names)
            assert status == 204 and answer["access-control-allow-origin"] == page
            assert answer["access-control-allow-headers"] == names
            assert {"GET", "HEAD", "POST", "PUT", "DELETE"} == set(
                answer["access-control-allow-methods"].split(", ")
            )
            assert "access-control-allow-private-network" not in answer
            key = {"Authorization": "Bearer sesame"}
            status, answer, _ = service.ask("GET", "/v1/models", Origin=page, **key)
            assert status == 200 and answer["access-control-allow-origin"] == page
        # The host of an application's page is not a name of this server.
        assert service.ask("GET", "/v1/models", Host="obsidian.md", **key)[0] == 403
        status, answer = preflight(
            service, pages[0], **{"Headers": "a b", "Private-Network": "true"}
        )
        assert "access-control-allow-headers" not in answer
        assert answer["access-control-allow-private-network"] == "true"
        assert preflight(service, "app://other", Headers=names)[0] == 403


def test_head_answers_as_get_without_the_body(service: Service) -> None:
    for path in ("/health/live", "/health/ready", "/v1/models", "/", "/v1/models/none", "/none"):
        status, headers, content = raw_ask(service, "GET", path)
        head = raw_ask(service, "HEAD", path)
        assert content and head[0] == status and head[2] == b""
        for name in ("content-length", "content-type", "etag"):
            assert head[1].get(name) == headers.get(name), path


def test_ready_names_no_models_without_the_key(tiny: Path) -> None:
    with served(tiny, key="sesame") as service:
        assert service.ask("GET", "/health/ready")[2] == {"status": "ready"}
        key = {"Authorization": "Bearer sesame"}
        assert service.ask("GET", "/health/ready", **key)[2]["models"] == {"tiny": True}


def test_body_limit(service: Service) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * MAX_BODY})
    status, _, answer = service.ask("POST", "/v1/completions", body)
    assert status == 413 and "4,194,304 bytes" in answer["error"]["message"]
    # Also without Content-Length.
    parts = (b" " * 65536 for _ in range(80))
    status, _, _ = service.ask("POST", "/v1/completions", parts)  # type: ignore[arg-type]
    assert status == 413


def test_key_is_checked(tiny: Path) -> None:
    with served(tiny, key="sesame") as service:
        for wrong in ("none", "sesam", "sesame2"):
            with pytest.raises(openai.AuthenticationError) as refused:
                service.client(wrong).models.list()
            assert refused.value.code == "invalid_api_key"
        assert service.ask("GET", "/v1/models")[0] == 401
        assert service.ask("GET", "/openapi.json")[0] == 401
        assert service.ask("GET", "/health/live")[0] == 200
        assert service.client("sesame").models.list().data[0].id == "tiny"


def serve_here(
    model: Path, address: Address, timeout: float, serve: Callable[..., None] = serve
) -> None:
    serve(
        [str(model)], data=model / "data", runs=model / "runs", max_upload=1, address=address,
        device="cpu", limits=Limits(), timeout=timeout, announce=print,
    )  # fmt: skip


def test_refuses_invalid_address(tiny: Path) -> None:
    def run(**changed: Any) -> None:
        timeout = changed.pop("timeout", 1.0)
        serve_here(tiny, Address(**{"port": 0, **changed}), timeout)

    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached .* a key is required"):
        run(host="0.0.0.0")
    for key in ("", " x", "钥匙"):
        with pytest.raises(ConfigError, match="API key"):
            run(api_key=key)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port} cannot be used: Address al"):
            run(port=port)
    with pytest.raises(ConfigError, match="--port is 99999"):
        run(port=99999)
    with pytest.raises(ConfigError, match="--request-timeout is 0"):
        run(timeout=0.0)
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        run(host="no.such.host.invalid", api_key="x")
    assert is_loopback("::1") and is_loopback("127.8.8.8") and not is_loopback("192.168.0.1")
    assert default_name(Path("/runs/demo/dpo/last")) == "dpo"
    assert default_name(Path("/m/qwen-0.6B")) == "qwen-0.6B"
    assert default_name(Path("/m/a.Q4_0.gguf")) == "a.Q4_0"


def test_refuses_an_embedder_that_cannot_be_opened(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="--embedder e5=gone: embedder gone not found"):
        serve(
            [str(tiny)], embedders=["e5=gone"], data=tiny / "data", runs=tiny / "runs",
            max_upload=1, address=Address(port=0), device="cpu", limits=Limits(), timeout=1.0,
            announce=print,
        )  # fmt: skip


def test_missing_package_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the service, imported for the first time."""
    monkeypatch.setattr(khaosz, "serve", khaosz.serve)  # restores the attribute at the end
    for name in [name for name in sys.modules if name.startswith("khaosz.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    run = importlib.import_module("khaosz.serve.run")
    with pytest.raises(ConfigError, match="needs fastapi") as missing:
        serve_here(tiny, run.Address(port=0), 1.0, run.serve)
    assert missing.value.hint == "pip install 'khaosz[serve]'"


@pytest.mark.parametrize("stream", [True, False])
def test_answers_cut_by_a_shutdown_end_with_an_error(
    tiny: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tiny, drain=2) as service:
        slowed(service, "tiny")
        connection = raw_request(service, {**LONG, "stream": stream})
        wait_until(lambda: open_requests(service) == 1)
    with connection, connection.makefile(encoding="utf-8") as response:
        text = response.read()
    assert text.startswith("HTTP/1.1 200" if stream else "HTTP/1.1 503")
    assert '"code": "shutting_down"' in text or '"code":"shutting_down"' in text
    assert not caplog.records


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_command_serves_and_drains(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "khaosz", "serve", str(tiny), "--port", "0", "--device", "cpu"]
    command += ["--data", str(tmp_path), "--deterministic"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("tiny: http://127.0.0.1:")
        client = openai.OpenAI(base_url=line.split()[1], api_key="none", max_retries=0)
        stream = client.chat.completions.create(**{**LONG, "max_tokens": 400}, stream=True)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        rest = [chunk.choices[0] for chunk in stream]
        assert first.choices[0].delta.role == "assistant"
        assert rest[-1].finish_reason == "length"
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert time.monotonic() - signalled < 20
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
