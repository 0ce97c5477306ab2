"""The sampling that a GGUF file recommends, in llama.cpp's keys (gguf-py, Keys.General)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIX = "general.sampling."
_KEYS = {
    "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}  # fmt: skip


def sampling_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of `SamplingParams`, as they are in the file."""
    values = {name: metadata[_PREFIX + k] for name, k in _KEYS.items() if _PREFIX + k in metadata}
    if metadata.get(f"{_PREFIX}penalty_last_n") == 0:  # of no token
        values.pop("repetition_penalty", None)
    return values


def sampling_to_metadata(values: Mapping[str, float]) -> dict[str, Any]:
    """Those that have a key."""
    return {_PREFIX + key: values[name] for name, key in _KEYS.items() if name in values}
