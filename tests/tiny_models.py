"""Tiny tokenizers and models, shared by all tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.model import Transformer

TEXTS = ["the quick brown fox jumps over the lazy dog", "春眠不觉晓，处处闻啼鸟。"] * 20
CONTEXT = 96
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # heads * head_dim is not the width: no code may assume it
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}

Module = TypeVar("Module", bound=nn.Module)


def randomised(model: Module, std: float = 0.3, seed: int = 0) -> Module:
    """Every parameter random, norms around 1 and residual writers too: a test that forgets one
    would pass with the values of a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
    return model.eval()


def tiny_model(std: float = 0.3, seed: int = 0, **changes: Any) -> Transformer:
    """A random model of `SHAPE` with `changes`."""
    return randomised(Transformer(ModelConfig.parse({**SHAPE, **changes})), std, seed)


def random_model(vocab_size: int, seed: int = 0, **changes: Any) -> Transformer:
    """The model of the engine's tests: QK-norm, an output table of its own, a short context."""
    fields = {"qk_norm": True, "tie_word_embeddings": False, "head_dim": 8}
    fields |= {"vocab_size": vocab_size, "max_position_embeddings": CONTEXT}
    return tiny_model(seed=seed, **{**fields, **changes})


def chain_model(by: Tokenizer, chain: Sequence[int], context: int = CONTEXT) -> Transformer:
    """A `Transformer` that maps each token of `chain` to the next: its blocks are the identity, its
    embedding separates tokens and its head has one large weight per pair. No token may occur twice,
    except that the last one may lead back."""
    config = ModelConfig(
        vocab_size=by.vocab_size,
        hidden_size=by.vocab_size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(0))
    assert model.lm_head is not None
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.eye(by.vocab_size))
        for token, following in pairwise(chain):
            model.lm_head.weight[following, token] = 10.0
    return model.eval()


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 320)


@cache
def bytewise() -> Tokenizer:
    """Bytes and one merge ("qq"), so that every character of three bytes is three tokens."""
    return train_tokenizer(iter(["qq qq qq"]), 273)
