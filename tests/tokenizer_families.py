"""Tiny tokenizers of the families that models come with, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from khaosz.data.tokenizer.tokenizer import QWEN2_PATTERN

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eom_id|>", "[INST]"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. user assistant system\n",
    "你好，世界。天气很好 hello world's 2024 123 x = {'a': 1}\n",
] * 12
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "chat_template": CHATML,
}
BYTES = pre_tokenizers.ByteLevel
LLAMA3 = QWEN2_PATTERN.replace(r"|\p{N}", r"|\p{N}{1,3}", 1)
Backend = tokenizers.Tokenizer


def _around(begin: str, finish: str = "") -> Callable[[Backend], Any]:
    def processor(backend: Backend) -> Any:
        single = f"{begin} $A {finish}".strip()
        names = [name for name in (begin, finish) if name]
        ids = [(name, backend.token_to_id(name)) for name in names]
        return processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1", special_tokens=ids
        )

    return processor


def _split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def _piece_decoder(strip: bool = True) -> Any:
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])


def _byte_level(pre: Any, *, normalizer: Any = None, **bpe: Any) -> Backend:
    backend = Backend(models.BPE(**bpe))
    backend.pre_tokenizer, backend.normalizer = pre, normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(BYTES.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _pieces(pre: Any, *, normalizer: Any = None, strip: bool = True) -> Backend:
    """SentencePiece BPE with bytes for characters that it has not."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer, backend.normalizer = pre, normalizer
    backend.decoder = _piece_decoder(strip)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=[*SPECIAL, *bytes_], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(SPECIAL)]  # bytes are pieces like any other
    return Backend.from_str(json.dumps(spec))


def _unigram(normalizer: Any) -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
    backend.decoder = decoders.Metaspace("▁", "always", True)
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _flags(backend: Backend, **flags: bool) -> Backend:
    """The markers of a turn with flags, as Phi has them."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        if token["content"].startswith("<|im_"):
            token |= flags
    return Backend.from_str(json.dumps(spec))


def _metaspace(scheme: str, **more: Any) -> Backend:
    return _pieces(pre_tokenizers.Metaspace("▁", scheme, False), **more)


_LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_QWEN = {"bos_token": None, "eos_token": "<|im_end|>"}
# Name: what builds the backend, its post-processor, changes of tokenizer_config.json.
FAMILIES: dict[str, tuple[Callable[[], Backend], Any, dict[str, Any]]] = {
    "gpt2": (lambda: _byte_level(BYTES(False)), None, {"bos_token": "</s>"}),
    "gpt2 with a space": (lambda: _byte_level(BYTES(True)), None, {}),
    "qwen2": (
        lambda: _byte_level(_split(QWEN2_PATTERN), normalizer=normalizers.NFC()),
        None,
        _QWEN,
    ),
    "llama3": (
        lambda: _byte_level(_split(LLAMA3), ignore_merges=True),
        _around("<s>"),
        {"eos_token": "<|im_end|>", "clean_up_tokenization_spaces": True},
    ),
    "deepseek": (lambda: _byte_level(_split(LLAMA3)), _around("<s>"), {"add_bos_token": True}),
    "bos in the config alone": (lambda: _byte_level(BYTES(False)), None, {"add_bos_token": True}),
    "bos against the config": (
        lambda: _byte_level(BYTES(False)),
        _around("<s>"),
        {"add_bos_token": False, "add_eos_token": True},
    ),
    "bos that has no name": (
        lambda: _byte_level(BYTES(False)),
        _around("<s>"),
        {"bos_token": None},
    ),
    "eos after a text": (lambda: _byte_level(BYTES(False)), _around("<s>", "</s>"), {}),
    "phi4": (
        lambda: _flags(_byte_level(_split(LLAMA3), ignore_merges=True), lstrip=True, rstrip=True),
        None,
        {"eos_token": "<|im_end|>"},
    ),
    "single words": (
        lambda: _flags(_byte_level(BYTES(False)), single_word=True, normalized=True),
        None,
        {},
    ),
    "llama2": (lambda: _pieces(None, normalizer=_LEGACY), _around("<s>"), {"chat_template": INST}),
    "llama2 chatml": (lambda: _pieces(None, normalizer=_LEGACY), _around("<s>"), {}),
    "phi3": (
        lambda: _flags(_pieces(None, normalizer=_LEGACY), rstrip=True),
        _around("<s>"),
        {"eos_token": "<|im_end|>"},
    ),
    "metaspace first": (lambda: _metaspace("first"), _around("<s>"), {}),
    "metaspace first without bos": (lambda: _metaspace("first"), None, {"bos_token": None}),
    "metaspace first with flags": (lambda: _flags(_metaspace("first"), rstrip=True), None, {}),
    "mistral": (lambda: _metaspace("first"), _around("<s>"), {"chat_template": INST}),
    "metaspace always": (lambda: _metaspace("always"), _around("<s>"), {}),
    "metaspace never": (lambda: _metaspace("never", strip=False), _around("<s>"), {}),
    "gemma": (
        lambda: _pieces(
            pre_tokenizers.Split(" ", "merged_with_previous"),
            normalizer=normalizers.Replace(" ", "▁"),
            strip=False,
        ),
        _around("<s>"),
        {},
    ),
    "unigram": (lambda: _unigram(normalizers.NFKC()), _around("", "</s>"), {"bos_token": None}),
    "word piece": (_word_piece, _around("<s>", "</s>"), {}),
}


@cache
def backend(family: str) -> Backend:
    build, processor, _ = FAMILIES[family]
    made = build()
    if processor is not None:
        made.post_processor = processor(made)
    return made


def write(family: str, directory: Path, **changes: Any) -> Path:
    """The family's tokenizer.json and tokenizer_config.json, with `changes` in the second."""
    directory.mkdir(parents=True, exist_ok=True)
    backend(family).save(str(directory / "tokenizer.json"))
    config = {**CONFIG, **FAMILIES[family][2], **changes}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
