"""What the service does under load, with clients that leave, and against strangers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Service, served, wait_until

from khaosz.errors import ConfigError
from khaosz.inference.request import Sequence
from khaosz.interop.models import default_name
from khaosz.serve.guard import MAX_BODY, Guard
from khaosz.serve.models import Limits
from khaosz.serve.run import Address, is_loopback, listen, serve

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
LONG: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 1900, "temperature": 0}


def raw_request(service: Service, body: dict[str, Any]) -> socket.socket:
    """A chat that is asked for and not read."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{service.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(head.encode() + content)
    return connection


def held(service: Service) -> int:
    loaded = service.models.all[0].loaded
    assert loaded is not None
    return loaded.worker.held


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_amid_the_answer_frees_the_place(service: Service, stream: bool) -> None:
    connection = raw_request(service, {**LONG, "stream": stream})
    wait_until(lambda: any(each.generated for each in service.engine._running))
    connection.close()
    wait_until(lambda: not service.engine.unfinished, seconds=0.5)  # the answer takes longer
    assert held(service) == 0


def test_the_official_client_leaves(service: Service) -> None:
    stream = service.client().chat.completions.create(**LONG, stream=True)
    for _ in range(3):
        next(iter(stream))
    stream.close()
    wait_until(lambda: not service.engine.unfinished, seconds=0.5)


def stopped_before_a_step(service: Service) -> tuple[list[int], threading.Event]:
    """The chunks of each step that began, and what lets them all go on."""
    runner = service.engine.runner
    run, passes, go_on = runner.run, [], threading.Event()

    def slow(chunks: Any) -> Any:
        passes.append(len(chunks))
        assert go_on.wait(60)
        return run(chunks)

    runner.run = slow  # type: ignore[method-assign]
    return passes, go_on


def test_who_leaves_amid_the_prompt_frees_the_place(tiny: Path) -> None:
    """The engine is held after the first part of the prompt until the client has gone."""
    with served(tiny, step_tokens=16) as service:
        passes, go_on = stopped_before_a_step(service)
        body = {**LONG, "messages": [{"role": "user", "content": "春 fox " * 200}], "stream": True}
        connection = raw_request(service, body)
        wait_until(lambda: len(passes) == 1)
        connection.close()
        wait_until(lambda: held(service) == 0)
        go_on.set()
        wait_until(lambda: not service.engine.unfinished)
        assert len(passes) == 1, "it went on reading a prompt that nobody asks about any more"


def test_who_reads_no_more_has_its_place_for_the_time_of_a_request(tiny: Path) -> None:
    """More is said than the buffers between the two take, so that the server can't go on."""
    with served(tiny, timeout=3) as service:
        loud = {"n": 32, "logprobs": True, "top_logprobs": 20, "stream": True}
        connection = raw_request(service, {**LONG, **loud})
        wait_until(lambda: held(service) == 1)
        wait_until(lambda: held(service) == 0, seconds=20)
        loaded = service.models.all[0].loaded
        assert loaded is not None and loaded.users == 0
        connection.close()


def test_waiting_for_the_engine_is_part_of_a_requests_time(tiny: Path) -> None:
    """It is amid a step, and can't take anything on."""
    with served(tiny, timeout=3) as service:
        passes, go_on = stopped_before_a_step(service)
        connection = raw_request(service, {**LONG, "stream": True})
        try:
            wait_until(lambda: bool(passes))
            with pytest.raises(openai.APIStatusError) as late:
                service.client().chat.completions.create(**LONG)
            assert late.value.status_code == 504 and late.value.code == "request_timeout"
            wait_until(lambda: held(service) == 0)
        finally:
            go_on.set()
            connection.close()
        wait_until(lambda: not service.engine.unfinished)
        service.client().chat.completions.create(**{**LONG, "max_tokens": 2})


def test_a_full_queue_says_when_to_come_again(tiny: Path) -> None:
    with served(tiny, limits=Limits(max_queue=1)) as service:
        held = raw_request(service, {**LONG, "stream": True})
        wait_until(lambda: service.engine.unfinished)
        with pytest.raises(openai.InternalServerError) as full:
            service.client().chat.completions.create(**LONG)
        assert full.value.status_code == 503 and full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        held.close()
        wait_until(lambda: not service.engine.unfinished)
        service.client().chat.completions.create(**{**LONG, "max_tokens": 2})


def test_a_step_that_fails_hurts_nobody_after_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tiny) as service:
        run = service.engine.runner.run
        short = {**LONG, "max_tokens": 8, "messages": [{"role": "user", "content": "fox " * 60}]}

        def broken(chunks: Any) -> Any:
            run(chunks)
            for chunk in chunks:  # nobody knows what a step that failed has written
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
        assert "secret /path" in caplog.text  # whoever runs the server can see it
        monkeypatch.setattr(service.engine.runner, "run", run)
        after = client.chat.completions.create(**short).choices[0].message.content
    with served(tiny) as fresh:
        expected = fresh.client().chat.completions.create(**short).choices[0].message.content
    assert after == expected


