"""What many tests share: real bilingual text from the built-in sample, a tokenizer, tiny models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Threads of several workers on one core wait for each other in loops.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

SAMPLE = Path(__file__).parent.parent / "khaosz" / "data" / "sample"


def sample_documents() -> list[str]:
    """Documents of the built-in sample, both languages in turn, about 100 KB."""
    chinese = []
    for line in (SAMPLE / "statutes_zh.jsonl").read_text(encoding="utf-8").splitlines():
        chinese.append(json.loads(line)["text"])
    english = (SAMPLE / "state_of_the_union_2024.txt").read_text(encoding="utf-8").split("\n\n")
    pairs = zip(chinese, [part for part in english if len(part) > 20], strict=False)
    return [text for pair in pairs for text in pair]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of the sample's documents."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in sample_documents()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chats_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of short two-turn conversations cut from the sample."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    texts = [text for text in sample_documents() if len(text) < 400]
    lines = []
    for first, second in zip(texts[::2], texts[1::2], strict=False):
        messages = [
            {"role": "user", "content": first[:60]},
            {"role": "assistant", "content": first[60:120] or "好。"},
            {"role": "user", "content": second[:60]},
            {"role": "assistant", "content": second[60:120] or "Yes."},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 600 tokens trained on the sample."""
    from khaosz.data.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sample_documents(), 600).save(directory)
    return directory


@pytest.fixture(scope="session")
def prepared_dir(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> Path:
    """The sample as prepared token shards with a tenth held out."""
    from khaosz.data.shards.prepare import prepare
    from khaosz.data.tokenizer import load_tokenizer

    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare([corpus_file], load_tokenizer(tokenizer_dir), directory, workers=0, val_fraction=0.1)
    return directory
