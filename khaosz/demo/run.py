"""`khaosz demo`: from real Chinese and English text to a model that chats."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.config import load_stages, shipped_recipe
from khaosz.demo.corpus import DemoCorpus, build_demo_corpus
from khaosz.demo.fetch import fetch_demo
from khaosz.errors import ConfigError, TrainingError
from khaosz.evaluation import bits_per_byte
from khaosz.files import write_json
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.trainer.loggers import read_metrics, smoothed
from khaosz.trainer.outcome import command
from khaosz.trainer.run import run

_LEAST_MINUTES = 0.2
# Shares of the remaining time at the start of each stage; the rest is for calibration, compilation
# and evaluation.
_SHARES = {"pt": 0.46, "sft": 0.56, "dpo": 0.4}
# With fewer the answers are empty or noise; on a slow or busy machine they take longer than asked.
_LEAST_STEPS = {"pt": 60, "sft": 60, "dpo": 5}
_MOST_EMPTY = 0.5  # share of the answers
_ANSWERS = SamplingParams(
    max_tokens=120, temperature=0.3, top_p=0.9, repetition_penalty=1.1, seed=0
)
_BLOCKS = "▁▂▃▄▅▆▇█"


class DemoStopped(Exception):
    """A signal stopped the training; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_demo(
    *, minutes: float, out: Path, offline: bool = False, console: Console | None = None
) -> Path:
    """Fetch texts, train a tokenizer, pretrain, fine-tune, evaluate, show; returns the model.

    `minutes` is the total time; a stage trains `_LEAST_STEPS` in any case. An existing `out` is
    renamed, never overwritten. Raises `KhaoszError`, also if the model does not answer, and
    `DemoStopped`.
    """
    if not (math.isfinite(minutes) and minutes >= _LEAST_MINUTES):
        raise ConfigError(f"--minutes must be {_LEAST_MINUTES} or more (got {minutes:g})")
    console = console or Console(stderr=True)
    started = time.monotonic()
    _move_aside(out, console)

    console.rule("1  texts")
    sources = fetch_demo(
        progress=lambda line: console.print(f"  {line}", highlight=False), offline=offline
    )
    for note in sources.notes:
        console.print(f"  {note}", highlight=False)
    corpus = build_demo_corpus(sources, out / "corpus")
    _show_corpus(corpus, console)

    stages = (
        ("pt", "pretraining: Chinese and English text", corpus.pt, corpus.val),
        ("sft", "fine-tuning: how to answer", corpus.sft, corpus.sft_val),
        ("dpo", "preferences: answers to the question", corpus.preference, corpus.preference_val),
    )
    previous = None
    recipes = zip(load_stages(shipped_recipe("demo.toml")), stages, strict=True)
    for number, (recipe, (name, title, data, val)) in enumerate(recipes, start=2):
        console.rule(f"{number}  {title}")
        left = minutes - (time.monotonic() - started) / 60
        limit = max(left * _SHARES[name], _LEAST_MINUTES / 4)
        config = recipe.updated(
            out=out / name, data=data, val=val, max_minutes=limit, min_steps=_LEAST_STEPS[name]
        )
        if previous is not None:
            config = config.updated(init_from=previous)
        context = run(config, console=console)
        previous = out / name / "last"
        if context.signal:
            raise DemoStopped(context.signal)

    console.rule("5  results")
    model = out / "dpo" / "last"
    _show_result(out, corpus, console)
    took = time.monotonic() - started
    line = f"\n  {took / 60:.1f} minutes in all. Talk to it:  {command('chat', str(model))}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return model


def _move_aside(out: Path, console: Console) -> None:
    if not out.exists():
        return
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(aside)
    console.print(f"  renamed the previous demo to {aside}", highlight=False)


def _show_corpus(corpus: DemoCorpus, console: Console) -> None:
    """Print the mix of the texts as bars."""
    total = sum(s.characters for s in corpus.stats.values()) or 1
    for name, stats in sorted(corpus.stats.items(), key=lambda item: -item[1].characters):
        bar = "█" * round(30 * stats.characters / total)
        console.print(
            f"  {name:<14} {stats.characters / 1e6:6.2f}M characters,"
            f" {stats.conversations:6,} conversations  [green]{bar}[/green]",
            highlight=False,
        )


def _show_result(out: Path, corpus: DemoCorpus, console: Console) -> None:
    for stage in ("pt", "sft", "dpo"):
        rows = read_metrics(out / stage / "metrics.jsonl")
        losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
        picture = out / stage / "loss.png"  # not without matplotlib
        console.print(f"  {stage:<4} loss {losses[0]:.2f} {_sparkline(losses)} {losses[-1]:.2f}"
                      f"   {picture if picture.exists() else ''}", highlight=False)  # fmt: skip
    score = bits_per_byte(out / "pt" / "last", corpus.val)
    langs = ", ".join(f"{lang} {value:.2f}" for lang, value in score.by_lang.items())
    console.print(
        f"  held-out text: {score.bits_per_byte:.3f} bits per byte ({langs})", highlight=False
    )
    console.print()
    prompts = json.loads(corpus.prompts.read_text(encoding="utf-8"))
    transcript = _converse(Generator.from_directory(out / "dpo" / "last"), prompts, console)
    write_json(out / "samples.json", transcript)
    empty = sum(not turn["answer"].strip() for turn in transcript)
    if empty > _MOST_EMPTY * len(transcript):
        steps = read_metrics(out / "sft" / "metrics.jsonl")[-1]["step"]
        raise TrainingError(
            f"{empty} of {len(transcript)} answers are empty: fine-tuning had {steps} steps",
            hint="give it more time, such as --minutes 9, on a machine that does nothing else",
        )


def _converse(generator: Generator, prompts: Any, console: Console) -> list[dict[str, str]]:
    transcript = []
    for prompt in prompts:
        question = prompt["prompt"]
        ids = generator.chat_ids([{"role": "user", "content": question}])
        answer = generator.generate(ids, _ANSWERS).text
        transcript.append({"question": question, "answer": answer})
        console.print("  [bold cyan]>[/bold cyan] ", end="")
        console.print(question, markup=False, highlight=False)
        console.print(f"    {answer}", markup=False, highlight=False)
    return transcript


def _sparkline(values: list[float], width: int = 40) -> str:
    """The smoothed values as a row of block characters."""
    values = smoothed(values, 0.7)
    picked = [values[i * len(values) // width] for i in range(min(width, len(values)))]
    low, span = min(picked), (max(picked) - min(picked)) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in picked)
