"""`ModelConfig` <-> the metadata of GGUF files, in llama.cpp's keys (gguf-py/gguf/constants.py)."""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np
from pydantic import ValidationError

from khaosz.config import ModelConfig, RopeScaling
from khaosz.errors import ConfigError, ModelError, one_line, quoted
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.interop.gguf.architectures.architecture import Keys
from khaosz.interop.gguf.blocks import dequantize
from khaosz.interop.gguf.file import GgufFile
from khaosz.interop.huggingface_config import check_rotary, model_type
from khaosz.model.rotary import rotary_frequencies

# What can be written: llama.cpp's numbers of types and mixtures.
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3}
FILE_TYPES |= {"Q4_K_M": 15, "Q6_K": 18}
ROPE_FACTORS = "rope_freqs.weight"
_OUR_SCALING = "khaosz.rope_scaling"
# What refutes a common network, unless an architecture reads it: keys, and their values without.
_DEFAULTS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name of a model's architecture. Raises `ModelError` where it has none."""
    family = model_type(config)
    for name, kind in ARCHITECTURES.items():
        if kind.family == family:
            return name
    raise ModelError(f"llama.cpp has no architecture for {family} models with these features")


def config_from_metadata(file: GgufFile) -> ModelConfig:
    """Raises `ModelError` for an architecture or a feature that is not supported. The caller
    checks sizes against tensors, and then calls `with_llama3`."""
    metadata, source = file.metadata, file.source
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        close = difflib.get_close_matches(str(family), ARCHITECTURES, n=1, cutoff=0.5)
        raise ModelError(
            f"{source}: architecture {quoted(family)} is not supported",
            hint=(f"the nearest is {close[0]}; " if close else "")
            + f"supported: {', '.join(ARCHITECTURES)}",
        )

    architecture, keys = ARCHITECTURES[family], Keys(file, family)
    value, number, count = keys.value, keys.number, keys.count
    if count("expert_count", 0) and "expert_count" not in architecture.own:
        what = "mixtures of experts, such as Mixtral,"
        raise ModelError(f"{source}: {what} as architecture {family} are not supported")
    heads, width = count("attention.head_count"), count("embedding_length")
    layers, context = count("block_count"), count("context_length")
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ModelError(f"{source}: tensor 'token_embd.weight' is missing")
    if heads < 1 or layers > len(file.tensors):
        raise ModelError(
            f"{source}: {layers} blocks of {heads} heads in {len(file.tensors)} tensors"
        )
    head_dim = count("attention.key_length", width // heads)
    common = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,  # rotation of a part of each head
        "attention.scale": max(1, head_dim) ** -0.5,
        **_DEFAULTS,
    }
    for key in sorted(common.keys() - architecture.own):
        stored = number(key, common[key])
        if not math.isclose(stored, common[key], rel_tol=1e-6):
            raise ModelError(f"{source}: {family}.{key} = {stored:g} is not supported")
    if (rows := count("vocab_size", table.shape[0])) != table.shape[0]:
        raise ModelError(
            f"{source}: {family}.vocab_size = {rows} contradicts the {table.shape[0]} rows of"
            " token_embd.weight"
        )
    sliding = "attention.sliding_window"
    if sliding not in architecture.own and 0 < count(sliding, 0) < context:
        raise ModelError(f"{source}: sliding windows of attention are not supported")
    many = "attention.head_count_kv" in architecture.own  # a number for each layer
    fields: dict[str, Any] = {
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "intermediate_size": next(iter(keys.counts("feed_forward_length", layers)), 0),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if many else count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    try:
        # As in llama.cpp, a factor without a type is linear; it may have its older name.
        kind, older = value("rope.scaling.type", str, ""), number("rope.scale_linear", 0.0)
        factor = number(
            "rope.scaling.factor", older or (None if kind in ("linear", "yarn") else 1.0)
        )
        if older not in (0.0, factor):
            raise ModelError(
                f"{source}: {family}.rope.scaling.factor = {factor:g} contradicts"
                f" {family}.rope.scale_linear = {older:g}"
            )
        match kind or ("none" if factor in (0.0, 1.0) else "linear"):
            case "none":
                pass
            case "linear" | "yarn" as kind:
                scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
                if kind == "yarn":
                    original = count("rope.scaling.original_context_length")
                    scaling["original_max_position_embeddings"] = original
                fields["rope_scaling"] = scaling
            case "longrope" if "longrope" in architecture.own:
                pass
            case other:
                raise ModelError(f"{source}: rope scaling {quoted(other)} is not supported")
        return ModelConfig.parse({**fields, **architecture.read(keys)}, source=source)
    except ArithmeticError as error:
        raise ModelError(f"{source}: not settings of {family}: {error}") from None
    except ConfigError as error:
        raise ModelError(one_line(str(error)), hint=error.hint) from None


def llama3_factors(config: ModelConfig) -> np.ndarray:
    """llama.cpp's divisor of each frequency: float32 (H / 2,)."""
    plain, _ = rotary_frequencies(config.model_copy(update={"rope_scaling": None}))
    scaled, _ = rotary_frequencies(config)
    return (plain / scaled).numpy()


def with_llama3(config: ModelConfig, file: GgufFile) -> ModelConfig:
    """llama.cpp stores the resulting factors only: find the scaling that gives them, ours by a key
    of our own, others among the published ones. Raises `ModelError` if none does."""
    shape = (config.head_dim // 2,)
    if config.rope_scaling is not None or file.tensors[ROPE_FACTORS].shape != shape:
        raise ModelError(f"{file.source}: '{ROPE_FACTORS}' does not fit the rotation of its heads")
    factors = dequantize(file.raw(ROPE_FACTORS), file.tensors[ROPE_FACTORS].type).ravel()
    scalings = [
        RopeScaling(rope_type="llama3", factor=factor, original_max_position_embeddings=original)
        for factor in (float(factors.max()), 8.0, 32.0)
        if math.isfinite(factor) and factor >= 1
        for original in (8192, 4096, 16_384)
    ]
    if isinstance(ours := file.metadata.get(_OUR_SCALING), str):
        try:
            scalings.insert(0, RopeScaling.model_validate_json(ours))
        except ValidationError:
            raise ModelError(f"{file.source}: '{_OUR_SCALING}' is {quoted(ours)}") from None
    for scaling in scalings:
        candidate = config.model_copy(update={"rope_scaling": scaling})
        check_rotary(candidate, file.source)
        # Both sides are fp32 formulas in different order: a few parts in 10^6 apart.
        if np.allclose(llama3_factors(candidate), factors, rtol=1e-4):
            return candidate
    raise ModelError(f"{file.source}: the factors in '{ROPE_FACTORS}' match no known scaling")


def config_to_metadata(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Raises `ModelError` for a rope scaling that llama.cpp has no keys for."""
    family = architecture_of(config)
    architecture = ARCHITECTURES[family]
    values: dict[str, Any] = {
        "general.architecture": family,
        "general.name": "KHAOSZ",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.attention.value_length": config.head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{family}.rope.freq_base": float(config.rope_theta),
        f"{family}.rope.dimension_count": config.rotary_dim,
        f"{family}.vocab_size": config.vocab_size,
    }
    match config.rope_scaling:
        case RopeScaling(rope_type="linear", factor=factor):
            values[f"{family}.rope.scaling.type"] = "linear"
            values[f"{family}.rope.scaling.factor"] = float(factor)
        case RopeScaling(rope_type="llama3") as scaling:
            values[_OUR_SCALING] = scaling.model_dump_json(exclude={"short_factor", "long_factor"})
        case RopeScaling(rope_type="yarn") as yarn:
            plain = RopeScaling(rope_type="yarn", factor=yarn.factor)
            names = ["beta_fast", "beta_slow", "truncate"]
            if "rope.scaling.yarn_log_multiplier" not in architecture.own:
                names.append("attention_factor")
            if any(getattr(yarn, name) != getattr(plain, name) for name in names):
                raise ModelError(
                    "this YaRN scaling cannot be written to GGUF", hint="keep it in HF"
                )
            values[f"{family}.rope.scaling.type"] = "yarn"
            values[f"{family}.rope.scaling.factor"] = float(yarn.factor)
            values[f"{family}.rope.scaling.original_context_length"] = (
                yarn.original_max_position_embeddings or config.max_position_embeddings
            )
    return {**values, **{f"{family}.{k}": v for k, v in architecture.write(config).items()}}
