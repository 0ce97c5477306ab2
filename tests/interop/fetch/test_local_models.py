"""What is on this machine: pulled and trained models, and those of other programs, by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import ModelError
from khaosz.interop.fetch.elsewhere import models_elsewhere
from khaosz.interop.fetch.pull import pull
from khaosz.interop.fetch.store import models_folder
from khaosz.interop.local_models import default_model, find_model, named_path, trainable_model
from khaosz.interop.models import load_model, open_tokenizer

Known = Callable[..., None]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.output


@pytest.fixture
def pulled(hub: HubServer, known: Known, new_gguf: bytes) -> Path:
    commit = hub.add("hf/m", {"tiny.gguf": new_gguf})
    known(new_gguf, huggingface="hf/m", revision=commit, aliases=[])
    return pull("tiny")


def test_a_name_that_is_not_here_says_how_to_pull_it(known: Known, new_gguf: bytes) -> None:
    known(new_gguf, huggingface="hf/m", revision="0" * 40)
    with pytest.raises(ModelError, match="tiny is not on this machine yet") as caught:
        find_model("tiny")
    assert (caught.value.hint or "").startswith("khaosz pull tiny  (")
    with pytest.raises(ModelError, match="model 'tinny' not found") as caught:
        named_path("tinny")
    assert "did you mean 'tiny'?" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="hf:a/b is not on this machine yet") as caught:
        named_path("hf:a/b")
    assert caught.value.hint == "khaosz pull hf:a/b"
    assert named_path("missing/model") == Path("missing/model"), "a path is not a name"
    with pytest.raises(ModelError, match="tiny is not on this machine yet"):
        run("generate", "tiny", "--prompt", "the")


def test_names_and_references_stand_for_a_model(
    hub: HubServer, pulled: Path, old_gguf: bytes, tiny_folder: Path
) -> None:
    assert find_model("tiny") == find_model("TINY") == pulled
    assert json.loads(run("generate", "tiny", "--prompt", "the fox", "--max-tokens", "2", "--json"))
    hub.add("me/other", {"x-Q8_0.gguf": old_gguf})
    other = pull("hf:me/other:Q8_0")
    assert find_model("hf:me/other:Q8_0") == find_model("me--other--x-Q8_0") == other
    assert find_model(str(tiny_folder)) == tiny_folder


def test_last_model_that_was_pulled_or_trained_is_the_default(
    hub: HubServer, pulled: Path, old_gguf: bytes, tiny_folder: Path
) -> None:
    hub.add("me/other", {"x-Q8_0.gguf": old_gguf})
    other = pull("hf:me/other:Q8_0")

    def age(path: Path, seconds: int) -> None:
        at = time.time() - seconds
        os.utime(path, (at, at))

    age(pulled.parent / "pulled.json", 20)
    assert default_model() == other
    age(other.parent / "pulled.json", 30)
    assert default_model() == pulled
    trained = Path("runs/mine/last")
    shutil.copytree(tiny_folder, trained)
    age(trained / "model.safetensors", -10)
    assert default_model() == trained
    age(trained / "model.safetensors", 100)
    assert default_model() == pulled
    age(pulled.parent / "pulled.json", 100)
    pull("tiny")  # it is here: it only becomes the last one
    assert default_model() == pulled


def test_a_failed_pull_does_not_become_the_default(
    hub: HubServer, pulled: Path, directory: dict[str, bytes]
) -> None:
    hub.add("g/mamba", {**directory, "config.json": b'{"model_type": "mamba"}'})
    with pytest.raises(ModelError):
        pull("hf:g/mamba")
    assert default_model() == pulled
    assert sorted(path.name for path in models_folder().iterdir()) == [".pulling", "tiny"]


def test_models_of_other_programs_are_used_where_they_lie(
    home: Path, new_gguf: bytes, old_gguf: bytes
) -> None:
    ollama = home / ".ollama/models"
    digest = hashlib.sha256(new_gguf).hexdigest()
    manifest = {
        "layers": [
            {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        ]
    }
    blob = ollama / f"blobs/sha256-{digest}"
    for path, content in (
        (ollama / "manifests/registry.ollama.test/library/tiny/1b", json.dumps(manifest).encode()),
        (ollama / "manifests/registry.ollama.test/me/broken/x", b"{"),
        (blob, new_gguf),
        (home / ".lmstudio/models/me/m/m.gguf", old_gguf),
        (home / ".lmstudio/models/me/m/mmproj-m.gguf", b"picture"),
        (home / ".cache/huggingface/hub/models--a--b/blobs/x", old_gguf),
        (home / ".cache/huggingface/hub/models--a--b/snapshots/1/s-00002-of-00002.gguf", b""),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    link = home / ".cache/huggingface/hub/models--a--b/snapshots/1/h.gguf"
    link.symlink_to("../../blobs/x")
    assert models_elsewhere() == {
        "ollama/tiny:1b": blob,
        "lmstudio/m": home / ".lmstudio/models/me/m/m.gguf",
        "hub/a/b/h.gguf": link,
    }
    # A blob is known by its content.
    assert load_model(named_path("ollama/tiny:1b")).config.hidden_size == 32
    assert open_tokenizer(find_model("hub/a/b/h.gguf")).encode("the fox")
    listed = json.loads(run("models", "list", "--json"))
    assert [row["name"] for row in listed] == ["ollama/tiny:1b", "lmstudio/m", "hub/a/b/h.gguf"]
    assert all(row["memory"] > row["bytes"] and row["problem"] is None for row in listed)
    with pytest.raises(ModelError, match="was not pulled"):
        run("models", "remove", "ollama/tiny:1b")
    assert blob.exists() and not models_folder().exists()


def test_models_are_shown_and_removed(pulled: Path) -> None:
    assert "tiny" in run("models") and "yes" in run("models")
    shown = json.loads(run("models", "show", "tiny", "--json"))
    assert shown["licence"] == "MIT" and shown["path"] == str(pulled)
    assert shown["origin"].startswith("Hugging Face")
    parts = shown["memory_parts"]
    assert sum(parts.values()) == shown["memory"] and shown["memory_context"] == 128
    # Python and PyTorch, and 700 bytes for each token of the vocabulary.
    assert parts["code and libraries"] == (256 << 20) + 700 * 300
    assert "memory_parts     code and libraries 256 MB" in run("models", "show", "tiny")
    assert "removed" in run("models", "remove", "tiny")
    assert "  no " in run("models") and not pulled.exists()
    with pytest.raises(ModelError, match="tiny is not on this machine yet"):
        run("models", "remove", "tiny")


def test_a_pulled_file_is_dequantised_for_training(pulled: Path) -> None:
    path = trainable_model(Path("tiny"))
    assert path == pulled.parent / "dequantised"
    assert load_model(path).config.hidden_size == 32
    assert trainable_model(Path("tiny")) == path
    assert find_model("tiny") == pulled
    assert trainable_model(Path("runs/later/last")) == Path("runs/later/last")
