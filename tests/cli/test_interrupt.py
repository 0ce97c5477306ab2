"""Ctrl-C and SIGTERM: one line and status 130 or 143, from the first import to the last answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest
from tiny_models import random_model, tokenizer

from khaosz.data.tokenizer import train_tokenizer
from khaosz.interop.huggingface import save_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to one process")
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

# The command `doctor`, with a signal to this process while a module is imported.
AT_IMPORT = """
import os, signal, sys
from khaosz.__main__ import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
sys.argv[:] = ["khaosz", "doctor"]
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("module", ["typer", "numpy", "khaosz.doctor"])
def test_signal_during_an_import(module: str, number: signal.Signals) -> None:
    """torch imports numpy in C code, which drops the exception that a handler raises."""
    code = AT_IMPORT.format(module=module, number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = (128 + number, f"{WORDS[number]}\n", "")
    assert (done.returncode, done.stderr, done.stdout) == expected


def signalled(
    number: signal.Signals, word: str, *arguments: str | Path, on_stdout: bool = False
) -> tuple[int, str]:
    """Status and last line of a command that gets a signal once it has printed a word."""
    process = subprocess.Popen(
        [sys.executable, "-m", "khaosz", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A background process may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        watched: IO[str] | None = process.stdout if on_stdout else process.stderr
        assert watched is not None and process.stderr is not None
        text = ""
        while word not in text:
            line = watched.readline()
            assert line, f"{text}{process.stderr.read()}"
            text += line
        process.send_signal(number)
        status = process.wait(timeout=60)
        errors = process.stderr.read()
    assert "Traceback" not in errors
    return status, errors.splitlines()[-1]


@pytest.mark.parametrize("number", WORDS)
def test_signal_while_a_run_calibrates(
    number: signal.Signals, tmp_path: Path, prepared_dir: Path
) -> None:
    overrides = ["size=small", f"data={prepared_dir}", f"out={tmp_path / 'run'}", "window=64"]
    ended = signalled(number, "documents in", "train", "recipes/pt.toml", *overrides)
    assert ended == (128 + number, WORDS[number])


@pytest.mark.parametrize("number", WORDS)
def test_signal_while_chat_waits_in_a_pipe(number: signal.Signals, tmp_path: Path) -> None:
    model = random_model(tokenizer().vocab_size)
    save_model(model, tmp_path, bos_id=0, eos_ids=[1], pad_id=2)
    tokenizer().save(tmp_path)
    ended = signalled(number, "/help for commands", "chat", tmp_path, on_stdout=True)
    assert ended == (128 + number, WORDS[number])


def test_training_a_tokenizer_is_interrupted_at_once(corpus_file: Path) -> None:
    """Compiled code would hold the interrupt back until it is done."""
    texts = corpus_file.read_text(encoding="utf-8").splitlines()
    many = [f"{i} {text} {i * 7919}" for i in range(300) for text in texts]

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    running = set(threading.enumerate())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(many, 6000)
        training = set(threading.enumerate()) - running
        assert training and all(thread.daemon for thread in training)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for thread in training:
        thread.join()


def test_errors_of_training_a_tokenizer_are_raised() -> None:
    def texts() -> object:
        yield "one text"
        raise TimeoutError("the file system does not answer")

    with pytest.raises(TimeoutError, match="does not answer"):
        train_tokenizer(texts(), 300)  # type: ignore[arg-type]
