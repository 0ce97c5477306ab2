"""Speed and memory of `khaosz data prepare`: one JSON line.

    python bench/prepare.py --megabytes 20

Text comes from `$KHAOSZ_SHARED/data/corpus/train.jsonl.zst` when that is there, else it is made up
(and then "corpus" says "generated": its numbers compare with themselves only). The tokenizer is
trained on a slice of the same text. MB are 10^6 bytes of raw UTF-8. `mb_per_cpu_s` divides by the
processor time of all processes, start included: the speed of one core that has nothing else to do.
`peak_rss_mb` is the peak of resident bytes summed over the main process and its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from khaosz.data.records.readers import open_source
from khaosz.data.shards.mmap import HEADER_BYTES, MmapFileHandler, encode_header
from khaosz.data.tokenizer import train_tokenizer


def corpus_lines() -> tuple[str, Iterator[bytes]]:
    shared = Path(os.environ.get("KHAOSZ_SHARED", "../shared"))
    path = shared / "data" / "corpus" / "train.jsonl.zst"
    if path.is_file():
        return path.name, (line for batch in open_source(path) for line in batch.lines)
    return "generated", generated_lines()


def generated_lines() -> Iterator[bytes]:
    """Words of a made-up vocabulary with Zipf frequencies, half Latin, half Chinese."""
    rng = random.Random(0)
    latin = ["".join(rng.choices("etaoinshrdlucmf", k=rng.randint(2, 9))) for _ in range(5000)]
    han = ["".join(chr(0x4E00 + int(rng.paretovariate(0.5)) % 3000) for _ in "ab") for _ in latin]
    weights = [1 / (i + 1) for i in range(5000)]
    while True:
        words, gap = (latin, " ") if rng.random() < 0.5 else (han, "")
        text = "".join(
            gap.join(rng.choices(words, weights, k=12)) + rng.choice((". ", "。\n"))
            for _ in range(40)
        )
        yield json.dumps({"text": text}, ensure_ascii=False).encode()


RUN = """
import json, os, sys
from khaosz.data.shards.prepare import prepare
from khaosz.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    source, tokenizer, out, workers = sys.argv[1:]
    report = prepare([source], load_tokenizer(tokenizer), out, stage="pt", workers=int(workers))
    print(json.dumps({"bytes": report.bytes, "cpu": sum(os.times()[:4])}))
"""


def measure(path: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    """One run in a fresh process, its tree watched every 20 ms."""
    command = [sys.executable, "-c", RUN, str(path), str(tokenizer), str(out), str(workers)]
    begin = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        root = psutil.Process(run.pid)
        while run.poll() is None:
            total = 0
            try:
                for process in (root, *root.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:  # one ended while we were looking
                continue
            peak = max(peak, total)
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        assert run.stdout is not None
        report = json.loads(run.stdout.read())
    megabytes = report["bytes"] / 1e6
    return {
        "mb_per_s": round(megabytes / seconds, 2),
        "mb_per_cpu_s": round(megabytes / report["cpu"], 2),
        "peak_rss_mb": round(peak / 1e6),
    }


def sparse_iteration_rss(path: Path, gigabytes: int) -> float | None:
    """Growth of resident MB while iterating a sparse shard; None where holes are not supported."""
    n_tokens = gigabytes * 500_000_000
    offset = HEADER_BYTES + 2 * n_tokens
    tokens = {"dtype": "uint16", "offset": HEADER_BYTES, "count": n_tokens, "crc32": 0}
    doc_offsets = {"dtype": "uint64", "offset": offset, "count": 2, "crc32": 0}
    header = {
        "stage": "pt",
        "vocab_size": 1000,
        "fingerprint": "",
        "n_tokens": n_tokens,
        "n_documents": 1,
        "n_bytes": 0,
        "sections": {"tokens": tokens, "doc_offsets": doc_offsets},
    }
    try:
        with open(path, "wb") as file:
            file.write(encode_header(header))
            file.truncate(offset)
            file.seek(offset)
            file.write(struct.pack("<QQ", 0, n_tokens))
    except OSError:
        return None
    process = psutil.Process()
    with MmapFileHandler(path) as handler:
        before = process.memory_info().rss
        peak = before
        for view in handler.pieces("tokens"):
            view.max()
            peak = max(peak, process.memory_info().rss)
    return round((peak - before) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=80, help="raw text to prepare")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--sparse-gigabytes", type=int, default=20, help="0 leaves it out")
    arguments = parser.parse_args()
    name, lines = corpus_lines()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        written = 0
        with open(path, "wb") as file:
            for line in lines:
                written += file.write(line + b"\n")
                if written >= arguments.megabytes * 1e6:
                    break
        texts = (
            json.loads(line)["text"] for batch in open_source(path) for line in batch.lines if line
        )
        tokenizer = train_tokenizer(texts, arguments.vocab_size, max_bytes=8_000_000)
        tokenizer_dir = Path(folder) / "tokenizer"
        tokenizer.save(tokenizer_dir)
        result: dict[str, object] = {
            "bench": "prepare",
            "corpus": name,
            "megabytes": round(written / 1e6, 1),
            "vocab_size": tokenizer.vocab_size,
        }
        for workers in (1, 2):
            out = Path(folder) / f"out{workers}"
            result[f"workers_{workers}"] = measure(path, tokenizer_dir, out, workers)
        if arguments.sparse_gigabytes:
            result[f"iterate_{arguments.sparse_gigabytes}_gb_rss_mb"] = sparse_iteration_rss(
                Path(folder) / "sparse.tok", arguments.sparse_gigabytes
            )
        result["machine"] = f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores"
        result["python"] = platform.python_version()
        print(json.dumps(result))


if __name__ == "__main__":
    main()
