"""Training tokens/s and peak memory: transformers and us on the same shape, one process each.

Speed: a 17M model (vocabulary 8192, d 384, 8 layers, tied), 8 rows of 512 tokens in a step, the
contenders taking turns (A B C A B C) so that a drifting machine drifts for all. Memory: the same
with a vocabulary of 65,536, where the logits are what grows. The peer's row is full of one random
document; ours are packed documents of about 300 tokens with attention kept apart, and padding is
not counted.

    python -m bench throughput --rounds 3
    python -m bench memory
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.contenders import Runs, in_turns, rows_of, run_json
from bench.machine import as_markdown, describe

_PEER, _OURS = "bench.peer_transformers", "bench.ours"
_DEFAULTS = "transformers, eager fp32 (defaults)"


# A module to start and its options, which come before the shape.
SPEED = {
    _DEFAULTS: [_PEER, "--dtype", "fp32", "--no-fused"],
    "khaosz, AdamW": [_OURS, "--optimizer", "adamw"],
    "transformers, compiled fp32": [_PEER, "--dtype", "fp32", "--compile"],
    "khaosz, Muon": [_OURS, "--optimizer", "muon"],
    "transformers, compiled bf16": [_PEER, "--dtype", "bf16", "--compile"],
}
MEMORY = {
    _DEFAULTS: [_PEER, "--dtype", "fp32", "--no-fused"],
    "khaosz, eager fp32, AdamW": [_OURS, "--dtype=fp32", "--compile=off", "--optimizer=adamw"],
    "transformers, compiled bf16": [_PEER, "--dtype", "bf16", "--compile"],
    "khaosz, calibrated, AdamW": [_OURS, "--optimizer", "adamw"],
    "khaosz, calibrated, Muon": [_OURS, "--optimizer", "muon"],
}


def compare(contenders: dict[str, list[str]], shape: list[str], steps: int, rounds: int) -> Runs:
    def measure(name: str) -> dict[str, Any]:
        module, *options = contenders[name]
        length = "--steps" if module == _OURS else "--time-only"
        command = [sys.executable, "-m", module, *options, *shape, length, str(steps)]
        return run_json(name, command)

    return in_turns(contenders, rounds, measure)


def summarise(results: Runs) -> list[dict[str, Any]]:
    """`rows_of`, with ratios to transformers' defaults."""
    rows = rows_of(results, _DEFAULTS, ("tokens_per_s", "peak_rss_mb", "first_step_s"))
    for row in rows:
        row["best_tokens_per_s"] = max(run["best_tokens_per_s"] for run in row["runs"])
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        f"### {title}",
        "",
        "| | computes | tokens/s, median (best) | x defaults | peak MB | x defaults | ready s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['computes']} | {row['tokens_per_s']:,.0f}"
            f" ({row['best_tokens_per_s']:,.0f}) | {row['speed_ratio']:.2f}"
            f" | {row['peak_rss_mb']:,.0f} | {row['memory_ratio']:.2f}"
            f" | {row['first_step_s']:.0f} |"
        )
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]], key: str, *, higher: bool) -> dict[str, Any]:
    """Our best row and the peer's best by `key`, and ours over theirs."""
    pick = max if higher else min
    ours = pick((r for r in rows if r["name"].startswith("khaosz")), key=lambda r: r[key])
    peer = pick((r for r in rows if not r["name"].startswith("khaosz")), key=lambda r: r[key])
    return {
        "ours": ours["name"],
        "peer": peer["name"],
        "ratio": round(ours[key] / peer[key], 3),
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Training speed and memory of transformers and khaosz, interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=("speed", "memory"), help="one half; default: both")
    parser.add_argument("--rounds", type=int, default=3, help="of the speed half")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each process")
    parser.add_argument("--memory-rounds", type=int, default=1)
    parser.add_argument("--memory-steps", type=int, default=3)
    parser.add_argument("--memory-vocab", type=int, default=65_536)
    shape = {"vocab": 8192, "d": 384, "layers": 8, "heads": 6, "ffn": 1024}
    for name, value in (shape | {"window": 512, "batch": 8}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def main() -> None:
    args = arguments().parse_args()
    machine = describe()
    sizes = ("d", "layers", "heads", "ffn", "window", "batch")
    shape = [part for name in sizes for part in (f"--{name}", str(getattr(args, name)))]
    report: dict[str, Any] = {"bench": "throughput", "machine": machine}
    print(as_markdown(machine) + "\n", flush=True)
    if args.only != "memory":
        results = compare(SPEED, [*shape, "--vocab", str(args.vocab)], args.steps, args.rounds)
        rows = summarise(results)
        found = verdict(rows, "tokens_per_s", higher=True)
        report["speed"] = {"rows": rows, "best_against_best": found}
        print(table(f"Speed, vocabulary {args.vocab:,}", rows))
        print(f"\nbest against best: {found['ours']} is {found['ratio']:.2f}x {found['peer']}\n")
    if args.only != "speed":
        wide = [*shape, "--vocab", str(args.memory_vocab)]
        rows = summarise(compare(MEMORY, wide, args.memory_steps, args.memory_rounds))
        found = verdict(rows, "peak_rss_mb", higher=False)
        report["memory"] = {"rows": rows, "best_against_best": found}
        print(table(f"Peak memory, vocabulary {args.memory_vocab:,}", rows))
        print(
            f"\nleast against least: {found['ours']} takes {found['ratio']:.2f}x {found['peer']}\n"
        )
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
