"""The examples of docs/en/tools.md, run unchanged against a real server of a real model, where
their packages are installed; they are not dependencies."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Service, served

from khaosz.serve.retrieval_models import RetrievalModels

FILE = os.environ.get("KHAOSZ_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE, reason="KHAOSZ_SMOLLM2 names no .gguf of SmolLM2-135M-Instruct"),
]

PAGE = Path(__file__).parents[2] / "docs" / "en" / "tools.md"
ADDRESS = "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def smol() -> Iterator[Service]:
    with served(f"smol={FILE}", retrieval=RetrievalModels([f"e5={FILE}"], [])) as running:
        yield running


def example(heading: str, language: str, service: Service) -> str:
    """The first block of that language below a heading, with this server's address."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None and ADDRESS in found[1]
    return found[1].replace(ADDRESS, f"http://127.0.0.1:{service.port}/v1")


def run(*command: str, **more: str) -> str:
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=300, env={**os.environ, **more}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def test_curl(smol: Service) -> None:
    commands = example("curl", "", smol)
    out = run("bash", "-euc", commands)
    assert out.count("data: {") > 8 and "data: [DONE]" in out
    assert out.count('"object":"embedding"') == 2


def test_openai(smol: Service) -> None:
    out = run(sys.executable, "-c", example("openai", "python", smol))
    assert " tokens\n576\n" in out and len(out) > 20


def test_langchain(smol: Service) -> None:
    needs("langchain_openai")
    out = run(sys.executable, "-c", example("LangChain", "python", smol))
    assert "name='Ann' age=7" in out
    assert "'name': 'add', 'args': {'a': 2, 'b': 3}" in out
    assert out.endswith("\n576\n")


def test_llama_index(smol: Service) -> None:
    needs("llama_index")
    out = run(sys.executable, "-c", example("LlamaIndex", "python", smol))
    assert "tool_name='add', tool_kwargs={'a': 2, 'b': 3}" in out
    assert out.endswith("\n576\n")


def test_llm(smol: Service, tmp_path: Path) -> None:
    needs("llm")
    models = tmp_path / "extra-openai-models.yaml"
    models.write_text(example("llm", "yaml", smol), encoding="utf-8")
    (tmp_path / "keys.json").write_text('{"khaosz": "none"}', encoding="utf-8")
    ask = [sys.executable, "-m", "llm", "-m", "khaosz", "-o", "temperature", "0"]
    ask += ["-o", "max_tokens", "16", "Name three colours."]
    streamed = run(*ask, LLM_USER_PATH=str(tmp_path))
    assert len(streamed) > 20
    assert run(*ask, "--no-stream", LLM_USER_PATH=str(tmp_path)) == streamed
