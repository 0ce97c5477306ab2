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
    "default": lambda **more: foreign(
        pre_tokenizers.Sequence([*map(split, DEFAULT), BYTES]), **more
    ),
}
