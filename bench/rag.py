"""Retrieval: is it right, how fast are documents taken in, how long does a search take.

    python -m bench rag lexical              nDCG@10 on CMRC 2018 (question -> its passage)
    python -m bench rag hybrid --embedder E5 --distractors 20000
    python -m bench rag ingest               10 KB files: new, and unchanged
    python -m bench rag large --embedder E5  search in a million chunks: `rag_large`

All need the shared data (`KHAOSZ_SHARED`). E5 is the folder that `python -m bench.e5_folder`
writes, or any embedder; vectors are kept under `--work`, and an hour of embedding is done once.
Splitters: `rag_split`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.kept_vectors import kept_embedder
from bench.machine import as_markdown, describe
from bench.rag_corpus import cmrc, distractors, rows
from bench.rag_large import large
from khaosz.rag import KnowledgeBase, StructureSplitter


def ndcg(ranks: Sequence[int | None]) -> float:
    """Of one right passage each; rank from 1, None beyond 10."""
    return float(np.mean([0.0 if r is None or r > 10 else 1 / math.log2(r + 1) for r in ranks]))


def retrieval(options: argparse.Namespace, modes: Sequence[str]) -> dict[str, Any]:
    path = options.work / "retrieval.kb"
    path.unlink(missing_ok=True)
    passages, questions = cmrc()
    embedder = kept_embedder(options.embedder, options.work) if options.embedder else None
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
                begun = time.process_time()
                base.add([folder])
                times.append(1000 / (time.process_time() - begun))
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
