"""Models that are on this machine: trained here, or pulled."""

from __future__ import annotations

from pathlib import Path


def trained_models(runs: Path) -> list[Path]:
    """Model directories of the stages under `runs`, the one written last first."""
    from khaosz.interop import WEIGHTS, is_embedder

    found = [
        path.parent
        for pattern in ("last/config.json", "*/last/config.json", "*/*/last/config.json")
        for path in runs.glob(pattern)
        if (path.parent / WEIGHTS).exists() and not is_embedder(path.parent)
    ]
    return sorted(found, key=lambda path: (path / WEIGHTS).stat().st_mtime, reverse=True)


def newest_model(runs: Path) -> Path:
    """The model directory written last under `runs`; raises `ModelError` if there is none."""
    from khaosz.errors import ModelError

    if found := trained_models(runs):
        return found[0]
    raise ModelError(
        f"no model was trained here (nothing under {runs}/)",
        hint="run `khaosz demo`, or `khaosz pull smollm2` for a small open model (English)",
    )


def models_here() -> list[Path]:
    from khaosz.interop.pull import pulled_models

    return trained_models(Path("runs")) + pulled_models()


def default_model() -> Path:
    """The newest model trained here, else the newest pulled, else say how to get one."""
    return next(iter(models_here()), None) or newest_model(Path("runs"))


def model_named(name: str) -> Path:
    """A path, or the model here whose short name it is. Raises `ModelError`."""
    from khaosz.errors import ModelError, nearest
    from khaosz.interop.models import default_name

    path = Path(name).expanduser()
    if path.exists():
        return path
    here = models_here()
    found = [model for model in here if default_name(model) == name]
    if len(found) > 1:
        paths = ", ".join(str(model) for model in found)
        raise ModelError(f"'{name}' may be {paths}", hint="name the whole path")
    if not found:
        guess = nearest(name, [default_name(model) for model in here])
        hint = f"did you mean {guess}?" if guess else "/model lists those that are here"
        raise ModelError(f"no model '{name}' is here", hint=hint)
    return found[0]
