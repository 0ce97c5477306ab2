"""Collect human preferences: show the answers of one or several models blind, read a ranking.

Each ranked prompt is one JSON line, synced before the next prompt is shown:
`{"prompt", "answers", "ranking", "finish_reasons", "id", "annotator", "created", ...}`, which
`load_pairs` reads; `khaosz.data.rankings.ranking_file` says the rest. The answers are in the order
shown. Nothing that is shown while ranking says which model wrote an answer.
"""

from __future__ import annotations

import random
import re
import string
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from khaosz.cli.answers import (
    Answer,
    AnswerFile,
    LiveAnswers,
    LocalSource,
    open_sources,
    prompt_params,
)
from khaosz.cli.output import open_console
from khaosz.config import ColumnsConfig
from khaosz.data.rankings.ranking_file import append_record, is_torn, repair_last_line, take_back
from khaosz.data.records.preference import Paths, Prompt, load_prompts, prompt_key, to_prompt
from khaosz.data.records.readers import Skip, parse_line
from khaosz.data.records.report import text_hash
from khaosz.data.records.turns import Message
from khaosz.errors import DataError, GenerationError
from khaosz.files import FolderInUse, holding, is_writable
from khaosz.inference.sampling import SamplingParams

HINT = "best first, = between equals, every letter once, like {}; s: skip, u: undo, q: quit"
MAX_NAME = 64  # characters of an annotator's name
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
    models: str | Path | Sequence[str | Path],
    prompts: Paths | None,
    out: str | Path | None,
    n: int | None = None,
    seed: int = 0,
    *,
    annotator: str | None = None,
    answers: Path | None = None,
    answers_only: bool = False,
    params: SamplingParams | None = None,
    device: str = "cpu",
    console: Console | None = None,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> Collected:
    """Ask for a ranking of the different answers to each prompt, appended to `out` (.jsonl).

    Each model gives `n` answers, by default 4 where it is the only one, else 1. With several models
    of this machine, or with `answers`, all answers are first sampled into that file (by default
    beside `out`), a model at a time; what the file has is not sampled again. `answers_only` stops
    there. Without `models`, all of that file are ranked; without `prompts`, those of that file.

    Prompts that `annotator` has in `out` are skipped. The answers depend on the model, the prompt,
    `params` and `seed` alone, their order on the annotator, too. Rankings are read from standard
    input, one per line; its end and Ctrl-C act as `q`.

    Raises DataError for unusable prompts, answers or `out`, or where the annotator is ranking into
    `out` already; ConfigError, GenerationError, ModelError, ServerError.
    """
    params = params or SamplingParams(temperature=0.9, top_p=0.95)
    models = [models] if isinstance(models, str | Path) else list(models)
    n = n or (4 if len(models) == 1 else 1)
    limit = len(string.ascii_uppercase)
    if not 1 <= n <= limit or (models and not 2 <= n * len(models) <= limit):
        of = f" of each of {len(models)} models" if len(models) > 1 else ""
        raise GenerationError(f"n must be between 2 and 26 answers (got {n}{of})")
    if params.temperature == 0 and n > 1:
        raise GenerationError(f"temperature 0 gives the same answer {n} times", hint="0.9 is usual")
    check_annotator(annotator)
    console = console or open_console(highlight=False, emoji=False)
    out = None if out is None else Path(out)
    if out is None and not (answers_only and answers):
        raise DataError("no file for the rankings", hint="name it with --out FILE.jsonl")
    for target in (out, answers):
        if target is not None and not is_writable(target):  # else the first ranking is lost
            raise DataError(f"cannot write {target}", hint="choose another place")
    with ExitStack() as stack:
        seen: set[str] = set()
        if out is not None and not answers_only:
            stack.enter_context(_session(out, annotator))
            seen = ranked_prompts(out, console, annotator)
        sources = open_sources(models, device)
        local = sum(isinstance(source, LocalSource) for source in sources)
        if answers is None and (answers_only or local > 1):
            assert out is not None
            answers = out.with_suffix(".answers.jsonl")
        file = None if answers is None else AnswerFile(answers)
        if prompts is None:
            if file is None or not file.prompts:
                raise DataError("no prompts", hint="name a file with --prompts")
            rows = [Prompt(each) for each in file.prompts.values()]
        else:
            data = load_prompts(prompts, columns=columns, allow_unread=allow_unread)
            console.print(Text("\n".join(data.report.lines())), soft_wrap=True)
            rows = data.train
        live = LiveAnswers(sources, params := replace(params, n=n), seed)
        answers_of: Callable[[Prompt], list[Answer]] = live
        if file is not None:
            names = [source.name for source in sources] or file.models
            if not names:
                raise DataError(f"{file.path} has no answers", hint="name the models to sample")
            with console.status("") as status:
                added = file.generate(
                    live,
                    sources,
                    rows,
                    lambda prompt: prompt_params(prompt, params, seed),
                    lambda name, done, total: status.update(
                        Text(f"{name}: answering {done + 1:,} of {total:,} prompts")
                    ),
                )
            if added or answers_only:
                what = f"{file.path}: {added:,} sets of answers sampled"
                console.print(Text(what), soft_wrap=True)
            answers_of = lambda prompt: file.of(prompt, names)  # noqa: E731
        result = Collected()
        if out is not None and not answers_only:
            _Session(out, annotator, console, rows, answers_of, seen, seed, result).run()
            summary = f"{out}: {result.ranked} ranked, {result.remaining} remaining"
            console.print(Text(summary), soft_wrap=True)
        for each in live.unanswered.values():
            console.print(Text(each.line()), soft_wrap=True)
        return result


