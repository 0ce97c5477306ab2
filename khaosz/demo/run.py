"""`khaosz demo`: documents answer, a model comes about, an assistant. Three acts."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.demo.assistant import Confirm, run_assistant
from khaosz.demo.reading import run_documents
from khaosz.demo.training import LEAST_MINUTES, SHORT_MINUTES, run_training
from khaosz.errors import ConfigError

ACTS = {  # title, and the time it takes
    "documents": ("Your documents", "under a minute, no model"),
    "model": ("A model comes about", ""),
    "assistant": ("An assistant", "about two minutes, its download aside"),
}


def run_demo(
    *,
    minutes: float,
    out: Path,
    offline: bool = False,
    acts: Collection[str] = tuple(ACTS),
    model: str | None = None,
    confirm: Confirm | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run these acts and return what each reached, by its name.

    `minutes`: of training; below `SHORT_MINUTES` it takes fixed numbers of steps. `model`: of the
    third act, else the one that `confirm` agrees to. Raises `KhaoszError`, also where training was
    too short to show anything, and `DemoStopped` after a signal.
    """
    if not (math.isfinite(minutes) and minutes >= LEAST_MINUTES):
        raise ConfigError(f"--minutes must be {LEAST_MINUTES} or more (got {minutes:g})")
    console = console or Console(stderr=True)
    reached: dict[str, Any] = {}
    for number, (act, (title, planned)) in enumerate(ACTS.items(), 1):
        if act not in acts:
            reached[act] = {"reached": False, "skipped": "not asked for"}
            continue
        if act == "model":
            planned = "fixed steps" if minutes < SHORT_MINUTES else f"{minutes:g} minutes"
        console.rule(f"{number}  {title} ({planned})")
        started = time.monotonic()
        match act:
            case "documents":
                reached[act] = run_documents(out, console)
            case "model":
                reached[act] = run_training(minutes, out, offline, console)
            case _:
                reached[act] = run_assistant(
                    out, console, name=model, offline=offline, confirm=confirm
                )
        seconds = time.monotonic() - started
        reached[act]["seconds"] = round(seconds, 1)
        took = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
        console.print(f"  took {took}\n", highlight=False)
    console.rule("next")
    for line in _next_lines(reached):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return reached


def _next_lines(reached: dict[str, Any]) -> tuple[str, str, str]:
    has_model = reached["assistant"]["reached"]
    name = reached["assistant"]["model"] if has_model else "MODEL"
    chat = f"khaosz chat {name}" if has_model else "khaosz pull && khaosz chat"
    return (
        f"  chat:                 {chat}",
        '  ask your own folder:  khaosz rag add FOLDER && khaosz rag ask "..."',
        f"  teach it:             khaosz train lora init_from={name} data=chats.jsonl",
    )
