"""Byte-level BPE, lossless for every string.

Text is not normalised and each of the 256 bytes is a token, so `decode(encode(text)) == text` for
all text that UTF-8 can encode. Text is split by the Qwen2 pattern (llama.cpp names it "qwen2": one
digit a token, letters with one leading mark, punctuation with the line ends after it) before the
merges of Sennrich et al. 2016 (arXiv:1508.07909) are applied. Files have the Hugging Face layout:
`tokenizer.json` and `tokenizer_config.json` with the chat template; files.py reads the others.

`encode` never yields a special token, not even for the text "<|end|>": callers place control tokens
by id. (A foreign Unigram vocabulary holds their names as pieces of text, as in transformers.)
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from khaosz.data.tokenizer.chat_template import CHAT_TEMPLATE
from khaosz.data.tokenizer.control import ControlEncoder, exceeds
from khaosz.data.tokenizer.files import read_directory
from khaosz.data.tokenizer.training_text import refuse_surrogates, training_sample
from khaosz.errors import ContextLengthError, DataError, TokenizerError
from khaosz.files import write_atomic, write_json

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    *(f"<|reserved_{i}|>" for i in range(8)),
)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + 1
# As published in Qwen2's tokenizer.json; llama.cpp detects it by a hash as "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of the end of a turn in different model families; the first one present is used.
_END_OF_TURN = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_turn|>")
# Where a saved tokenizer keeps the ids of the model's files: they are not beside every copy.
_MODEL_IDS = "model_token_ids"


class Tokenizer:
    """A `tokenizers.Tokenizer`, its settings and its chat template.

    `config` is the content of `tokenizer_config.json`; `serialized` the bytes of `tokenizer.json`,
    which `save` writes back unchanged so that `fingerprint` survives a round trip.
    """

    def __init__(
        self,
        serialized: bytes | Callable[[], bytes],
        config: dict[str, Any],
        model_ids: dict[str, list[int]] | None = None,
        backend: tokenizers.Tokenizer | None = None,
    ) -> None:
        """`model_ids`: ids of "bos", "eos" and "pad" in the model's files. Those of "eos" end a
        text as well; the others stand in where the tokenizer names none. `backend`: what
        `serialized`, which may be a function then, gives; writing and parsing a large vocabulary
        take seconds."""
        self._serialized = serialized
        if backend is None:
            try:
                backend = tokenizers.Tokenizer.from_buffer(self.serialized)
            except ValueError as error:
                raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.config = config
        model_ids = {**(config.get(_MODEL_IDS) or {}), **(model_ids or {})}
        added = backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        # These are control tokens, whatever their `special` flag.
        names = [self._configured(key) for key in ("bos_token", "eos_token", "pad_token")]
        names += [added[i].content for i in model_ids.get("eos", ()) if i in added]
        for name in names:
            token_id = None if name is None else backend.token_to_id(name)
            if name is not None and token_id is not None:
                self.special_ids[name] = token_id
                if token_id in added and not added[token_id].special:
                    added[token_id].special = True
                    backend.add_tokens([added[token_id]])
        self._marks = self._post_processor_ids()
        eos = model_ids.get("eos", [])
        self.eos_id = self._find("<|eos|>", "eos_token", *eos[:1])
        self.bos_id = self._find(
            "<|bos|>", "bos_token", *self._marks[0][:1], *model_ids.get("bos", []), self.eos_id
        )
        self.pad_id = self._find("<|pad|>", "pad_token", *model_ids.get("pad", []), self.eos_id)
        self.end_id = next(
            (self.special_ids[name] for name in _END_OF_TURN if name in self.special_ids),
            self.eos_id,
        )
        ends = {self.end_id, *eos} - {self.eos_id}
        self.end_ids: tuple[int, ...] = (self.eos_id, *sorted(ends))  # any of them ends an answer
        keys = [key for key in model_ids if self._named(f"<|{key}|>", f"{key}_token") is None]
        if keys or not set(eos) <= {self.eos_id, self.end_id}:
            self.config = {**config, _MODEL_IDS: model_ids}
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        _ = self.chat_templates  # raises where they are broken

    @cached_property
    def serialized(self) -> bytes:
        """The bytes of tokenizer.json."""
        return self._serialized if isinstance(self._serialized, bytes) else self._serialized()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `serialized`, in hexadecimal digits."""
        return hashlib.sha256(self.serialized).hexdigest()

    def _configured(self, key: str) -> str | None:
        value = self.config.get(key)
        if isinstance(value, dict):  # older files store the whole AddedToken
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _named(self, ours: str, key: str) -> int | None:
        """The id of our name, else of the token that `key` names."""
        for name in (ours, self._configured(key)):
            if name is not None and name in self.special_ids:
                return self.special_ids[name]
        return None

    def _find(self, ours: str, key: str, *fallbacks: int) -> int:
        token_id = self._named(ours, key)
        if token_id is not None:
            return token_id
        if not fallbacks:
            raise TokenizerError(
                f"the tokenizer has no {ours} token and its tokenizer_config.json names no {key}",
                hint="copy tokenizer_config.json from the same model beside tokenizer.json",
            )
        return fallbacks[0]

    def _post_processor_ids(self) -> tuple[list[int], list[int]]:
        """Ids that tokenizer.json adds before and after a text."""
        for probe in ("a", "0", "."):
            plain: list[int] = self._backend.encode(probe, add_special_tokens=False).ids
            marked: list[int] = self._backend.encode(probe).ids
            for first in range(len(marked) - len(plain) + 1) if plain else ():
                if marked[first : first + len(plain)] == plain:
                    return marked[:first], marked[first + len(plain) :]
        return [], []

    @property
    def begin_ids(self) -> list[int]:
        """Ids before a text, as transformers adds them: of tokenizer.json's post-processor, and bos
        for ours, whose chat template writes it. `encode` adds none."""
        ours = "<|bos|>" in self.special_ids and not any(self._marks)
        return [self.bos_id] if ours else list(self._marks[0])

    @property
    def finish_ids(self) -> list[int]:
        """Ids after a text, as transformers adds them."""
        return list(self._marks[1])

    @property
    def begins_with_bos(self) -> bool:
        """Whether a text to continue begins with bos."""
        return self.bos_id in self.begin_ids

    @property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates by name; the only one is "default"."""
        value = self.config.get("chat_template") or {}
        if isinstance(value, str):
            return {"default": value}
        try:
            if isinstance(value, list):
                value = {entry["name"]: entry["template"] for entry in value}
            if all(isinstance(text, str) for item in value.items() for text in item):
                return dict(value)
        except (AttributeError, KeyError, TypeError):
            pass
        raise TokenizerError("chat_template is neither a text nor a list of named templates")

    def chat_template_for(self, tools: object) -> str | None:
        """The template of a chat, named "tool_use" unless `tools` is None; None without any."""
        templates = self.chat_templates
        if tools is not None and "tool_use" in templates:
            return templates["tool_use"]
        if templates and "default" not in templates:
            raise DataError(
                f"of the chat templates {', '.join(templates)} none is named default",
                hint="name one of them default in tokenizer_config.json",
            )
        return templates.get("default")

    @property
    def chat_template(self) -> str | None:
        """The template of a chat without tools."""
        return self.chat_templates.get("default")

    @property
    def template_variables(self) -> dict[str, str]:
        """Variables of a chat template: bos_token, eos_token and all others that have a name."""
        extra = self.config.get("extra_special_tokens")
        keys = [*self.config, *(extra if isinstance(extra, dict) else ())]
        named = {key: self._configured(key) for key in keys if key.endswith("_token")}
        return {key: name for key, name in named.items() if name is not None}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the name of any special token, longest first."""
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        """Ids of `text` without bos, eos or other special tokens.

        Raises TokenizerError for lone surrogates, the only str content that UTF-8 cannot encode,
        and ContextLengthError early for a long text that has more than `limit` tokens.
        """
        refuse_surrogates(text)
        if limit is not None and exceeds(self._backend, text, limit):
            raise ContextLengthError(limit)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def control_encoder(self) -> ControlEncoder:
        """Encodes rendered chats; see `ControlEncoder`."""
        added = {t.content: i for i, t in self._backend.get_added_tokens_decoder().items()}
        shared = None if isinstance(self._serialized, bytes) else self._backend
        return ControlEncoder(lambda: self.serialized, added, self.special_ids, shared)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]` on all cores and without offsets."""
        for text in texts:
            refuse_surrogates(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _decoder(self) -> tuple[list[bytes], bool]:
        return token_table(self._backend, self.vocab_size)

    @cached_property
    def _special_id_set(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_id_set

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id; of a special token, those of its name.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1})"
            )
        return self._decoder[0][token_id]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 (vocab_size,): bytes of text per token, 0 for special tokens.

        Dividing a loss by these bytes gives bits per byte, which compares across vocabularies.
        """
        lengths = np.array([len(raw) for raw in self._decoder[0]], dtype=np.int64)
        lengths[list(self._special_id_set)] = 0
        return lengths

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`. Lossless for `encode(text)`; bytes that are not UTF-8 become U+FFFD.

        Special tokens appear by name unless `skip_special`.
        """
        stream = StreamDecoder(self, skip_special=skip_special)
        raw = b"".join(stream._bytes_of(int(i)) for i in ids)
        return raw.decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "tokenizer.json", [self.serialized])
        write_json(directory / "tokenizer_config.json", self.config)


class StreamDecoder:
    """Text of a growing id sequence, token by token, in O(1) each.

    Characters split over tokens (most rare hanzi and emoji) are buffered until complete: the joined
    output equals `decode` of all ids, and incomplete characters give no U+FFFD.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = False, continues: bool = False
    ) -> None:
        """`continues`: other text came before, so a space in front of the first word is kept."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = tokenizer._decoder[1] and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _bytes_of(self, token_id: int) -> bytes:
        if self._tokenizer.is_special(token_id):
            return b"" if self._skip_special else self._tokenizer.token_bytes(token_id)
        raw = self._tokenizer.token_bytes(token_id)
        if self._strip_space:
            self._strip_space = False
            raw = raw.removeprefix(b" ")
        return raw

    def push(self, token_id: int) -> str:
        """The text completed by this token, "" in the middle of a character."""
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """The rest: U+FFFD if the stream stopped inside a character, else ""."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a tokenizer directory: ours, or any Hugging Face one with a tokenizer.json.

    Raises TokenizerError for a missing directory or file, broken JSON, or a missing end-of-text
    token.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise TokenizerError(
            f"tokenizer directory {directory} does not exist",
            hint="train one, or give the directory that holds tokenizer.json",
        )
    try:
        return Tokenizer(*read_directory(directory))
    except TokenizerError as error:
        if str(directory) in str(error):
            raise
        raise TokenizerError(f"{directory}: {error}", hint=error.hint) from error


