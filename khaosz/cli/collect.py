"""Collect human preferences: sample a model's answers to a prompt, show them blind, read a ranking.

Each ranked prompt is one JSON line, synced before the next prompt is shown:
`{"prompt", "answers", "ranking", "finish_reasons", "model", "sampling"}`, which `load_pairs` reads.
The answers are in the order shown.
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

from khaosz.cli.output import open_console
from khaosz.config import ColumnsConfig
from khaosz.data.records.preference import Paths, load_prompts, prompt_key, to_prompt
from khaosz.data.records.readers import Skip, parse_line
from khaosz.data.records.report import text_hash
from khaosz.data.records.turns import Message
from khaosz.errors import DataError, GenerationError
from khaosz.files import append, disk_hint, is_writable
from khaosz.inference.generator import Completion, Generator
from khaosz.inference.sampling import SamplingParams

HINT = "best first, = between equals, every letter once, like {}; s: skip, q: quit"
_LINE_START = b'{"prompt": ['  # of every line that we write
_SIGNS = str.maketrans("》〉", ">>")  # a Chinese keyboard types these for >
# Control and bidirectional characters, which could steer the terminal or reorder its lines.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Collected:
    """Numbers of prompts: `ranked` and `skipped` now, `ranked_before` in the file, `identical` with
    fewer than two different answers, `remaining` when the person quit."""

    ranked: int = 0
    skipped: int = 0
    ranked_before: int = 0
    identical: int = 0
    remaining: int = 0


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
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> Collected:
    """Ask for a ranking of up to `n` different answers to each prompt, appended to `out` (.jsonl).

    Prompts already in `out` are skipped. The answers and their order depend on the model, the
    prompt, `params` and `seed` alone. Rankings are read from standard input, one per line; its end
    and Ctrl-C act as `q`.

    Raises DataError for unusable prompts or an unusable `out`, GenerationError, ModelError.
    """
    params = params or SamplingParams(temperature=0.9, top_p=0.95)
    if not 2 <= n <= len(string.ascii_uppercase):
        raise GenerationError(f"n must be between 2 and 26 (got {n})")
    if params.temperature == 0:
        raise GenerationError(f"temperature 0 gives the same answer {n} times", hint="0.9 is usual")
    console, out = console or open_console(highlight=False, emoji=False), Path(out)
    if not is_writable(out):  # else the first ranking is lost
        raise DataError(f"cannot write {out}", hint="choose another place for --out")
    seen = ranked_prompts(out, console)
    generator = Generator.from_directory(model, device=device)
    data = load_prompts(
        prompts,
        generator.tokenizer,
        generator.context,
        columns=columns,
        allow_unread=allow_unread,
    )
    console.print(Text("\n".join(data.report.lines())), soft_wrap=True)
    result = Collected()
    try:
        for number, prompt in enumerate(data.train, start=1):
            key = prompt_key(prompt.prompt)
            if key in seen:
                result.ranked_before += 1
                continue
            seen.add(key)
            prompt_seed = int.from_bytes(text_hash(f"{seed} {key}")) >> 65
            prompt_params = replace(params, n=n, seed=prompt_seed)
            sampled = generator.generate_batch([prompt.prompt_ids.tolist()], prompt_params)
            answers = list({each.text: each for each in sampled if each.text.strip()}.values())
            if len(answers) < 2:
                result.identical += 1
                continue
            random.Random(prompt_seed).shuffle(answers)
            console.rule(f"{number} / {len(data.train)}")
            _print_answers(console, prompt.prompt, answers)
            ranking = _read_ranking(console, len(answers))
            if ranking == "q":
                break
            if ranking == "s":
                result.skipped += 1
                continue
            record = {
                "prompt": prompt.prompt,
                "answers": [each.text for each in answers],
                "ranking": ranking,
                "finish_reasons": [each.finish_reason for each in answers],
                "model": str(model),
                "sampling": asdict(prompt_params),
            }
            _append(out, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
            result.ranked += 1
    except KeyboardInterrupt:
        console.print()
    result.remaining = len(data.train) - sum(asdict(result).values())
    summary = f"{out}: {result.ranked} ranked, {result.remaining} remaining"
    console.print(Text(summary), soft_wrap=True)
    return result


def parse_ranking(entry: str, n: int) -> list[int | list[int]]:
    """Parse `b>a=c` into indices, best first, equals grouped in a list: [1, [0, 2]].

    Spaces, capitals and full-width characters are accepted. Raises DataError unless each of the
    first `n` letters occurs exactly once.
    """
    letters = list(string.ascii_lowercase[:n])
    plain = unicodedata.normalize("NFKC", entry).casefold().translate(_SIGNS)
    levels = [level.split("=") for level in "".join(plain.split()).split(">")]
    names = [name for level in levels for name in level]
    if sorted(names) != letters:
        name = next(x for x in [*names, *letters] if x not in letters or names.count(x) != 1)
        fault = "is not an answer"
        if name in letters:
            fault = "occurs twice" if name in names else "is missing"
        raise DataError(f"{name!r} {fault}", hint=HINT.format(">".join(letters)))
    indices = [[letters.index(name) for name in level] for level in levels]
    return [level[0] if len(level) == 1 else level for level in indices]


def ranked_prompts(out: Path, console: Console) -> set[str]:
    """Keys of the prompts in `out`. A truncated last line, left by a crash, is removed and
    reported. Raises DataError for any other content, without changing the file."""
    if out.suffix != ".jsonl":
        raise DataError(f"{out} does not end in .jsonl", hint="rankings are written as JSON lines")
    try:
        *lines, last = (out.read_bytes() if out.exists() else b"").split(b"\n")
        keys = {_key(out, n, line) for n, line in enumerate(lines, start=1) if line.strip()}
        ours = last.startswith(_LINE_START) or _LINE_START.startswith(last)
        if last and ours and isinstance(parse_line(last), Skip):
            console.print(Text(f"{out}: line {len(lines) + 1} was truncated and is removed"))
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
        raise DataError(
            f"{out}, line {number} is not a ranking", hint="give another file"
        ) from error


def _append(out: Path, line: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        append(out, line)
    except OSError as error:
        what = f"cannot write {out}: {error.strerror or error}"
        raise DataError(what, hint=disk_hint(error)) from error


def _print_answers(console: Console, prompt: list[Message], answers: list[Completion]) -> None:
    rows = [(turn["role"], "bold", turn.get("content", ""), "") for turn in prompt]
    for letter, answer in zip(string.ascii_uppercase, answers, strict=False):
        reason = "" if answer.finish_reason == "stop" else f" [{answer.finish_reason}]"
        rows.append((letter, "bold cyan", answer.text, reason))
    for name, style, text, reason in rows:
        text = _CONTROLS.sub(lambda match: f"⟨{ord(match[0]):x}⟩", text)
        console.print(Text.assemble((f"{name}: ", style), text, (reason, "dim")), soft_wrap=True)


def _read_ranking(console: Console, n: int) -> list[int | list[int]] | str:
    """A ranking, "s" or "q"; asks again until the entry is valid."""
    while True:
        try:
            entry = console.input("[bold cyan]ranking>[/bold cyan] ").strip()
            if not sys.stdin.isatty():  # no terminal has echoed it
                console.print(Text(entry))
            return entry.lower() if entry.lower() in ("s", "q") else parse_ranking(entry, n)
        except EOFError:
            console.print()
            return "q"
        except UnicodeDecodeError as error:
            console.print(f"invalid {error.encoding}")
        except DataError as error:
            console.print(Text(f"{error} ({error.hint})"), soft_wrap=True)
