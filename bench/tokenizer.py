"""Characters per token, Chinese and English, of our tokenizers beside published ones.

    python bench/tokenizer.py --vocab 8192 16384 --megabytes 12

Learns from `corpus/train.jsonl.zst` and measures on the texts of the SFT demos, which it has not
seen. Data: $KHAOSZ_SHARED/data, ../shared by default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from khaosz.data.records.texts import read_texts
from khaosz.data.tokenizer import Tokenizer, train_tokenizer

# Characters per token (zh, en) on the same demo files, from measured.md, section "Tokenizers".
PUBLISHED = {
    "DeepSeek-V4 129k": (1.94, 4.90),
    "Qwen 152k": (1.78, 4.83),
    "Llama-4 200k": (1.77, 4.90),
    "Llama-3 128k": (1.42, 4.87),
    "MiniMind 6.4k": (1.40, 3.19),
}


def demo_texts(path: Path) -> list[str]:
    """instruction + input + output of every record, joined."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return [
        "".join(record[key] for key in ("instruction", "input", "output")) for record in records
    ]


def characters_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(map(len, texts)) / sum(map(len, tokenizer.encode_batch(texts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--megabytes", type=float, default=48.0, help="of corpus to learn from")
    options = parser.parse_args()
    data = Path(os.environ.get("KHAOSZ_SHARED", "../shared")) / "data"
    corpus = data / "corpus" / "train.jsonl.zst"
    if not corpus.is_file():
        sys.exit(f"{corpus} does not exist: set KHAOSZ_SHARED")
    demos = {lang: demo_texts(data / "sft" / f"alpaca_{lang}_demo.json") for lang in ("zh", "en")}
    rows = []
    for vocab_size in options.vocab:
        started = time.perf_counter()
        texts = (text for _, text in read_texts(corpus))
        tokenizer = train_tokenizer(texts, vocab_size, max_bytes=int(options.megabytes * 1e6))
        trained = time.perf_counter() - started
        started = time.perf_counter()
        zh, en = (characters_per_token(tokenizer, demos[lang]) for lang in ("zh", "en"))
        encoded = time.perf_counter() - started
        size = sum(len(text.encode()) for texts in demos.values() for text in texts)
        rows.append(
            {
                "vocab_size": tokenizer.vocab_size,
                "zh": round(zh, 3),
                "en": round(en, 3),
                "train_seconds": round(trained, 1),
                "encode_mb_per_s": round(size / 1e6 / encoded, 1),
            }
        )
    print(f"{'tokenizer':24} {'zh':>6} {'en':>6}   characters per token, SFT demos")
    for row in rows:
        print(f"{'KHAOSZ ' + str(row['vocab_size']):24} {row['zh']:6.2f} {row['en']:6.2f}")
    for name, (zh, en) in PUBLISHED.items():
        print(f"{name:24} {zh:6.2f} {en:6.2f}   published")
    print(json.dumps({"bench": "tokenizer", "megabytes": options.megabytes, "ours": rows}))


if __name__ == "__main__":
    main()
