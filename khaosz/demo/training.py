"""The demo's second act: from real Chinese and English text to a very small model."""

from __future__ import annotations

import json
import math
import random
import time
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from khaosz.config import load_stages, shipped_recipe
from khaosz.demo.corpus import DemoCorpus, build_demo_corpus
from khaosz.demo.facts import Fact, split_facts
from khaosz.demo.fetch import DemoSources, fetch_demo
from khaosz.errors import TrainingError
from khaosz.evaluation import bits_per_byte
from khaosz.files import write_atomic, write_json
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.trainer.loggers import read_metrics, smoothed
from khaosz.trainer.run import run

LEAST_MINUTES = 0.2
SHORT_MINUTES = 2.0  # below, every stage runs LEAST_STEPS: the same on slow machines
# Shares of the remaining time at the start of each stage; the rest is for calibration, compilation
# and evaluation.
_SHARES = {"pt": 0.46, "sft": 0.56, "dpo": 0.4}
# With fewer the answers are empty or noise.
LEAST_STEPS = {"pt": 60, "sft": 60, "dpo": 5}
_MOST_EMPTY = 0.5  # share of the answers
_CONTINUED = SamplingParams(
    max_tokens=60, temperature=0.3, top_p=0.9, repetition_penalty=1.1, seed=0
)
_COPIED = SamplingParams(max_tokens=160, temperature=0.0)
_KINDS = ("idioms", "laws")
_CASES = 10
_PASSAGES = 9_000  # facts of which those with a passage are fine-tuned on
_LONGEST_PASSAGE = 160  # characters: question and answer fit in the window, too
_BEGUN = {"zh": 24, "en": 60}  # characters of a document that is continued
_PLAN = "demo.json"
_BLOCKS = "▁▂▃▄▅▆▇█"


