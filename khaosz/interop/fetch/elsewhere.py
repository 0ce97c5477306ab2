"""GGUF files that other programs have on this machine: Ollama, LM Studio, the Hugging Face cache.

They are used where they lie; nothing is copied or changed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")


def models_elsewhere() -> dict[str, Path]:
    """Files by name: ollama/qwen3:0.6b, lmstudio/NAME, hub/OWNER/NAME/FILE."""
    found: dict[str, Path] = {}
    for names in (_ollama(), _lm_studio(), _hub_cache()):
        for name, path in names:
            found.setdefault(name, path)
    return found


def _ollama() -> Iterator[tuple[str, Path]]:
    folders = [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]
    if chosen := os.environ.get("OLLAMA_MODELS"):
        folders = [Path(chosen)]
    for folder in folders:
        for manifest in _files(folder / "manifests", "*/*/*/*"):
            host, space, model, tag = manifest.parts[-4:]
            try:
                layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
                digests = [each["digest"] for each in layers if each["mediaType"] == _MODEL_LAYER]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            # A model may have an adapter or several files beside it: those are not one model.
            if len(digests) != 1 or (match := _DIGEST.fullmatch(str(digests[0]))) is None:
                continue
            blob = folder / "blobs" / f"sha256-{match[1]}"
            if blob.is_file():
                owner = "" if space == "library" else f"{space}/"
                of = "" if "ollama" in host else f"{host}/"  # its own host, or another one
                yield f"ollama/{of}{owner}{model}:{tag}", blob


def _lm_studio() -> Iterator[tuple[str, Path]]:
    home = Path.home()
    for folder in (home / ".lmstudio/models", home / ".cache/lm-studio/models"):
        for path in _files(folder, "*/*/*.gguf"):
            if _is_model(path):
                yield f"lmstudio/{path.stem}", path


def _hub_cache() -> Iterator[tuple[str, Path]]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for path in _files(folder, "models--*/snapshots/*/*.gguf"):
        if _is_model(path):
            repository = path.parts[-4].removeprefix("models--").replace("--", "/")
            yield f"hub/{repository}/{path.name}", path


def _is_model(path: Path) -> bool:
    """Not an image projector, and of a split file the first part."""
    return "mmproj" not in path.name.lower() and not _LATER_PART.search(path.name)


def _files(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in folder.expanduser().glob(pattern) if path.is_file())
    except OSError:  # another user's folder
        return []
