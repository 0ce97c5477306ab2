"""Models of other projects, in and out: Hugging Face directories and GGUF files."""

from khaosz.files import write_json
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
from khaosz.interop.huggingface import (
    WEIGHTS,
    is_reward_model,
    load_config,
    load_reward_model,
    save_model,
)
from khaosz.interop.models import convert, is_gguf, load_model, open_tokenizer
from khaosz.interop.sentence_transformers import (
    EmbedderSettings,
    is_embedder,
    load_embedder_settings,
    save_embedder,
)

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
