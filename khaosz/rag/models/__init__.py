"""Embedders, rerankers and chat backends."""
