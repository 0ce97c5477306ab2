"""The texts that embedders were trained to read before a query and before a passage, of models
whose files do not say them: GGUF files and some directories of E5 and BGE. They are known by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
# As their model cards have them.
_PROMPTS = (
    ("e5-large-instruct", f"Instruct: {_SEARCH}\nQuery: ", ""),
    ("e5-(small|base|large)", "query: ", "passage: "),
    ("bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),
    ("bge-(small|base|large)-en", "Represent this sentence for searching relevant passages: ", ""),
    ("qwen3-embedding", f"Instruct: {_SEARCH}\nQuery:", ""),
    ("embedding-?gemma", "task: search result | query: ", "title: none | text: "),
)


def known_prompts(names: Iterable[str]) -> tuple[str, str]:
    """Prefixes of queries and passages of a model that has one of these names, such as that of its
    folder; empty ones for a model that is not known."""
    text = "\n".join(names).lower().replace("_", "-").replace(" ", "-")
    for pattern, query, passage in _PROMPTS:
        if re.search(rf"(?<![a-z0-9]){pattern}(?![a-z])", text):
            return query, passage
    return "", ""


def known_pooling(names: Iterable[str]) -> Literal["cls", "mean"]:
    """The pooling of a file of an early converter, which says none."""
    return "cls" if re.search(r"(?<![a-z0-9])bge-", "\n".join(names).lower()) else "mean"
