"""Lexical, dense and hybrid search."""
