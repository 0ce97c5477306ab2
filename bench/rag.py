"""Retrieval: accuracy, ingestion rate, search latency.

    python -m bench rag lexical              nDCG@10 on CMRC 2018 (question -> its passage)
    python -m bench rag hybrid --embedder E5 --distractors 20000
    python -m bench rag ingest               10 KB files: new, and unchanged
    python -m bench rag large --embedder E5  hybrid search in a million chunks

All need the shared data (`KHAOSZ_SHARED`). E5 is the folder that `python -m bench.e5_folder`
writes, or any embedder; vectors are cached under `--work`, so that an hour of embedding runs once.
Splitters: `rag_split`.

`large` reports p95 without encoding the query, recall and memory. Text: 60 words a chunk, drawn by
Zipf's law from 50,000 of either language; a query is eight words of a text that is not in the
knowledge base. Vectors: those of 20,000 real Chinese passages, each many times over, moved by the
difference of two others, so far that two copies are as near as a real passage and its nearest
neighbour: noise in the directions of the model's vectors. (`--noise even` is isotropic, which no
model produces and no graph handles well.) Queries are the vectors of CMRC's questions, which are in
no passage. One process builds the knowledge base, another searches it; the memory of the second is
reported.
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

from bench.cached_vectors import cached_embedder
from bench.machine import as_markdown, describe, peak_rss_mb
from bench.rag_corpus import cmrc, distractors, rows
from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.search.search import DEPTH, search
from khaosz.rag.store.index import open_index
from khaosz.rag.store.records import NewChunk, NewDocument, SourceFile

_REAL = 20_000
_BATCH = 2_000
_WORDS, _ASKED = 60, 8
_CHECKED = 200  # queries that are also searched exactly
_TABLE = 50_000


def large(options: argparse.Namespace) -> dict[str, Any]:
    if options.step == "build":
        return build(options.work, options.chunks, options.noise == "even")
    if options.step == "ask":
        return ask(options.work, options.chunks, options.queries)
    options.work.mkdir(parents=True, exist_ok=True)
    embedder = cached_embedder(options.embedder, options.work)
    passages = [text for _, text in distractors(_REAL)]
    np.save(options.work / "large-real.npy", embedder.passages(passages))
    questions = [question for question, _ in cmrc()[1]]
    np.save(options.work / "large-questions.npy", embedder.queries(questions))
    command = [sys.executable, "-m", "bench", "rag", *sys.argv[1:], "--step"]
    # Separate processes: the embedder's memory must not count as the search's.
    made = subprocess.run([*command, "build"], check=True, stdout=subprocess.PIPE, text=True)
    asked = subprocess.run([*command, "ask"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(made.stdout) | json.loads(asked.stdout)


class _Known:
    """An embedder that returns a known vector: encoding the query is not timed."""

    name, good_cosine, dimension = "known", None, 0

    def __init__(self, vector: np.ndarray) -> None:
        self._vector = vector

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vector[None]

    passages = queries


def build(work: Path, chunks: int, even: bool) -> dict[str, Any]:
    """Resumes where it was interrupted."""
    start = time.perf_counter()
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
                seconds = time.perf_counter() - start
                print(f"  {first:,} chunks, {seconds:,.0f} s", file=sys.stderr, flush=True)
        stored = time.perf_counter()
        open_index(base.store)
        indexed = time.perf_counter()
    return {
        "store_s": round(stored - start),
        "index_s": round(indexed - stored),
        "build_rss_mb": peak_rss_mb(),
    }


def ask(work: Path, chunks: int, count: int) -> dict[str, Any]:
    base = KnowledgeBase(work / f"large-{chunks}.kb")
    questions = np.load(work / "large-questions.npy")[:count]
    start = time.perf_counter()
    index = open_index(base.store)
    opened = time.perf_counter() - start
    texts = _texts(_words(), len(questions), 2**31)
    asked = [" ".join(text.split()[:_ASKED]) for text in texts]
    times: dict[str, list[float]] = {"lexical": [], "dense": [], "hybrid": []}
    found = []
    for warm in (True, False):
        for vector, text in list(zip(questions, asked, strict=True))[: 50 if warm else None]:
            taken = []
            for mode in ("lexical", "dense", "hybrid"):
                start = time.perf_counter()
                search(base.store, text, 10, mode, embedder=_Known(vector), index=index)
                taken.append(time.perf_counter() - start)
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
    """Words in order of frequency, each with its separator."""
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


def ndcg(ranks: Sequence[int | None]) -> float:
    """Of one right passage each; rank from 1, None beyond 10."""
    return float(np.mean([0.0 if r is None or r > 10 else 1 / math.log2(r + 1) for r in ranks]))


def retrieval(options: argparse.Namespace, modes: Sequence[str]) -> dict[str, Any]:
    path = options.work / "retrieval.kb"
    path.unlink(missing_ok=True)
    passages, questions = cmrc()
    embedder = cached_embedder(options.embedder, options.work) if options.embedder else None
    # Whole passages, as the peers' figures have them.
    whole = StructureSplitter(max_chars=100_000)
    base = KnowledgeBase(path, embedder=embedder, splitter=whole)
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
                start = time.process_time()
                base.add([folder])
                times.append(1000 / (time.process_time() - start))
    return {"new_files_per_s": round(max(new)), "unchanged_files_per_s": round(max(same))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench rag", description=__doc__)
    parser.add_argument("task", choices=["lexical", "hybrid", "ingest", "large"])
    parser.add_argument("--work", type=Path, default=Path("runs/rag"))
    parser.add_argument("--embedder")
    parser.add_argument("--distractors", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--noise", choices=["real", "even"], default="real", help="for `large`")
    parser.add_argument("--step", choices=["build", "ask"], help="one process of `large`")
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
            if options.step:
                print(json.dumps(found))
                return
    print(json.dumps({"task": options.task, **found}))


if __name__ == "__main__":
    main()
