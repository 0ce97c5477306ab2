"""Recipes: TOML files plus `key=value` overrides in, the resolved configuration out."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from khaosz.config.train_config import TrainConfig
from khaosz.errors import ConfigError


def load_recipe(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a TOML recipe, lay `key=value` overrides over it, validate.

    Raises `ConfigError` for a missing or broken file, an unknown key, a value out of range.
    """
    try:
        # Some Windows editors begin a file with a byte order mark, which TOML forbids.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = "recipes/ holds the shipped ones"
        raise ConfigError(f"no such recipe: {path}", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for dotted, value in parse_overrides(overrides or []).items():
        _assign(values, dotted, value)
    return TrainConfig.parse(values, source=str(path))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["lr=1e-3", "schedule.name=wsd"]` -> {"lr": 0.001, "schedule.name": "wsd"}.

    A value is read as TOML where that succeeds and taken as a plain string where it does not.
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
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override '{dotted}': '{parent}' is a value, not a table")
    values[leaf] = value
