"""Whatever is written to a disk that is full or read-only ends in one line, and nothing is left
half-written. Files can't grow beyond a limit here, which a full disk does to the same calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model

from khaosz.data.tokenizer import load_tokenizer
from khaosz.interop.huggingface import save_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")

TRAIN = """
import resource, signal, sys
from pathlib import Path
from rich.console import Console
from khaosz.config import load_recipe
from khaosz.errors import KhaoszError
from khaosz.trainer.run import run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = load_recipe(Path(sys.argv[1]))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in [*map(int, sys.argv[2:]), hard]:
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        run(config, resume=True, console=Console(quiet=True))
        outcome = "trained"
    except KhaoszError as error:
        outcome = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(outcome)
    print([str(path) for path in config.out.glob("**/*partial*") if "tok" not in path.name])
"""


def test_run_ends_in_one_line_at_every_write_and_resumes(corpus_file: Path, tmp_path: Path) -> None:
    """Tokenizer, shards, checkpoint, in the order in which they are written."""
    out = tmp_path / "run"
    (tmp_path / "recipe.toml").write_text(
        f'stage = "pt"\nsize = "nano"\ndata = "{corpus_file}"\nout = "{out}"\nvocab_size = 400\n'
        'window = 32\nbatch_tokens = 256\nmax_steps = 3\nsave_every = 1\ndtype = "fp32"\n'
        'compile = "off"\nprompts = ["The"]\n[model]\nhidden_size = 32\nnum_hidden_layers = 2\n'
        "num_attention_heads = 2\nnum_key_value_heads = 2\nhead_dim = 16\nintermediate_size = 64\n"
    )
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "recipe.toml"), "100", "20000", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stdout + done.stderr
    assert "tokenizer.json: file too large" in lines[0]
    assert lines[2].startswith("DataError: cannot write ")
    assert (
        lines[4] == f"TrainingError: could not write checkpoint {out}/step-000001: File too large"
    )
    assert lines[6] == "trained"
    assert lines[1::2] == ["[]"] * 4
    assert (out / "last").resolve().name == "step-000003"


COMMANDS = """
import resource, signal, sys
from khaosz.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
model, text, out = sys.argv[1:]
for command in (
    ["tokenizer", "train", text, "--out", f"{out}/tokenizer", "--vocab-size", "300"],
    ["data", "prepare", text, "--tokenizer", model, "--out", f"{out}/prepared"],
    ["convert", model, f"{out}/model.gguf"],
    ["init", "--size", "nano", "--out", f"{out}/initial"],
    ["quantize", model, "--to", "int8", "--out", f"{out}/small.gguf"],
):
    sys.argv = ["khaosz", *command]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    print(command[0], code, file=sys.stderr)
"""


def test_commands_end_in_one_line_and_leave_nothing(
    tmp_path: Path, tokenizer_dir: Path, corpus_file: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    model = tmp_path / "model"
    shape = {"intermediate_size": 64, "head_dim": 16}  # 8-bit blocks have 32 values
    save_model(tiny_model(vocab_size=tokenizer.vocab_size, **shape), model)
    tokenizer.save(model)
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(model), str(corpus_file), str(out)],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    endings = [line for line in done.stderr.splitlines() if line.endswith((" 0", " 1"))]
    assert [line.split()[0] for line in endings if line.endswith(" 1")] == [
        "tokenizer", "data", "convert", "init", "quantize"
    ], done.stderr  # fmt: skip
    assert done.stderr.count("error: ") == 5
    left = [path for path in out.rglob("*") if path.is_file() and ".prepare" not in path.parts]
    assert left == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "khaosz", "--version"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: no space left on device"
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere"
)
def test_read_only_output(tmp_path: Path, tokenizer_dir: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    command = ["tokenizer", "train", str(tokenizer_dir / "tokenizer.json"), "--out", f"{place}/new"]
    done = subprocess.run(
        [sys.executable, "-m", "khaosz", *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "permission denied" in done.stderr
    assert "Traceback" not in done.stderr
