"""Runs the contenders of a bench in turns, each measurement in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Runs = dict[str, list[dict[str, Any]]]  # by contender, one per round


def run_json(name: str, command: list[str], **environment: str) -> dict[str, Any]:
    """The JSON line that a command prints last. Raises SystemExit with its last messages."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise SystemExit(f"error: {name} exited {done.returncode}: {' / '.join(last)}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def in_turns(names: Iterable[str], rounds: int, measure: Callable[[str], dict[str, Any]]) -> Runs:
    """Measure every contender once per round (A B C A B C), so that drift affects all."""
    results: Runs = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name, runs in results.items():
            runs.append(measure(name))
            speed, memory = runs[-1]["tokens_per_s"], runs[-1]["peak_rss_mb"]
            print(
                f"  round {number}/{rounds}  {name}: {speed:,.0f} tokens/s, {memory:,.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    return results


def rows_of(
    results: Runs, reference: str, keys: Iterable[str], *, inverse: bool = False
) -> list[dict[str, Any]]:
    """One row per contender: medians over rounds, and ratios to `reference` (of it, if `inverse`)
    of the same rounds: what slows a whole round cancels out."""
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {"name": name, "runs": runs, "parameters": runs[0]["parameters"]}
        for key in keys:
            row[key] = round(median(run[key] for run in runs), 4)
        over, under = (results[reference], runs) if inverse else (runs, results[reference])
        for key, ratio in (("tokens_per_s", "speed_ratio"), ("peak_rss_mb", "memory_ratio")):
            row[ratio] = round(median(a[key] / b[key] for a, b in zip(over, under, strict=True)), 3)
        how = sorted({"compiled" if run["compiled"] else "eager" for run in runs})
        row["computes"] = f"{'/'.join(how)} {'/'.join(sorted({run['dtype'] for run in runs}))}"
        rows.append(row)
    return rows
