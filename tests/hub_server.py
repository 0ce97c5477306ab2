"""A server that speaks the protocols of Hugging Face and of ModelScope, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class HubServer:
    """`files`: content by repository, commit and name; `head`: the commit of a branch.

    cuts        bytes after which an answer with a file is cut, in turn; then none is
    status      answered to everything
    gated       answered 403 without this token
    stall       seconds before a file's bytes
    pause       seconds between 16 KB of a file
    sent        what is sent instead of a file's content, by name
    redirect    address of another host that files are redirected to
    lists_names_only  sizes and hashes are in the answer to HEAD alone
    """

    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    status: int | None = None
    gated: str | None = None
    stall: float = 0.0
    pause: float = 0.0
    sent: dict[str, bytes] = field(default_factory=dict)
    redirect: str | None = None
    ignores_ranges: bool = False
    lists_names_only: bool = False
    log: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """A new commit, which is the branch's from now on."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.files.setdefault(repository, {})[commit] = files
        self.head[repository] = commit
        return commit

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.files.get(repository, {})
        branch = revision in ("main", "master")
        commit = self.head.get(repository, "") if branch else revision
        return (commit, commits[commit]) if commit in commits else None

    @property
    def downloads(self) -> list[str]:
        """Files that were asked for."""
        return [path for _, path, *_ in self.log if "/resolve/" in path or "FilePath=" in path]

    @property
    def ranges(self) -> list[str]:
        return [range_ for _, _, range_, _ in self.log if range_]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *rest: object) -> None:
        self.hub = hub
        super().__init__(*rest)  # type: ignore[arg-type]

    def log_message(self, *rest: object) -> None:
        pass

    def do_HEAD(self) -> None:
        """Of a file, its commit, size and hash."""
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = None if match is None else self.hub.at(match[1], match[2])
        if match is None or found is None:
            self._empty(200)
            return
        content = found[1][match[3]]
        self.send_response(200)
        self.send_header("X-Repo-Commit", found[0])
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def do_GET(self) -> None:
        hub, headers = self.hub, self.headers
        authorization = headers.get("Authorization") or headers.get("Cookie")
        hub.log.append((self.command, self.path, headers.get("Range"), authorization))
        if hub.status is not None:
            self._empty(hub.status)
            return
        if hub.gated is not None and hub.gated not in (authorization or ""):
            self._empty(403, {"X-Error-Code": "GatedRepo"})
            return
        path = unquote(urlsplit(self.path).path)
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model_info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._content(*match.groups())
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self._list(match[1], query.get("Revision", "master"))
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self._content(match[1], query["Revision"], query["FilePath"])
        elif match := re.fullmatch(r"/plain/(.+)", path):
            self._content("plain/plain", "main", match[1])
        else:
            self._empty(404)

    def _model_info(self, repository: str, revision: str) -> None:
        if repository not in self.hub.files:
            self._empty(404, {"X-Error-Code": "RepoNotFound"})
        elif (found := self.hub.at(repository, revision)) is None:
            self._empty(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = []
            for name, content in found[1].items():
                sibling: dict[str, object] = {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
                }
                if name.endswith((".gguf", ".safetensors")):
                    sha256 = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
                siblings.append({"rfilename": name} if self.hub.lists_names_only else sibling)
            self._json(
                {"id": repository, "sha": found[0], "siblings": siblings, "tags": ["license:mit"]}
            )

    def _list(self, repository: str, revision: str) -> None:
        if (found := self.hub.at(repository, revision)) is None:
            self._json({"Code": 10010205001, "Success": False, "Message": "not found"}, 404)
            return
        files = [
            {"Path": name, "Name": name, "Size": len(content), "Type": "blob",
             "Sha256": hashlib.sha256(content).hexdigest()}
            for name, content in found[1].items()
        ]  # fmt: skip
        self._json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def _content(self, repository: str, revision: str, name: str) -> None:
        hub = self.hub
        found = hub.at(repository, revision)
        if found is None or name not in found[1]:
            self._empty(404, {"X-Error-Code": "EntryNotFound"})
            return
        if hub.redirect is not None and self.headers.get("Host", "") not in hub.redirect:
            self._empty(302, {"Location": f"{hub.redirect}{self.path}"})
            return
        content, start, end = hub.sent.get(name, found[1][name]), 0, None
        if (asked := self.headers.get("Range")) and not hub.ignores_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else None
            if start >= len(content):
                self._empty(416, {"Content-Range": f"bytes */{len(content)}"})
                return
        body = content[start:end]
        time.sleep(hub.stall)
        self.send_response(206 if start or end else 200)
        if start or end:
            last_byte = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start}-{last_byte}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = hub.cuts.pop(0) if hub.cuts and end is None else None
        for at in range(0, len(body), 16_384):
            piece = body[at : at + 16_384][: None if cut is None else max(0, cut - at)]
            try:
                self.wfile.write(piece)
            except OSError:  # the client is gone
                self.close_connection = True
                return
            if cut is not None and at + 16_384 >= cut:
                self.close_connection = True
                return
            time.sleep(hub.pause)

    def _json(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *rest: object) -> None:
        """A client that was killed is expected."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    server = _Server(("127.0.0.1", 0), partial(_Handler, hub))
    hub.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own, without importing everything again; its id."""
    if (process := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process
