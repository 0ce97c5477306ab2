"""Does a small model learn to answer from passages? Before and after, on modules never trained on.

    khaosz convert SmolLM2-135M-Instruct.Q4_1.gguf MODEL
    python -m bench grounded MODEL --work runs/grounded

Records are those of `khaosz data grounded` about Python's functions, in English. Every question
about a tenth of the modules is held out; records that show a passage of theirs are not trained on.
LoRA adapters are trained; about a quarter of an hour on one core for 135M parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe

_ASKED = re.compile(r"What does \S+ do in (\S+)\?|What is \S+ of (\S+) for\?")
_SHOWN = re.compile(r'source="([^" >]+)')
# ChatML as most models have it, without generation markers.
_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_MARKED = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}"
    + _TURN
    + "{% endif %}"
)


def held_out(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] < 26


def split(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    train, apart = [], []
    for record in records:
        prompt = record["messages"][0]["content"]
        asked = _ASKED.search(prompt.rpartition("Question: ")[2])
        if record["lang"] != "en" or asked is None:
            continue
        if held_out(asked[1] or asked[2]):
            apart.append(record)
        elif not any(map(held_out, _SHOWN.findall(prompt))):
            train.append(record)
    return train, apart


def with_marks(model: Path) -> None:
    """Add generation markers to a ChatML template that has none."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    template = config.get("chat_template", "")
    if "generation %}" not in template and _TURN in template:
        config["chat_template"] = template.replace(_TURN, _MARKED)
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def khaosz(*arguments: object) -> str:
    command = [sys.executable, "-m", "khaosz", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench grounded", description=__doc__)
    parser.add_argument("model", type=Path, help="a model directory; its template may be changed")
    parser.add_argument("--work", type=Path, default=Path("runs/grounded"))
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--records", type=int, default=60, help="held-out questions to ask")
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    print(as_markdown(describe()), file=sys.stderr)
    with_marks(options.model)
    khaosz("data", "grounded", options.model, "--out", work, "--max-tokens", 128)
    records = [
        json.loads(line)
        for name in ("grounded.jsonl", "grounded_val.jsonl")
        for line in (work / name).read_text(encoding="utf-8").splitlines()
    ]
    for name, part in zip(("train", "held"), split(records), strict=True):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in part]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    asked = work / "held.jsonl", "--limit", options.records, "--json"
    before = json.loads(khaosz("eval", "grounded", options.model, *asked))
    recipe = work / "recipe.toml"
    recipe.write_text('stage = "sft"\n[lora]\nrank = 16\n', encoding="utf-8")
    khaosz(
        "train", recipe, f"init_from={options.model}", f"data={work / 'train.jsonl'}",
        f"val={work / 'held.jsonl'}", f"out={work / 'run'}", f"max_minutes={options.minutes}",
        "window=1024", "batch_tokens=4096", "lr=0.001", "embedding_lr=0.001", "compile=off",
        "eval_every=1000",
    )  # fmt: skip
    after = json.loads(khaosz("eval", "grounded", work / "run/last", *asked))
    print(json.dumps({"task": "grounded", "before": before, "after": after}))


if __name__ == "__main__":
    main()
