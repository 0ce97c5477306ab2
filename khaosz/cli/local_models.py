"""Find the models on this machine: trained under runs/, or pulled."""

from __future__ import annotations

from pathlib import Path

_RUNS = Path("runs")


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
    return sorted(models, key=lambda path: (path / WEIGHTS).stat().st_mtime, reverse=True)


def newest_model(runs: Path) -> Path:
    """The model directory last written under `runs`; raises `ModelError` if there are none."""
    from khaosz.errors import ModelError

    if models := trained_models(runs):
        return models[0]
    raise ModelError(
        f"no trained model found under {runs}/",
        hint="run `khaosz demo`, or `khaosz pull smollm2` for a small open model (English)",
    )


def local_models() -> list[Path]:
    """Trained models, then pulled ones, each the newest first."""
    from khaosz.interop.pull import pulled_models

    return trained_models(_RUNS) + pulled_models()


def default_model() -> Path:
    """The newest trained model, else the newest pulled one. Raises `ModelError`."""
    return next(iter(local_models()), None) or newest_model(_RUNS)


def find_model(name: str) -> Path:
    """A path, or the local model with this short name. Raises `ModelError`."""
    from khaosz.errors import ModelError, did_you_mean
    from khaosz.interop.models import default_name

    path = Path(name).expanduser()
    if path.exists():
        return path
    models = local_models()
    matches = [model for model in models if default_name(model) == name]
    if len(matches) > 1:
        paths = ", ".join(str(model) for model in matches)
        raise ModelError(f"'{name}' is ambiguous: {paths}", hint="give the whole path")
    if not matches:
        names = [default_name(model) for model in models]
        hint = did_you_mean(name, names, "/model lists the local models")
        raise ModelError(f"model '{name}' not found", hint=hint)
    return matches[0]
