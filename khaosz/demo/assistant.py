"""The demo's third act: a downloaded model answers the questions of the first, and two others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.demo.fetch import download_rate
from khaosz.demo.reading import QUESTIONS, is_right, open_documents, show
from khaosz.errors import KhaoszError
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.fetch.catalogue import Entry, catalogue, entry_of
from khaosz.interop.fetch.pull import entry_path, pull
from khaosz.interop.local_models import named_path
from khaosz.rag.answer import ask
from khaosz.rag.models.chat_models import LocalModel

PROPOSED = "qwen2.5-coder-0.5b"
PLAIN = ("用一句话解释什么是复利。", "Explain in one sentence what compound interest is.")

Confirm = Callable[[str], bool]


def run_assistant(
    out: Path, console: Console, *, name: str | None, offline: bool, confirm: Confirm | None
) -> dict[str, Any]:
    """Answer with the model `name`, or with `PROPOSED` if it is here or `confirm` agrees to its
    download; `confirm` is None without a terminal. Nothing is downloaded before. Whatever
    fails is reported, not raised."""
    try:
        path = _model(console, name, offline, confirm)
        if isinstance(path, str):
            console.print(f"  skipped: {path}", highlight=False, markup=False, soft_wrap=True)
            return {"reached": False, "skipped": path}
        return _answer(out, path, console)
    except KhaoszError as error:
        wanted = entry_of(name or PROPOSED)
        later = f"khaosz pull {wanted.name if wanted else PROPOSED}; khaosz demo --only assistant"
        line = f"  {error}. Later: {later}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        return {"reached": False, "error": str(error)}


def can_ask() -> bool:
    """Whether a person can be asked: on a terminal, and not in continuous integration."""
    return sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def proposal(entry: Entry) -> str:
    """The question before the download, with its minutes by the rate of the demo's texts."""
    rate = download_rate()
    minutes = None if rate is None else max(1, round(entry.bytes / rate / 60))
    time = "duration not known" if minutes is None else f"about {minutes} min"
    return f"fetch {entry.name}, {entry.bytes / 1e6:,.0f} MB, {time}?"


def _model(
    console: Console, name: str | None, offline: bool, confirm: Confirm | None
) -> Path | str:
    """The model's path, or why there is none."""
    entry = entry_of(name or PROPOSED)
    if name is not None and (entry is None or Path(name).exists()):
        return named_path(name)
    entry = entry or catalogue()[PROPOSED]
    if (here := entry_path(entry)) is not None:
        return here
    later = f"khaosz pull {entry.name}; khaosz demo --only assistant"
    if offline:
        return f"offline. Later: {later}"
    if name is None and confirm is None:
        return f"no terminal to ask on. Later: {later}  (or --model NAME_OR_FILE)"
    if name is None and confirm is not None and not confirm(proposal(entry)):
        return f"not fetched. Later: {later}"
    return _pull(entry, console)


def _pull(entry: Entry, console: Console) -> Path:
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("  {task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total or None)
            bars.update(tasks[file], completed=done, total=total or None)

        def note(line: str) -> None:
            bars.print(f"  {line}", highlight=False, markup=False)

        return pull(entry.name, report, note=note)


def _answer(out: Path, path: Path, console: Console) -> dict[str, Any]:
    console.print(f"  model: {path}", highlight=False, markup=False, soft_wrap=True)
    generator = Generator.from_directory(path, prompt_lookup=True)
    model = LocalModel(generator)
    right = cited = 0
    console.print(
        "  So small a model is often wrong: below each answer is the sentence of the document.",
        highlight=False,
    )
    with open_documents(out, console) as base:
        for each in QUESTIONS:
            reply = ask(base, each.question, model)
            text = "".join(reply).strip()
            right += is_right(text, each)
            cited += each.doc in [citation.doc for citation in reply.citations]
            used = [(each.number, reply.passages[each.number - 1]) for each in reply.citations]
            places = [f"[{n}] {hit.place}" for n, hit in used]
            if (quote := ask(base, each.question, None).quote) is not None:
                places.append(f"“{quote.text}” {quote.hit.place}")
            show(console, each.question, text, places)
    for question in PLAIN:
        params = SamplingParams(max_tokens=160, temperature=0.0)
        ids = generator.chat_ids([{"role": "user", "content": question}])
        show(console, question, generator.generate(ids, params).text.strip())
    count = len(QUESTIONS)
    console.print(f"  {right} of {count} right, {cited} cited rightly", highlight=False)
    return {"reached": True, "model": str(path), "questions": count, "right": right,
            "cited": cited}  # fmt: skip
