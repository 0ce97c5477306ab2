"""The pretraining race: the same minutes on the same machine, then bits per byte on the same texts.

The peer is a tuned transformers loop (`bench.peer_transformers`), ours the shipped recipe through
the `khaosz` command as a user runs it. Both get one tokenizer. Minutes are time in optimizer steps;
compilation, tokenisation and scoring are excluded for both and are reported as `wall_s`.

    python -m bench race --minutes 10

Nothing is cleaned up: OUT/ours is our run, OUT/peer the peer's model, OUT/race.json the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe

_TUNED = {
    "d": 256, "layers": 6, "heads": 4, "ffn": 704, "lr": 3e-3, "batch": 16, "window": 256,
    "warmup": 0.03, "min_ratio": 0.1,
}  # fmt: skip


_UNEQUAL = 0.05  # difference in training time that makes a comparison unfair


def run_peer(args: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    """Train and score the peer; its JSON line with `wall_s`."""
    settings = [p for name in _TUNED for p in (_flag(name), str(getattr(args, f"peer_{name}")))]
    command = [
        *("-m", "bench.peer_transformers", "--minutes", str(args.minutes)),
        *("--data", str(args.data), "--tokenizer", str(tokenizer), "--eval", str(args.eval)),
        *("--dtype", args.peer_dtype, "--compile" if args.peer_compile else "--no-compile"),
        *("--seed", str(args.seed), "--save", str(args.out / "peer"), *settings),
        *_limit("--eval-docs", args.eval_docs),
    ]
    output, wall = _python(command)
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**result, "wall_s": round(wall, 1)}


def run_ours(args: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    """Train by the recipe, then score OUT/ours/last as a user would."""
    out = args.out / "ours"
    overrides = [
        f"data={args.data}",
        f"tokenizer={tokenizer}",
        f"out={out}",
        f"max_minutes={args.minutes}",
        f"seed={args.seed}",
        *args.set,
    ]
    _, wall = _python(["-m", "khaosz", "train", str(args.recipe), *overrides])
    scoring = ["-m", "khaosz", "eval", "bpb", str(out / "last"), str(args.eval), "--json"]
    scored, _ = _python([*scoring, *_limit("--limit", args.eval_docs)])
    score = json.loads(scored.strip().splitlines()[-1])
    state = json.loads((out / "last" / "state" / "state.json").read_text(encoding="utf-8"))
    progress, plan = state["progress"], state["plan"]
    return {
        "tokens_per_s": round(progress["tokens"] / progress["seconds"], 1),
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "bits_per_byte": score["bits_per_byte"],
        "by_lang": score["by_lang"],
        "seconds": round(progress["seconds"], 2),
        "dtype": plan["dtype"],
        "compiled": plan["compiled"],
        "reasons": plan["reasons"],
        "wall_s": round(wall, 1),
    }


def tokenizer_for(args: argparse.Namespace) -> Path:
    """The tokenizer of both: given, left by an earlier race, or trained on the training texts."""
    if args.tokenizer is not None:
        return Path(args.tokenizer)
    directory: Path = args.out / "tokenizer"
    if not (directory / "tokenizer.json").exists():
        command = ["-m", "khaosz", "tokenizer", "train", str(args.data), "--out", str(directory)]
        _python([*command, "--vocab-size", str(args.vocab)])
    return directory


def _python(arguments: list[str]) -> tuple[str, float]:
    """Standard output and seconds of a Python process; its messages go to ours.

    Raises SystemExit when it fails.
    """
    print(f"$ python {' '.join(arguments)}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # What we read is JSON with Chinese in it, also where the console is not UTF-8.
        env={**os.environ, "PYTHONUTF8": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: `python {' '.join(arguments)}` exited {done.returncode}")
    return done.stdout, time.perf_counter() - started


def _limit(flag: str, value: int | None) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def arguments() -> argparse.ArgumentParser:
    corpus = Path(os.environ.get("KHAOSZ_SHARED", "../shared")) / "data" / "corpus"
    parser = argparse.ArgumentParser(
        description="Bits per byte after the same minutes of training, transformers and khaosz.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--data", type=Path, default=corpus / "train.jsonl.zst")
    parser.add_argument("--eval", type=Path, default=corpus / "dev.jsonl.zst", metavar="FILE")
    parser.add_argument("--eval-docs", type=int, help="documents to score at most")
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    parser.add_argument("--tokenizer", type=Path, help="default: one trained on --data")
    parser.add_argument("--vocab", type=int, default=8192, help="of a tokenizer trained here")
    parser.add_argument(
        "--skip",
        choices=("peer", "ours"),
        help="leave one side out; its result is read from OUT when an earlier race left it there",
    )
    parser.add_argument("--first", choices=("peer", "ours"), default="peer")
    parser.add_argument("--seed", type=int, default=0)
    ours = parser.add_argument_group("ours")
    ours.add_argument("--recipe", type=Path, default=Path("recipes/pt.toml"))
    ours.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override; repeatable"
    )
    peer = parser.add_argument_group("peer (tuned)")
    for name, value in _TUNED.items():
        peer.add_argument(f"--peer-{name.replace('_', '-')}", type=type(value), default=value)
    peer.add_argument("--peer-dtype", choices=("fp32", "bf16"), default="bf16")
    peer.add_argument("--peer-compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    for path in (args.data, args.eval, args.recipe, args.tokenizer):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if args.skip != "ours" and (args.out / "ours" / "last").exists():
        parser.error(f"{args.out / 'ours'} holds a run: choose another --out, or --skip ours")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    print(as_markdown(machine) + "\n", flush=True)
    tokenizer = tokenizer_for(args)
    results: dict[str, dict[str, Any]] = {}
    sides = {"peer": run_peer, "ours": run_ours}
    for side in sorted(sides, key=lambda name: name != args.first):
        kept = args.out / f"{side}.json"
        if side != args.skip:
            results[side] = {"minutes": args.minutes, **sides[side](args, tokenizer)}
            kept.write_text(json.dumps(results[side], ensure_ascii=False) + "\n", encoding="utf-8")
        elif kept.exists():
            results[side] = json.loads(kept.read_text(encoding="utf-8"))
    report: dict[str, Any] = {"bench": "race", "machine": machine, **results}
    print("| | bits per byte | by language | tokens | tokens/s | step minutes | wall s |")
    print("|---|---|---|---|---|---|---|")
    for side, found in results.items():
        by_lang = ", ".join(f"{lang} {value:.3f}" for lang, value in found["by_lang"].items())
        print(
            f"| {side} | {found['bits_per_byte']:.4f} | {by_lang} | {found['tokens']:,}"
            f" | {found['tokens_per_s']:,.0f} | {found['seconds'] / 60:.2f}"
            f" | {found['wall_s']:.0f} |"
        )
    if len(results) == 2:
        ratio = results["ours"]["bits_per_byte"] / results["peer"]["bits_per_byte"]
        report["ratio"] = round(ratio, 4)
        print(f"\nours / peer, bits per byte: {ratio:.4f} (below 1 is better)")
        # Both fix their steps from a few timed ones, so a busy machine gives them unequal time.
        report["time_ratio"] = round(results["ours"]["seconds"] / results["peer"]["seconds"], 4)
        if abs(report["time_ratio"] - 1) > _UNEQUAL:
            print(f"unequal: ours trained {report['time_ratio']:.2f}x as long as the peer")
        if results["ours"]["minutes"] != results["peer"]["minutes"]:
            print("unequal: the two sides were asked for different minutes")
    line = json.dumps(report, ensure_ascii=False)
    print("\n" + line)
    (args.out / "race.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
