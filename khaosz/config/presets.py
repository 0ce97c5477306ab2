"""Presets: `size` determines width, depth, heads, vocabulary, learning rates and batch.

Every derived number has a reason, so that a reader can disagree with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from khaosz.config.model_config import ModelConfig
from khaosz.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Derived:
    """A derived number and its reason."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Preset:
    """A model shape and its training hyperparameters."""

    size: str
    model: ModelConfig
    window: int
    batch_tokens: int
    lr: float
    embedding_lr: float
    weight_decay: float
    derived: list[Derived]


# width, layers, heads, key/value heads, feed-forward width, vocabulary, pretraining window,
# maximum context, tokens per step.
_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, int]] = {
    "nano": (256, 6, 4, 4, 704, 8_192, 256, 512, 4_096),
    "mini": (384, 8, 6, 6, 1_024, 8_192, 512, 1_024, 8_192),
    "small": (512, 12, 8, 4, 1_408, 16_384, 1_024, 2_048, 32_768),
    "base": (768, 16, 12, 4, 2_048, 32_768, 1_024, 2_048, 131_072),
    "1b": (2_048, 16, 32, 8, 8_192, 65_536, 2_048, 4_096, 1_048_576),
    "7b": (4_096, 32, 32, 8, 13_312, 65_536, 4_096, 8_192, 4_194_304),
    "13b": (5_120, 40, 40, 8, 16_384, 65_536, 4_096, 8_192, 4_194_304),
}
SIZES: tuple[str, ...] = tuple(_SHAPES)


def preset(size: str, *, vocab_size: int | None = None, stage: str = "pt") -> Preset:
    """The preset of a size; `vocab_size` is that of an existing tokenizer, by default derived.

    Raises `ConfigError` for an unknown size.
    """
    if size not in _SHAPES:
        hint = did_you_mean(size, SIZES, f"sizes: {', '.join(SIZES)}")
        raise ConfigError(f"unknown size '{size}'", hint=hint)
    width, layers, heads, kv_heads, ffn, default_vocab, window, context, batch = _SHAPES[size]
    vocab = vocab_size or default_vocab
    tied = 384 < width < 4_096
    theta = 10_000.0 if context <= 4_096 else 500_000.0
    model = ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=context,
        rope_theta=theta,
        tie_word_embeddings=tied,
        qk_norm=True,
        initializer_range=0.02 if tied else 0.2,
    )
    why_kv = "one per query head: the KV cache is small anyway"
    if kv_heads < heads:
        why_kv = f"{heads // kv_heads} query heads per key/value head: a smaller KV cache"
    why_tied = "separate tables learn faster in few steps and cost no computation"
    if tied:
        why_tied = "a second table would be a large part of the model"
    elif width >= 4_096:
        why_tied = "a second table is a small part of a model this wide"
    why_init = "small, because the input table is also the output matrix"
    if not tied:
        why_init = "a separate input table starts large enough for the first block"
    why_vocab = "from the tokenizer"
    if vocab_size is None:
        why_vocab = "grows with the model, so that embeddings do not dominate it"
    shape = [
        Derived("hidden_size", width, f"size '{size}'"),
        Derived("num_hidden_layers", layers, "width / depth is 40 to 130 and grows with size"),
        Derived("num_attention_heads", heads, f"{width // heads} dimensions per head"),
        Derived("head_dim", width // heads, "width / heads, 64 to 128"),
        Derived("num_key_value_heads", kv_heads, why_kv),
        Derived("intermediate_size", ffn, "SwiGLU: 8/3 of the width, 3 to 4 times from 1b up"),
        Derived("vocab_size", vocab, why_vocab),
        Derived("tie_word_embeddings", tied, why_tied),
        Derived("initializer_range", model.initializer_range, why_init),
        Derived("qk_norm", True, "stable attention logits"),
        Derived("max_position_embeddings", context, "the window of fine-tuning"),
        Derived("rope_theta", theta, "10,000 up to 4096 positions, Llama 3's 500,000 beyond"),
        Derived("parameters", f"{model.parameters() / 1e6:,.1f}M", "exact count"),
    ]
    numbers = training_numbers(width, stage)
    if stage != "pt":
        window, batch = context, max(2_048, batch // 2)
        why_window = "the whole context: conversations are not split"
        why_batch = "half of pretraining's: few tokens of a conversation are scored"
    else:
        why_window = "fits the documents of a corpus of this size"
        why_batch = "grows with the training tokens"
    numbers = [
        Derived("window", window, why_window),
        Derived("batch_tokens", batch, why_batch),
        *numbers,
    ]
    values = {number.name: number.value for number in numbers}
    return Preset(size, model, derived=[*shape, *numbers], **values)


def training_numbers(width: int, stage: str) -> list[Derived]:
    """Learning rates and weight decay of a width and stage."""
    # Muon's update has a fixed norm per matrix; 1/sqrt(width) from the tuned nano run is the usual
    # rule where the larger sizes have not been swept.
    share = {"pt": 1.0, "sft": 0.3, "embed": 0.03, "rm": 0.03, "dpo": 0.03}.get(stage, 0.003)
    scale = (256 / width) ** 0.5 * share
    why_share = {
        "pt": "",
        "sft": ", times 0.3 after pretraining",
        "embed": ", times 0.03: embedding adjusts a pretrained model only a little",
    }.get(stage, f", times {share:g}: alignment adjusts a trained model only a little")
    decay = 0.1 if stage in ("pt", "sft") else 0.0
    why_decay = "the usual 0.1; small effect in one short epoch"
    if not decay:
        why_decay = "none: decay would pull the model away from its initial weights"
    return [
        Derived("lr", round(0.01 * scale, 6), f"Muon: 0.01 * sqrt(256 / width){why_share}"),
        Derived("embedding_lr", round(0.015 * scale, 6), "AdamW for embeddings, head and norms"),
        Derived("weight_decay", decay, why_decay),
    ]


def nearest_size(width: int) -> str:
    """The size of nearest width; an existing model takes its batch and window from it."""
    return min(SIZES, key=lambda size: abs(_SHAPES[size][0] - width))


_LIMITS = {  # minutes of training, and the size for no more than that
    "a CPU": ((30.0, "nano"), (240.0, "mini"), (math.inf, "small")),
    "an accelerator": ((10.0, "small"), (120.0, "base"), (math.inf, "1b")),
}


def size_for_minutes(minutes: float, *, accelerator: bool = False) -> Derived:
    """The size with the lowest bits per byte after `minutes` of training on such a device."""
    where = "an accelerator" if accelerator else "a CPU"
    size = next(size for limit, size in _LIMITS[where] if minutes <= limit)
    reason = f"{minutes:g} minutes on {where}: a larger model would see too few tokens"
    return Derived("size", size, reason)
