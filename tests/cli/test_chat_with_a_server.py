"""The terminal chat as a client of `khaosz serve`, both in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from scripted_model import (
    CONTEXT,
    SCRIPT,
    environment,
    khaosz_serve,
    model,
    model_directory,
    run_khaosz,
)

ANSWER = "南极[1]。"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("served") / "saying")


@pytest.fixture(scope="module")
def url(directory: Path) -> Iterator[str]:
    with khaosz_serve(directory) as address:
        yield address


def chat(url: str, *lines: str, options: tuple[str, ...] = (), **more: str) -> str:
    """The output of a chat through a pipe."""
    typed = "\n".join(lines).encode()
    done = run_khaosz("chat", "--url", url, *options, lines=typed, **more)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    return done.stdout.decode()


def error_and_hint(*arguments: str, **more: str) -> tuple[str, str]:
    """The error of a chat that fails to start."""
    done = run_khaosz("chat", *arguments, **more)
    error, hint = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    return error, hint


def test_answer_comes_from_the_server(url: str, tmp_path: Path) -> None:
    saved = tmp_path / "a.json"
    out = chat(
        url, "你好", "/model", f"/save {saved}", "/reset", "/retry", f"/load {saved}", "/retry"
    )
    assert f"saying  at {url}" in out
    assert out.count(SCRIPT) == 2
    assert "* saying\n" in out
    assert "nothing to retry" in out
    assert "1 exchanges" in out


def test_client_does_not_import_torch(url: str) -> None:
    code = (
        "import sys\nfrom khaosz.cli import main\n"
        f"sys.argv = ['khaosz', 'chat', '--url', {url!r}]\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        "assert 'khaosz.cli.terminal.server_backend' in sys.modules\n"
        "assert not {'torch', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"hi\n", capture_output=True, env=environment()
    )
    assert done.returncode == 0, done.stderr.decode()
    assert SCRIPT in done.stdout.decode()


def test_oldest_exchange_is_dropped_when_the_context_is_full(url: str) -> None:
    out = chat(url, "a" * 30, "b" * 30, "c" * 30)
    assert "(context full: the oldest exchange is dropped)" in out
    too_long = chat(url, "a" * 200)
    assert f"the model's context is {CONTEXT}" in too_long and SCRIPT not in too_long


def test_server_error_is_one_line(url: str) -> None:
    out = chat(url, "/set temperature 3", "hi", "/set temperature 0", "hi")
    assert "temperature" in out and "(400)" in out
    assert out.count(SCRIPT) == 1
    assert "Traceback" not in out


def test_unknown_model(url: str) -> None:
    error, hint = error_and_hint("--url", url, "--model", "sayinh")
    assert (
        error == f"error: model 'sayinh' not found at {url}"
        and hint == "hint: did you mean 'saying'?"
    )
    assert "model 'x' not found" in chat(url, "/model x", "hi")


def test_server_with_an_api_key(directory: Path) -> None:
    with khaosz_serve(directory, KHAOSZ_API_KEY="sesame") as url:
        error, hint = error_and_hint("--url", url)
        assert "(401)" in error and "KHAOSZ_API_KEY" in hint
        assert SCRIPT in chat(url, "hi", KHAOSZ_API_KEY="sesame")
        assert SCRIPT in chat(url, "hi", OPENAI_API_KEY="sesame")
        error, hint = error_and_hint("--url", url, KHAOSZ_API_KEY="sesame\n")
        assert "sesame" not in error


def test_proxy_variables_are_ignored_for_loopback(url: str) -> None:
    assert SCRIPT in chat(
        url, "hi", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--url", "http://127.0.0.1:9/v1"], "Connection refused", "is the server running"),
        (["--url", "127.0.0.1:8000"], "is not an http address", "http://127.0.0.1:8000/v1"),
        (["--url", "http://[::1/v1"], "is not an http address", "http://127.0.0.1:8000/v1"),
    ],
)
def test_invalid_addresses(arguments: list[str], error: str, hint: str) -> None:
    printed_error, printed_hint = error_and_hint(*arguments)
    assert error in printed_error and hint in printed_hint


def test_address_without_v1(url: str) -> None:
    error, hint = error_and_hint("--url", url.removesuffix("/v1"))
    assert "(404)" in error and "/v1" in hint


def test_path_and_url_exclude_each_other(directory: Path, url: str) -> None:
    done = run_khaosz("chat", str(directory), "--url", url)
    assert done.returncode == 1 and b"not both" in done.stderr


@pytest.fixture(scope="module")
def citing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a knowledge base and a model that cites."""
    directory = model_directory(tmp_path_factory.mktemp("served") / "citing", model(ANSWER, 4096))
    texts = {
        "企鹅.md": "企鹅住在南极。它们不会飞。",
        "合同.md": "合同自双方签字之日起生效，有效期三年。",
        "whales.md": "The blue whale is the largest animal.",
    }
    with khaosz_serve(directory) as url:
        request_json("POST", f"{url}/knowledge_bases", json.dumps({"name": "动物"}).encode())
        files = f"{url}/knowledge_bases/{quote('动物')}/files"
        for name, text in texts.items():
            request_json("PUT", f"{files}/{quote(name)}", text.encode())
        while any(file["status"] != "ready" for file in request_json("GET", files)["data"]):
            time.sleep(0.05)
        yield url


def request_json(method: str, address: str, body: bytes | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_answers_from_a_knowledge_base_of_the_server(citing: str) -> None:
    question = "企鹅住在哪里？"
    out = chat(citing, "/docs", "/docs 动物", question, "/retry", "/docs off", question)
    assert "answering without documents\nknowledge bases:\n  动物" in out
    assert "answering from 动物" in out
    assert out.count(f"{ANSWER}\n[1] 企鹅.md, line 1\n") == 2
    assert out.count(ANSWER) == 3


def test_refusal_without_a_matching_passage(citing: str) -> None:
    out = chat(citing, "木星有多少颗卫星？", options=("--docs", "动物"))
    assert "资料中没有找到答案。\n" in out
    assert "the model was not asked. /anyway asks it.\n[1] 合同.md, line 1\n" in out


def test_unknown_knowledge_base(citing: str) -> None:
    error, hint = error_and_hint("--url", citing, "--docs", "动")
    assert "knowledge base '动' not found" in error and "did you mean '动物'?" in hint
