"""Find the models on this machine: trained under runs/, pulled, and those of other programs."""

from __future__ import annotations

from pathlib import Path

RUNS = Path("runs")


def trained_models(runs: Path) -> list[Path]:
    """Model directories of the stages under `runs`, the last written first."""
    from khaosz.interop.huggingface import WEIGHTS
    from khaosz.interop.sentence_transformers import is_embedder

    models = [
        path.parent
        for pattern in ("last/config.json", "*/last/config.json", "*/*/last/config.json")
        for path in runs.glob(pattern)
        if (path.parent / WEIGHTS).exists() and not is_embedder(path.parent)
    ]
    return sorted(models, key=_trained_at, reverse=True)


def _trained_at(model: Path) -> float:
    from khaosz.interop.huggingface import WEIGHTS

    return (model / WEIGHTS).stat().st_mtime


def newest_model(runs: Path) -> Path:
    """The model directory last written under `runs`; raises `ModelError` if there are none."""
    from khaosz.errors import ModelError

    if models := trained_models(runs):
        return models[0]
    raise ModelError(
        f"no trained model found under {runs}/",
        hint="run `khaosz demo`, or `khaosz pull` for an open model",
    )


def local_models() -> list[Path]:
    """Trained models, then pulled ones, each the newest first."""
    from khaosz.interop.fetch.store import pulled_models

    return trained_models(RUNS) + pulled_models()


def default_model() -> Path:
    """The model for texts that was trained or pulled last. Raises `ModelError`."""
    from khaosz.interop.fetch.catalogue import entry_of
    from khaosz.interop.fetch.store import pulled_at, pulled_models, record_of
    from khaosz.interop.retrieval import is_encoder

    def writes(model: Path) -> bool:
        record = record_of(model)
        entry = None if record is None else entry_of(record.name)
        return entry is None or entry.kind in ("chat", "translation")

    times = {model: _trained_at(model) for model in trained_models(RUNS)}
    times |= {model: pulled_at(model) for model in pulled_models() if writes(model)}
    newest = sorted(times, key=lambda model: times[model], reverse=True)
    return next((m for m in newest if not is_encoder(m)), None) or newest_model(RUNS)


def named_path(argument: str) -> Path:
    """A MODEL as commands take it: a path, or a name that `find_model` knows."""
    looks_like_a_path = "/" in argument and not argument.startswith(("hf:", "ms:", "ollama/"))
    path = Path(argument).expanduser()
    if path.exists() or looks_like_a_path or "\\" in argument or argument.endswith(".gguf"):
        return path
    return find_model(argument)


def find_model(name: str) -> Path:
    """A path, or the model with this name: a local one, by its short name or by the name or
    reference it was pulled by, or one of another program. Raises `ModelError`, with the command
    that pulls it where it is not here."""
    from khaosz.errors import ModelError, did_you_mean
    from khaosz.interop.fetch.catalogue import catalogue, entry_of
    from khaosz.interop.fetch.elsewhere import models_elsewhere
    from khaosz.interop.fetch.store import record_of
    from khaosz.interop.models import default_name

    path = Path(name).expanduser()
    if path.exists():
        return path
    entry = entry_of(name)
    if entry is not None and entry.file:
        from khaosz.interop.fetch.pull import entry_path

        if (pulled := entry_path(entry)) is not None:
            return pulled
        raise ModelError(
            f"{entry.name} is not on this machine yet",
            hint=f"khaosz pull {entry.name}  ({entry.bytes / 1e9:.1f} GB)",
        )
    models = local_models()
    matches = [model for model in models if default_name(model) == name]
    for model in models:
        record = record_of(model)
        if record is not None and name in (record.reference, record.name):
            matches = [model]
    elsewhere = models_elsewhere() if not matches else {}
    if not matches and name in elsewhere:
        return elsewhere[name]
    if len(matches) > 1:
        paths = ", ".join(str(model) for model in matches)
        raise ModelError(f"'{name}' is ambiguous: {paths}", hint="give the whole path")
    if not matches:
        if name.startswith(("hf:", "ms:")):
            raise ModelError(f"{name} is not on this machine yet", hint=f"khaosz pull {name}")
        names = [*(default_name(model) for model in models), *elsewhere, *catalogue()]
        hint = did_you_mean(name, names, "`khaosz models` lists the names")
        raise ModelError(f"model '{name}' not found", hint=hint)
    return matches[0]


def trainable_model(model: Path) -> Path:
    """The directory to train from of a path or of the name of a pulled model; its .gguf file is
    dequantised once, in its folder. Other paths are returned as they are. Raises `ModelError`."""
    from khaosz.interop.fetch.catalogue import entry_of
    from khaosz.interop.fetch.store import record_of

    name = str(model)
    if not model.exists() and entry_of(name) is None and not name.startswith(("hf:", "ms:")):
        return model
    path = find_model(name)
    if path.is_dir() or record_of(path) is None:
        return path
    target = path.parent / "dequantised"
    if not target.exists():
        from khaosz.interop.models import convert

        convert(path, target)
    return target
