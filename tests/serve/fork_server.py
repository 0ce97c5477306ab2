"""`khaosz` commands as forks of one process that has imported everything, so that each starts at
once. Run as a program it forks one command per line of its input, one at a time; `ForkServer` is
its client."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Command:
    """A running command; `port` is 0 if it ended before it served."""

    pid: int
    port: int
    stderr: Path
    server: ForkServer
    exit_code: int | None = None

    def kill(self) -> None:
        """With SIGKILL. Returns when it has ended."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.server.read_exit(self)


class ForkServer:
    def __init__(self, folder: Path) -> None:
        """`folder`: for the commands' stderr."""
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self._process.communicate()

    @contextmanager
    def khaosz(
        self, *arguments: str | Path, file_limit: int | None = None, port: int = 0
    ) -> Iterator[Command]:
        """The command `khaosz serve` with these arguments, killed at the end. `file_limit`: bytes
        that it may write to a file; `port`: 0 is any free one."""
        assert self._process.stdin is not None
        stderr = self._folder / f"stderr-{len(list(self._folder.iterdir()))}"
        request = {
            "arguments": ["serve", *map(str, arguments), "--port", str(port), "--device", "cpu"],
            "stderr": str(stderr),
            "file_limit": file_limit,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        command = Command(int(self._line()), 0, stderr, self)
        line = self._line()
        if line.startswith("exit "):
            command.exit_code = int(line.split()[1])
        else:  # NAME: http://HOST:PORT/v1
            command.port = int(line.rsplit(":", 1)[1].split("/")[0])
        try:
            yield command
        finally:
            command.kill()

    def read_exit(self, command: Command) -> None:
        while not (line := self._line()).startswith("exit "):
            pass
        command.exit_code = int(line.split()[1])

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        return line


def run(request: dict[str, Any]) -> None:
    """In the fork."""
    from khaosz.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT), 2)
    if request["file_limit"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    sys.argv = ["khaosz", *request["arguments"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve_forks() -> None:
    for module in ("cli", "serve.run", "serve.app", "rag"):
        importlib.import_module(f"khaosz.{module}")
    for module in ("uvicorn.protocols.http.h11_impl", "uvicorn.loops.auto", "torch._dynamo"):
        importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("exit", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve_forks()
