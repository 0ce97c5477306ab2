"""Gemma 4 for text, of Google: Gemma 3's block, and an embedding of each token for each layer, last
layers that read the keys and values of earlier ones, wider heads in layers that see everything, of
which a part rotates, normalised values, and a scale of each layer. E2B, E4B and the dense models
whose values have a projection."""

from __future__ import annotations

from typing import Any

from khaosz.config import ModelConfig
from khaosz.errors import ModelError, quoted
from khaosz.interop.families.family import Family, Values, hf_layout
from khaosz.interop.families.gemma3 import DEFAULTS, NORM_NAMES, gemma3_layers

_LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
_PROPORTIONAL = {
    "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25
}  # fmt: skip


def _read(values: Values, source: str) -> Values:
    for key, harmless in {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, "vision"),  # of images: text is causal
        "enable_moe_block": (False, None),
        "attention_k_eq_v": (False, None),
    }.items():
        if (value := values.pop(key, harmless[0])) not in harmless:
            raise ModelError(f"{source}: {key}={quoted(value)} is not supported")
    types, window = _layer_types(values, source), values.pop("sliding_window", 512)
    full = _full_head_dim(values, types, source)
    width, each = values.get("hidden_size"), values.pop("hidden_size_per_layer_input", 256) or 0
    table = values.pop("vocab_size_per_layer_input", 262_144)
    if each and table != values.get("vocab_size"):
        raise ModelError(f"{source}: vocab_size_per_layer_input={quoted(table)} is not vocab_size")
    shared = values.pop("num_kv_shared_layers", 0)
    local = _read_rotations(values, source)
    fields = {
        "qk_norm": True,
        "output_norms": True,
        "value_norm": True,
        "layer_scalar": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": width**0.5 if isinstance(width, int) and width > 0 else 1.0,
        "attention_multiplier": 1.0,
        "hidden_size_per_layer_input": each,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": values.pop("use_double_wide_mlp", False) if shared else False,
        "final_logit_softcapping": values.pop("final_logit_softcapping", None),
        "layer_types": types,
    }
    if "sliding_attention" in types:
        own = None if full == values.get("head_dim") else full
        return {
            **fields, "sliding_window": window, "rope_local_theta": local, "global_head_dim": own
        }  # fmt: skip
    values["head_dim"] = full
    return {**fields, "layer_types": None}


def _layer_types(values: Values, source: str) -> list[str]:
    """As transformers, whose last layer sees everything whatever is said of it."""
    types, layers = values.pop("layer_types", None), values.get("num_hidden_layers")
    if types is None:
        count = layers if isinstance(layers, int) and 0 < layers < 10_000 else 1
        types = list(gemma3_layers(count))
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or any(kind not in kinds for kind in types):
        raise ModelError(f"{source}: layer_types={quoted(types)} is not supported")
    return [*types[:-1], "full_attention"]


def _full_head_dim(values: Values, types: list[str], source: str) -> Any:
    """The head width of layers that see everything: `global_head_dim` as published, in what
    transformers writes an entry of `per_layer_config` for each of them."""
    width, layers = values.pop("global_head_dim", 512), values.pop("per_layer_config", None)
    values.pop("num_global_key_value_heads", None)  # of models without projections of values
    if layers is None:
        return width
    full = [str(i) for i, kind in enumerate(types) if kind == "full_attention"]
    changed: list[Any] = [None]
    if isinstance(layers, dict) and layers.keys() <= set(full):
        changed = [layers.get(layer, {}) for layer in full]
    same = all(isinstance(changes, dict) and changes == changed[0] for changes in changed)
    if not same or changed[0].keys() - {"head_dim"}:
        raise ModelError(f"{source}: per_layer_config={quoted(layers)} is not supported")
    return changed[0].get("head_dim", values.get("head_dim"))


def _read_rotations(values: Values, source: str) -> Any:
    """Leaves in `values` the rotation of layers that see everything; returns the other's base."""
    rotations = values.get("rope_parameters") or {}
    tables = [rotations, *rotations.values()] if isinstance(rotations, dict) else [rotations]
    if not all(isinstance(table, dict) for table in tables):
        raise ModelError(f"{source}: rope_parameters={quoted(rotations)} is not supported")
    near = dict(rotations.get("sliding_attention") or _LOCAL)
    if near.get("rope_type", "default") != "default" or near.keys() - {"rope_type", "rope_theta"}:
        raise ModelError(f"{source}: a scaled rotation of sliding layers is not supported")
    far = dict(rotations.get("full_attention") or _PROPORTIONAL)
    if far.get("rope_type") == "proportional":
        part = far.pop("partial_rotary_factor", 1.0)
        far |= {"factor": far.get("factor", 1.0), "proportion": part}
    values["rope_parameters"] = far
    return near.get("rope_theta", _LOCAL["rope_theta"])


def _write(config: ModelConfig, values: Values) -> None:
    values.pop("hidden_act")
    theta, far = values.pop("rope_theta"), values.pop("rope_scaling", {"rope_type": "default"})
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "proportional":
        far |= {"partial_rotary_factor": config.rope_scaling.proportion}
    layers = config.num_hidden_layers
    values |= {
        "hidden_activation": config.hidden_act,
        "global_head_dim": config.widest_head,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "use_bidirectional_attention": None,
        "vocab_size_per_layer_input": config.vocab_size,
        "hidden_size_per_layer_input": config.hidden_size_per_layer_input,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": config.use_double_wide_mlp,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": config.sliding_window or 512,
        "layer_types": list(config.layer_types or ("full_attention",) * layers),
        "rope_parameters": {
            "full_attention": {**far, "rope_theta": theta},
            "sliding_attention": {**_LOCAL, "rope_theta": config.rope_local_theta or 10_000.0},
        },
    }


def _suits(config: ModelConfig) -> bool:
    """Its constants, and its last layer sees everything."""
    scaled = config.embedding_multiplier == config.hidden_size**0.5
    last = config.window(config.num_hidden_layers - 1)
    return scaled and config.attention_multiplier == 1.0 and last is None


GEMMA4 = Family(
    "Gemma4",
    frozenset({
        "qk_norm", "output_norms", "hidden_act", "embedding_multiplier", "attention_multiplier",
        "value_norm", "layer_scalar",
    }),
    frozenset({
        "layer_types", "rope_local_theta", "global_head_dim", "proportional",
        "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
        "final_logit_softcapping",
    }),
    defaults={**DEFAULTS, "vocab_size": 262_144},
    read=_read,
    write=_write,
    suits=_suits,
    layout=hf_layout(
        {
            **NORM_NAMES,
            "per_layer_input.gate": "per_layer_input_gate",
            "per_layer_input.projection": "per_layer_projection",
            "per_layer_norm": "post_per_layer_input_norm",
            "layer_scalar.weight": "layer_scalar",
        },
        top={
            "embed_per_layer": "model.embed_tokens_per_layer",
            "per_layer_inputs.projection": "model.per_layer_model_projection",
            "per_layer_inputs.norm": "model.per_layer_projection_norm",
        },
    ),
)  # fmt: skip
