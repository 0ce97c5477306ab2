"""All steps from files to an answer, in a process that cannot reach another host."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_STEPS = """
import sys

def refuse(event, arguments):
    # Local sockets connect processes; an address of two parts is on a network.
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        print("CONNECTED", arguments[1])
        sys.exit(3)
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        print("ASKED", event, arguments)
        sys.exit(3)

sys.addaudithook(refuse)
from khaosz.cli import main
kb, docs, model = sys.argv[1:]
for arguments in (
    ["rag", "add", docs, "--kb", kb, "--embedder", model],
    ["rag", "search", "企鹅住在哪里", "--kb", kb, "--mode", "hybrid", "--reranker", model],
    ["rag", "reindex", "--kb", kb],
    ["rag", "ask", "企鹅住在哪里？", "--kb", kb, "--model", model, "--max-tokens", "8"],
    ["chat", model, "--docs", kb, "--max-tokens", "4"],
    ["generate", model, "--prompt", "企鹅", "--max-tokens", "4"],
    ["rag", "split", docs + "/a.md", "--semantic", "--embedder", model, "--json"],
):
    sys.argv = ["khaosz", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise
print("DONE")
"""


_IMPORTS = """
import importlib, pkgutil, socket, sys

def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")):
        print("OPENED", event, arguments)
        sys.exit(3)

sys.addaudithook(refuse)
import khaosz
for module in pkgutil.walk_packages(khaosz.__path__, "khaosz."):
    if module.name == "khaosz.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert not str(error.name).startswith("khaosz"), error  # an optional package
print("DONE")
"""


def test_no_module_opens_a_socket_when_it_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and "DONE" in done.stdout, done.stdout + done.stderr


def test_no_step_uses_the_network(tmp_path: Path, tiny_model: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# 鸟\n\n企鹅住在南极。它们不会飞。\n", encoding="utf-8")
    remote = '<img src="http://192.0.2.1/x.png"><link rel="stylesheet" href="http://192.0.2.1/">'
    (docs / "b.html").write_text(f"<p>The penguin lives in the south.</p>{remote}")
    base = tmp_path / "a.kb"
    command = [sys.executable, "-c", _STEPS, str(base), str(docs), str(tiny_model)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=240,
        input="企鹅住在哪里？\n/docs off\n企鹅\n",
    )  # fmt: skip
    assert done.returncode == 0 and "DONE" in done.stdout, done.stdout + done.stderr
    assert "CONNECTED" not in done.stdout and "ASKED" not in done.stdout
    # The audit hook works:
    with_server = [*command[:-3], str(tmp_path / "b.kb"), str(docs), "http://127.0.0.1:9/v1"]
    caught = subprocess.run(with_server, capture_output=True, text=True, timeout=240)
    assert caught.returncode == 3 and "DONE" not in caught.stdout
    base.unlink()
    if sys.platform == "linux" and shutil.which("unshare"):
        # Once more without any network, also for sockets of compiled code.
        isolated = subprocess.run(
            ["unshare", "-rn", *command], capture_output=True, text=True, encoding="utf-8",
            timeout=240,
        )  # fmt: skip
        if "unshare failed" in isolated.stderr or "Operation not permitted" in isolated.stderr:
            pytest.skip("this user may not create namespaces")
        assert "DONE" in isolated.stdout, isolated.stdout + isolated.stderr
