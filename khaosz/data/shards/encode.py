"""What a worker of `data prepare` does: raw records in, documents as compact arrays out.

`PieceEncoder` gives the ids of `Tokenizer.encode` with less work and bounded memory. It uses two
facts about the Qwen2 pattern, and only for tokenizers that have it (`can_cut`):

1. After a letter and before a punctuation mark or white space a piece always ends. Every
   alternative that takes letters takes the whole run of them, and no lookahead crosses that place.
   Merges stay inside pieces, so text may be cut there without changing an id.
2. English repeats its words. In a stretch of ASCII, Python's `re` finds the pieces and a dictionary
   has their ids; the library encodes only new ones. That is about four times as fast.
"""

from __future__ import annotations

import json
import os
import re
import signal
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.config import ColumnsConfig
from khaosz.data.records.chat import to_messages
from khaosz.data.records.layouts import fitting, read_record
from khaosz.data.records.learned import learned_chats
from khaosz.data.records.readers import RawBatch, Skip, detect_language, parsed
from khaosz.data.records.report import HASH_BYTES, text_hash
from khaosz.data.records.turns import LeftOut, has_reasoning
from khaosz.data.shards.mmap import Stage, token_dtype
from khaosz.data.tokenizer.tokenizer import QWEN2_PATTERN, Tokenizer, load_tokenizer
from khaosz.errors import DataError

# The tokenizer library needs about 200 bytes per token of a batch while it encodes.
_ENCODE_CHARACTERS = 1 << 18
_PIECE_CHARACTERS = 1 << 16
_CACHED_CHARACTERS = 1 << 19  # about 100 thousand words, 20 MB
_SAFE_CUT = re.compile(r"[A-Za-z\u4e00-\u9fa5](?=[ \n\t,.;:!?，。；：！？、])")
# Greedy on both sides: from the first safe cut of an ASCII stretch to its last one.
_ASCII_STRETCH = re.compile(
    r"(?<=[A-Za-z])(?=[ \n\t,.;:!?])[\x00-\x7f]{64,}(?<=[A-Za-z])(?=[ \n\t,.;:!?])"
)
_LEADING_ASCII = re.compile(r"[\x00-\x7f]{64,}(?<=[A-Za-z])(?=[ \n\t,.;:!?])")
# QWEN2_PATTERN for ASCII.
_ASCII_PIECE = re.compile(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)


@dataclass
class EncodedBatch:
    """Documents of one RawBatch, in order.

    tokens: (sum of lengths,) uint16 or uint32; loss_mask: like tokens, uint8, None for PT;
    lengths, n_bytes, n_characters, group: (documents,) int64, group indexing `groups`, which are
    (source, language) pairs; hashes: (documents, 16) uint8. `skipped`: (line number, reason,
    whether the record could not be read; the others are left out on purpose).
    """

    groups: list[tuple[str, str]]
    tokens: np.ndarray
    loss_mask: np.ndarray | None
    lengths: np.ndarray
    n_bytes: np.ndarray
    n_characters: np.ndarray
    group: np.ndarray
    hashes: np.ndarray
    n_records: int
    skipped: list[tuple[int, str, bool]]


@dataclass
class _Documents:
    stem: str  # the source of records that name none
    groups: dict[tuple[str, str], int] = field(default_factory=dict)
    n_bytes: list[int] = field(default_factory=list)
    n_characters: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    skipped: list[tuple[int, str, bool]] = field(default_factory=list)
    n_records: int = 0

    def skip(self, number: int, reason: str, *, unread: bool = True) -> None:
        self.skipped.append((number, reason, unread))

    def add(
        self, record: dict[str, Any], text: str, n_bytes: int, identity: str, number: int = 0
    ) -> None:
        """`number`: of several documents of a record. Only one has its bytes; all are held out or
        none, by the first half of their hash."""
        language = _language(record.get("lang")) or detect_language(text)
        key = (source_name(record.get("source") or self.stem), language)
        self.group.append(self.groups.setdefault(key, len(self.groups)))
        self.n_bytes.append(0 if number else n_bytes)
        self.n_characters.append(0 if number else len(text))
        hashed = text_hash(identity)
        half = HASH_BYTES // 2
        if number:
            hashed = hashed[:half] + text_hash(f"{number} {identity}")[half:]
        self.hashes.append(hashed)


