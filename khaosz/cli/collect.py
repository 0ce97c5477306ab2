"""Preferences of a person: answers of a model to one prompt, shown blind, to be ranked.

Each ranked prompt is one JSON line, on the disk before the next is shown:
`{"prompt", "answers", "ranking", "finish_reasons", "model", "sampling"}`, which `load_pairs` reads,
with the answers in the order in which they were shown.
"""

from __future__ import annotations

import json
import os
import random
import re
import string
import sys
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from khaosz.data.records.chat import Message
from khaosz.data.records.preference import Paths, load_prompts, prompt_key, to_prompt
from khaosz.data.records.readers import Skip, parse_line
from khaosz.data.records.report import text_hash
from khaosz.errors import DataError, GenerationError
from khaosz.inference.generator import Completion, Generator
from khaosz.inference.sampling import SamplingParams

HINT = "best first, = between equals, every letter once, like {}; s skips, q quits"
_BEGINNING = b'{"prompt": ['  # of each line that we write
_SIGNS = str.maketrans("》〉", ">>")  # what a Chinese keyboard writes for >
# Text of strangers must not steer the terminal or reorder its lines.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Collected:
    """Numbers of prompts: `ranked` and `skipped` now, `passed_over` as ranked before, `alike` with
    fewer than two different answers, `left` when the person quit."""

    ranked: int = 0
    skipped: int = 0
    passed_over: int = 0
    alike: int = 0
    left: int = 0


def collect(
    model: str | Path,
    prompts: Paths,
    out: str | Path,
    n: int = 4,
    seed: int = 0,
    *,
    params: SamplingParams | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Collected:
    """Ask for a ranking of up to `n` different answers to each prompt, appended to `out` (.jsonl).

    Prompts that are in `out` are not asked again. The answers and their order depend on the model,
    the prompt, `params` and `seed` alone. Rankings are read from standard input, a terminal or not,
    one a line; its end and Ctrl-C are as good as `q`.

    Raises DataError for prompts or an `out` that can't be used, GenerationError, ModelError.
    """
    params = params or SamplingParams(temperature=0.9, top_p=0.95)
    if not 2 <= n <= len(string.ascii_uppercase):
        raise GenerationError(f"n must be between 2 and 26 (got {n})")
    if params.temperature == 0:
        raise GenerationError(f"temperature 0 gives the same answer {n} times", hint="0.9 is usual")
    console, out = console or Console(highlight=False, emoji=False), Path(out)
    seen = ranked_prompts(out, console)
    generator = Generator.from_directory(model, device=device)
    data = load_prompts(prompts, generator.tokenizer, generator.context)
    console.print(Text("\n".join(data.report.lines())), soft_wrap=True)
    done = Collected()
    try:
        for number, prompt in enumerate(data.train, start=1):
            key = prompt_key(prompt.prompt)
            if key in seen:
                done.passed_over += 1
                continue
            seen.add(key)
            own = replace(params, n=n, seed=int.from_bytes(text_hash(f"{seed} {key}")) >> 65)
            sampled = generator.generate_batch([prompt.prompt_ids.tolist()], own)
            answers = list({each.text: each for each in sampled if each.text.strip()}.values())
            if len(answers) < 2:
                done.alike += 1
                continue
            random.Random(own.seed).shuffle(answers)
            console.rule(f"{number} / {len(data.train)}")
            _show(console, prompt.prompt, answers)
            ranking = _ask(console, len(answers))
            if ranking == "q":
                break
            if ranking == "s":
                done.skipped += 1
                continue
            record = {
                "prompt": prompt.prompt,
                "answers": [each.text for each in answers],
                "ranking": ranking,
                "finish_reasons": [each.finish_reason for each in answers],
                "model": str(model),
                "sampling": asdict(own),
            }
            _append(out, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
            done.ranked += 1
    except KeyboardInterrupt:
        console.print()
    done.left = len(data.train) - done.ranked - done.skipped - done.passed_over - done.alike
    console.print(Text(f"{out}: {done.ranked} ranked, {done.left} left"), soft_wrap=True)
    return done


def parse_ranking(entry: str, n: int) -> list[int | list[int]]:
    """`b>a=c` as indices, best first and equals in a list of their own: [1, [0, 2]].

    Spaces, capitals and full-width signs are fine. Raises DataError unless each of the first `n`
    letters is named once.
    """
    letters = list(string.ascii_lowercase[:n])
    plain = unicodedata.normalize("NFKC", entry).casefold().translate(_SIGNS)
    levels = [level.split("=") for level in "".join(plain.split()).split(">")]
    named = [name for level in levels for name in level]
    if sorted(named) != letters:
        odd = next(x for x in [*named, *letters] if x not in letters or named.count(x) != 1)
        wrong = "no answer" if odd not in letters else "missing" if odd not in named else "twice"
        raise DataError(f"{odd!r} is {wrong}", hint=HINT.format(">".join(letters)))
    ranked = [[letters.index(name) for name in level] for level in levels]
    return [level[0] if len(level) == 1 else level for level in ranked]


def ranked_prompts(out: Path, console: Console) -> set[str]:
    """Keys of the prompts in `out`. A last line that a crash tore is taken off, aloud. Raises
    DataError for a file that holds anything else, and leaves it as it is."""
    if out.suffix != ".jsonl":
        raise DataError(f"{out} does not end in .jsonl", hint="one JSON line is added per ranking")
    try:
        *lines, last = (out.read_bytes() if out.exists() else b"").split(b"\n")
        keys = {_key(out, n, line) for n, line in enumerate(lines, start=1) if line.strip()}
        torn = last.startswith(_BEGINNING) or _BEGINNING.startswith(last)
        if last and torn and isinstance(parse_line(last), Skip):
            console.print(Text(f"{out}: line {len(lines) + 1} was cut short and is taken off"))
            os.truncate(out, out.stat().st_size - len(last))
        elif last:
            keys.add(_key(out, len(lines) + 1, last))
            _append(out, b"\n")
        return keys
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}") from error


def _key(out: Path, number: int, line: bytes) -> str:
    record = parse_line(line)
    try:
        return prompt_key(to_prompt({} if isinstance(record, Skip) else record).prompt)
    except DataError as error:
        raise DataError(f"{out}, line {number} is no ranking", hint="give another file") from error


def _append(out: Path, line: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error


def _show(console: Console, prompt: list[Message], answers: list[Completion]) -> None:
    shown = [(turn["role"], "bold", turn["content"], "") for turn in prompt]
    for letter, answer in zip(string.ascii_uppercase, answers, strict=False):
        cut = "" if answer.finish_reason == "stop" else f" [{answer.finish_reason}]"
        shown.append((letter, "bold cyan", answer.text, cut))
    for name, style, text, cut in shown:
        text = _UNSEEN.sub(lambda match: f"⟨{ord(match[0]):x}⟩", text)
        console.print(Text.assemble((f"{name}: ", style), text, (cut, "dim")), soft_wrap=True)


def _ask(console: Console, n: int) -> list[int | list[int]] | str:
    """A ranking, "s" or "q", asked for until it is one."""
    while True:
        try:
            entry = console.input("[bold cyan]ranking>[/bold cyan] ").strip()
            if not sys.stdin.isatty():  # nobody's keyboard has echoed it
                console.print(Text(entry))
            return entry.lower() if entry.lower() in ("s", "q") else parse_ranking(entry, n)
        except EOFError:
            console.print()
            return "q"
        except UnicodeDecodeError as error:
            console.print(f"these bytes are not {error.encoding}")
        except DataError as error:
            console.print(Text(f"{error} ({error.hint})"), soft_wrap=True)
