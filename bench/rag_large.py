"""Hybrid search in a million chunks: p95 without encoding the query, recall, memory.

Text: 60 words a chunk, drawn by Zipf's law from 50,000 of either language; a query is eight words
of a text that is not in the base. Vectors: those of 20,000 real Chinese passages, each many times
over, moved by the difference of two others, so far that two copies are as near as a real passage
and its nearest neighbour: noise that points where the model's vectors do. (`--noise even` has noise
that points anywhere, which no model makes and no graph likes.) Queries are the vectors of CMRC's
questions, which are in no passage. The base is made by one process and searched by another, whose
memory is what is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.kept_vectors import kept_embedder
from bench.machine import peak_rss_mb
from bench.rag_corpus import cmrc, distractors
from khaosz.rag import KnowledgeBase
from khaosz.rag.search.search import DEPTH, search
from khaosz.rag.store import NewChunk, NewDocument, SourceFile
from khaosz.rag.store.index import open_index

_REAL = 20_000
_BATCH = 2_000
_WORDS, _ASKED = 60, 8
_CHECKED = 200  # queries whose neighbours are also sought exactly
_TABLE = 50_000


def large(options: argparse.Namespace) -> dict[str, Any]:
    if options.step == "build":
        return build(options.work, options.chunks, options.noise == "even")
    if options.step == "ask":
        return ask(options.work, options.chunks, options.queries)
    options.work.mkdir(parents=True, exist_ok=True)
    embedder = kept_embedder(options.embedder, options.work)
    passages = [text for _, text in distractors(_REAL)]
    np.save(options.work / "large-real.npy", embedder.passages(passages))
    questions = [question for question, _ in cmrc()[1]]
    np.save(options.work / "large-questions.npy", embedder.queries(questions))
    command = [sys.executable, "-m", "bench", "rag", *sys.argv[1:], "--step"]
    # Processes of their own: the embedder's memory is not the search's.
    made = subprocess.run([*command, "build"], check=True, stdout=subprocess.PIPE, text=True)
    asked = subprocess.run([*command, "ask"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(made.stdout) | json.loads(asked.stdout)


class _Known:
    """An embedder that knows the query's vector: encoding it is not what is timed."""

    name, good_cosine, dimension = "known", None, 0

    def __init__(self, vector: np.ndarray) -> None:
        self._vector = vector

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vector[None]

    passages = queries


def build(work: Path, chunks: int, even: bool) -> dict[str, Any]:
    """Goes on where it was stopped."""
    begun = time.perf_counter()
    path = work / f"large-{chunks}.kb"
    real = np.load(work / "large-real.npy")
    spread = _spread(real)
    words = _words()
    with KnowledgeBase(path) as base:
        for first in range(base.store.chunk_count, chunks, _BATCH):
            own = np.random.default_rng(first)
            at = np.arange(first, first + _BATCH) % len(real)
            if even:
                noise = own.normal(size=(_BATCH, real.shape[1]))
            else:
                one, other = own.integers(len(real), size=(2, _BATCH))
                noise = real[one] - real[other]
            near = real[at] + spread * noise / np.linalg.norm(noise, axis=1).mean()
            made = [
                NewChunk(0, len(text), text, (), vector)
                for text, vector in zip(_texts(words, _BATCH, first), _unit(near), strict=True)
            ]
            documents = [
                NewDocument(f"{first + i}", f"{first + i}", f"{first + i:064}", c.end, [c])
                for i, c in enumerate(made)
            ]
            with base.store.writing():
                base.store.set("dimension", str(real.shape[1]))
                base.store.replace("default", SourceFile(f"/{first}", 0, 0, ""), documents)
            if first % 50_000 == 0:
                seconds = time.perf_counter() - begun
                print(f"  {first:,} chunks, {seconds:,.0f} s", file=sys.stderr, flush=True)
        stored = time.perf_counter()
        open_index(base.store)
        indexed = time.perf_counter()
    return {
        "store_s": round(stored - begun),
        "index_s": round(indexed - stored),
        "build_rss_mb": peak_rss_mb(),
    }


def ask(work: Path, chunks: int, count: int) -> dict[str, Any]:
    base = KnowledgeBase(work / f"large-{chunks}.kb")
    questions = np.load(work / "large-questions.npy")[:count]
    begun = time.perf_counter()
    index = open_index(base.store)
    opened = time.perf_counter() - begun
    texts = _texts(_words(), len(questions), 2**31)
    asked = [" ".join(text.split()[:_ASKED]) for text in texts]
    times: dict[str, list[float]] = {"lexical": [], "dense": [], "hybrid": []}
    found = []
    for warm in (True, False):
        for vector, text in list(zip(questions, asked, strict=True))[: 50 if warm else None]:
            taken = []
            for mode in ("lexical", "dense", "hybrid"):
                begun = time.perf_counter()
                search(base.store, text, 10, mode, embedder=_Known(vector), index=index)
                taken.append(time.perf_counter() - begun)
            if not warm:
                for mode, seconds in zip(times, taken, strict=True):
                    times[mode].append(seconds)
                found.append([number for number, _ in index.nearest(vector, DEPTH)[:10]])
    memory = peak_rss_mb()
    exact = _exact(base, questions[:_CHECKED])
    hits = sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=False))
    return {
        "chunks": base.store.chunk_count,
        "queries": len(questions),
        "open_s": round(opened, 2),
        "p50_ms": {name: round(1e3 * median(taken), 1) for name, taken in times.items()},
        "p95_ms": {name: round(1e3 * _percentile(taken), 1) for name, taken in times.items()},
        "recall_at_10": round(hits / (10 * len(exact)), 4),
        "peak_rss_mb": memory,
    }


def _exact(base: KnowledgeBase, queries: np.ndarray) -> list[list[int]]:
    numbers, matrix = base.store.vectors()
    best = []
    for query in queries:
        cosines = matrix @ query
        top = np.argpartition(-cosines, 10)[:10]
        best.append(numbers[top].tolist())
    return best


def _percentile(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * len(seconds))]


def _spread(real: np.ndarray) -> float:
    """Length of the noise: see above."""
    some = real[:: max(1, len(real) // 2_000)]
    cosines = some @ real.T
    cosines[np.arange(len(some)), np.arange(0, len(real), max(1, len(real) // 2_000))] = -1
    near = float(np.median(cosines.max(1)))
    return math.sqrt(1 / near - 1)


def _words() -> list[str]:
    """In one order of frequency, with what parts them."""
    chance = random.Random(0)
    words = []
    for _ in range(_TABLE // 2):
        pair = (int(chance.paretovariate(0.7)) % 6_000 for _ in range(2))
        words.append("".join(chr(0x4E00 + number) for number in pair))
        length = chance.randint(2, 10)
        words.append(" " + "".join(chance.choice("etaoinshrdlu") for _ in range(length)) + " ")
    return words


def _texts(words: list[str], count: int, seed: int) -> list[str]:
    weights = 1 / (np.arange(len(words)) + 2.7)
    cumulative = np.cumsum(weights / weights.sum())
    drawn = np.random.default_rng(seed).random((count, _WORDS))
    picked = np.minimum(np.searchsorted(cumulative, drawn), len(words) - 1)
    return ["".join(words[i] for i in row) for row in picked]


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
