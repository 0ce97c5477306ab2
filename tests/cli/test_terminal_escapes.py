"""Terminal escapes of models, servers, documents and file names are shown, never obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pseudo_terminal import PseudoTerminal
from scripted_model import environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")

TITLE = "\x1b]0;PWNED\x07"  # sets the window's title
ESCAPES = TITLE + "\x1b[2J\x9b31m\u202e"


class Hostile(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def _send(self, kind: str, body: str) -> None:
        raw = body.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        name = "model" if self.path.endswith("/models") else "base"
        self._send("application/json", json.dumps({"data": [{"id": name + ESCAPES}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        delta: dict[str, Any] = {"content": f"hello{ESCAPES} there [bold]x[/bold]"}
        choices = [{"index": 0, "delta": delta, "finish_reason": f"odd{ESCAPES}"}]
        self._send("text/event-stream", f"data: {json.dumps({'choices': choices})}\n\n")


@pytest.fixture
def hostile() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def check(output: bytes) -> None:
    text = output.decode()
    assert not {"\x07", "\x9b", "\u202e"} & set(text) and "\x1b]0;PWN" not in text
    assert "\x1b[2J" not in text and "␛[2J" in text


def on_terminal(*command: str, cwd: Path, start: tuple[str, ...] = ("-m", "khaosz")) -> bytes:
    """What a command prints on a terminal."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *start, *command],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=environment(TERM="xterm", COLUMNS="200"),
    )
    os.close(theirs)
    output = b""
    with suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1 << 16):
            output += part
    os.close(ours)
    process.wait(60)
    return output


def test_server_of_a_chat(hostile: str, tmp_path: Path) -> None:
    with PseudoTerminal("chat", "--url", hostile, home=tmp_path) as terminal:
        for keys in ("hi\r", "/model\r", "/docs\r"):
            terminal.send(keys, ">")
        assert terminal.quit() == 0
        check(terminal._raw)


def test_usage_errors_and_logs(tmp_path: Path) -> None:
    name = "m\u202e\x9b31m\x07"
    for command in (("chat", "model", name), ("serve", f"--{name}"), (name,)):
        text = on_terminal(*command, cwd=tmp_path).decode()
        assert "rror: " in text and not {"\x07", "\x9b", "\u202e"} & set(text)
    code = (
        "import logging, khaosz.cli as cli\n"
        f"cli.app = lambda: logging.getLogger('khaosz.serve').warning({'document' + ESCAPES!r})\n"
        "cli.main()"
    )
    check(on_terminal(cwd=tmp_path, start=("-c", code)))


def test_documents_and_file_names(tmp_path: Path) -> None:
    odd = tmp_path / f"odd{TITLE}\x1b[2J.md"
    odd.write_text(f"# Ducks{ESCAPES}\n\nDucks swim{ESCAPES} in the pond.\n")
    for command in (
        ("add", "missing\x1b[2J.md"),
        ("add", str(odd)),
        ("search", "ducks"),
        ("list",),
        ("split", str(odd)),
    ):
        check(on_terminal("rag", *command, cwd=tmp_path))
    piped = subprocess.run(
        [sys.executable, "-m", "khaosz", "rag", "search", "ducks", "--json"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        check=True,
    )
    assert json.loads(piped.stdout.splitlines()[0])
