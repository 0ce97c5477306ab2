"""Pairs of random tokens in which a query and its passage are one text in two alphabets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LATIN = "abcdefghijklmnop"
HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张"


def translation_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """A query of letters; its passage has the same letters as Chinese characters; one hard
    negative in three records has one of them changed."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        word = [rng.randrange(len(LATIN)) for _ in range(rng.randint(3, 6))]
        record: dict[str, Any] = {
            "query": " ".join(LATIN[n] for n in word),
            "positive": "".join(HAN[n] for n in word),
        }
        if i % 3 == 0:
            other = [(word[0] + 1) % len(HAN), *word[1:]]
            record["negatives"] = ["".join(HAN[n] for n in other)]
        records.append(record)
    return records


def written(path: Path, records: list[Any]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
