"""A real model: SmolLM2-135M-Instruct, Q4_1, from the .gguf file that KHAOSZ_SMOLLM2 names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import render_chat
from khaosz.interop.gguf.model import GgufModel, load_gguf
from khaosz.interop.huggingface_config import model_type
from khaosz.interop.models import convert, load_model, open_tokenizer
from khaosz.model import Transformer

FILE = os.environ.get("KHAOSZ_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE, reason="KHAOSZ_SMOLLM2 names no .gguf of SmolLM2-135M-Instruct"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(FILE)


def greedy(model: Transformer, ids: list[int], count: int) -> list[int]:
    """Without a cache and without the engine: the reference."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model.logits(model(torch.tensor([ids])))[0, -1].argmax())]
    return ids


def test_smollm2_shape_is_as_published() -> None:
    config = GgufModel.open(FILE).config
    assert model_type(config) == "llama" and config.tie_word_embeddings
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49_152, 576, 1536)
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.head_dim) == (3, 64)
    assert (config.rope_theta, config.rms_norm_eps) == (100_000.0, 1e-5)
    assert config.max_position_embeddings == 8192 and config.parameters() == 134_515_008


def test_smollm2_tokens_are_as_published(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49_152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_id) == (1, 2, 2)
    assert tokenizer.special_ids["<|im_start|>"] == 1 and tokenizer.special_ids["<|im_end|>"] == 2
    # Digits one by one; words with their space.
    spelled = [tokenizer.token_bytes(i) for i in tokenizer.encode("Hello world, it's 2024")]
    assert spelled == [b"Hello", b" world", b",", b" it", b"'s", b" ", b"2", b"0", b"2", b"4"]
    chat = render_chat(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\n")


def test_smollm2_knows_capital_of_france(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = load_gguf(FILE)
    prompt = tokenizer.encode("The capital of France is")
    ids = greedy(model, prompt, 12)
    assert "Paris" in tokenizer.decode(ids)
    convert(FILE, tmp_path / "directory")
    assert greedy(load_model(tmp_path / "directory"), prompt, 12) == ids
    again = open_tokenizer(tmp_path / "directory")
    text = "naïve café 2024 — 你好\n\n\tdef f(x):  return x"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
