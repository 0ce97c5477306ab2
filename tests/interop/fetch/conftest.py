"""A tiny model in both formats, the local hub, and a catalogue that names files on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, hub_server
from tiny_models import tiny_model

from khaosz.data.tokenizer import train_tokenizer
from khaosz.interop.fetch import catalogue
from khaosz.interop.gguf.model import save_gguf
from khaosz.interop.huggingface import save_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with two .gguf files of different weights, old.gguf and new.gguf."""
    source = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(iter(["the quick brown fox"] * 5), 300)
    model = tiny_model(vocab_size=300, head_dim=8, intermediate_size=64)
    save_model(model, source, bos_id=1)
    tokenizer.save(source)
    save_gguf(model, tokenizer, source / "new.gguf", "F32")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save_gguf(model, tokenizer, source / "old.gguf", "F32")
    return source


@pytest.fixture
def new_gguf(tiny_folder: Path) -> bytes:
    return (tiny_folder / "new.gguf").read_bytes()


@pytest.fixture
def old_gguf(tiny_folder: Path) -> bytes:
    return (tiny_folder / "old.gguf").read_bytes()


@pytest.fixture
def directory(tiny_folder: Path) -> dict[str, bytes]:
    """The files of the model directory."""
    files = [path for path in tiny_folder.iterdir() if path.suffix != ".gguf"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and home, and no settings of the user's."""
    for name in (
        "HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_API_TOKEN", "OLLAMA_MODELS", "HF_HOME",
        "HF_HUB_CACHE", "XDG_CACHE_HOME", "KHAOSZ_MODEL_SOURCE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home/.modelscope"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The only hub: of Hugging Face, and of ModelScope."""
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
        yield server


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`known(content, **fields)` makes a catalogue of one entry, "tiny"."""

    def write(content: bytes, **fields: object) -> None:
        values = {
            "kind": "chat", "architecture": "llama", "file": "tiny.gguf", "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(), "confirmed": 8, "licence": "MIT",
            "languages": "en", "context": 64, **fields,
        }  # fmt: skip
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        file = tmp_path / "catalogue.toml"
        file.write_text("\n".join(["[tiny]", *lines]), encoding="utf-8")
        monkeypatch.setattr(catalogue, "_FILE", file)
        catalogue.catalogue.cache_clear()

    yield write
    catalogue.catalogue.cache_clear()


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if not isinstance(value, str) else f'"{value}"'