def check_vocab_size(vocab_size: int) -> None:
    """Raises TokenizerError for a vocabulary without room for a merge."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small, the least is {MIN_VOCAB_SIZE}",
            hint="16 special tokens + 256 bytes + 1 merge; 8192 suits a small model",
        )


def _interruptibly(work: Callable[[], object]) -> None:
    """Call compiled code that does not look at signals for minutes in a thread, so that Ctrl-C
    ends the wait; the process does not wait for the thread."""
    pool = ThreadPool(1)
    result = pool.apply_async(work)
    pool.close()
    while not result.ready():
        result.wait(0.1)  # without a limit, Windows ignores signals
    result.get()


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = 48_000_000,
    after_reading: Callable[[], None] | None = None,
) -> Tokenizer:
    """Learn the merges from the first `max_bytes` of UTF-8 in `texts`. `after_reading` is called
    when they were read, before the merges are learned; what it raises ends the training.

    Interleave languages: text beyond `max_bytes` is not read. The result is deterministic, to the
    byte. Too little text gives fewer tokens than `vocab_size`: the result has the real number.
    Raises TokenizerError for a `vocab_size` below the 16 special tokens, 256 bytes and one merge,
    without any text, and for lone surrogates.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=False, ignore_merges=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = training_sample(texts, max_bytes, after_reading)
    first = next(sample, None)
    if first is None:
        raise TokenizerError("no text to train a tokenizer on", hint="the input is empty or blank")
    _interruptibly(partial(backend.train_from_iterator, chain([first], sample), trainer))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "unk_token": None,  # without this field Qwen2Tokenizer would add a token
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # transformers 5 rebuilds the tokenizer of a qwen2 model with an NFC normaliser (lossy)
        # unless this field makes it load tokenizer.json as it is. No code is loaded, as auto_map
        # is absent, and the user's own `trust_remote_code` argument is not changed.
        "trust_remote_code": True,
        "chat_template": CHAT_TEMPLATE,
    }
    return Tokenizer(backend.to_str(pretty=True).encode(), config)


