"""How a model wants to be sampled: by its files, else by the catalogue, else as any model.

Read, in this order, key by key: `generation_config.json` beside the weights (transformers), the
keys `general.sampling.*` of a GGUF file (llama.cpp), the entry of the catalogue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from khaosz.interop.fetch.catalogue import Entry, catalogue, entry_of
from khaosz.interop.fetch.store import record_of
from khaosz.interop.gguf.file import GgufFile, is_gguf
from khaosz.interop.gguf.sampling import sampling_from_metadata

FALLBACK: Mapping[str, float] = {"temperature": 0.8, "top_p": 0.95}

# The ranges of `SamplingParams`.
_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0), "top_k": (0, 2**31), "top_p": (1e-9, 1.0), "min_p": (0.0, 0.999),
    "typical_p": (1e-9, 1.0), "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
}  # fmt: skip
NAMES = tuple(_RANGES)
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def sampling_defaults(model: str | Path) -> dict[str, float]:
    """Sampling parameters of a model directory or .gguf file, by their names in `SamplingParams`;
    `FALLBACK` for a model that nothing is known of. A value out of range is not used."""
    values = recommended_sampling(model)
    return values if "temperature" in values else {**FALLBACK, **values}


def recommended_sampling(model: str | Path) -> dict[str, float]:
    """What the files of a model and the catalogue say; also written beside models that are made of
    it."""
    entry = known_entry(Path(model))
    known = {} if entry is None else _in_range(entry.sampling)
    return {**known, **_own_sampling(Path(model))}


def _own_sampling(path: Path) -> dict[str, float]:
    folder = path if path.is_dir() else path.parent
    stored: dict[str, float] = {}
    if path.is_file() and is_gguf(path):
        stored = _in_range(sampling_from_metadata(GgufFile.open(path).metadata))
        if len(list(folder.glob("*.gguf"))) > 1:  # whose is generation_config.json?
            return stored
    return {**stored, **_in_range(_generation_config(folder))}


def sampling_values(defaults: Mapping[str, float], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked, over the defaults. Temperature 0 asks for the likeliest tokens: the model's
    own penalties would change them, so only those that are asked count. The values of `FALLBACK`
    belong together: who sets another temperature gets none of them."""
    if "temperature" in asked and defaults == FALLBACK:
        return dict(asked)
    if asked.get("temperature") == 0:
        defaults = {name: value for name, value in defaults.items() if name not in _PENALTIES}
    return {**defaults, **asked}


def known_entry(path: Path) -> Entry | None:
    """The entry of the catalogue that a model is: pulled by its name, or a file of its name and
    size."""
    record = record_of(path)
    if record is not None and (entry := entry_of(record.name)) is not None:
        return entry
    if not path.is_file():
        return None
    name, size = path.name.lower(), path.stat().st_size
    for entry in catalogue().values():
        if entry.file and Path(entry.file).name.lower() == name and entry.bytes == size:
            return entry
    return None


def _generation_config(folder: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _in_range(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that can be used."""
    usable: dict[str, float] = {}
    for name, (least, most) in _RANGES.items():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if least <= value <= most:
            # GGUF's numbers have 32 bits: 0.8 would be 0.800000011920929.
            usable[name] = int(value) if name == "top_k" else float(f"{value:.6g}")
    return usable
