"""The `khaosz` command at a terminal: keys in, screen contents out."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripted_model import environment

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>()][A-Z0-9]?)")


class PseudoTerminal:
    def __init__(self, *arguments: str, home: Path, **more: str) -> None:
        import pty  # not on Windows

        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "khaosz", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=home,
            start_new_session=True,
            # A background process may ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            # The tests do not answer queries of the cursor position.
            env=environment(
                TERM="xterm", HOME=str(home), PROMPT_TOOLKIT_NO_CPR="1", COLUMNS="100", **more
            ),
        )
        os.close(theirs)
        self._raw = b""
        self._read = 0

    def __enter__(self) -> PseudoTerminal:
        self.until(">")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    @property
    def screen(self) -> str:
        """What was printed since the last `until`, without escape sequences."""
        text = self._raw.decode("utf-8", errors="replace").replace("\r", "")
        return _ESCAPES.sub("", text)[self._read :]

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def send(self, keys: str, then: str) -> str:
        self.type(keys)
        return self.until(then)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def until(self, text: str, seconds: float = 60) -> str:
        """What was printed up to this text."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            left = deadline - time.monotonic()
            assert left > 0, f"timed out waiting for {text!r}: {self.screen!r}"
            if select.select([self._ours], [], [], min(left, 0.2))[0]:
                try:
                    self._raw += os.read(self._ours, 1 << 16)
                except OSError:  # the other end is closed
                    assert text in self.screen, f"{text!r} not printed: {self.screen!r}"
        before, _, _ = self.screen.partition(text)
        self._read += len(before) + len(text)
        return before + text

    def quit(self) -> int:
        """Leave the chat; the exit status."""
        self.type("/exit\r")
        # The process exits only when all its output has been read.
        deadline = time.monotonic() + 30
        with contextlib.suppress(OSError):
            while select.select([self._ours], [], [], max(0, deadline - time.monotonic()))[0]:
                if not os.read(self._ours, 1 << 16) or time.monotonic() > deadline:
                    break
        return self.process.wait(timeout=30)
