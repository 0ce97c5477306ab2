"""Models of other projects, in and out: Hugging Face directories, GGUF files, PEFT adapters.

Names are imported when they are first used: `khaosz.interop.pip` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khaosz.interop.gguf.model import GgufModel
    from khaosz.interop.huggingface_config import model_type
    from khaosz.interop.models import load_model, open_tokenizer

_MODULES = {
    "GgufModel": "gguf.model",
    "load_model": "models",
    "model_type": "huggingface_config",
    "open_tokenizer": "models",
}

__all__ = ["GgufModel", "load_model", "model_type", "open_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'khaosz.interop' has no attribute '{name}'")
    return getattr(importlib.import_module(f"khaosz.interop.{_MODULES[name]}"), name)