def start_worker() -> None:
    """Set up a worker process: the number of workers is the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C


def encode_in_worker(
    directory: Path, batch: RawBatch, stage: Stage, columns: ColumnsConfig | None = None
) -> EncodedBatch:
    """`encode_records` with the tokenizer of `directory`, read once per process."""
    return encode_records(_loaded(directory), batch, stage, columns)


@lru_cache(maxsize=1)
def _loaded(directory: Path) -> PieceEncoder:
    return PieceEncoder(load_tokenizer(directory))


def record_stage(record: dict[str, Any], columns: ColumnsConfig | None = None) -> Stage | None:
    """The stage of a record: "sft" for a chat or a prompt with its answer, "pt" for text, else
    None."""
    if fitting(record, ("chat",), columns):
        return "sft"
    return "pt" if fitting(record, ("text",), columns) else None


def encode_records(
    encoder: PieceEncoder, batch: RawBatch, stage: Stage, columns: ColumnsConfig | None = None
) -> EncodedBatch:
    """Parse, check and tokenise every record. Unusable records are in `skipped`, with a reason.

    A PT document is bos, text, eos; an SFT document is the chat as its template renders it.
    """
    stem = batch.path.name.split(".")[0]
    documents = _Documents(stem, n_records=len(batch.skipped))
    documents.skipped = [(number, reason, True) for number, reason in batch.skipped]
    if columns is not None and not any(vars(columns).values()):
        columns = None
    if stage == "pt":
        texts = list(_texts(batch, documents, columns))
        tokens, lengths = _encode_texts(encoder, texts)
        loss_mask = None
    else:
        tokens, lengths, loss_mask = _encode_chats(encoder.tokenizer, batch, documents, columns)
    documents.skipped.sort()
    hashes = np.frombuffer(b"".join(documents.hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)
    return EncodedBatch(
        groups=list(documents.groups),
        tokens=tokens,
        loss_mask=loss_mask,
        lengths=lengths,
        n_bytes=np.array(documents.n_bytes, dtype=np.int64),
        n_characters=np.array(documents.n_characters, dtype=np.int64),
        group=np.array(documents.group, dtype=np.int64),
        hashes=hashes,
        n_records=documents.n_records,
        skipped=documents.skipped,
    )


def _records(batch: RawBatch, documents: _Documents) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, record in parsed(batch):
        documents.n_records += 1
        if isinstance(record, Skip):
            documents.skip(number, record.reason)
        else:
            yield number, record


def _texts(batch: RawBatch, documents: _Documents, columns: ColumnsConfig | None) -> Iterator[str]:
    for number, record in _records(batch, documents):
        text = record.get("text") if columns is None else None
        if not isinstance(text, str):
            try:
                text = str(read_record(record, ("text",), columns))
            except DataError as error:
                documents.skip(number, str(error))
                continue
        if not text or text.isspace():
            documents.skip(number, "empty text", unread=False)
        elif (n_bytes := _utf8_length(text)) is None:
            documents.skip(number, "lone surrogate in a JSON escape")
        else:
            documents.add(record, text, n_bytes, text)
            yield text


def _utf8_length(text: str) -> int | None:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return None


def _encode_texts(encoder: PieceEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all documents, bos and eos included, and their lengths."""
    tokenizer = encoder.tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    lengths = np.full(len(texts), 2, dtype=np.int64)
    waiting: list[str] = []
    owners: list[int] = []  # document of each waiting piece
    characters = 0
    opened = -1

    def encode_waiting() -> None:
        nonlocal characters, opened
        encoded = encoder.encode_batch(waiting)
        runs: list[list[int]] = []
        for owner, ids in zip(owners, encoded, strict=True):
            if owner != opened:
                runs.append(
                    [tokenizer.bos_id] if opened < 0 else [tokenizer.eos_id, tokenizer.bos_id]
                )
                opened = owner
            runs.append(ids)
            lengths[owner] += len(ids)
        n = sum(map(len, runs))
        parts.append(np.fromiter(chain.from_iterable(runs), dtype=dtype, count=n))
        waiting.clear()
        owners.clear()
        characters = 0

    for owner, text in enumerate(texts):
        for piece in cut_text(text, _PIECE_CHARACTERS) if encoder.can_cut else (text,):
            waiting.append(piece)
            owners.append(owner)
            characters += len(piece)
            if characters >= _ENCODE_CHARACTERS:
                encode_waiting()
    if waiting:
        encode_waiting()
    if texts:
        parts.append(np.array([tokenizer.eos_id], dtype=dtype))
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    return tokens, lengths


