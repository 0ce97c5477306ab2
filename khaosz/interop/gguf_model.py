"""Models in GGUF files <-> our names and configuration: Llama (Mistral, SmolLM), Qwen2, Qwen3.

Keys and tensor names are llama.cpp's (gguf-py/gguf/constants.py, tensor_mapping.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from khaosz.config import ModelConfig, RopeScaling
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ConfigError, ModelError
from khaosz.interop.gguf_blocks import dequantize, is_affine, quantize
from khaosz.interop.gguf_file import TENSOR_TYPES, GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf_tokenizer import tokenizer_from_metadata, tokenizer_to_metadata
from khaosz.interop.shown import one_line, shown
from khaosz.model import Transformer, parameter_shapes
from khaosz.model.module import Rotary, rotary_frequencies

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_ROPE_FACTORS = "rope_freqs.weight"
_SLICE = 1 << 24  # weights converted at a time


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our parameters."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, index, part = stem.split(".", 2)
        return f"blk.{index}.{_BLOCK_NAMES[part]}.{kind}"
    return f"{_TOP_NAMES[stem]}.{kind}"


class GgufModel:
    """One model in a GGUF file, tensors under our names and in our row order."""

    def __init__(self, file: GgufFile) -> None:
        """Raises `ModelError` for an architecture or feature we do not compute, and for tensors
        that are missing, unexpected or misshapen, by name."""
        self.file = file
        self.config = _config(file)
        shapes = parameter_shapes(self.config)
        self.names = {name: gguf_name(name) for name in shapes}
        for name, shape in shapes.items():
            tensor = file.tensors.get(self.names[name])
            if tensor is None:
                raise ModelError(f"{file.source}: tensor '{self.names[name]}' is missing")
            if tensor.shape != shape:
                raise ModelError(
                    f"{file.source}: tensor '{self.names[name]}' is {tensor.shape}, not {shape}"
                )
        unexpected = file.tensors.keys() - set(self.names.values()) - {_ROPE_FACTORS}
        if unexpected:
            raise ModelError(f"{file.source}: unexpected tensor {shown(min(unexpected))}")

    @classmethod
    def open(cls, path: str | Path) -> GgufModel:
        return cls(GgufFile.open(path))

    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizer_from_metadata(self.file.metadata, self.file.source)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ModelError(
                f"{self.file.source}: {tokenizer.vocab_size} tokens, but only"
                f" {self.config.vocab_size} rows of embedding"
            )
        return tokenizer

    def kind(self, name: str) -> str:
        """The tensor type that one of our parameters is stored as."""
        return self.file.tensors[self.names[name]].type

    def raw(self, name: str) -> np.ndarray:
        """uint8 (rows, bytes of a row): a view of the file, but for Llama's queries and keys,
        whose rows are copied into our order (no row is requantised)."""
        raw = self.file.raw(self.names[name])
        heads = _permuted_heads(name, self.config)
        return raw if heads is None else _to_halves(raw, heads)

    def float32(self, name: str) -> np.ndarray:
        """The dequantised parameter."""
        tensor = self.file.tensors[self.names[name]]
        return dequantize(self.raw(name), tensor.type).reshape(tensor.shape)


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """The dequantised model, in evaluation mode: the reference, not the fast path."""
    source = GgufModel.open(path)
    with torch.device("meta"):
        model = Transformer(source.config)
    loaded = {
        name: torch.from_numpy(np.array(source.float32(name))).to(dtype) for name in source.names
    }
    model.load_state_dict(loaded, assign=True)
    model.rotary = Rotary(source.config)
    return model.requires_grad_(True).eval()


def save_gguf(
    model: Transformer, tokenizer: Tokenizer, path: Path, kind: str = "F16", *, search: bool = False
) -> None:
    """Write a model for llama.cpp and for us; `kind` and `search` as for `write_model`."""
    parameters = dict(model.named_parameters())
    write_model(model.config, lambda name: parameters[name].detach(), tokenizer, path, kind, search)


def write_model(
    config: ModelConfig,
    parameter: Callable[[str], torch.Tensor],
    tokenizer: Tokenizer,
    path: Path,
    kind: str,
    search: bool = False,
) -> None:
    """Write a .gguf whose parameters are asked for one at a time, by name. `kind`: F32, F16, BF16,
    Q8_0, Q4_0 or Q4_1; `search` looks for better scales than ggml's reference rounding.

    Vectors stay F32. With 4 bits the embedding and the head are Q8_0: they are few and they are
    what quality hangs on. Raises `ModelError` for rows that are not whole blocks of 32.
    """
    if kind not in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"):
        raise ModelError(f"cannot write tensors of type '{kind}'", hint="F16, Q8_0, Q4_0, Q4_1")
    shapes = parameter_shapes(config)
    tensors = []
    for name, shape in shapes.items():
        wanted = kind
        if len(shape) == 1:
            wanted = "F32"
        elif kind.startswith("Q4") and name.startswith(("embed_tokens", "lm_head")):
            wanted = "Q8_0"
        if shape[-1] % TENSOR_TYPES[wanted][1]:
            raise ModelError(
                f"{wanted} takes blocks of 32, '{name}' has rows of {shape[-1]}", hint="use F16"
            )
        rows = partial(_rows, parameter, name, wanted, _permuted_heads(name, config), search)
        tensors.append(TensorToWrite(gguf_name(name), wanted, shape, rows))
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        factors = _llama3_factors(config)
        tensors.append(
            TensorToWrite(_ROPE_FACTORS, "F32", factors.shape, lambda: [factors.view(np.uint8)])
        )
    metadata = {**_metadata(config, kind), **tokenizer_to_metadata(tokenizer, config.vocab_size)}
    write_gguf(path, metadata, tensors)


def _rows(
    parameter: Callable[[str], torch.Tensor],
    name: str,
    kind: str,
    heads: int | None,
    search: bool,
) -> Iterator[np.ndarray]:
    weights = parameter(name).cpu()
    if weights.dim() == 1:
        weights = weights[None]
    if heads is not None:
        weights = torch.from_numpy(_to_pairs(weights.float().numpy(), heads))
    step = max(1, _SLICE // weights.shape[1])
    for start in range(0, len(weights), step):
        yield quantize(weights[start : start + step].float().numpy(), kind, search=search)


def _permuted_heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a parameter whose rows llama.cpp orders in pairs (i, i + 1) for its rotation, where
    we have halves (i, i + H/2); None for all others. Only the Llama family has this order."""
    if config.family != "llama" or not name.startswith("layers."):
        return None
    match name.split(".")[3]:
        case "q_proj":
            return config.num_attention_heads
        case "k_proj":
            return config.num_key_value_heads
    return None


