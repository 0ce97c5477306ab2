"""SmolLM3: llama.cpp knows its usual pattern of layers without rotation only."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys


def _pattern(layers: int) -> tuple[int, ...]:
    return tuple(int((i + 1) % 4 != 0) for i in range(layers))


def _read(keys: Keys) -> Values:
    rotated = _pattern(keys.count("block_count"))
    return {"no_rope_layers": None if all(rotated) else rotated}


def _write(config: ModelConfig) -> Values:
    if config.no_rope_layers != _pattern(config.num_hidden_layers):
        raise ModelError(
            "llama.cpp rotates nothing in every fourth layer: these no_rope_layers cannot be"
            " written to GGUF",
            hint="keep it in HF",
        )
    return {}


SMOLLM3 = Architecture("smollm3", paired=True, read=_read, write=_write)
