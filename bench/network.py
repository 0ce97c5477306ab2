"""Decode, prefill and training step of this tree against another checkout of it.

    python -m bench network --against DIR

Both trees run the same work by their own public interfaces. A pair is one measurement of each, one
right after the other, the order alternating; what is printed are medians and, of the ratio this
tree / other tree, the median with a 95 % bootstrap interval over the pairs. A change that must not
slow the network down keeps the interval's lower end at 0.97 or above.

Engine: a fresh process each time, default settings, a random model of 61M parameters as a
directory (fp32), a BF16 and a Q4_0 .gguf. Training: the nano preset's shape by `bench.ours`, which
calibrates as a run does (compiled where that pays); calibration takes a minute, so each tree keeps
one process, which takes a few steps when it is its turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent.parent
PROMPT, ANSWER, ROUNDS = 256, 32, 3
STEPS, WARMUPS = 2, 3  # training steps of a measurement, and before the first
NANO = {"d": 256, "layers": 6, "heads": 4, "ffn": 704, "vocab": 4096, "window": 256, "batch": 8}


def write_models(folder: Path) -> list[Path]:
    """The random model, in the three forms the engine has defaults for."""
    import torch

    from khaosz.config import ModelConfig
    from khaosz.data.tokenizer import train_tokenizer
    from khaosz.interop.gguf.model import save_gguf
    from khaosz.interop.huggingface import save_model
    from khaosz.model import Transformer

    tokenizer = train_tokenizer(iter(["to be or not to be", "学而时习之，不亦说乎"]), 300)
    model = Transformer(
        ModelConfig(
            vocab_size=8192,
            hidden_size=640,
            intermediate_size=1792,
            num_hidden_layers=12,
            num_attention_heads=10,
            num_key_value_heads=5,
            head_dim=64,
            qk_norm=True,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    paths = [folder / "fp32", folder / "bf16.gguf", folder / "q4_0.gguf"]
    tokenizer.save(paths[0])
    save_model(model, paths[0], bos_id=tokenizer.bos_id, eos_ids=[tokenizer.eos_id])
    save_gguf(model, tokenizer, paths[1], "BF16")
    save_gguf(model, tokenizer, paths[2], "Q4_0")
    return paths


def measure_engine(paths: list[str]) -> dict[str, float]:
    """Tokens per second of each model's prefill and decode, the best of a few rounds."""
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    speeds: dict[str, float] = {}
    for path in paths:
        generator = Generator.from_directory(path)
        never = dict.fromkeys(generator.engine.end_ids, -100.0)
        one = SamplingParams(temperature=0.0, max_tokens=1, logit_bias=never)
        many = SamplingParams(temperature=0.0, max_tokens=ANSWER, logit_bias=never)
        for start in range(ROUNDS):  # no prompt begins as the one before
            prompt = [start + 20 + i % 200 for i in range(PROMPT)]
            for name, params, tokens in (("prefill", one, PROMPT), ("decode", many, ANSWER)):
                begin = time.perf_counter()
                generator.generate(prompt, params)  # the second finds the prompt in the cache
                speed = tokens / (time.perf_counter() - begin)
                key = f"{name} {Path(path).stem}"
                speeds[key] = max(speeds.get(key, 0.0), speed)
    return speeds


def train_in_turns(pairs: int) -> None:
    """`bench.ours` of the tree in whose process this runs, a few steps for each line read."""
    import bench.ours as ours

    class Paced(ours.Trainer):
        def step(self, number: int) -> Any:
            timed = number - WARMUPS
            if timed >= 0 and timed % STEPS == 0:
                print(json.dumps({"ready": True}), flush=True)
                sys.stdin.readline()
            metrics = super().step(number)
            if timed >= 0:
                print(json.dumps({"train nano": metrics["tokens_per_s"]}), flush=True)
            return metrics

    vars(ours)["Trainer"] = Paced
    sys.argv = ["ours", "--warmups", str(WARMUPS), "--steps", str(STEPS * pairs)]
    sys.argv += [text for name, value in NANO.items() for text in (f"--{name}", str(value))]
    ours.main()


class Trainee:
    """A tree's training process, stopped between its turns."""

    def __init__(self, tree: Path, pairs: int) -> None:
        command, settings = worker(tree, "train", str(pairs))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **settings
        )
        self._line()  # calibrated, compiled and warm

    def _line(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"training stopped with status {self.process.wait()}: {line}")
        values: dict[str, float] = json.loads(line)
        return values

    def measure(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        speeds = [self._line()["train nano"] for _ in range(STEPS)]
        self._line()  # ready for the next turn, or the result at the end
        return {"train nano": max(speeds)}


def worker(tree: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """The command that runs this file on a tree's modules, and settings of its process."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", *arguments]
    return command, {"cwd": tree, "env": environment}


def engine_speeds(tree: Path, paths: list[Path]) -> dict[str, float]:
    command, settings = worker(tree, "engine", *map(str, paths))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **settings)
    speeds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


def measure_pairs(
    ours: Callable[[], dict[str, float]], other: Callable[[], dict[str, float]], pairs: int
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(this tree, other tree), measured in turns."""
    results = []
    for number in range(pairs):
        if number % 2:
            second = other()
            first = ours()
        else:
            first = ours()
            second = other()
        ratios = ", ".join(f"{name} {first[name] / second[name]:.3f}" for name in first)
        print(f"  pair {number + 1}/{pairs}: {ratios}", file=sys.stderr, flush=True)
        results.append((first, second))
    return results


def summarise(results: list[tuple[dict[str, float], dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per quantity; `low` and `high` bound the median ratio, by bootstrap over pairs."""
    rows = []
    for name in results[0][0]:
        first, second = (np.array([pair[i][name] for pair in results]) for i in (0, 1))
        ratios = first / second
        draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
        rows.append(
            {
                "name": name,
                "tokens_per_s": round(median(first.tolist()), 1),
                "other_tokens_per_s": round(median(second.tolist()), 1),
                "ratio": round(median(ratios.tolist()), 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", choices=("engine", "train"), help="one half")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *rest = options.worker
        if kind == "train":
            train_in_turns(int(rest[0]))
        else:
            print(json.dumps(measure_engine(rest)))
        return
    if options.against is None:
        parser.error("--against DIR is required")
    from bench.machine import as_markdown, describe

    machine = describe()
    print(as_markdown(machine) + "\n", flush=True)
    against, pairs, rows = options.against.resolve(), options.pairs, []
    if options.only != "train":
        with tempfile.TemporaryDirectory() as folder:
            paths = write_models(Path(folder))
            rows += summarise(
                measure_pairs(
                    lambda: engine_speeds(HERE, paths), lambda: engine_speeds(against, paths), pairs
                )
            )
    if options.only != "engine":
        trainees = [Trainee(tree, pairs) for tree in (HERE, against)]
        rows += summarise(measure_pairs(trainees[0].measure, trainees[1].measure, pairs))
    print("| tokens/s | this tree | other tree | ratio | 95 % |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['tokens_per_s']:,.1f} | {row['other_tokens_per_s']:,.1f}"
            f" | {row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} |"
        )
    print(json.dumps({"bench": "network", "pairs": pairs, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