class DemoStopped(Exception):
    """A signal stopped the training; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_training(minutes: float, out: Path, offline: bool, console: Console) -> dict[str, Any]:
    """Fetch texts, train a tokenizer, pretrain, fine-tune, evaluate, show.

    `minutes` is the total time; below `SHORT_MINUTES` every stage runs `LEAST_STEPS` instead.
    Finished stages of an equal demo in `out` are used again; others are renamed, never overwritten.
    Raises `KhaoszError`, also where a stage was too short to show anything, and `DemoStopped`.
    """
    started = time.monotonic()
    is_short = minutes < SHORT_MINUTES
    plan = {"minutes": 0.0 if is_short else minutes, "offline": offline}
    finished = _finished_stages(out, plan, console)

    console.rule("texts", align="left")
    sources = fetch_demo(
        progress=lambda line: console.print(f"  {line}", highlight=False), offline=offline
    )
    for note in sources.notes:
        console.print(f"  {note}", highlight=False)
    corpus = build_demo_corpus(sources, out / "corpus")
    cases = _mix_in_passages(sources, corpus)
    _show_corpus(corpus, console)

    stages = (
        ("pt", "pretraining: Chinese and English text", corpus.pt, corpus.val),
        ("sft", "fine-tuning: how to answer", corpus.sft, corpus.sft_val),
        ("dpo", "preferences: answers to the question", corpus.preference, corpus.preference_val),
    )
    previous = None
    recipes = zip(load_stages(shipped_recipe("demo.toml")), stages, strict=True)
    for recipe, (name, title, data, val) in recipes:
        console.rule(title, align="left")
        last = out / name / "last"
        if name in finished and last.exists():
            console.print(f"  finished before: {last}", highlight=False)
            previous = last
            continue
        finished = []  # what follows starts from another model
        _move_aside(out / name, console)
        left = max(0.0, minutes - (time.monotonic() - started) / 60)
        limit = max(left * _SHARES[name], LEAST_MINUTES / 4)
        length = {"max_minutes": None, "max_steps": LEAST_STEPS[name]} if is_short else {}
        config = recipe.updated(
            **{"out": out / name, "data": data, "val": val, "max_minutes": limit, **length}
        )
        if previous is not None:
            # So small a model answers no open question: none is asked while it trains.
            config = config.updated(init_from=previous, prompts=[])
        context = run(config, console=console)
        previous = last
        if context.signal:
            raise DemoStopped(context.signal)
        _check_steps(out, name, minutes)
        done = [*_plan(out).get("stages", []), name]
        write_json(out / _PLAN, {**plan, "stages": done})

    console.rule("results", align="left")
    return _show_result(out, corpus, cases, console)


def _plan(out: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((out / _PLAN).read_text(encoding="utf-8"))
        return stored
    except (OSError, ValueError):
        return {}


def _finished_stages(out: Path, plan: dict[str, Any], console: Console) -> list[str]:
    """The stages that an equal demo finished; what another one left is renamed."""
    stored = _plan(out)
    stages = stored.pop("stages", [])
    if stored == plan:
        return list(stages)
    for path in (out / name for name in (*LEAST_STEPS, "corpus", "samples.json")):
        _move_aside(path, console)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _PLAN, {**plan, "stages": []})
    return []


def _check_steps(out: Path, name: str, minutes: float) -> None:
    steps = read_metrics(out / name / "metrics.jsonl")[-1]["step"]
    if steps < LEAST_STEPS[name]:
        longer = math.ceil(minutes * LEAST_STEPS[name] / max(steps, 1))
        least = ", ".join(f"{stage} {count}" for stage, count in LEAST_STEPS.items())
        raise TrainingError(
            f"{name} ran {steps} steps, too few to show anything; least numbers: {least}",
            hint=f"--minutes {longer}, or a machine that does nothing else",
        )


def _mix_in_passages(sources: DemoSources, corpus: DemoCorpus) -> list[Fact]:
    """Add questions about a passage that stands before them to the fine-tuning texts, so that the
    model learns to look there; returns held-out ones, idioms and statutes alternating."""
    train, held = split_facts(sources, 0, _PASSAGES)
    asked = [each for each in train if each.source in _KINDS]
    records = [
        {
            "messages": [
                {"role": "user", "content": _with_passage(each)},
                {"role": "assistant", "content": each.answer},
            ],
            "lang": each.lang,
            "source": "passages",
        }
        for each in asked
        if len(each.passage) <= _LONGEST_PASSAGE
    ]
    lines = corpus.sft.read_text(encoding="utf-8").splitlines()
    lines += [json.dumps(record, ensure_ascii=False) for record in records]
    random.Random(0).shuffle(lines)
    write_atomic(corpus.sft, (f"{line}\n".encode() for line in lines))
    short = [each for each in held if len(each.passage) <= _LONGEST_PASSAGE]
    by_kind = [[each for each in short if each.source == kind] for kind in _KINDS]
    return [each for pair in zip(*by_kind, strict=False) for each in pair][:_CASES]


def _with_passage(fact: Fact) -> str:
    return f"{fact.passage}\n\n{fact.question}"


def _move_aside(path: Path, console: Console) -> None:
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    console.print(f"  renamed what was there to {aside}", highlight=False)


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


def _show_result(
    out: Path, corpus: DemoCorpus, cases: list[Fact], console: Console
) -> dict[str, Any]:
    """Loss curves, and what a model of minutes can do: continue a text of a held-out document in
    each language, and answer from a passage that stands before the question."""
    steps = {}
    for stage in LEAST_STEPS:
        rows = read_metrics(out / stage / "metrics.jsonl")
        losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
        steps[stage] = rows[-1]["step"]
        picture = out / stage / "loss.png"  # not without matplotlib
        console.print(f"  {stage:<4} loss {losses[0]:.2f} {_sparkline(losses)} {losses[-1]:.2f}"
                      f"   {picture if picture.exists() else ''}", highlight=False)  # fmt: skip
    score = bits_per_byte(out / "pt" / "last", corpus.val)
    langs = ", ".join(f"{lang} {value:.2f}" for lang, value in score.by_lang.items())
    console.print(
        f"  held-out text: {score.bits_per_byte:.3f} bits per byte ({langs})", highlight=False
    )
    console.print("\n  It continues a text:", highlight=False)
    base = Generator.from_directory(out / "pt" / "last")
    transcript = []
    for beginning in _beginnings(corpus):
        text = base.generate(beginning, _CONTINUED).text
        transcript.append({"question": beginning, "answer": text})
        console.print("    ", beginning, f"[green]{escape(text)}[/green]", sep="", highlight=False)
    right, copied, by_chance = 0, 0.0, 0.0
    if cases:
        console.print("\n  It answers from a passage that stands before the question:")
        model = Generator.from_directory(out / "dpo" / "last")
        for number, fact in enumerate(cases):
            ids = model.chat_ids([{"role": "user", "content": _with_passage(fact)}])
            text = model.generate(ids, _COPIED).text.strip()
            is_copied = text == fact.answer.strip()
            right += is_copied
            copied += _share_copied(text, fact.answer) / len(cases)
            by_chance += _share_copied(text, cases[number - len(_KINDS)].answer) / len(cases)
            transcript.append({"question": _with_passage(fact), "answer": text})
            if number < len(_KINDS) and is_copied:
                console.print(f"    {fact.question}\n    {text}", markup=False, highlight=False)
        kinds = "idioms explained and statutes quoted word for word"
        console.print(f"    held-out {kinds}: {right} of {len(cases)}", highlight=False)
        console.print(
            f"    longest run that is copied: {copied:.0%} of the right sentence;"
            f" {by_chance:.0%} of another one's, for comparison",
            highlight=False,
        )
    write_json(out / "samples.json", transcript)
    empty = sum(not turn["answer"].strip() for turn in transcript)
    if empty > _MOST_EMPTY * len(transcript):
        raise TrainingError(
            f"{empty} of {len(transcript)} answers are empty: fine-tuning had {steps['sft']} steps",
            hint="give it more time, such as --minutes 9, on a machine that does nothing else",
        )
    return {
        "reached": True, "model": str(out / "dpo" / "last"), "steps": steps,
        "bits_per_byte": score.bits_per_byte, "by_lang": score.by_lang,
        "cases": len(cases), "right": right, "copied": copied, "copied_by_chance": by_chance,
    }  # fmt: skip


def _share_copied(text: str, answer: str) -> float:
    """Characters of the longest run that both share, of those of `answer`."""
    run = SequenceMatcher(None, text, answer, autojunk=False).find_longest_match()
    return run.size / max(1, len(answer))


def _beginnings(corpus: DemoCorpus) -> list[str]:
    """The first words of a held-out document of each language."""
    found: dict[str, str] = {}
    for line in corpus.val.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = " ".join(record["text"].split())
        lang = record.get("lang", "en")
        if lang not in found and len(text) > 2 * _BEGUN[lang]:
            part = text[: _BEGUN[lang]]
            found[lang] = part if lang == "zh" else part.rpartition(" ")[0]
    return list(found.values())


def _sparkline(values: list[float], width: int = 40) -> str:
    """The smoothed values as a row of block characters."""
    values = smoothed(values, 0.7)
    picked = [values[i * len(values) // width] for i in range(min(width, len(values)))]
    low, span = min(picked), (max(picked) - min(picked)) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in picked)
