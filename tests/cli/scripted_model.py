"""Tiny models that answer with a fixed text, and the `khaosz` command in processes over them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_models import chain_model

from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.interop.huggingface import save_model
from khaosz.model import Transformer

SCRIPT = "Yes, 中是\n[b]ok:1"  # two lines, three-byte characters, text that looks like markup
CONTEXT = 96
ROOT = Path(__file__).parents[2]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["qq qq qq"]), 273)  # bytes and one merge


@cache
def model(script: str = SCRIPT, context: int = CONTEXT, endless: bool = False) -> Transformer:
    """A `Transformer` that answers with `script`, once or repeated for ever: its blocks are the
    identity, its head maps each token of the script to the next."""
    by = tokenizer()
    words = by.encode(script)
    chain = [by.special_ids["<|assistant|>"], *words, words[0] if endless else by.end_id]
    assert len(set(words)) == len(words)
    return chain_model(by, chain, context)


def model_directory(directory: Path, scripted: Transformer | None = None) -> Path:
    save_model(scripted or model(), directory)
    tokenizer().save(directory)
    return directory


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this source tree and has no API keys."""
    kept = {k: v for k, v in os.environ.items() if k not in ("KHAOSZ_API_KEY", "OPENAI_API_KEY")}
    given = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "200"}
    return {**kept, **given, **more}


def run_khaosz(
    *arguments: str, lines: bytes = b"", cwd: Path = ROOT, **more: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "khaosz", *arguments],
        input=lines,
        capture_output=True,
        env=environment(**more),
        cwd=cwd,
        timeout=120,
        check=False,
    )


@contextmanager
def khaosz_serve(directory: Path, *options: str, **more: str) -> Iterator[str]:
    """The address of a server in its own process."""
    command = [sys.executable, "-m", "khaosz", "serve", str(directory), "--port", "0"]
    with (
        TemporaryDirectory() as data,
        subprocess.Popen(
            [*command, "--device", "cpu", "--data", data, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**more),
        ) as server,
    ):
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split(": ")[1].strip()
        finally:
            server.terminate()
