"""KHAOSZ: a private, local, bilingual language model for one person and an ordinary computer.

    from khaosz import ModelConfig, TrainConfig, Trainer, load_model, load_tokenizer, generate

Names are imported on first use: `import khaosz` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khaosz.config import ModelConfig, TrainConfig
    from khaosz.data.tokenizer import load_tokenizer
    from khaosz.inference.generator import generate
    from khaosz.interop.models import load_model
    from khaosz.trainer.run import run
    from khaosz.trainer.trainer import Trainer

__version__ = "0.1.0"

_MODULES = {
    "ModelConfig": "khaosz.config",
    "TrainConfig": "khaosz.config",
    "Trainer": "khaosz.trainer.trainer",
    "generate": "khaosz.inference.generator",
    "load_model": "khaosz.interop.models",
    "load_tokenizer": "khaosz.data.tokenizer",
    "run": "khaosz.trainer.run",
}

__all__ = [
    "ModelConfig",
    "TrainConfig",
    "Trainer",
    "generate",
    "load_model",
    "load_tokenizer",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'khaosz' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
