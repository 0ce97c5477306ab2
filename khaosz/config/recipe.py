"""Recipes: from TOML files and `key=value` overrides to validated configurations."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

from khaosz.config.train_config import TrainConfig
from khaosz.errors import ConfigError
from khaosz.files import write_json


def load_recipe(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a TOML recipe of one stage, apply `key=value` overrides, validate.

    Raises `ConfigError` for a missing or invalid file, an unknown key, a value out of range.
    """
    stages = load_stages(path, overrides)
    if len(stages) != 1:
        raise ConfigError(f"{path} has {len(stages)} stages, expected one")
    return stages[0]


def load_stages(path: Path, overrides: list[str] | None = None) -> list[TrainConfig]:
    """The stages of a recipe, in order: one, or its `[[stages]]` tables, each of which inherits the
    keys above them. An override `pt.lr=1e-3` applies to the stage of that name.

    Raises `ConfigError` as `load_recipe` does.
    """
    values = _read_toml(path)
    tables = values.pop("stages", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: stages must be [[stages]] tables")
    parsed = parse_overrides(overrides or [])
    names = [table.get("stage", values.get("stage")) for table in tables]
    configs = []
    for name, table in zip(names, tables, strict=True):
        merged = copy.deepcopy({**values, **table})
        for dotted, value in parsed.items():
            owner, _, rest = dotted.partition(".")
            if owner not in names:
                _assign(merged, dotted, value)
            elif owner == name:
                # `embed` is a stage and a table: a name that is not a recipe key is the table's.
                keys = TrainConfig.model_fields
                in_table = owner in keys and rest.partition(".")[0] not in keys
                _assign(merged, dotted if in_table else rest, value)
        configs.append(TrainConfig.parse(merged, source=str(path)))
    return configs


def shipped_recipe(name: str) -> Path:
    """A recipe shipped with KHAOSZ, in the package or in the source tree."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes" / name
    return inside if inside.exists() else package.parent / "recipes" / name


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # Some Windows editors write a byte order mark, which TOML forbids.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = "the shipped recipes are in recipes/"
        raise ConfigError(f"recipe not found: {path}", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["lr=1e-3", "schedule.name=wsd"]` -> {"lr": 0.001, "schedule.name": "wsd"}.

    A value that is not valid TOML is taken as a string.
    """
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not key:
            raise ConfigError(f"not an override: '{text}'", hint="write key=value, e.g. lr=1e-3")
        try:
            parsed[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed[key] = value
    return parsed


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as JSON, atomically."""
    write_json(path, config.model_dump(mode="json"))


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override '{dotted}': '{parent}' is a value, not a table")
    values[leaf] = value
