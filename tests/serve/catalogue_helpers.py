"""A catalogue of tiny models on a local hub, and a service without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, hub_server
from serving import Service, wait_until

from khaosz.interop.fetch import catalogue
from khaosz.interop.models import convert

KNOWN = "smollm2-135m"  # a name that is proposed


@pytest.fixture(scope="session")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(tiny, path, kind="F32")
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, tiny_gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The only hub, in an empty home with a catalogue of its models: `KNOWN`, "limited" with a
    limited licence, "huge" that no disk holds, and "nowhere" at a hub that is off."""
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path / "cache"))
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")  # discard: nothing there
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home/.modelscope"))
        commit = server.add("me/tiny", {"tiny.gguf": tiny_gguf})
        known = {
            "kind": "chat", "architecture": "llama", "file": "tiny.gguf", "bytes": len(tiny_gguf),
            "sha256": hashlib.sha256(tiny_gguf).hexdigest(), "confirmed": 8, "licence": "MIT",
            "languages": "en", "context": 2048, "cache_mb": 1, "huggingface": "me/tiny",
            "revision": commit,
        }  # fmt: skip
        entries = {
            KNOWN: known,
            "limited": {**known, "licence": "Terms, limited", "file": "limited.gguf"},
            # Known to have Chinese, and proposed to no machine.
            "qwen3-0.6b": {
                **known, "languages": "zh, en", "cache_mb": 10**9, "file": "chinese.gguf",
            },
            "huge": {**known, "bytes": 1 << 60, "file": "huge.gguf"},
            "nowhere": {
                **known, "huggingface": None, "modelscope": "me/tiny", "file": "nowhere.gguf",
            },
        }  # fmt: skip
        lines = [
            line for name, entry in entries.items() for line in (f'["{name}"]', *_toml_lines(entry))
        ]
        file = tmp_path / "catalogue.toml"
        file.write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.setattr(catalogue, "_FILE", file)
        catalogue.catalogue.cache_clear()
        yield server
    catalogue.catalogue.cache_clear()


def _toml_lines(entry: dict[str, Any]) -> list[str]:
    return [
        f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"'
        for key, value in entry.items()
        if value is not None
    ]


def listed(service: Service, name: str) -> dict[str, Any]:
    data = service.ask("GET", "/v1/catalogue")[2]["data"]
    return next(each for each in data if each["name"] == name)


def pull_of(service: Service, name: str, method: str = "GET", more: str = "") -> dict[str, Any]:
    status, _, answer = service.ask(method, f"/v1/catalogue/{name}/pull{more}")
    assert status == (202 if method == "POST" else 200), answer
    return answer


def when(service: Service, name: str, condition: Callable[[dict[str, Any]], bool]) -> Any:
    """The pull, once it is so."""
    states: list[dict[str, Any]] = []
    wait_until(lambda: states.append(pull_of(service, name)) or condition(states[-1]))
    return states[-1]


def ended(service: Service, name: str) -> Any:
    return when(service, name, lambda pull: pull["state"] != "running")