def _to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    swapped = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(swapped).reshape(rows.shape)


def _to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    swapped = rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(swapped).reshape(rows.shape)


def _config(file: GgufFile) -> ModelConfig:
    metadata, source = file.metadata, file.source
    family = metadata.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ModelError(
            f"{source}: architecture {shown(family)} is not supported",
            hint="llama, qwen2, qwen3 are",
        )

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{family}.{name}", default)
        if value is None:
            raise ModelError(f"{source}: key '{family}.{name}' is missing")
        if not isinstance(value, int | float | str):
            raise ModelError(f"{source}: '{family}.{name}' is a {type(value).__name__}")
        # Stored in fp32: 1e-6 is to be 1e-6 again, not 9.99999997e-07.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if get("expert_count", 0):
        raise ModelError(f"{source}: mixtures of experts are not supported")
    heads, width = get("attention.head_count"), get("embedding_length")
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ModelError(f"{source}: tensor 'token_embd.weight' is missing")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        raise ModelError(f"{source}: {shown(heads)} heads of a width of {shown(width)}")
    head_dim = get("attention.key_length", width // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{source}: rotation of a part of each head is not supported")
    fields = {
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
    }
    if fields["num_hidden_layers"] > len(file.tensors):
        raise ModelError(f"{source}: {fields['num_hidden_layers']} blocks, too few tensors")
    try:
        match get("rope.scaling.type", "none"):
            case "none":
                pass
            case "linear":
                fields["rope_scaling"] = RopeScaling(
                    rope_type="linear", factor=get("rope.scaling.factor")
                )
            case "yarn":
                fields["rope_scaling"] = RopeScaling(
                    rope_type="yarn",
                    factor=get("rope.scaling.factor"),
                    original_max_position_embeddings=get("rope.scaling.original_context_length"),
                )
            case other:
                raise ModelError(f"{source}: rope scaling {shown(other)} is not supported")
        config = ModelConfig.parse(fields, source=source)
        if _ROPE_FACTORS in file.tensors:
            config = _with_llama3(config, file)
        return config
    except (ConfigError, ValueError) as error:
        raise ModelError(one_line(str(error)), hint=getattr(error, "hint", None)) from None


def _llama3_factors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp divides each frequency by: float32 (H / 2,)."""
    plain, _ = rotary_frequencies(config.model_copy(update={"rope_scaling": None}))
    scaled, _ = rotary_frequencies(config)
    return (plain / scaled).numpy()


def _with_llama3(config: ModelConfig, file: GgufFile) -> ModelConfig:
    """The file holds the resulting factors only: find the published scaling that gives them."""
    given = dequantize(file.raw(_ROPE_FACTORS), file.tensors[_ROPE_FACTORS].type).ravel()
    largest = float(given.max())
    for factor in (largest, 8.0, 32.0):
        if not math.isfinite(factor) or factor < 1:
            continue
        for original in (8192, 4096, 16_384):
            scaling = RopeScaling(
                rope_type="llama3",
                factor=factor,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=original,
            )
            candidate = config.model_copy(update={"rope_scaling": scaling})
            ours = _llama3_factors(candidate)
            # Both sides are fp32 formulas in different order: a few parts in 10^6 apart.
            if ours.shape == given.shape and np.allclose(ours, given, rtol=1e-4):
                return candidate
    raise ModelError(f"{file.source}: the factors in '{_ROPE_FACTORS}' are of no known scaling")


def _metadata(config: ModelConfig, kind: str) -> dict[str, Any]:
    family = config.family
    values: dict[str, Any] = {
        "general.architecture": family,
        "general.name": "KHAOSZ",
        "general.file_type": {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}[
            kind
        ],
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
        f"{family}.rope.dimension_count": config.head_dim,
        f"{family}.vocab_size": config.vocab_size,
    }
    match config.rope_scaling:
        case RopeScaling(rope_type="linear", factor=factor):
            values[f"{family}.rope.scaling.type"] = "linear"
            values[f"{family}.rope.scaling.factor"] = float(factor)
        case RopeScaling(rope_type="yarn") as yarn:
            plain = RopeScaling(rope_type="yarn", factor=yarn.factor)
            if (yarn.beta_fast, yarn.beta_slow, yarn.attention_factor, yarn.truncate) != (
                plain.beta_fast,
                plain.beta_slow,
                plain.attention_factor,
                plain.truncate,
            ):
                raise ModelError(
                    "this YaRN scaling cannot be written to GGUF", hint="keep it in HF"
                )
            values[f"{family}.rope.scaling.type"] = "yarn"
            values[f"{family}.rope.scaling.factor"] = float(yarn.factor)
            values[f"{family}.rope.scaling.original_context_length"] = (
                yarn.original_max_position_embeddings or config.max_position_embeddings
            )
    return values


def tensor_kinds(kinds: Iterable[str]) -> str:
    """A one-line summary, "210 Q4_1, 1 Q8_0", of quantised or dense types."""
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    quantised = sorted(counts, key=lambda k: (not is_affine(k), -counts[k]))
    return ", ".join(f"{counts[k]} {k}" for k in quantised)
