"""Models of other projects, in and out: Hugging Face directories, GGUF files, PEFT adapters.

Names are imported when they are first used: `khaosz.interop.pip` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
    from khaosz.interop.huggingface import (
        WEIGHTS,
        is_reward_model,
        load_config,
        load_reward_model,
        model_type,
        save_model,
    )
    from khaosz.interop.models import convert, is_gguf, load_model, open_tokenizer
    from khaosz.interop.sentence_transformers import (
        EmbedderSettings,
        is_embedder,
        load_embedder_settings,
        save_embedder,
    )

_HOMES = {
    "WEIGHTS": "huggingface",
    "EmbedderSettings": "sentence_transformers",
    "GgufModel": "gguf.model",
    "convert": "models",
    "is_embedder": "sentence_transformers",
    "is_gguf": "models",
    "is_reward_model": "huggingface",
    "load_config": "huggingface",
    "load_embedder_settings": "sentence_transformers",
    "load_gguf": "gguf.model",
    "load_model": "models",
    "load_reward_model": "huggingface",
    "model_type": "huggingface",
    "open_tokenizer": "models",
    "save_embedder": "sentence_transformers",
    "save_gguf": "gguf.model",
    "save_model": "huggingface",
}

__all__ = [
    "WEIGHTS",
    "EmbedderSettings",
    "GgufModel",
    "convert",
    "is_embedder",
    "is_gguf",
    "is_reward_model",
    "load_config",
    "load_embedder_settings",
    "load_gguf",
    "load_model",
    "load_reward_model",
    "model_type",
    "open_tokenizer",
    "save_embedder",
    "save_gguf",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'khaosz.interop' has no attribute '{name}'")
    return getattr(importlib.import_module(f"khaosz.interop.{_HOMES[name]}"), name)
