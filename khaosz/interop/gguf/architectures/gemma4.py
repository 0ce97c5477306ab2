"""Gemma 4: heads of two widths, a feed-forward width for each layer, and the pairs that rotate as
divisors of frequencies."""

from __future__ import annotations

import numpy as np

from khaosz.config import ModelConfig
from khaosz.errors import ModelError
from khaosz.interop.families.family import Values
from khaosz.interop.gguf.architectures.architecture import Architecture, Keys, gguf_layout
from khaosz.interop.gguf.blocks import dequantize

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_SHARED, _EACH = "attention.shared_kv_layers", "embedding_length_per_layer_input"
_LOCAL, _CAP, _INNER = "rope.freq_base_swa", "final_logit_softcapping", "feed_forward_length"
_FACTORS, _STILL = "rope_freqs.weight", 1e30  # the divisor of pairs that do not rotate


def _read(keys: Keys) -> Values:
    layers, width = keys.count("block_count"), keys.count("embedding_length")
    pattern = keys.file.metadata.get(f"{keys.prefix}.{_PATTERN}")
    if not isinstance(pattern, np.ndarray) or len(pattern) != layers:
        raise ModelError(f"{keys.source}: {keys.prefix}.{_PATTERN} is not one for each layer")
    if not pattern.any():
        raise ModelError(f"{keys.source}: Gemma 4 without sliding windows is not supported")
    full, near = keys.count("attention.key_length"), keys.count("attention.key_length_swa")
    for key, expected in (
        ("attention.value_length_swa", near),
        ("rope.dimension_count_swa", near),
    ):
        if (stored := keys.count(key, expected)) != expected:
            raise ModelError(f"{keys.source}: {keys.prefix}.{key} = {stored} is not supported")
    shared, inner = keys.count(_SHARED, 0), keys.counts(_INNER, layers)
    return {
        "qk_norm": True,
        "output_norms": True,
        "value_norm": True,
        "layer_scalar": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": width**0.5,
        "attention_multiplier": 1.0,
        "head_dim": near,
        "global_head_dim": None if full == near else full,
        "rope_theta": keys.number("rope.freq_base", 1_000_000.0),
        "rope_local_theta": keys.number(_LOCAL, 10_000.0),
        "rope_scaling": _scaling(keys, full),
        "layer_types": tuple(
            "sliding_attention" if sliding else "full_attention" for sliding in pattern.tolist()
        ),
        "sliding_window": keys.count(_WINDOW),
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": bool(shared) and inner[-1] == 2 * inner[0],
        "hidden_size_per_layer_input": keys.count(_EACH, 0),
        "final_logit_softcapping": keys.number(_CAP, 0.0) or None,
    }


def _scaling(keys: Keys, width: int) -> Values:
    tensor = keys.file.tensors.get(_FACTORS)
    if tensor is None or tensor.shape != (width // 2,):
        raise ModelError(f"{keys.source}: '{_FACTORS}' does not fit the rotation of its heads")
    factors = dequantize(keys.file.raw(_FACTORS), tensor.type).ravel()
    count = int((factors == 1.0).sum())
    if count < 1 or (factors[:count] != 1.0).any() or (factors[count:] < 1e29).any():
        raise ModelError(f"{keys.source}: '{_FACTORS}' is not 1 for the pairs that rotate")
    # Half a pair more, where rounding would lose the last one.
    part = count / len(factors)
    part = part if int(part * width // 2) == count else (count + 0.5) / len(factors)
    return {"rope_type": "proportional", "factor": 1.0, "proportion": part}


def _write(config: ModelConfig) -> Values:
    if config.sliding_window is None:
        raise ModelError("GGUF has no Gemma 4 without sliding windows", hint="keep it in HF")
    scaling = config.rope_scaling
    if scaling is not None and (scaling.rope_type != "proportional" or scaling.factor != 1.0):
        raise ModelError("GGUF has no scaled rotation of Gemma 4", hint="keep it in HF")
    layers = range(config.num_hidden_layers)
    near = np.array([config.window(layer) is not None for layer in layers], np.bool_)
    return {
        _PATTERN: near,
        _WINDOW: config.sliding_window,
        _SHARED: config.num_kv_shared_layers,
        _EACH: config.hidden_size_per_layer_input,
        _INNER: np.array([config.feed_forward_width(layer) for layer in layers], np.int32),
        _LOCAL: float(config.rope_local_theta or config.rope_theta),
        _CAP: float(config.final_logit_softcapping or 0.0),
        "attention.key_length": config.widest_head,
        "attention.value_length": config.widest_head,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "rope.dimension_count_swa": config.head_dim,
    }


def _tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    pairs, scaling = config.widest_head // 2, config.rope_scaling
    part = 1.0 if scaling is None else scaling.proportion
    factors = np.full(pairs, _STILL, np.float32)
    factors[: int(part * config.widest_head // 2)] = 1.0
    return {_FACTORS: factors}


GEMMA4 = Architecture(
    "gemma4_text",
    read=_read,
    write=_write,
    tensors=_tensors,
    own=frozenset({_WINDOW, _LOCAL, _CAP, _FACTORS}),
    layout=gguf_layout(
        parts={
            "per_layer_input.gate": "inp_gate",
            "per_layer_input.projection": "proj",
            "per_layer_norm": "post_norm",
            "layer_scalar": "layer_output_scale",
        },
        top={
            "embed_per_layer": "per_layer_token_embd",
            "per_layer_inputs.projection": "per_layer_model_proj",
            "per_layer_inputs.norm": "per_layer_proj_norm",
        },
    ),
)
