"""Planned and measured memory: fresh processes train and generate; prints both and their ratio.

python -m bench planned --data PREPARED --model DIRECTORY_OR_GGUF [--model ...]
    [--init MODEL_DIRECTORY --corpus CORPUS_OF_THE_DEMO]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from bench.machine import as_markdown, describe, peak_rss_mb

TRAINING = [
    ["dtype=fp32"],
    ["dtype=bf16"],
    ["dtype=fp32", "window=1024", "model.max_position_embeddings=1024", "batch_tokens=4096"],
    ["dtype=fp32", "micro_batch=4"],
    ["dtype=fp32", "micro_batch=1"],
    ["dtype=fp32", "optimizer=adamw"],
    ["dtype=fp32", "lora.rank=16", "micro_batch=4"],
    ["dtype=bf16", "lora.rank=16"],
    ["dtype=fp32", "gradient_checkpointing=true"],
    ["dtype=fp32", "size=mini", "batch_tokens=3072"],
]
# With --init and --corpus.
PAIRS = "data={corpus}/preference.jsonl"
ALIGNING = [
    ["stage=rm", PAIRS],
    ["stage=dpo", PAIRS],
    ["stage=dpo", PAIRS, "dtype=bf16"],
    ["stage=dpo", PAIRS, "lora.rank=16"],
    ["stage=grpo", PAIRS, "rollout.prompts=8", "rollout.group=8"],
    ["stage=grpo", PAIRS, "rollout.prompts=8", "rollout.group=8", "lora.rank=16"],
    ["stage=ppo", PAIRS],
    ["stage=embed", "data={corpus}/pairs.jsonl"],
]
GENERATING = [
    (2_048, "float32", 1),
    (2_048, "bfloat16", 1),
    (16_384, "bfloat16", 1),
    (1_024, "auto", 8),
]


def train(data: str, overrides: list[str]) -> dict[str, Any]:
    from khaosz.config import TrainConfig
    from khaosz.config.recipe import parse_overrides
    from khaosz.memory.machine import resident_memory
    from khaosz.trainer.checks import check_stages
    from khaosz.trainer.memory import training_plan
    from khaosz.trainer.run import run

    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "stage": "pt",
            "data": data,
            "out": f"{folder}/out",
            "size": "nano",
        }
        values |= {"max_steps": 6, "compile": "off", "val_fraction": 0.0}
        if any(override.startswith("init_from=") for override in overrides):
            del values["size"]
        if {"stage=ppo", "stage=grpo"} & {*overrides}:
            values["reward_function"] = "khaosz.rewards:brevity"
        for dotted, value in parse_overrides(overrides).items():
            table, _, key = dotted.rpartition(".")
            (values.setdefault(table, {}) if table else values)[key] = value
        config = TrainConfig.parse(values)
        (stage,) = check_stages([config])
        plan = training_plan(stage.config, stage.shape, stage.parallel, stage.tokenizer)
        planned = plan.memory(resident_memory()).total
        run(config)
    return {"planned": planned >> 20, "measured": round(peak_rss_mb())}


def generate(model: str, context: int, dtype: str, sequences: int) -> dict[str, Any]:
    import torch

    from khaosz.inference.generator import Generator, plan_inference
    from khaosz.inference.sampling import SamplingParams
    from khaosz.interop.models import open_model
    from khaosz.memory.machine import resident_memory

    kind = None if dtype == "auto" else getattr(torch, dtype)
    source = open_model(model)
    plan = plan_inference(source, dtype=kind, context=context, sequences=sequences)
    planned = plan.memory(resident_memory()).total
    generator, rng = Generator.from_directory(model, dtype=kind, context=context), random.Random(0)
    size = generator.tokenizer.vocab_size
    prompts = [[rng.randrange(size) for _ in range(context - 20)] for _ in range(sequences)]
    generator.generate_batch(prompts, SamplingParams(16, 0.7, seed=1))
    return {"planned": planned >> 20, "measured": round(peak_rss_mb())}


def serve(model: str, context: int, sequences: int) -> dict[str, Any]:
    """A service that answers `sequences` requests at once."""
    from khaosz.inference.generator import plan_inference
    from khaosz.interop.models import open_model
    from khaosz.memory.parts import BASE

    source, rng = open_model(model), random.Random(0)
    command = [sys.executable, "-m", "khaosz", "serve", f"model={model}", "--port", "0"]
    command += ["--context", str(context)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        line = next(line for line in service.stdout if line.startswith("page:"))
        url = "http://127.0.0.1:" + re.sub(r"\D", "", line.rpartition(":")[2])

        def ask(number: int, length: int = context - 20) -> None:
            prompt = [rng.randrange(source.config.vocab_size) for _ in range(length)]
            body = {"model": "model", "prompt": prompt, "max_tokens": 16, "seed": number}
            httpx.post(f"{url}/v1/completions", json=body, timeout=900).raise_for_status()

        ask(0, length=4)  # loads the model
        parts = httpx.get(f"{url}/health/ready").json()["memory"]["model"]
        with ThreadPoolExecutor(sequences) as pool:
            list(pool.map(ask, range(sequences)))
        status = Path(f"/proc/{service.pid}/status").read_text("utf-8")
        service.terminate()
    plan = plan_inference(source, context=context, sequences=sequences)
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak
    return {"planned": plan.memory(parts[BASE]).total >> 20, "measured": int(peak[1]) >> 10}


def fresh(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.planned", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def show(name: str, result: dict[str, Any]) -> None:
    planned, measured = result["planned"], result["measured"]
    print(f"| {name} | {planned:,} | {measured:,} | {planned / measured:.2f} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, first, *rest = sys.argv[2:]
        if kind == "train":
            print(json.dumps(train(first, rest)))
        elif kind == "serve":
            print(json.dumps(serve(first, int(rest[0]), int(rest[1]))))
        else:
            print(json.dumps(generate(first, int(rest[0]), rest[1], int(rest[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="prepared data to train on")
    parser.add_argument("--model", action="append", default=[], help="model to generate with")
    parser.add_argument("--init", help="model directory that the other stages start from")
    parser.add_argument("--corpus", help="runs/demo/corpus, as `khaosz data get demo` writes it")
    options = parser.parse_args()
    print(as_markdown(describe()))
    print("\n| | planned MB | peak MB | ratio |\n|---|---|---|---|")
    for overrides in TRAINING if options.data else []:
        show(f"train {' '.join(overrides)}", fresh("train", options.data, *overrides))
    for stage in ALIGNING if options.init and options.corpus else []:
        overrides = [word.format(corpus=options.corpus) for word in stage]
        more = ["optimizer=adamw", "dtype=fp32", f"init_from={options.init}"]
        result = fresh("train", options.corpus, *more, *overrides)
        show(
            f"{Path(options.init).parent.name}, {' '.join(w for w in stage if w[:5] != 'data=')}",
            result,
        )
    for model in options.model:
        for context, dtype, sequences in GENERATING:
            result = fresh("generate", model, str(context), dtype, str(sequences))
            name = f"{Path(model).name}, {dtype}, {sequences} x {context:,} tokens"
            show(name, result)
        result = fresh("serve", model, "1024", "8")
        show(f"{Path(model).name}, service, 8 x 1,024 tokens", result)


if __name__ == "__main__":
    main()
