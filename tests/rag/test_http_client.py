"""Streams of other servers, over real HTTP and cut anywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khaosz.errors import ServerError
from khaosz.rag.models.http_client import deltas, event_data, read_events


def chunk(text: str, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": reason}]}


def line(value: dict[str, Any], end: str = "\n") -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}{end}{end}"


def spread(value: dict[str, Any]) -> str:
    """One event over several data lines."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return "".join(f"data: {part}\n" for part in text.split("\n")) + "\n"


DONE = "data: [DONE]\n\n"
TWO = line(chunk("你好")) + line(chunk("，世界"))
COMPLETE = {
    "plain": TWO + line(chunk("", "stop")) + DONE,
    "several data lines": line(chunk("你好")) + spread(chunk("，世界", "stop")) + DONE,
    "CR": line(chunk("你好"), "\r") + line(chunk("，世界", "stop"), "\r"),
    "CR LF": line(chunk("你好"), "\r\n") + line(chunk("，世界", "stop"), "\r\n") + DONE,
    "no [DONE]": TWO + line(chunk("", "length")),
    "usage after the end": TWO + line(chunk("", "stop")) + line({"choices": [], "usage": {}}),
    "no blank line at the end": TWO + f"data: {json.dumps(chunk('', 'stop'))}",
    "no space": TWO.replace("data: ", "data:") + DONE,
    "comments and other fields": ": ping\n\n" + "event: x\nid: 1\nretry: 9\n" + TWO + DONE,
    "byte order mark": "\ufeff" + TWO + DONE,
    "not streamed": json.dumps({"choices": [{"message": {"content": "你好，世界"}}]}),
}
BROKEN = {
    "no finish reason": (TWO, "broke off"),
    "empty finish reason": (TWO + line(chunk("", "")), "broke off"),
    "one of two choices": (TWO + line(chunk("", "stop")) + line(chunk("x", index=1)), "broke off"),
    "nothing": ("", "broke off"),
    "error": (TWO + line({"error": {"message": "out of memory"}}), "out of memory"),
    "not JSON": ("data: {\n\n", "Expecting"),
    "not an object": ("data: []\n\n", "not a JSON object"),
}


@contextmanager
def serving(text: str, step: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            kind = "application/json; charset=utf-8" if text[:1] == "{" else "text/event-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            raw = text.encode()
            for at in range(0, len(raw), step):
                part = raw[at : at + step]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("name", COMPLETE)
def test_complete_streams(name: str, step: int) -> None:
    with serving(COMPLETE[name], step) as address:
        events = list(read_events(address, {"stream": True}))
    texts = [delta.get("content", "") for event in events for delta, _ in deltas(event)]
    assert "".join(texts) == "你好，世界"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_streams(name: str) -> None:
    text, message = BROKEN[name]
    with serving(text, 7) as address, pytest.raises(ServerError, match=message):
        list(read_events(address, {}))


@given(
    st.lists(st.text("ab:\r\n 春\u2028", max_size=6), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r", "\r\n"]),
    st.lists(st.integers(1, 7), min_size=1),
)
def test_chunks_may_end_anywhere(events: list[str], end: str, steps: list[int]) -> None:
    """Data with line breaks stands on several lines; the parser joins them by line feeds."""
    datas = [text.replace("\r\n", "\n").replace("\r", "\n") for text in events]
    lines = [[f"data: {part}{end}" for part in data.split("\n")] for data in datas]
    raw = "".join("".join(each) + end for each in lines).encode()
    chunks, at = [], 0
    while at < len(raw):
        step = steps[len(chunks) % len(steps)]
        chunks.append(raw[at : at + step])
        at += step
    assert list(event_data(chunks)) == [data for data in datas if data.strip()]
