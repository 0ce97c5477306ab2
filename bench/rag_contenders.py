"""Splitters that are compared: ours and its peers, each made by a function of the cap.

A peer is imported when it is made: the peers live in a Python of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Split = Callable[[str], list[str]]


def _khaosz(cap: int) -> Split:
    from khaosz.rag.split.structure import StructureSplitter

    splitter = StructureSplitter(max_chars=cap)
    return lambda text: [chunk.text for chunk in splitter.split(text)]


def _khaosz_semantic(cap: int) -> Split:
    from bench.rag_semantic import embedder
    from khaosz.rag.split.semantic import SemanticSplitter

    splitter = SemanticSplitter(embedder(), max_chars=cap)
    return lambda text: [chunk.text for chunk in splitter.split(text)]


def _fixed(cap: int) -> Split:
    return lambda text: [text[i : i + cap] for i in range(0, len(text), cap)]


def _semantic_text_splitter(cap: int) -> Split:
    from semantic_text_splitter import TextSplitter

    return TextSplitter(cap, trim=False).chunks


def _semantic_markdown(cap: int) -> Split:
    from semantic_text_splitter import MarkdownSplitter

    return MarkdownSplitter(cap, trim=False).chunks


def _langchain(cap: int, separators: list[str] | None = None) -> Split:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    return RecursiveCharacterTextSplitter(
        chunk_size=cap, chunk_overlap=0, separators=separators, keep_separator="end"
    ).split_text


def _langchain_sentences(cap: int) -> Split:
    # The separators of Chroma's evaluation, and those LangChain recommends for Chinese.
    return _langchain(
        cap, ["\n\n", "\n", "。", "！", "？", "；", "…", ". ", "? ", "! ", "，", " ", ""]
    )


def _semchunk(cap: int) -> Split:
    import semchunk

    return semchunk.chunkerify(len, cap)


def _chonkie(kind: str, **settings: Any) -> Callable[[int], Split]:
    def make(cap: int) -> Split:
        import chonkie

        chunker = getattr(chonkie, kind)(tokenizer="character", chunk_size=cap, **settings)
        return lambda text: [chunk.text for chunk in chunker.chunk(text)]

    return make


MARKS = [". ", "! ", "? ", "\n", "。", "！", "？", "；"]
CONTENDERS: dict[str, tuple[bool, Callable[[int], Split]]] = {
    "khaosz": (False, _khaosz),
    "khaosz, semantic": (True, _khaosz_semantic),  # where the embedder is
    "fixed windows": (False, _fixed),
    "semantic-text-splitter": (True, _semantic_text_splitter),
    "semantic-text-splitter, Markdown": (True, _semantic_markdown),
    "LangChain recursive": (True, _langchain),
    "LangChain recursive, sentence marks": (True, _langchain_sentences),
    "semchunk": (True, _semchunk),
    "chonkie recursive": (True, _chonkie("RecursiveChunker")),
    "chonkie sentence": (True, _chonkie("SentenceChunker", chunk_overlap=0, delim=MARKS)),
}
OURS = "khaosz"
# Embedding is not what its speed would show.
SLOW = ("khaosz, semantic",)
