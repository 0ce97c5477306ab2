"""The recipe `lora` on a .gguf file: from chats without markers to answers of model and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, tokenizer

from khaosz.config import TrainConfig, load_recipe
from khaosz.data.tokenizer.tokenizer import Tokenizer
from khaosz.errors import ConfigError
from khaosz.inference.generator import Generator
from khaosz.interop.adapter import adapter_of, merge_adapter
from khaosz.interop.gguf.model import save_gguf
from khaosz.trainer.run import run

SHAPE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.gguf` and `chats.jsonl`."""
    folder = tmp_path_factory.mktemp("teach")
    own = tokenizer()
    by = Tokenizer(own.serialized, {**own.config, "chat_template": CHATML})
    save_gguf(random_model(by.vocab_size, **SHAPE), by, folder / "model.gguf", "Q8_0")
    turns = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "the lazy dog"}]
    lines = [json.dumps({"messages": [*turns, {**turns[0], "content": f"{i}"}, turns[1]]})
             for i in range(30)]  # fmt: skip
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


def recipe(place: Path, out: Path, *overrides: str) -> TrainConfig:
    keys = [f"init_from={place / 'model.gguf'}", f"data={place / 'chats.jsonl'}", f"out={out}"]
    keys += ["epochs=100", "max_minutes=100", "max_steps=40", "dtype=fp32", "batch_tokens=128"]
    return load_recipe(Path("lora"), [*keys, "lr=0.01", "lora.rank=4", *overrides])


def test_a_gguf_learns_an_answer(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    context = run(recipe(place, out))
    assert context.config.window == 64
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 < 2 < losses[0]
    assert not list(out.rglob("model.safetensors"))
    base, adapter = adapter_of(out / "last") or (None, None)
    assert base == place / "model.gguf" and adapter == out / "last" / "adapter"
    chat = [{"role": "user", "content": "fox?"}]
    answer = Generator.from_directory(out / "last").chat(chat).text
    assert answer == "the lazy dog"
    merged = merge_adapter(adapter, tmp_path / "merged")  # checks that the base is the same
    assert Generator.from_directory(merged).chat(chat).text == answer


@pytest.mark.slow
def test_resumes_exactly(place: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    steps = ["max_steps=8", "save_every=4", "keep=9", "schedule.name=constant"]
    run(recipe(place, straight, *steps))
    run(recipe(place, stopped, *steps))
    shutil.rmtree(stopped / "step-000008")
    for name in ("last", "best"):
        (stopped / name).unlink(missing_ok=True)
    (stopped / "last").symlink_to("step-000004")
    run(recipe(place, stopped, *steps), resume=True)
    ours, theirs = (p / "last/adapter/adapter_model.safetensors" for p in (straight, stopped))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["fp32", "int8"])
def test_dequantised_bases(base: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    context = run(recipe(place, out, f"lora.base={base}", "max_steps=2"))
    assert (out / "last/model.safetensors").exists() and adapter_of(out / "last") is None
    assert isinstance(context.model.embed_tokens.weight, torch.nn.Parameter)


def test_stages_that_cannot_keep_a_file_are_refused(place: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"data": "x", "out": "y", "init_from": "z", "max_steps": 1}
    with pytest.raises(ConfigError, match=r'lora.base="file" is for pt and sft, not rm'):
        TrainConfig.parse({**keys, "stage": "rm", "lora": {"base": "file"}})
