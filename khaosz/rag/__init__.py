"""Retrieval-augmented generation: load, split, embed and store documents, search them, answer.

    from khaosz.rag import KnowledgeBase, LocalModel, SemanticSplitter, StructureSplitter

Names are imported when they are first used: the processes that read files need none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khaosz.rag.knowledge_base import KnowledgeBase
    from khaosz.rag.models.chat_models import LocalModel
    from khaosz.rag.split.semantic import SemanticSplitter
    from khaosz.rag.split.structure import Chunk, StructureSplitter

_MODULES = {
    "Chunk": "khaosz.rag.split.structure",
    "KnowledgeBase": "khaosz.rag.knowledge_base",
    "LocalModel": "khaosz.rag.models.chat_models",
    "SemanticSplitter": "khaosz.rag.split.semantic",
    "StructureSplitter": "khaosz.rag.split.structure",
}

__all__ = ["Chunk", "KnowledgeBase", "LocalModel", "SemanticSplitter", "StructureSplitter"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'khaosz.rag' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