def test_a_request_that_is_not_taken_on_hurts_nobody(
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


def test_requests_do_not_wait_for_a_thread_that_has_ended(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tiny) as service:
        stream = service.client().chat.completions.create(**LONG, stream=True)
        next(iter(stream))
        # Nothing that a request does gets this far; it stands for a defect of ours.
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(service.engine, "take", None)
        with pytest.raises(openai.APIError, match="the answer failed"):
            list(stream)
        wait_until(lambda: service.ask("GET", "/health/ready")[0] == 503)
        assert service.ask("GET", "/health/live")[0] == 200
        with pytest.raises(openai.InternalServerError, match="the request failed"):
            service.client().chat.completions.create(**LONG)


def test_one_answer_fails_and_its_neighbour_does_not(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khaosz.errors import GenerationError

    choose = Sequence._choose

    def choosing(sequence: Sequence, logits: Any) -> int:
        if sequence.request.params.seed == 13 and sequence.generated == 5:
            raise GenerationError("the model's output is not finite")
        return choose(sequence, logits)

    asked = {**LONG, "max_tokens": 40}
    expected = service.client().chat.completions.create(**asked).choices[0].message.content
    monkeypatch.setattr(Sequence, "_choose", choosing)
    found: list[str | None] = []

    def neighbour() -> None:
        found.append(service.client().chat.completions.create(**asked).choices[0].message.content)

    thread = threading.Thread(target=neighbour)
    thread.start()
    with pytest.raises(openai.APIError, match="not finite"):
        list(service.client().chat.completions.create(**asked, seed=13, stream=True))
    thread.join()
    assert found == [expected]


def test_strangers_are_refused(service: Service) -> None:
    def status(**headers: str) -> int:
        return service.ask("GET", "/v1/models", **headers)[0]

    here = f"127.0.0.1:{service.port}"
    assert status(Host=here) == status(Host="localhost") == status(Host="[::1]:8000") == 200
    for name in ("evil.example", f"evil.example:{service.port}", "127.0.0.1.evil.example", "[", ""):
        assert status(Host=name) == 403, name
    assert status(Host=here, Origin=f"http://{here}") == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://{here}.evil"):
        assert status(Host=here, Origin=origin) == 403, origin


def test_named_origins_are_let_in(tiny: Path) -> None:
    """A page elsewhere, or a proxy before this server, once somebody has named it."""
    page = "https://chat.example.org"
    with served(tiny, key="sesame", origins=[page + "/"]) as service:
        key = {"Authorization": "Bearer sesame"}
        status, headers, _ = service.ask("GET", "/v1/models", Origin=page, **key)
        assert status == 200 and headers["access-control-allow-origin"] == page
        assert "access-control-allow-credentials" not in headers
        status, headers, _ = service.ask("GET", "/v1/models", Origin=page)
        assert status == 401 and headers["access-control-allow-origin"] == page  # it can say why
        asked = {"Access-Control-Request-Method": "PUT", "Origin": page}
        connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
        connection.request("OPTIONS", "/v1/chat/completions", headers=asked)
        answer = connection.getresponse()
        assert answer.status == 204 and "PUT" in (
            answer.getheader("access-control-allow-methods") or ""
        )
        connection.close()
        # The proxy passes on the name that it was called by.
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
        "ftp://a",
        "https://",
        "https://u@a",
        "https://[",
        "null",
    ):
        with pytest.raises(ConfigError, match="--origin"):
            Guard(None, key=None, hosts=None, origins=[wrong])  # type: ignore[arg-type]


def test_bodies_are_bounded(service: Service) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * MAX_BODY})
    status, _, answer = service.ask("POST", "/v1/completions", body)
    assert status == 413 and "4,194,304 bytes" in answer["error"]["message"]
    # Without a length that is told beforehand, too.
    parts = (b" " * 65536 for _ in range(80))
    status, _, _ = service.ask("POST", "/v1/completions", parts)  # type: ignore[arg-type]
    assert status == 413


def test_a_key_is_checked(tiny: Path) -> None:
    with served(tiny, key="sesame") as service:
        for wrong in ("none", "sesam", "sesame2"):
            with pytest.raises(openai.AuthenticationError) as refused:
                service.client(wrong).models.list()
            assert refused.value.code == "invalid_api_key"
        assert service.ask("GET", "/v1/models")[0] == 401
        assert service.ask("GET", "/openapi.json")[0] == 401
        assert service.ask("GET", "/health/live")[0] == 200
        assert service.client("sesame").models.list().data[0].id == "tiny"


def serve_here(model: Path, address: Address, timeout: float) -> None:
    serve(
        [str(model)], data=model / "data", runs=model / "runs", max_upload=1, address=address,
        device="cpu", limits=Limits(), timeout=timeout, announce=print,
    )  # fmt: skip


def test_what_cannot_be_served(tiny: Path) -> None:
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


def test_a_missing_package_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "khaosz.serve.app")
    with pytest.raises(ConfigError, match="needs fastapi") as missing:
        serve_here(tiny, Address(port=0), 1.0)
    assert missing.value.hint == "pip install 'khaosz[serve]'"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_the_command_serves_and_drains(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "khaosz", "serve", str(tiny), "--port", "0", "--device", "cpu"]
    command += ["--data", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("tiny: http://127.0.0.1:")
        client = openai.OpenAI(base_url=line.split()[1], api_key="none", max_retries=0)
        stream = client.chat.completions.create(**{**LONG, "max_tokens": 800}, stream=True)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        rest = [chunk.choices[0] for chunk in stream]
        assert first.choices[0].delta.role == "assistant"
        assert rest[-1].finish_reason == "length"
        assert process.wait(timeout=10) == -signal.SIGTERM
        assert time.monotonic() - began < 20
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
