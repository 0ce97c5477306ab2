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
    SAID,
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


def told(url: str, *lines: str, options: tuple[str, ...] = (), **more: str) -> str:
    """What a conversation through a pipe prints."""
    typed = "\n".join(lines).encode()
    done = run_khaosz("chat", "--url", url, *options, lines=typed, **more)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    return done.stdout.decode()


def refused(*arguments: str, **more: str) -> tuple[str, str]:
    """The line and the hint of a chat that does not begin."""
    done = run_khaosz("chat", *arguments, **more)
    error, hint = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b""
    return error, hint


def test_an_answer_comes_from_the_server(url: str, tmp_path: Path) -> None:
    saved = tmp_path / "a.json"
    out = told(
        url, "你好", "/model", f"/save {saved}", "/reset", "/retry", f"/load {saved}", "/retry"
    )
    assert f"saying  at {url}" in out
    assert out.count(SAID) == 2
    assert "* saying\n" in out
    assert "nothing to answer again" in out
    assert "1 exchanges" in out


def test_it_is_a_client_without_torch(url: str) -> None:
    code = (
        "import sys\nfrom khaosz.cli import main\n"
        f"sys.argv = ['khaosz', 'chat', '--url', {url!r}]\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "assert 'khaosz.cli.terminal.server' in sys.modules\n"
        "assert not {'torch', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"hi\n", capture_output=True, env=environment()
    )
    assert done.returncode == 0, done.stderr.decode()
    assert SAID in done.stdout.decode()


def test_the_oldest_exchange_is_forgotten_aloud(url: str) -> None:
    out = told(url, "a" * 30, "b" * 30, "c" * 30)
    assert "(context full: the oldest 1 exchanges are forgotten)" in out
    alone = told(url, "a" * 200)
    assert f"the model's context is {CONTEXT}" in alone and SAID not in alone


def test_what_the_server_refuses_is_one_line(url: str) -> None:
    out = told(url, "/set temperature 3", "hi", "/set temperature 0", "hi")
    assert "temperature" in out and "(400)" in out
    assert out.count(SAID) == 1
    assert "Traceback" not in out


def test_models_and_bases_that_are_not_there(url: str) -> None:
    error, hint = refused("--url", url, "--model", "sayinh")
    assert error == f"error: no model 'sayinh' at {url}" and hint == "hint: did you mean saying?"
    assert "no model 'x'" in told(url, "/model x", "hi")


def test_a_server_that_wants_a_key(directory: Path) -> None:
    with khaosz_serve(directory, KHAOSZ_API_KEY="sesame") as url:
        error, hint = refused("--url", url)
        assert "(401)" in error and "KHAOSZ_API_KEY" in hint
        assert SAID in told(url, "hi", KHAOSZ_API_KEY="sesame")
        assert SAID in told(url, "hi", OPENAI_API_KEY="sesame")
        error, hint = refused("--url", url, KHAOSZ_API_KEY="sesame\n")
        assert "sesame" not in error


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(url: str) -> None:
    assert SAID in told(url, "hi", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--url", "http://127.0.0.1:9/v1"], "Connection refused", "is the server running"),
        (["--url", "127.0.0.1:8000"], "is no http address", "http://127.0.0.1:8000/v1"),
        (["--url", "http://[::1/v1"], "is no http address", "http://127.0.0.1:8000/v1"),
    ],
)
def test_addresses_that_cannot_be(arguments: list[str], error: str, hint: str) -> None:
    said = refused(*arguments)
    assert error in said[0] and hint in said[1]


def test_an_address_without_v1(url: str) -> None:
    error, hint = refused("--url", url.removesuffix("/v1"))
    assert "(404)" in error and "/v1" in hint


def test_a_path_and_an_address_are_two_things(directory: Path, url: str) -> None:
    done = run_khaosz("chat", str(directory), "--url", url)
    assert done.returncode == 1 and b"not both" in done.stderr


@pytest.fixture(scope="module")
def citing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model cites, and that keeps a base."""
    directory = model_directory(tmp_path_factory.mktemp("served") / "citing", model(ANSWER, 4096))
    texts = {
        "企鹅.md": "企鹅住在南极。它们不会飞。",
        "合同.md": "合同自双方签字之日起生效，有效期三年。",
        "whales.md": "The blue whale is the largest animal.",
    }
    with khaosz_serve(directory) as url:
        asked("POST", f"{url}/knowledge_bases", json.dumps({"name": "动物"}).encode())
        files = f"{url}/knowledge_bases/{quote('动物')}/files"
        for name, text in texts.items():
            asked("PUT", f"{files}/{quote(name)}", text.encode())
        while any(file["status"] != "ready" for file in asked("GET", files)["data"]):
            time.sleep(0.05)
        yield url


def asked(method: str, address: str, body: bytes | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_answers_come_from_a_base_of_the_servers(citing: str) -> None:
    question = "企鹅住在哪里？"
    out = told(citing, "/docs", "/docs 动物", question, "/retry", "/docs off", question)
    assert "answers come from no documents\n/docs BASE takes:\n  动物" in out
    assert "answers come from 动物" in out
    assert out.count(f"{ANSWER}\n[1] 企鹅.md  0-13\n") == 2
    assert out.count(ANSWER) == 3


def test_what_a_base_does_not_hold_no_model_is_asked(citing: str) -> None:
    out = told(citing, "木星有多少颗卫星？", options=("--docs", "动物"))
    assert "资料中没有找到答案。\n> " in out and "[1]" not in out


def test_a_base_that_the_server_has_not(citing: str) -> None:
    error, hint = refused("--url", citing, "--docs", "动")
    assert "no knowledge base '动'" in error and "did you mean 动物?" in hint