def check_annotator(name: str | None) -> None:
    """Raises DataError for a name that is empty, long, or has control characters."""
    if name is not None and not (name.strip() == name and 0 < len(name) <= MAX_NAME):
        raise DataError(f"an annotator's name has 1 to {MAX_NAME} characters, no spaces around it")
    if name is not None and not name.isprintable():
        raise DataError("an annotator's name has characters that cannot be shown")


def _session(out: Path, annotator: str | None) -> Any:
    """Holds a lock: the same annotator ranks a prompt once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.{text_hash(annotator or '').hex()[:8]}.session")
    stack = ExitStack()
    try:
        stack.enter_context(holding(path))
    except FolderInUse as error:
        who = f"{annotator} is" if annotator else "someone is"
        raise DataError(
            f"{who} ranking into {out} already ({error})",
            hint="each annotator has a name: --annotator NAME",
        ) from None
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from None
    return stack


@dataclass
class _Session:
    """One annotator ranks prompts."""

    out: Path
    annotator: str | None
    console: Console
    prompts: list[Prompt]
    answers_of: Callable[[Prompt], list[Answer]]
    seen: set[str]  # keys of prompts that are ranked or were shown
    seed: int
    result: Collected

    def run(self) -> None:
        numbered = [
            (number, prompt_key(prompt.prompt), prompt)
            for number, prompt in enumerate(self.prompts, start=1)
        ]
        self._queue = deque(numbered)
        self._by_key = {key: (number, key, prompt) for number, key, prompt in reversed(numbered)}
        self._now: set[str] = set()  # keys that were ranked now
        self._seconds: list[float] = []
        result = self.result
        try:
            while self._queue:
                number, key, prompt = self._queue.popleft()
                if key in self.seen:
                    result.ranked_before += 1
                    continue
                self.seen.add(key)
                by_text: dict[str, list[Answer]] = {}
                for answer in self.answers_of(prompt):
                    if answer.text.strip():
                        by_text.setdefault(answer.text, []).append(answer)
                if len(by_text) < 2:
                    result.identical += 1
                    continue
                shown = list(by_text.values())
                order = prompt_params(prompt, SamplingParams(), self.seed).seed
                by = order if self.annotator is None else f"{order} {self.annotator}"
                random.Random(by).shuffle(shown)
                if not self._rank(number, key, prompt, shown):
                    break
        except KeyboardInterrupt:
            self.console.print()
        result.ranked = len(self._now)
        counted = result.ranked + result.skipped + result.ranked_before + result.identical
        result.remaining = len(self.prompts) - counted

    def _rank(self, number: int, key: str, prompt: Prompt, shown: list[list[Answer]]) -> bool:
        """False to quit."""
        left = 1 + len({k for _, k, _ in self._queue} - self.seen)
        self.console.rule(
            progress_line(number, len(self.prompts), self.result.skipped, self._seconds, left)
        )
        _print_answers(self.console, prompt.prompt, [each[0] for each in shown])
        started = time.monotonic()
        while True:
            entry = _read_ranking(self.console, len(shown))
            if entry == "u" and (taken := take_back(self.out, self.annotator)) is None:
                self.console.print("no ranking to take back")
                continue
            break
        if entry == "q":
            return False
        if entry == "u":
            self.seen.discard(key)
            self._queue.appendleft((number, key, prompt))
            self._again(taken)
            return True
        self._seconds.append(time.monotonic() - started)
        if entry == "s":
            self.result.skipped += 1
            return True
        assert isinstance(entry, list)
        append_record(self.out, self._record(key, prompt, shown, entry))
        self._now.add(key)
        return True

    def _again(self, taken: dict[str, Any] | None) -> None:
        """Show the prompt of a ranking that was taken back next, if it is one of ours."""
        key = prompt_key(to_prompt(taken).prompt)
        self.seen.discard(key)
        self.console.print("the last ranking is taken back")
        if (row := self._by_key.get(key)) is None:
            return
        if key in self._now:
            self._now.discard(key)
        elif all(k != key for _, k, _ in self._queue):
            self.result.ranked_before -= 1
        self._queue = deque([row, *(each for each in self._queue if each[1] != key)])

    def _record(
        self, key: str, prompt: Prompt, shown: list[list[Answer]], ranking: list[int | list[int]]
    ) -> dict[str, Any]:
        sources = [
            [{"model": each.model, "sampling": each.sampling} for each in same] for same in shown
        ]
        of_all = {(each.model, str(each.sampling)) for same in shown for each in same}
        first = shown[0][0]
        name = prompt.extra.get("id")
        return {
            "prompt": prompt.prompt,
            "answers": [same[0].text for same in shown],
            "ranking": ranking,
            "finish_reasons": [same[0].finish_reason for same in shown],
            **(
                {"model": first.model, "sampling": first.sampling}
                if len(of_all) == 1
                else {"sources": sources}
            ),
            "id": name if isinstance(name, str | int) else key,
            **({} if self.annotator is None else {"annotator": self.annotator}),
            "created": int(time.time()),
        }


def progress_line(
    number: int, total: int, skipped: int, seconds: Sequence[float], left: int
) -> str:
    """Such as `12 of 40, 3 skipped, about 6 min left`: by the mean of the `seconds` that prompts
    took, with `left` prompts to rank."""
    line = f"{number} of {total}"
    if skipped:
        line += f", {skipped} skipped"
    if seconds:
        minutes = sum(seconds) / len(seconds) * left / 60
        line += ", under 1 min left" if minutes < 1 else f", about {round(minutes)} min left"
    return line


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


def ranked_prompts(out: Path, console: Console, annotator: str | None = None) -> set[str]:
    """Keys of the prompts in `out`, those of an annotator where one is given. A truncated last
    line, left by a crash, is removed and reported. Raises DataError for any other content, without
    changing the file."""
    if out.suffix != ".jsonl":
        raise DataError(f"{out} does not end in .jsonl", hint="rankings are written as JSON lines")
    try:
        lines = (out.read_bytes() if out.exists() else b"").split(b"\n")
        last = lines[-1]
        keys = [_key(out, n, line) for n, line in enumerate(lines[:-1], start=1) if line.strip()]
        if last and not is_torn(last):
            keys.append(_key(out, len(lines), last))
        if last and repair_last_line(out):
            console.print(Text(f"{out}: line {len(lines)} was truncated and is removed"))
        return {key for key, name in keys if annotator in (None, name)}
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}") from error


def _key(out: Path, number: int, line: bytes) -> tuple[str, Any]:
    """A record's prompt and annotator."""
    record = parse_line(line)
    try:
        fields = {} if isinstance(record, Skip) else record
        return prompt_key(to_prompt(fields).prompt), fields.get("annotator")
    except DataError as error:
        raise DataError(
            f"{out}, line {number} is not a ranking", hint="give another file"
        ) from error