def token_table(backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[list[bytes], bool]:
    """Bytes of every id, and whether the first token of a text has an additional space.

    Byte-level vocabularies write bytes in GPT-2's alphabet. SentencePiece ones (Llama 2) write
    spaces as U+2581 and single bytes as <0xE4>. The bytes of an added token are its name.
    """
    # Not of `to_str`, which writes the vocabulary and all merges as well.
    parts = [part for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    steps = [step for part in parts for step in _components(json.loads(part.__getstate__()))]
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    leading_space = not byte_level and any(
        (step["type"] == "Strip" and step.get("start", 0) > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    alphabet = _byte_alphabet()
    table = [b""] * vocab_size  # unused ids are empty
    for token, i in backend.get_vocab(with_added_tokens=False).items():
        if byte_level:
            # Only tokens added by hand have characters outside the alphabet.
            table[i] = b"".join(
                bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token
            )
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[i] = bytes.fromhex(token[3:5])
        else:
            table[i] = token.replace("\u2581", " ").encode()
    for i, added in backend.get_added_tokens_decoder().items():
        table[i] = added.content.encode()
    return table, leading_space


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return table


def _components(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The flat list of the steps of a pre-tokenizer or decoder of tokenizer.json."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("decoders") or []
        return [step for child in inner for step in _components(child)]
    return [part]
