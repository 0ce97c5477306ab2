"""Models that have a plain name, in `catalogue.toml`."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("catalogue.toml")
_BASE = 400 << 20  # bytes of Python, PyTorch and the buffers of a pass


@dataclass(frozen=True)
class Packages:
    """Python packages that carry a file: `parts` of them, or one that has it as `member`."""

    prefix: str
    version: str
    parts: int = 0
    member: str | None = None

    @property
    def names(self) -> list[str]:
        return [f"{self.prefix}{n}" for n in range(1, self.parts + 1)] or [self.prefix]


@dataclass(frozen=True)
class Entry:
    """One model; `catalogue.toml` says what the fields mean. `bytes` are those of `file`; a model
    that has files `beside` it is a folder."""

    name: str
    kind: str
    bytes: int
    licence: str
    languages: str
    context: int
    file: str = ""
    sha256: str | None = None
    revision: str | None = None
    confirmed: int = 0
    architecture: str | None = None
    huggingface: str | None = None
    modelscope: str | None = None
    packages: Packages | None = None
    package: str | None = None
    thinking: str = "no"
    cache_mb: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    sampling_thinking: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    beside: tuple[Mapping[str, Any], ...] = ()

    @property
    def files(self) -> list[Entry]:
        """An entry for each file that is fetched."""
        return [self, *(replace(self, **each) for each in self.beside)]

    @property
    def memory(self) -> int:
        """Bytes needed with 4,096 tokens of context, by its size and shape; without the keys and
        values where the shape is not known."""
        return self.bytes + (self.cache_mb or 0) * 1_000_000 + _BASE

    @property
    def is_limited(self) -> bool:
        """Whether its licence limits who may use it, or for what."""
        return self.licence.endswith(", limited")


@functools.cache
def catalogue() -> dict[str, Entry]:
    """Entries by name, in the order of the file."""
    tables: dict[str, dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {name: _entry(name, table) for name, table in tables.items()}


def _entry(name: str, table: dict[str, Any]) -> Entry:
    unknown = table.keys() - {each.name for each in fields(Entry)}
    assert not unknown, f"{name}: {unknown}"
    if "packages" in table:
        table["packages"] = Packages(**table["packages"])
    table |= {key: tuple(table.get(key, ())) for key in ("aliases", "beside")}
    return Entry(name=name, **table)


def entry_of(name: str) -> Entry | None:
    """The entry with this name or alias, in any case."""
    wanted = name.lower()
    for entry in catalogue().values():
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    return None
