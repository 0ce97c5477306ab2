"""Knowledge from the user's own documents: load, split, embed, store, retrieve, answer.

    from khaosz.rag import KnowledgeBase, StructureSplitter, SemanticSplitter

Names are imported when they are first used: the processes that read files need none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from khaosz.rag.knowledge_base import KnowledgeBase
    from khaosz.rag.split.semantic import SemanticSplitter
    from khaosz.rag.split.structure import Chunk, StructureSplitter

_HOMES = {
    "Chunk": "khaosz.rag.split.structure",
    "KnowledgeBase": "khaosz.rag.knowledge_base",
    "SemanticSplitter": "khaosz.rag.split.semantic",
    "StructureSplitter": "khaosz.rag.split.structure",
}

__all__ = ["Chunk", "KnowledgeBase", "SemanticSplitter", "StructureSplitter"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'khaosz.rag' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
