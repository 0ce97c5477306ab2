"""Gemma 3: the windows and bases that llama.cpp has keys for."""

from __future__ import annotations

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.families.gemma3 import gemma3_layers
from khaosz.interop.families.granite import attention_multiplier
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys

_WINDOW, _LOCAL = "attention.sliding_window", "rope.freq_base_swa"
_WIDE = 62  # layers of the 27B model, whose scale llama.cpp takes from its width and heads


def _scale(layers: int, width: int, heads: int, head_dim: int) -> float:
    return ((width / heads) if layers == _WIDE else head_dim) ** -0.5


def _read(keys: Keys) -> Values:
    layers, width = keys.count("block_count"), keys.count("embedding_length")
    heads, window = keys.count("attention.head_count"), keys.count(_WINDOW, 0)
    head_dim = keys.count("attention.key_length", width // heads)
    fields: Values = {
        "qk_norm": True,
        "output_norms": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": width**0.5,
        "attention_multiplier": attention_multiplier(
            _scale(layers, width, heads, max(1, head_dim)), head_dim
        ),
        "rope_theta": keys.number("rope.freq_base", 1_000_000.0),
    }
    if window:
        fields |= {
            "layer_types": gemma3_layers(layers),
            "sliding_window": window,
            "rope_local_theta": keys.number(_LOCAL, 10_000.0),
        }
    return fields


def _read_embedder(keys: Keys) -> Values:
    fields = _read(keys)
    if window := fields.get("sliding_window"):
        fields["sliding_window"] = window // 2 + 1  # the key has both sides of a window
    return {**fields, "bidirectional": True}


def _write(config: ModelConfig) -> Values:
    if config.bidirectional:
        raise ModelError("embedders cannot be written to GGUF", hint="keep it in HF")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    scale = config.attention_multiplier or config.head_dim**-0.5
    if scale != _scale(layers, config.hidden_size, heads, config.head_dim):
        raise ModelError(f"llama.cpp has no key for attention_multiplier={scale:g} of Gemma 3")
    if config.sliding_window is None:
        return {}
    if config.layer_types != gemma3_layers(layers):
        raise ModelError(
            "llama.cpp lets every sixth layer of Gemma 3 see everything: these layer_types cannot"
            " be written to GGUF",
            hint="keep it in HF",
        )
    local = config.rope_local_theta or config.rope_theta
    return {_WINDOW: config.sliding_window, _LOCAL: float(local)}


GEMMA3 = Architecture("gemma3_text", read=_read, write=_write, own=frozenset({_WINDOW, _LOCAL}))
# Read alone: of the two, `gemma3` is the first with the family's name.
GEMMA_EMBEDDING = Architecture(
    "gemma3_text",
    read=_read_embedder,
    own=frozenset({_WINDOW, _LOCAL, "dense_2.weight", "dense_3.weight"}),
)