def _encode_chats(
    tokenizer: Tokenizer, batch: RawBatch, documents: _Documents, columns: ColumnsConfig | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: list[np.ndarray] = [np.empty(0, dtype=dtype)]
    masks: list[np.ndarray] = [np.empty(0, dtype=np.uint8)]
    renders_reasoning = re.search("reasoning|thinking", tokenizer.chat_template or "") is not None
    for number, record in _records(batch, documents):
        try:
            chat = to_messages(record, columns)
            if not renders_reasoning and any(map(has_reasoning, chat.messages)):
                raise DataError("reasoning that the chat template does not render")
            text = "\n".join(message.get("content", "") for message in chat.messages)
            parts = [chat.messages, chat.tools, chat.weights][: 2 + (chat.weights is not None)]
            identity = json.dumps(parts, ensure_ascii=False, sort_keys=True)
            if _utf8_length(identity) is None:
                raise DataError("lone surrogate in a JSON escape")
            texts = learned_chats(tokenizer, chat.messages, chat.tools or None, chat.weights)
        except DataError as error:
            documents.skip(number, str(error), unread=not isinstance(error, LeftOut))
            continue
        except RecursionError:
            documents.skip(number, "nested too deeply")
            continue
        n_bytes = len(text.encode("utf-8"))
        for number, (ids, loss_mask) in enumerate(texts):
            documents.add(record, text, n_bytes, identity, number)
            tokens.append(np.array(ids, dtype=dtype))
            masks.append(np.array(loss_mask, dtype=np.uint8))
    lengths = np.array([len(ids) for ids in tokens[1:]], dtype=np.int64)
    return np.concatenate(tokens), lengths, np.concatenate(masks)


def source_name(source: object) -> str:
    """A source as part of a file name: letters, digits, `_` and `.`, lower case, 40 at most.

    Lower case because two sources must not share a file on disks that ignore case.
    """
    name = unicodedata.normalize("NFC", str(source)).casefold()
    return re.sub(r"[^\w.-]+", "_", name)[:40].strip("_.-") or "unnamed"


def _language(tag: object) -> str | None:
    """The primary subtag of a language tag, e.g. "zh" for "zh-Hans-CN"; None for other values."""
    if not isinstance(tag, str):
        return None
    match = re.match(r"([A-Za-z]{2,8})(?:[-_]|$)", tag.strip())
    return match[1].lower() if match else None


class PieceEncoder:
    """`encode_batch` of a tokenizer, faster for English through a cache of pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.can_cut = can_cut(tokenizer.serialized)
        self._ids: dict[str, list[int]] = {}
        self._characters = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[tokenizer.encode(text) for text in texts]`, for texts that UTF-8 can hold."""
        if not self.can_cut:
            return self.tokenizer.encode_batch(texts)
        if self._characters > _CACHED_CHARACTERS:
            self._ids.clear()
            self._characters = 0
        known = self._ids
        plans: list[list[list[str] | None]] = []
        stretches: list[str] = []  # for the library, in order
        missing: set[str] = set()
        for text in texts:
            plan: list[list[str] | None] = []
            for start, end, ascii_only in _stretches(text):
                if ascii_only:
                    pieces = _ASCII_PIECE.findall(text, start, end)
                    missing.update(set(pieces).difference(known))
                    plan.append(pieces)
                else:
                    stretches.append(text[start:end])
                    plan.append(None)
            plans.append(plan)
        new = sorted(missing)
        encoded = self.tokenizer.encode_batch(stretches + new)
        known.update(zip(new, encoded[len(stretches) :], strict=True))
        self._characters += sum(map(len, new))
        ids = iter(encoded)
        return [
            list(
                chain.from_iterable(
                    next(ids) if part is None else chain.from_iterable(map(known.get, part))  # type: ignore[arg-type]
                    for part in plan
                )
            )
            for plan in plans
        ]


@lru_cache(maxsize=2)
def can_cut(serialized: bytes) -> bool:
    """Whether this tokenizer.json splits text by the Qwen2 pattern and changes nothing else."""
    spec = json.loads(serialized)
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers") or []
    return (
        spec.get("normalizer") is None
        and all(token["special"] for token in spec.get("added_tokens") or [])
        and len(steps) == 2
        and steps[0].get("type") == "Split"
        and steps[0].get("pattern") == {"Regex": QWEN2_PATTERN}
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
        and steps[1].get("type") == "ByteLevel"
        and steps[1].get("add_prefix_space") is False
        and steps[1].get("use_regex") is False
    )


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Pieces of about `limit` characters whose ids, joined, are those of the whole text.

    Only for tokenizers that `can_cut` accepts. A stretch without a safe cut stays whole.
    """
    start = 0
    while len(text) - start > limit:
        match = _SAFE_CUT.search(text, start + limit - 1)
        if match is None:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _stretches(text: str) -> Iterator[tuple[int, int, bool]]:
    """The text as consecutive (start, end, whether to use the cache)."""
    if text.isascii():
        yield 0, len(text), True
        return
    position = 0
    leading = _LEADING_ASCII.match(text)
    if leading is not None:
        position = leading.end()
        yield 0, position, True
    for match in _ASCII_STRETCH.finditer(text, position):
        if match.start() > position:
            yield position, match.start(), False
        yield match.start(), match.end(), True
        position = match.end()
    if position < len(text):
        yield position, len(text), False
