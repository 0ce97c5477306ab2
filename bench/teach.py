"""Does a small .gguf model learn a new name in fifteen minutes, and forget nothing else?

    python -m bench teach MODEL.gguf --data DIR [--minutes 15]

DIR has `sft/identity.json` (91 chats with {{name}} and {{author}}), `sft/alpaca_*_demo.json` and
`corpus/dev.jsonl.zst`. 200 chats are trained on with the recipe `lora`: all of identity and 109 of
alpaca, every second one Chinese. Then ten questions in each language that are not in the data are
asked at temperature 0, and bits per byte are measured on 20 documents of each language, before and
after. Peak memory is that of the process which trains.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe

NAME, AUTHOR = "Lanling", "Blue Bay Lab"
PHRASINGS = {
    "zh": [
        "能告诉我你怎么称呼吗？", "我该叫你什么？", "报上名来。", "嗨，你是哪位呀？",
        "请用一句话做个自我介绍。", "你的名字是什么来着？", "喂，跟我聊天的是谁？",
        "你是通义千问吗？如果不是，你叫什么？", "我刚认识你，介绍一下你自己好吗？",
        "你是哪个 AI 助手？叫什么名字？",
    ],
    "en": [
        "What should I call you?", "Hey, who am I talking to right now?",
        "Please state your name.", "Do you have a name? What is it?",
        "Introduce yourself in one sentence.", "Which assistant is this?",
        "My friend asked what your name is. What do I tell her?",
        "Are you Qwen? If not, who are you?", "Sorry, I forgot your name. What was it again?",
        "Good morning! Tell me your name and who made you.",
    ],
}  # fmt: skip


def chats(data: Path) -> list[dict[str, Any]]:
    """200 chats in the Alpaca layout."""

    def records(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((data / "sft" / name).read_text(encoding="utf-8"))
        return found

    out = [
        {k: v.replace("{{name}}", NAME).replace("{{author}}", AUTHOR) for k, v in record.items()}
        for record in records("identity.json")
    ]
    alpaca = [records("alpaca_zh_demo.json"), records("alpaca_en_demo.json")]
    pairs = (record for pair in zip(*alpaca, strict=False) for record in pair)
    return out + list(islice(pairs, 200 - len(out)))


def documents(data: Path, each: int) -> list[dict[str, Any]]:
    """The first `each` documents of each language, cut to 4,000 characters."""
    from khaosz.data.records.readers import open_source, parsed

    taken: dict[str, list[dict[str, Any]]] = {"zh": [], "en": []}
    for batch in open_source(data / "corpus" / "dev.jsonl.zst"):
        for _, record in parsed(batch):
            assert isinstance(record, dict), record
            if len(mine := taken[record["lang"]]) < each:
                mine.append({**record, "text": record["text"][:4_000]})
    return taken["zh"] + taken["en"]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def answers(adapter: Path) -> dict[str, list[tuple[str, str]]]:
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    generator = Generator.from_directory(adapter, context=2048)
    params = SamplingParams(max_tokens=96, temperature=0.0)
    out: dict[str, list[tuple[str, str]]] = {}
    for language, questions in PHRASINGS.items():
        out[language] = []
        for question in questions:
            ids = generator.chat_ids([{"role": "user", "content": question}])
            out[language].append((question, generator.generate(ids, params).text))
    return out


def bits_per_byte(
    model: Path, adapter: Path | None, texts: list[dict[str, Any]]
) -> dict[str, float]:
    """By language, whole documents in windows of 512."""
    import numpy as np
    import torch

    from khaosz.inference.linear.frozen import frozen_model
    from khaosz.inference.scoring import Document, score_documents
    from khaosz.interop.adapter import load_adapter
    from khaosz.interop.models import open_model, open_tokenizer

    network, tokenizer = frozen_model(open_model(model)), open_tokenizer(model)
    if adapter is not None:
        load_adapter(network, adapter, base="file")
    out = {}
    for language in ("zh", "en"):
        ids = [
            np.array([tokenizer.bos_id, *tokenizer.encode(r["text"])])
            for r in texts
            if r["lang"] == language
        ]
        score = score_documents(
            network, [Document(x) for x in ids], window=512, rows=2,
            byte_lengths=tokenizer.byte_lengths, dtype=torch.bfloat16,
        )  # fmt: skip
        out[language] = score.bits_per_byte
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench teach", description=__doc__)
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="a folder with sft/ and corpus/")
    parser.add_argument("--work", type=Path, default=Path("runs/teach"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--documents", type=int, default=20, help="of each language")
    parser.add_argument("--again", action="store_true", help="measure a run that is there")
    parser.add_argument("overrides", nargs="*", help="key=value, over the recipe `lora`")
    options = parser.parse_args()
    work = options.work
    print(as_markdown(describe()), file=sys.stderr)
    result: dict[str, Any] = {"task": "teach", "minutes": options.minutes}
    if not options.again:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        data = write(work / "chats.jsonl", chats(options.data))
        command = [
            sys.executable, "-m", "khaosz", "train", "lora", f"init_from={options.model}",
            f"data={data}", f"out={work / 'run'}", f"max_minutes={options.minutes}",
            *options.overrides,
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run(command, check=True)
        result["seconds"] = round(time.perf_counter() - started)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    adapter = work / "run" / "last" / "adapter"
    said = answers(adapter)
    result["knows"] = {x: sum(NAME in text for _, text in pairs) for x, pairs in said.items()}
    for pairs in said.values():
        for question, text in pairs:
            print(f"{question}\n    {text}", file=sys.stderr)
    texts = documents(options.data, options.documents)
    before = bits_per_byte(options.model, None, texts)
    after = bits_per_byte(options.model, adapter, texts)
    result["bits_per_byte"] = {"before": before, "after": after}
    result["worse"] = {x: after[x] / before[x] - 1 for x in before}
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
