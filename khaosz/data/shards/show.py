"""`data show`: records as the model sees them, token by token, with the loss mask.

In colour, trained tokens are green, context is dim, and every other token is underlined. Without
colour (a file, a pipe, NO_COLOR) `▏` separates tokens and ⟦ ⟧ enclose trained ones. Bytes of a
character that is split over tokens are printed as ⟨e4⟩, and so are control characters, because
untrusted text must not control the terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from khaosz.config import ColumnsConfig
from khaosz.data.records.chat import to_messages
from khaosz.data.records.layouts import fitting, read_record
from khaosz.data.records.learned import learned_chats
from khaosz.data.records.report import InputReport, summary, usable_records, worst_reason
from khaosz.data.shards.manifest import PreparedData
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import DataError

BOUNDARY, OPEN, CLOSE = "▏", "⟦", "⟧"
MAX_TOKENS = 400  # per record: about a screenful
_RAW_WINDOW = 20_000  # records of a raw file to choose from


@dataclass
class _Record:
    title: str
    ids: Sequence[int] | np.ndarray
    loss_mask: Sequence[int] | np.ndarray | None  # None for pretraining: all tokens are trained on


def show(
    source: str | Path,
    tokenizer: Tokenizer,
    n: int = 3,
    seed: int = 0,
    console: Console | None = None,
    columns: ColumnsConfig | None = None,
) -> None:
    """Print `n` records of a prepared directory or a raw file, sampled with `seed`.

    Records of a raw file come from its first 20,000; those that cannot be parsed are counted below
    them. Raises DataError for a path that is missing,
    has no record or was prepared with another tokenizer.
    """
    source = Path(source)
    console = Console() if console is None else console
    if not source.exists():
        raise DataError(f"{source} does not exist", hint="give a prepared directory or a raw file")
    if n < 1:
        raise DataError(f"cannot show {n} records, the minimum is 1")
    rng = np.random.default_rng(seed)
    colour = console.color_system is not None and not console.no_color
    report = InputReport(str(source))
    if (source / "manifest.json").is_file():
        records = _from_prepared(source, tokenizer, n, rng)
    else:
        records = _from_raw(report, tokenizer, n, rng, columns)
    for record in records:
        trained = len(record.ids) if record.loss_mask is None else int(np.sum(record.loss_mask))
        console.rule(Text(record.title))
        console.print(
            render_tokens(tokenizer, record.ids, record.loss_mask, colour=colour), soft_wrap=True
        )
        console.print(Text(f"{len(record.ids)} tokens, {trained} trained on"))
    for line in summary([report])[1:]:
        console.print(Text(line), soft_wrap=True)


def render_tokens(
    tokenizer: Tokenizer,
    ids: Sequence[int] | np.ndarray,
    loss_mask: Sequence[int] | np.ndarray | None = None,
    *,
    colour: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> Text:
    """Tokens with their boundaries; `loss_mask` (one entry per token) marks trained ones."""
    if loss_mask is not None and len(loss_mask) != len(ids):
        raise DataError(f"loss mask has {len(loss_mask)} entries for {len(ids)} tokens")
    out = Text()
    inside = False  # a trained span is open
    for n, token_id in enumerate(ids[:max_tokens]):
        trained = loss_mask is not None and bool(loss_mask[n])
        if not colour:
            if inside and not trained:
                out.append(CLOSE)
            if n:
                out.append(BOUNDARY)
            if trained and not inside:
                out.append(OPEN)
            inside = trained
        style = "" if loss_mask is None else "green" if trained else "dim"
        if tokenizer.is_special(int(token_id)):
            style += " bold"
        elif n % 2:
            style += " underline"
        out.append(token_text(tokenizer, int(token_id)), style=style.strip() if colour else "")
    if inside:
        out.append(CLOSE)
    if len(ids) > max_tokens:
        out.append(f" … {len(ids) - max_tokens} more tokens")
    return out


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """One token as text, a special token's name, ⟨e4⟩ for bytes of an incomplete character."""
    raw = tokenizer.token_bytes(token_id)
    # surrogateescape turns each byte that is not UTF-8 into U+DC80 + (byte - 0x80).
    return "".join(map(_visible, raw.decode("utf-8", errors="surrogateescape")))


def _visible(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟨{code - 0xDC00:02x}⟩"
    if char == "\n":
        return "↵\n"
    if unicodedata.category(char) == "Cc" and char != "\t":  # e.g. of escape sequences
        return f"⟨{code:02x}⟩"
    # Embeddings, overrides and isolates would reorder the printed line.
    if "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069":
        return f"⟨U+{code:04X}⟩"
    return char


def _from_prepared(
    directory: Path, tokenizer: Tokenizer, n: int, rng: np.random.Generator
) -> Iterator[_Record]:
    prepared = PreparedData.open(directory)
    if prepared.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{directory} was prepared with another tokenizer "
            f"({prepared.fingerprint[:12]}, not {tokenizer.fingerprint[:12]})",
            hint=f"use the one in {prepared.tokenizer_dir}",
        )
    shards = [(group, shard) for group in prepared.groups for shard in group.shards]
    bounds = np.cumsum([len(shard) for _, shard in shards])
    total = int(bounds[-1]) if shards else 0
    if total == 0:
        raise DataError(f"{directory} holds no documents")
    # Floyd's method inside numpy: no permutation of all documents is built.
    for pick in rng.choice(total, size=min(n, total), replace=False):
        at = int(np.searchsorted(bounds, pick, side="right"))
        group, shard = shards[at]
        i = int(pick) - (int(bounds[at - 1]) if at else 0)
        start, end = int(shard.doc_offsets[i]), int(shard.doc_offsets[i + 1])
        mask = None if shard.loss_mask is None else shard.loss_mask[start:end]
        title = f"{group.split} {group.source} {group.lang}, document {i}"
        yield _Record(title, shard.tokens[start:end], mask)


def _from_raw(
    report: InputReport,
    tokenizer: Tokenizer,
    n: int,
    rng: np.random.Generator,
    columns: ColumnsConfig | None,
) -> Iterator[_Record]:
    path = Path(report.path)
    chosen: list[tuple[int, dict[str, Any]]] = []
    # Reservoir sampling (Vitter 1985, algorithm R): one pass, n records kept.
    for seen, numbered in enumerate(islice(usable_records(report, columns), _RAW_WINDOW)):
        if len(chosen) < n:
            chosen.append(numbered)
        elif (slot := int(rng.integers(seen + 1))) < n:
            chosen[slot] = numbered
    if not chosen:
        raise DataError(f"{path} holds no records{worst_reason([report])}")
    for line, record in chosen:
        title = f"{path.name}, record {line}"
        try:
            if fitting(record, ("text",), columns):
                text = read_record(record, ("text",), columns)
                ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                yield _Record(title, ids, None)
            else:
                chat = to_messages(record, columns)
                for ids, mask in learned_chats(
                    tokenizer, chat.messages, chat.tools or None, chat.weights
                ):
                    yield _Record(title, ids, mask)
        except DataError as error:
            raise DataError(f"{path}, record {line}: {error}", hint=error.hint) from error
