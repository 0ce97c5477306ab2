"""Decode, prefill and training step of this tree against another checkout of it.

    python -m bench network --against DIR

Both trees run the same work by their own public interfaces. A pair is one measurement of each, one
right after the other, the order alternating; what is printed are medians and, of the ratio this
tree / other tree, the median with a 95 % bootstrap interval over the pairs. A change that must not
slow the network down keeps the interval's lower end at 0.97 or above.

Engine: default settings, a random model of 61M parameters as a directory (fp32), a BF16 and a Q4_0
.gguf. Each pair has fresh processes, because a process's memory layout alone moves decoding by 3 %;
within a pair the two take turns, because the machine drifts. Training: the nano preset's shape by
`bench.ours`, which calibrates as a run does (compiled where that pays); calibration takes a minute,
so each tree keeps one process, which takes a few steps when it is its turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent.parent
PROMPT, ANSWER, TURNS = 256, 32, 6
STEPS, WARMUPS = 2, 3  # training steps of a measurement, and before the first
Pair = tuple[dict[str, float], dict[str, float]]  # (this tree, other tree): tokens/s by quantity
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


def generate_in_turns(paths: list[str]) -> None:
    """For each line read, the tokens per second of every model's prefill and decode, once."""
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    generators = {Path(path).stem: Generator.from_directory(path) for path in paths}
    for turn, _ in enumerate(sys.stdin):
        speeds: dict[str, float] = {}
        prompt = [turn + 20 + i % 200 for i in range(PROMPT)]  # begins as none before it
        for model, generator in generators.items():
            never = dict.fromkeys(generator.engine.end_ids, -100.0)
            # The second request finds the prompt in the cache.
            for name, answer, tokens in (("prefill", 1, PROMPT), ("decode", ANSWER, ANSWER)):
                params = SamplingParams(temperature=0.0, max_tokens=answer, logit_bias=never)
                begin = time.perf_counter()
                generator.generate(prompt, params)
                speeds[f"{name} {model}"] = tokens / (time.perf_counter() - begin)
        print(json.dumps(speeds), flush=True)


def train_in_turns(pairs: int) -> None:
    """`bench.ours` of the tree in whose process this runs, a few steps for each line read."""
    import bench.ours as ours

    class Paced(ours.Trainer):
        def step(self, number: int) -> Any:
            timed = number - WARMUPS
            if timed >= 0 and timed % STEPS == 0:
                if timed:
                    print(json.dumps({"train nano": max(self.speeds)}), flush=True)
                self.speeds: list[float] = []
                sys.stdin.readline()
            metrics = super().step(number)
            if timed >= 0:
                self.speeds.append(metrics["tokens_per_s"])
            return metrics

    vars(ours)["Trainer"] = Paced
    steps = STEPS * (pairs + 1) + 1  # a turn to warm up; the last step prints the last turn
    sys.argv = ["ours", "--warmups", str(WARMUPS), "--steps", str(steps)]
    sys.argv += [text for name, value in NANO.items() for text in (f"--{name}", str(value))]
    ours.main()


class Worker:
    """A process on a tree's modules, which measures when it is its turn."""

    def __init__(self, tree: Path, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=environment,
        )

    def measure(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"a worker stopped with status {self.process.wait()}: {line}")
        values: dict[str, float] = json.loads(line)
        return values

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def best_of_turns(ours: Worker, other: Worker, turns: int) -> Pair:
    """The best speeds of both, which take turns; a warm-up before."""
    ours.measure(), other.measure()
    best: Pair = ({}, {})
    for turn in range(turns):
        order = ((0, ours), (1, other)) if turn % 2 else ((1, other), (0, ours))
        for side, worker in order:
            for name, speed in worker.measure().items():
                best[side][name] = max(best[side].get(name, 0.0), speed)
    return best


def engine_pairs(against: Path, paths: list[Path], pairs: int) -> Iterator[Pair]:
    for _ in range(pairs):
        trees = (HERE, against)
        ours, other = (Worker(tree, "engine", *map(str, paths)) for tree in trees)
        yield best_of_turns(ours, other, TURNS)
        ours.close()
        other.close()


def training_pairs(against: Path, pairs: int) -> Iterator[Pair]:
    ours, other = (Worker(tree, "train", str(pairs)) for tree in (HERE, against))
    ours.measure(), other.measure()  # calibrated, compiled and warm
    for number in range(pairs):
        if number % 2:
            second = other.measure()
            yield ours.measure(), second
        else:
            yield ours.measure(), other.measure()
    ours.close()
    other.close()


def shown(pairs: Iterator[Pair], count: int) -> list[Pair]:
    """The pairs, each printed as it comes."""
    results = []
    for number, (ours, other) in enumerate(pairs, start=1):
        ratios = ", ".join(f"{name} {ours[name] / other[name]:.3f}" for name in ours)
        print(f"  pair {number}/{count}: {ratios}", file=sys.stderr, flush=True)
        results.append((ours, other))
    return results


def summarise(results: list[Pair]) -> list[dict[str, Any]]:
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
            generate_in_turns(rest)
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
            rows += summarise(shown(engine_pairs(against, paths, pairs), pairs))
    if options.only != "engine":
        rows += summarise(shown(training_pairs(against, pairs), pairs))
    print("| tokens/s | this tree | other tree | ratio | 95 % |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['tokens_per_s']:,.1f} | {row['other_tokens_per_s']:,.1f}"
            f" | {row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} |"
        )
    print(json.dumps({"bench": "network", "pairs": pairs, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