def _print_answers(console: Console, prompt: list[Message], answers: list[Answer]) -> None:
    rows = [(turn["role"], "bold", turn.get("content", ""), "") for turn in prompt]
    for letter, answer in zip(string.ascii_uppercase, answers, strict=False):
        reason = "" if answer.finish_reason == "stop" else f" [{answer.finish_reason}]"
        rows.append((letter, "bold cyan", answer.text, reason))
    for name, style, text, reason in rows:
        text = _CONTROLS.sub(lambda match: f"⟨{ord(match[0]):x}⟩", text)
        console.print(Text.assemble((f"{name}: ", style), text, (reason, "dim")), soft_wrap=True)


def _read_ranking(console: Console, n: int) -> list[int | list[int]] | str:
    """A ranking, "s", "u" or "q"; asks again until the entry is valid."""
    while True:
        try:
            entry = console.input("[bold cyan]ranking>[/bold cyan] ").strip()
            if not sys.stdin.isatty():  # no terminal has echoed it
                console.print(Text(entry))
            return entry.lower() if entry.lower() in ("s", "u", "q") else parse_ranking(entry, n)
        except EOFError:
            console.print()
            return "q"
        except UnicodeDecodeError as error:
            console.print(f"invalid {error.encoding}")
        except DataError as error:
            console.print(Text(f"{error} ({error.hint})"), soft_wrap=True)
