"""Recipes: from TOML files and `key=value` overrides to validated configurations."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from khaosz.config.closed import Closed
from khaosz.config.effects import Ineffective, ineffective
from khaosz.config.shipped import find_recipe
from khaosz.config.stages import TABLES
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
    keys above them. An override `pt.lr=1e-3` applies to the stage of that name. `path` may be the
    name of a shipped recipe.

    Raises `ConfigError` as `load_recipe` does.
    """
    path = find_recipe(path)
    values = _read_toml(path)
    tables = values.pop("stages", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: stages must be [[stages]] tables")
    if not tables:
        raise ConfigError(f"{path}: stages is empty", hint="add [[stages]] tables, or remove it")
    parsed = parse_overrides(overrides or [])
    names = [table.get("stage", values.get("stage")) for table in tables]
    configs, origins = [], []
    for name, table in zip(names, tables, strict=True):
        merged = copy.deepcopy({**values, **table})
        origin = _Origin(_keys(table), _keys(values) - _keys(table))
        for dotted, value in parsed.items():
            owner, _, rest = dotted.partition(".")
            if owner in names and owner != name:
                continue
            # `embed` is a stage and a table: a name that is not a recipe key is the table's.
            keys = TrainConfig.model_fields
            in_table = owner in keys and rest.partition(".")[0] not in keys
            key = dotted if owner not in names or in_table else rest
            _assign(merged, key, value)
            origin.override(key, own=owner in names)
        if len(tables) > 1 and merged.get("init_from") and "model" not in origin.own:
            merged.pop("model", None)  # shared: for the stages that start with a new model
        configs.append(TrainConfig.parse(merged, source=str(path)))
        origins.append(origin)
    _check_effects(str(path), configs, origins)
    return configs


@dataclass(frozen=True)
class _Origin:
    """Where the keys of a stage come from: from its own table or overrides, or from what all stages
    share. Those of tables are written `table.key`."""

    own: set[str]
    shared: set[str]
    overridden: set[str] = field(default_factory=set)

    def override(self, key: str, own: bool) -> None:
        # `model.head_dim` is `model`, `columns.roles.bot` is `columns.roles`
        key = ".".join(key.split(".")[: 2 if key.partition(".")[0] in TABLES else 1])
        self.overridden.add(key)
        (self.own if own else self.shared).add(key)

    def replaced(self, cause: str | None) -> bool:
        """Whether an override gives the key `cause`."""
        return any(key == cause or key.startswith(f"{cause}.") for key in self.overridden)


def _keys(values: dict[str, Any]) -> set[str]:
    keys: set[str] = set()
    for key, value in values.items():
        inner = value if key in TABLES and isinstance(value, dict) else {}
        keys |= {f"{key}.{name}" for name in inner} or {key}
    return keys


def _check_effects(source: str, configs: list[TrainConfig], origins: list[_Origin]) -> None:
    """Raises `ConfigError` for a key without effect in its stage, and for one that all stages share
    without effect in any. An override may disable a key of the recipe: it takes its place."""
    common: dict[str, Ineffective] | None = None
    for config, origin in zip(configs, origins, strict=True):
        own = origin.own if len(configs) > 1 else origin.own | origin.shared
        given = {key for key in own | origin.shared if _value(config, key) is not None}
        vain = {
            each.key: each
            for each in ineffective(config, given)
            if each.key in origin.overridden or not origin.replaced(each.cause)
        }
        for key in sorted(vain.keys() & own):
            raise _without_effect(source, vain[key])
        common = {key: vain[key] for key in vain if common is None or key in common}
    for each in (common or {}).values():
        raise _without_effect(source, each)


def _value(config: Closed, key: str) -> Any:
    name, _, inner = key.partition(".")
    value = getattr(config, name)
    return _value(value, inner) if inner else value


def _without_effect(source: str, each: Ineffective) -> ConfigError:
    hint = each.hint or "remove it, or change the key that disables it"
    return ConfigError(f"{source}: {each.shown} has no effect {each.reason}", hint=hint)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # Some Windows editors write a byte order mark, which TOML forbids.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
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


def overridden(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """A copy with `key=value` overrides. Raises `ConfigError`."""
    values = config.model_dump(exclude_unset=True)
    for dotted, value in parse_overrides(overrides).items():
        _assign(values, dotted, value)
    return TrainConfig.parse(values)


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override '{dotted}': '{parent}' is a value, not a table")
    values[leaf] = value
