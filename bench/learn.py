"""Does alignment learn? Five seeds of five tasks, through the same recipes a user runs.

    python -m bench learn [TASK ...] [--seeds 5] [--model runs/demo/sft/last] [--picture FILE.png]

    rm-planted   pairs whose better answer contains a marker: held-out accuracy, target >= 95 %
    rm-real      the shared pairs of people, each held out once over the seeds: better than chance?
    dpo-real     the same folds: held-out accuracy and margin up, log p of chosen answers preserved?
    ppo, grpo    eight tokens rewarded for lower-case letters, from a uniform policy: the best
                 policy under the KL penalty has a closed form; target >= 90 % of its reward

The last two start from a policy that is uniform over a byte vocabulary, so with reward weight 1 and
KL weight beta the soft value of t tokens to go is
V_t = beta log mean_token exp((r + V_{t-1}) / beta), an end token ending it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import re
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from khaosz.config import TrainConfig
from khaosz.data.tokenizer import load_tokenizer, train_tokenizer
from khaosz.evaluation import preference_accuracy
from khaosz.evaluation.preference import wilson
from khaosz.trainer.loggers import read_metrics
from khaosz.trainer.run import run

TOKENS, BETA = 8, 0.02
SHARED = Path(os.environ.get("KHAOSZ_SHARED", "../shared")) / "data/preference"
TASKS = ("rm-planted", "rm-real", "dpo-real", "ppo", "grpo")
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
}
Rows = list[dict[str, Any]]


def letters(messages: list[dict[str, Any]], answer: str, extra: dict[str, Any]) -> float:
    """Lower-case letters among the eight tokens, as a share; names of control tokens aside."""
    plain = re.sub(r"<\|.*?\|>", "", answer)
    return sum("a" <= c <= "z" for c in plain) / TOKENS


def optimum(vocabulary: int, good: int, ends: int) -> float:
    """Reward less KL cost of the best policy; see the module's text."""
    value = 0.0
    for _ in range(TOKENS):
        total = good * math.exp((1 / TOKENS + value) / BETA) + ends
        total += (vocabulary - good - ends) * math.exp(value / BETA)
        value = BETA * math.log(total / vocabulary)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench learn", description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=" ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="fine-tuned model, for the real pairs")
    parser.add_argument("--work", type=Path, default=Path("runs/learn"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    curves: dict[str, list[Rows]] = {}
    for task in options.tasks:
        started = time.perf_counter()
        work = options.work / task
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        match task:
            case "rm-planted":
                result, rows = planted(work, options.seeds)
            case "rm-real" | "dpo-real":
                result, rows = real(task.removesuffix("-real"), work, options.seeds, options.model)
            case _:
                result, rows = letters_task(task, work, options.seeds)
        curves[task] = rows
        result = {"task": task, **result, "seconds": round(time.perf_counter() - started)}
        print(json.dumps(result), flush=True)
    if options.picture:
        draw(curves, options.picture)


def planted(work: Path, seeds: int) -> tuple[dict[str, Any], list[Rows]]:
    rng = random.Random(0)
    words = "春 夏 秋 冬 山 水 风 云 red blue green one two three four five".split()  # noqa: SIM905

    def sentence(marked: bool) -> str:
        said = [rng.choice(words) for _ in range(rng.randint(4, 12))]
        said.insert(rng.randint(0, len(said)), "please" if marked else "indeed")
        return " ".join(said)

    records = [
        {"prompt": sentence(bool(i % 2)), "chosen": sentence(True), "rejected": sentence(False)}
        for i in range(600)
    ]
    _write(work / "train.jsonl", records[:400])
    _write(work / "held_out.jsonl", records[400:])
    tokenizer = work / "tokenizer"
    train_tokenizer([r["chosen"] + " " + r["rejected"] for r in records], 400).save(tokenizer)
    found, rows = [], []
    for seed in range(seeds):
        config = _config("rm", work, seed, tokenizer, data=work / "train.jsonl",
                         val=work / "held_out.jsonl", epochs=6, batch_pairs=16, window=128,
                         model=TINY, size="nano", lr=3e-3, embedding_lr=3e-3)  # fmt: skip
        rows.append(_run(config))
        found.append(preference_accuracy(config.out / "last", work / "held_out.jsonl").accuracy)
    return {"held_out_accuracy": found, "least": min(found)}, rows


def real(
    stage: str, work: Path, seeds: int, model: Path | None
) -> tuple[dict[str, Any], list[Rows]]:
    """Cross-validation: seed s holds out every `seeds`-th pair, beginning with the s-th."""
    if model is None:
        raise SystemExit("error: the real pairs need --model DIR, a fine-tuned model")
    records = []
    for name in ("dpo_zh_demo.json", "dpo_en_demo.json"):
        records += json.loads((SHARED / name).read_text(encoding="utf-8"))
    right = total = 0.0
    before, after, rows = [], [], []
    for seed in range(seeds):
        fold = work / str(seed)
        fold.mkdir()
        _write(fold / "train.jsonl", [r for i, r in enumerate(records) if i % seeds != seed])
        _write(fold / "held_out.jsonl", records[seed::seeds])
        more: dict[str, Any] = {"preference": {"sft_weight": 0.2}} if stage == "dpo" else {}
        config = _config(stage, fold, seed, None, data=fold / "train.jsonl",
                         val=fold / "held_out.jsonl", epochs=1, batch_pairs=16, init_from=model,
                         **more)  # fmt: skip
        rows.append(_run(config))
        reference = model if stage == "dpo" else None
        got = preference_accuracy(config.out / "last", fold / "held_out.jsonl", reference=reference)
        right += got.accuracy * got.pairs
        total += got.pairs
        first = next(row for row in rows[-1] if "val_loss" in row)
        before.append(first)
        after.append(rows[-1][-1])
    low, high = wilson(right, total)
    result: dict[str, Any] = {
        "held_out_accuracy": round(right / total, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "pairs": int(total),
        "val_margin": round(mean(row["val_margin"] for row in after), 4),
    }
    if stage == "dpo":
        for name in ("val_logprob_chosen", "val_logprob_rejected"):
            result[name] = [round(mean(r[name] for r in rows), 4) for rows in (before, after)]
    return result, rows


def letters_task(stage: str, work: Path, seeds: int) -> tuple[dict[str, Any], list[Rows]]:
    # 16 control tokens, 256 bytes and the one merge that is required, of digits, so that no letter
    # has two tokens.
    train_tokenizer(["0000 " * 200], 273).save(work / "tokenizer")
    tokenizer = load_tokenizer(work / "tokenizer")
    best = optimum(tokenizer.vocab_size, 26, len({tokenizer.end_id, tokenizer.eos_id}))
    _write(work / "prompts.jsonl", [{"prompt": p} for p in "abcdefgh"])
    rollout = {
        "prompts": 16 if stage == "grpo" else 64,
        "group": 8 if stage == "grpo" else 1,
        "max_new_tokens": TOKENS,
        "epochs": 2,
        "minibatches": 2,
        "kl": BETA,
        "lam": 0.95,
        "kl_loss": "k2",
        "scale_by_std": False,
    }
    rewards, kls, scores, rows = [], [], [], []
    for seed in range(seeds):
        config = _config(stage, work, seed, work / "tokenizer", data=work / "prompts.jsonl",
                         max_steps=240, model=TINY, size="nano", window=64, lr=3e-3,
                         embedding_lr=3e-3, rollout=rollout,
                         reward_function=f"{__file__}:letters")  # fmt: skip
        rows.append(_run(config))
        last = rows[-1][-20:]
        rewards.append(mean(row["reward"] for row in last))
        kls.append(mean(row["kl"] for row in last))
        scores.append((rewards[-1] - BETA * kls[-1]) / best)
    return {
        "reward": [round(x, 4) for x in rewards],
        "kl_nats_per_answer": [round(x, 3) for x in kls],
        "reward_less_kl_of_optimum": [round(x, 4) for x in scores],
        "least": round(min(scores), 4),
    }, rows


def _config(
    stage: str, work: Path, seed: int, tokenizer: Path | None, **changes: Any
) -> TrainConfig:
    values = {
        "stage": stage,
        "out": work / f"seed-{seed}",
        "seed": seed,
        "optimizer": "adamw",
        "tokenizer": tokenizer,
        "log_every": 1,
        "save_every": 10_000,
        "compile": "off",
        "dtype": "fp32",
        **changes,
    }
    return TrainConfig.parse(values)


def _run(config: TrainConfig) -> Rows:
    run(config, console=Console(file=io.StringIO()))
    return read_metrics(config.out / "metrics.jsonl")


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(curves: dict[str, list[Rows]], path: Path) -> None:
    """One panel per task, one line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        "rm-planted": [("val_accuracy", "held-out accuracy")],
        "rm-real": [("val_accuracy", "held-out accuracy")],
        "dpo-real": [("val_accuracy", "held-out accuracy"), ("val_margin", "held-out margin")],
        "ppo": [("reward", "reward"), ("kl", "KL, nats per answer")],
        "grpo": [("reward", "reward"), ("kl", "KL, nats per answer")],
    }
    panels = [(task, *line) for task in curves for line in shown[task]]
    figure = Figure(figsize=(11, 2.6 * math.ceil(len(panels) / 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).ravel()
    for axis, (task, metric, label) in zip(axes, panels, strict=False):
        for rows in curves[task]:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(f"{task}: {label}", fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
