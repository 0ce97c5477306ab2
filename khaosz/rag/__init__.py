"""Knowledge from the user's own documents: load, split, embed, store, retrieve, answer."""

from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.semantic import SemanticSplitter
from khaosz.rag.split import Chunk, StructureSplitter

__all__ = ["Chunk", "KnowledgeBase", "SemanticSplitter", "StructureSplitter"]
