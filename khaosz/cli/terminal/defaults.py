"""Settings that a user keeps for new chats: `chat.toml` in the configuration folder.

The keys are those of `/set`, and `system`. Options of the command win over the file, the file over
what the model recommends.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from khaosz.cli.terminal.conversation import Settings
from khaosz.errors import ConfigError, did_you_mean
from khaosz.files import config_folder, disk_error, write_atomic

# Names of settings and their types, of a value that is set.
TYPES: dict[str, type] = {
    field.name: {"bool": bool, "float": float}.get(str(field.type).partition(" ")[0], int)
    for field in fields(Settings)
}


def defaults_file() -> Path:
    return config_folder() / "chat.toml"


def read_defaults() -> dict[str, Any]:
    """Empty if the file does not exist. Raises `ConfigError` for a file that cannot be used."""
    path = defaults_file()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:  # broken TOML, another encoding
        raise ConfigError(f"{path} cannot be read: {error}", hint="mend it, or remove it") from None
    for name, value in values.items():
        expected = str if name == "system" else TYPES.get(name)
        if expected is None:
            hint = did_you_mean(name, [*TYPES, "system"], "see /set")
            raise ConfigError(f"{path}: unknown setting '{name}'", hint=hint)
        if expected is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not expected:
            raise ConfigError(f"{path}: {name} is not of type {expected.__name__}")
    return values


def save_defaults(settings: Settings, system: str | None) -> Path:
    """Raises `ConfigError` where the file cannot be written."""
    values = {name: value for name, value in vars(settings).items() if value is not None}
    if settings.max_tokens == Settings().max_tokens:
        del values["max_tokens"]
    values |= {"system": system} if system else {}
    # JSON's numbers, words and texts are TOML's.
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items()
    ]
    path = defaults_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ["".join(lines).encode()])
    except OSError as error:
        raise ConfigError(f"cannot write {disk_error(error, path)}") from None
    return path
