"""One dial: `size` derives width, depth, heads, vocabulary, learning rate, batch and schedule.

Every derived number carries its reason, because a reader should be able to disagree with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from khaosz.config.model_config import ModelConfig
from khaosz.errors import ConfigError, nearest


@dataclass(frozen=True)
class Derived:
    """One derived number and why it is what it is."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Preset:
    """A model shape and the training numbers that go with it."""

    size: str
    model: ModelConfig
    window: int
    batch_tokens: int
    lr: float
    embedding_lr: float
    weight_decay: float
    derived: list[Derived]


# width, layers, heads, key/value heads, feed-forward width, vocabulary, pretraining window,
# longest context, tokens per step.
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
    """The preset of one size; `vocab_size` replaces the derived vocabulary (an existing tokenizer).

    Raises `ConfigError` for a size we do not have.
    """
    if size not in _SHAPES:
        guess = nearest(size, SIZES)
        hint = f"did you mean '{guess}'?" if guess else f"sizes: {', '.join(SIZES)}"
        raise ConfigError(f"no preset of size '{size}'", hint=hint)
    width, layers, heads, kv_heads, ffn, own_vocab, window, context, batch = _SHAPES[size]
    vocab = vocab_size or own_vocab
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
    why_kv = "one per query head: so small a cache needs no sharing"
    if kv_heads < heads:
        why_kv = f"{heads // kv_heads} query heads share one: a smaller KV cache"
    why_tied = "two tables learn faster in few steps, and cost no computation"
    if tied:
        why_tied = "a second table would be a large part of the model"
    elif width >= 4_096:
        why_tied = "a second table is a small part of a model this wide"
    why_spread = "the input table is the output matrix too, and must start small"
    if not tied:
        why_spread = "an input table of its own starts at a size the first block can hear"
    why_vocab = "given by the tokenizer"
    if vocab_size is None:
        why_vocab = "grows with the model, so that embeddings do not own it"
    shape = [
        Derived("hidden_size", width, f"size '{size}'"),
        Derived("num_hidden_layers", layers, "width / depth of 40 to 130, growing with size"),
        Derived("num_attention_heads", heads, f"heads of {width // heads} dimensions"),
        Derived("head_dim", width // heads, "width / heads; 64 to 128 wide"),
        Derived("num_key_value_heads", kv_heads, why_kv),
        Derived("intermediate_size", ffn, "SwiGLU: 8/3 of the width, 3 to 4 times from 1b on"),
        Derived("vocab_size", vocab, why_vocab),
        Derived("tie_word_embeddings", tied, why_tied),
        Derived("initializer_range", model.initializer_range, why_spread),
        Derived("qk_norm", True, "steadier attention logits; exports as Qwen3"),
        Derived("max_position_embeddings", context, "as far as the window of fine-tuning reaches"),
        Derived("rope_theta", theta, "the usual 10,000 to 4096 positions, Llama 3's beyond"),
        Derived("parameters", f"{model.parameters() / 1e6:,.1f}M", "counted exactly"),
    ]
    numbers = training_numbers(width, stage)
    if stage != "pt":
        window, batch = context, max(2_048, batch // 2)
        why_window = "the whole context: a conversation is not cut into segments"
        why_batch = "half of pretraining's: few tokens of a conversation are trained on"
    else:
        why_window = "what documents of this corpus size fill, within the context"
        why_batch = "grows with the tokens such a model is trained on"
    numbers = [
        Derived("window", window, why_window),
        Derived("batch_tokens", batch, why_batch),
        *numbers,
    ]
    values = {number.name: number.value for number in numbers}
    return Preset(size, model, derived=[*shape, *numbers], **values)


def training_numbers(width: int, stage: str) -> list[Derived]:
    """Learning rates and weight decay for a width, each with its reason."""
    # The update of Muon has a fixed size per matrix; 1/sqrt(width) from the tuned nano run is the
    # usual guide where nobody has swept the larger sizes.
    share = {"pt": 1.0, "sft": 0.3, "embed": 0.03, "rm": 0.03, "dpo": 0.03}.get(stage, 0.003)
    shrink = (256 / width) ** 0.5 * share
    after = {
        "pt": "",
        "sft": ", 0.3 of it after pretraining",
        "embed": ", 0.03 of it: what a model has read is to be compared, not read anew",
    }.get(stage, f", {share:g} of it: alignment moves a model, it does not make one")
    decay = 0.1 if stage in ("pt", "sft") else 0.0
    why_decay = "the usual 0.1; one short epoch hardly feels it"
    if not decay:
        why_decay = "none: decay would pull the model away from where it starts"
    return [
        Derived("lr", round(0.01 * shrink, 6), f"Muon, 0.01 at width 256, by sqrt(width){after}"),
        Derived("embedding_lr", round(0.015 * shrink, 6), "AdamW for embeddings, head and norms"),
        Derived("weight_decay", decay, why_decay),
    ]


def nearest_size(width: int) -> str:
    """The preset whose width is nearest: what an existing model takes its batch and window from."""
    return min(SIZES, key=lambda size: abs(_SHAPES[size][0] - width))


def size_for_minutes(minutes: float, *, accelerator: bool = False) -> Derived:
    """The size that reaches the lowest bits per byte in `minutes` of training on such a device."""
    if accelerator:
        steps = [(10.0, "small"), (120.0, "base")]
        largest = "1b"
    else:
        steps = [(30.0, "nano"), (240.0, "mini")]
        largest = "small"
    size = next((size for limit, size in steps if minutes <= limit), largest)
    where = "an accelerator" if accelerator else "a CPU"
    reason = f"{minutes:g} minutes on {where}: a larger one sees too few tokens"
    return Derived("size", size, reason)
