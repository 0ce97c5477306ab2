"""Shared by the tests of inference: tiny tokenizers and models with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.model import Transformer

TEXTS = ["the quick brown fox jumps over the lazy dog", "春眠不觉晓，处处闻啼鸟。"] * 20
CONTEXT = 96


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 320)


@cache
def bytewise() -> Tokenizer:
    """Bytes and one merge ("qq"), so that every character of three bytes is three tokens."""
    return train_tokenizer(iter(["qq qq qq"]), 273)


def random_model(vocab_size: int, seed: int = 0, **changes: Any) -> Transformer:
    """Two layers of width 32. Random norms too: a test that forgets one would pass with ones."""
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "qk_norm": True,
        "tie_word_embeddings": False,
    }
    model = Transformer(ModelConfig(**{**fields, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model.eval()
