"""Tiny true models that say one sentence, and the `khaosz` command in real processes over them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.interop.huggingface import save_model
from khaosz.model import Transformer

SAID = "Yes, 中是\n[b]ok:1"  # two lines, three-byte characters, what looks like markup
CONTEXT = 96
ROOT = Path(__file__).parents[2]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["qq qq qq"]), 273)  # bytes and one merge


@cache
def model(said: str = SAID, context: int = CONTEXT, endless: bool = False) -> Transformer:
    """A true `Transformer` that says `said` after every assistant mark, once or without end: its
    blocks are the identity, its head maps each token of the sentence to the next."""
    by = tokenizer()
    words = by.encode(said)
    chain = [by.special_id("<|assistant|>"), *words, words[0] if endless else by.end_id]
    assert len(set(words)) == len(words)
    config = ModelConfig(
        vocab_size=by.vocab_size,
        hidden_size=by.vocab_size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    built = Transformer(config)
    built.initialise(torch.Generator().manual_seed(0))
    assert built.lm_head is not None
    with torch.no_grad():
        built.embed_tokens.weight.copy_(torch.eye(by.vocab_size))
        for token, following in pairwise(chain):
            built.lm_head.weight[following, token] = 10.0
    return built.eval()


def model_directory(directory: Path, saying: Transformer | None = None) -> Path:
    save_model(saying or model(), directory)
    tokenizer().save(directory)
    return directory


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds this source tree and nobody's keys."""
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
    """A server in its own process; its address."""
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
