"""Worker processes for formats whose parsers a file can crash, hang or make use too much memory.

One thread per worker talks to it and waits, so that nothing here depends on what an operating
system can wait for. If a worker dies or takes too long, only its file is lost: the next file gets
a new worker.

Both ends talk in frames through the worker's standard input and output: the length of a JSON
object in four bytes, big-endian, then the object. First come the limits, answered by `{}`; then a
file for each request and its documents, or an error, for each reply.
"""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from khaosz.errors import DocumentError
from khaosz.rag.load.document import Document, InputFile, Limits, Loaded, Source

_LENGTH = struct.Struct(">I")
_START_SECONDS = 60.0
_CLOSED = "was not read: loading has ended"
# Not `multiprocessing`: its pipes unpickle, and it imports the user's script again.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from khaosz.rag.load.worker import main; main()"
)


class WorkerPool:
    """At most `limits.workers` processes; the first one starts with the first file."""

    def __init__(self, limits: Limits, *, docling: bool = False) -> None:
        self.limits, self._docling = limits, docling
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="khaosz-load")
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called from any thread; files that are being read fail."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.process.kill()  # its thread sees the end of the pipe
        self._threads.shutdown(wait=True)  # queued files see that the pool is closed
        for worker in self._workers:
            worker.close()

    def submit(self, file: InputFile) -> Future[Loaded]:
        """The future raises DocumentError if the file cannot be read; this method raises it if the
        pool is closed."""
        try:
            return self._threads.submit(self._load, file)
        except RuntimeError:
            raise DocumentError(_CLOSED, code="not_read") from None

    def _load(self, file: InputFile) -> Loaded:
        worker = self._idle_worker()
        request = {"path": str(file.path), "name": file.name, "format": file.format}
        try:
            reply = worker.request(request, self.limits.seconds)
        except DocumentError:
            self._drop(worker)
            raise
        if reply.get("spent"):
            self._drop(worker)
        else:
            with self._lock:
                self._idle.append(worker)
        if "message" in reply:
            raise DocumentError(reply["message"], code=reply["code"], hint=reply["hint"])
        source = Source(**{**reply["source"], "path": Path(reply["source"]["path"])})
        documents = [Document(**{**d, "pages": tuple(d["pages"])}) for d in reply["documents"]]
        return source, documents

    def _idle_worker(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise DocumentError(_CLOSED, code="not_read")
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self.limits)
            self._workers.add(worker)
        try:
            # Importing docling is slow.
            seconds = _START_SECONDS + (self.limits.seconds if self._docling else 0.0)
            worker.request({"limits": asdict(self.limits), "docling": self._docling}, seconds)
        except DocumentError as error:
            self._drop(worker)
            raise DocumentError(
                "the process that reads such files did not start",
                code="not_read",
                hint=f"more than {self.limits.memory_bytes >> 20} MB of memory may be needed",
            ) from error
        return worker

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.close()


class _Worker:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # parsers complain about damaged files there
            bufsize=0,
        )

    def request(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply. Raises DocumentError if none arrives within `seconds`; the worker is then
        dead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        too_late = threading.Event()

        def stop() -> None:
            too_late.set()
            self.process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            write_frame(self.process.stdin, message)
            reply = read_frame(self.process.stdout, 16 * self._limits.text_characters + 65536)
        except (OSError, ValueError):
            reply = None
        finally:
            timer.cancel()
            timer.join()
        if too_late.is_set():
            raise DocumentError(
                f"takes longer than {seconds:g} seconds",
                code="too_slow",
                hint="split it, or save it in another way",
            )
        if reply is None:
            try:
                code = self.process.wait(1)
            except subprocess.TimeoutExpired:  # it is alive, and its reply was not a frame
                self.process.kill()
                code = self.process.wait()
            raise DocumentError(
                f"makes its parser fail ({_exit_text(code)})",
                code="damaged",
                hint="it is damaged, or needs more than "
                f"{self._limits.memory_bytes >> 20} MB of memory",
            )
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def _exit_text(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def write_frame(pipe: IO[bytes], message: dict[str, Any]) -> None:
    """`pipe` is unbuffered, so that one write may take only a part of the frame."""
    body = json.dumps(message).encode("ascii")  # \\u escapes: paths may hold lone surrogates
    rest = memoryview(_LENGTH.pack(len(body)) + body)
    while rest:
        rest = rest[pipe.write(rest) :]


def read_frame(pipe: IO[bytes], limit: int = 1 << 32) -> dict[str, Any] | None:
    """None at the end of the pipe, which may be inside a frame.

    Raises ValueError for a frame of more than `limit` bytes, and for JSON that is not an object.
    """
    head = _read(pipe, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise ValueError(f"a frame of {length} bytes; at most {limit} are allowed")
    body = _read(pipe, length)
    if body is None:
        return None
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError(f"a frame with a {type(message).__name__}, not an object")
    return message


def _read(pipe: IO[bytes], length: int) -> bytes | None:
    parts = []
    while length:
        part = pipe.read(min(length, 1 << 20))
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
