"""Byte-level tokenizers as other projects save them, under llama.cpp's names of what cuts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from khaosz.data.tokenizer.tokenizer import QWEN2_PATTERN, Tokenizer

TEXTS = ["The years 1999 and 2024, 你好 123 456 hello world's"] * 9


def foreign(
    pre: Any, normalizer: Any = None, *, texts: Sequence[str] = TEXTS, **bpe: Any
) -> Tokenizer:
    """A tokenizer as other projects save them."""
    backend = Backend(models.BPE(**bpe))
    backend.pre_tokenizer, backend.normalizer = pre, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "add_bos_token": False}
    return Tokenizer(backend.to_str().encode(), config)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = QWEN2_PATTERN.replace(r"|\p{N}", r"|\p{N}{1,3}", 1)
# What llama.cpp does for files that name nothing; written out once more, from llama-vocab.cpp.
DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# As the tokenizer.json of these models has them.
MINICPM5 = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}+|", 1)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HUNYUAN = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    # Line ends stand there as they are.
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
FOREIGN: dict[str, Callable[..., Tokenizer]] = {
    "gpt-2": lambda **more: foreign(GPT2, **more),
    "smollm": lambda **more: foreign(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), **more
    ),
    "qwen2": lambda **more: foreign(
        pre_tokenizers.Sequence([split(QWEN2_PATTERN), BYTES]), normalizers.NFC(), **more
    ),
    "llama-bpe": lambda **more: foreign(
        pre_tokenizers.Sequence([split(LLAMA3), BYTES]), ignore_merges=True, **more
    ),
    "qwen35": lambda **more: foreign(pre_tokenizers.Sequence([split(QWEN35), BYTES]), **more),
    "gpt-4o": lambda **more: foreign(pre_tokenizers.Sequence([split(GPT4O), BYTES]), **more),
    "minicpm5": lambda **more: foreign(
        pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(MINICPM5), BYTES]),
        ignore_merges=True,
        **more,
    ),
    "tekken": lambda **more: foreign(
        pre_tokenizers.Sequence([split(TEKKEN), BYTES]), ignore_merges=True, **more
    ),
    "hunyuan-dense": lambda **more: foreign(
        pre_tokenizers.Sequence([*map(split, HUNYUAN), BYTES]), **more
    ),
    "default": lambda **more: foreign(
        pre_tokenizers.Sequence([*map(split, DEFAULT), BYTES]), **more
    ),
}
