"""Which sampling a model recommends, in what order, and that models made of it keep it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import random_model, tokenizer

from khaosz.errors import GenerationError
from khaosz.inference.generator import Generator
from khaosz.interop.gguf.file import GgufFile
from khaosz.interop.gguf.model import save_gguf
from khaosz.interop.huggingface import save_model
from khaosz.interop.languages import language_of, language_warning
from khaosz.interop.models import convert
from khaosz.interop.sampling import FALLBACK, sampling_defaults, sampling_values

OWN = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    save_model(random_model(tokenizer().vocab_size), folder, sampling=OWN)
    tokenizer().save(folder)
    return folder


def test_the_order_of_the_sources(directory: Path) -> None:
    """Its files, the catalogue by its name, and what suits any model; key by key."""
    assert sampling_defaults(directory) == OWN
    record = {"name": "smollm2-135m", "reference": "", "source": "", "revision": None}
    record |= {"licence": None, "model": "", "bytes": 1}
    try:
        (directory / "pulled.json").write_text(json.dumps(record))
        assert sampling_defaults(directory) == OWN
        config = directory / "generation_config.json"
        stored = config.read_text()
        config.write_text('{"temperature": 0.6, "top_k": -1, "top_p": "x", "min_p": true}')
        assert sampling_defaults(directory) == {"temperature": 0.6, "top_p": 0.9}
        config.write_text("not JSON")
        assert sampling_defaults(directory) == {"temperature": 0.2, "top_p": 0.9}
        (directory / "pulled.json").unlink()
        assert sampling_defaults(directory) == FALLBACK
        config.write_text('{"do_sample": true, "top_k": 5}')
        assert sampling_defaults(directory) == {**FALLBACK, "top_k": 5}
    finally:
        config.write_text(stored)
        (directory / "pulled.json").unlink(missing_ok=True)


def test_models_made_of_it_keep_it(directory: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    convert(directory, file)
    keys = {k: v for k, v in GgufFile.open(file).metadata.items() if "sampling" in k}
    assert {k: round(v, 4) for k, v in keys.items()} == {
        "general.sampling.temp": 0.6, "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.8, "general.sampling.penalty_repeat": 1.05,
    }  # fmt: skip
    assert sampling_defaults(file) == OWN
    convert(file, back)
    assert sampling_defaults(back) == OWN
    assert json.loads((back / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_catalogue_file_is_known_by_name_and_size(
    tmp_path: Path,
) -> None:
    from khaosz.interop.fetch.catalogue import catalogue

    entry = catalogue()["qwen3.5-2b"]
    path = tmp_path / entry.file.upper()
    save_gguf(random_model(tokenizer().vocab_size), tokenizer(), path)
    assert sampling_defaults(path) == FALLBACK
    object.__setattr__(entry, "bytes", path.stat().st_size)
    try:
        assert sampling_defaults(path) == dict(entry.sampling)
    finally:
        catalogue.cache_clear()


def test_what_is_asked_wins() -> None:
    assert sampling_values(OWN, {"temperature": 1.0}) == {**OWN, "temperature": 1.0}
    greedy = sampling_values(OWN, {"temperature": 0})  # the likeliest tokens, unchanged
    assert greedy == {"temperature": 0, "top_k": 20, "top_p": 0.8}
    asked = {"temperature": 0, "repetition_penalty": 1.2}
    assert sampling_values(OWN, asked)["repetition_penalty"] == 1.2
    assert sampling_values(FALLBACK, {"temperature": 0.7}) == {"temperature": 0.7}
    assert sampling_values(FALLBACK, {"seed": 1}) == {**FALLBACK, "seed": 1}


def test_python_samples_as_the_model_wants(directory: Path) -> None:
    generator = Generator.from_directory(directory)
    params = generator.params(seed=3, max_tokens=9)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.8)
    assert generator.params(temperature=0.1).temperature == 0.1
    own = generator.generate("fox", params)
    assert own == generator.generate("fox", generator.params(**OWN, seed=3, max_tokens=9))
    with pytest.raises(GenerationError, match="top_p"):
        generator.params(top_p=3)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("你好，你是谁？", "zh"),
        ("用 Python 写一个快速排序", "zh"),
        ("What is the capital of France?", "en"),
        ("日本語で答えてください", None),
        ("Translate 你好 into English, please", None),
        ("ok", None),
        ("```\nfor x in range(10): print(x)\n```", None),
        ("", None),
    ],
)
def test_language_of(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_a_model_that_lacks_the_language_says_so_once() -> None:
    known = frozenset({"en"})
    warning = language_warning("你好，你是谁？", known, "small")
    assert warning is not None and warning.model == "qwen3.5-2b"
    assert "small 未针对中文训练" in warning.message and "khaosz pull" in warning.message
    assert language_warning("你好，你是谁？", known, "small", ["春眠不觉晓"]) is None
    assert language_warning("你好，你是谁？", frozenset({"zh", "en"}), "small") is None
    assert language_warning("你好，你是谁？", None, "small") is None
    assert language_warning("Who are you today?", known, "small") is None
    other = language_warning("Who are you today?", frozenset({"zh"}), "小")
    assert other is not None and "was not trained for English" in other.message
