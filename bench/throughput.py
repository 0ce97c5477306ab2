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
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe

_PEER, _OURS = "bench.peer_transformers", "bench.ours"
_DEFAULTS = "transformers, eager fp32 (defaults)"


@dataclass(frozen=True)
class Contender:
    """A process to start; `options` come before the shape."""

    name: str
    module: str
    options: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return self.module == _OURS


def _peer(name: str, *options: str) -> Contender:
    return Contender(name, _PEER, options)


def _our(name: str, *options: str) -> Contender:
    return Contender(name, _OURS, options)


SPEED = (
    _peer(_DEFAULTS, "--dtype", "fp32", "--no-fused"),
    _our("khaosz, AdamW", "--optimizer", "adamw"),
    _peer("transformers, compiled fp32", "--dtype", "fp32", "--compile"),
    _our("khaosz, Muon", "--optimizer", "muon"),
    _peer("transformers, compiled bf16", "--dtype", "bf16", "--compile"),
)
MEMORY = (
    _peer(_DEFAULTS, "--dtype", "fp32", "--no-fused"),
    _our("khaosz, eager fp32, AdamW", "--dtype=fp32", "--compile=off", "--optimizer=adamw"),
    _peer("transformers, compiled bf16", "--dtype", "bf16", "--compile"),
    _our("khaosz, calibrated, AdamW", "--optimizer", "adamw"),
    _our("khaosz, calibrated, Muon", "--optimizer", "muon"),
)


def run_contender(contender: Contender, shape: list[str], steps: int) -> dict[str, Any]:
    """The JSON line of one fresh process. Raises SystemExit with its last output."""
    length = ["--steps", str(steps)] if contender.ours else ["--time-only", str(steps)]
    command = [sys.executable, "-m", contender.module, *contender.options, *shape, *length]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise SystemExit(f"error: {contender.name} exited {done.returncode}: {' / '.join(last)}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def compare(
    contenders: tuple[Contender, ...], shape: list[str], steps: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run every contender once per round, alternating."""
    results: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            result = run_contender(contender, shape, steps)
            results[contender.name].append(result)
            print(
                f"  round {number + 1}/{rounds}  {contender.name}:"
                f" {result['tokens_per_s']:,.0f} tokens/s, {result['peak_rss_mb']:,.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    return results


def summarise(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per contender: medians over rounds, and ratios to the defaults of the same rounds."""
    rows = []
    for name, runs in results.items():
        speeds = [run["tokens_per_s"] for run in runs]
        pairs = list(zip(runs, results[_DEFAULTS], strict=True))
        rows.append(
            {
                "name": name,
                "tokens_per_s": round(statistics.median(speeds), 1),
                "best_tokens_per_s": max(run["best_tokens_per_s"] for run in runs),
                "medians": speeds,
                # Ratios per round: what slows a whole round cancels out.
                "speed_ratio": round(
                    statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs), 3
                ),
                "peak_rss_mb": round(statistics.median(run["peak_rss_mb"] for run in runs), 1),
                "memory_ratio": round(
                    statistics.median(a["peak_rss_mb"] / b["peak_rss_mb"] for a, b in pairs), 3
                ),
                "first_step_s": round(statistics.median(run["first_step_s"] for run in runs), 1),
                "dtype": sorted({run["dtype"] for run in runs}),
                "compiled": sorted({run["compiled"] for run in runs}),
                "parameters": runs[0]["parameters"],
            }
        )
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
        dtype = "/".join(row["dtype"])
        how = "/".join("compiled" if value else "eager" for value in row["compiled"])
        lines.append(
            f"| {row['name']} | {how} {dtype} | {row['tokens_per_s']:,.0f}"
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
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
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
    line = json.dumps(report, ensure_ascii=False)
    print(line)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
