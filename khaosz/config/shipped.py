"""The recipes that are shipped with KHAOSZ and the data that they name, by their names: their
folder is in the package, or beside it in the source tree."""

from __future__ import annotations

from pathlib import Path

from khaosz.errors import ConfigError, did_you_mean

_SAMPLE = "sample:"


def shipped_recipe(name: str) -> Path:
    return _folder() / name


def shipped_recipes() -> dict[str, str]:
    """Names, and what each recipe does: its first line."""
    recipes = {}
    for path in sorted(_folder().glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        recipes[path.stem] = first.removeprefix("#").strip()
    return recipes


def find_recipe(name: Path) -> Path:
    """A file, or the shipped recipe of that name. Raises `ConfigError`."""
    if name.is_file():
        return name
    known = shipped_recipes()
    if str(name).removesuffix(".toml") in known:
        return shipped_recipe(f"{name.stem}.toml")
    if name.exists():
        return name  # reading it says why it cannot be read
    otherwise = f"a file, or one of {', '.join(known)}"
    raise ConfigError(f"recipe not found: {name}", hint=did_you_mean(name.stem, known, otherwise))


def sample_data(value: object) -> object:
    """The file that `sample:NAME` stands for, any other value as it is. Raises ValueError."""
    if not str(value).startswith(_SAMPLE):
        return value
    name = str(value).removeprefix(_SAMPLE)
    files = {path.stem: path for path in sorted((_folder() / "data").glob("*.jsonl"))}
    if name not in files:
        known = f"samples: {', '.join(_SAMPLE + each for each in files)}"
        raise ValueError(f"sample '{name}' not found, {did_you_mean(name, files, known)}")
    return files[name]


def _folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.exists() else package.parent / "recipes"
