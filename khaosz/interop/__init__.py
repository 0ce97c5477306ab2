"""Models of other projects, in and out: Hugging Face directories and GGUF files."""

from khaosz.interop.embedder import (
    EmbedderSettings,
    is_embedder,
    load_embedder_settings,
    save_embedder,
)
from khaosz.interop.gguf_model import GgufModel, load_gguf, save_gguf
from khaosz.interop.huggingface import (
    WEIGHTS,
    is_reward_model,
    load_config,
    load_reward_model,
    save_model,
    write_json,
)
from khaosz.interop.models import convert, is_gguf, load_model, open_tokenizer

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
    "open_tokenizer",
    "save_embedder",
    "save_gguf",
    "save_model",
    "write_json",
]
