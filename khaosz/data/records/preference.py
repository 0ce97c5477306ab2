"""Preference records of every layout, as pairs of answers and token ids.

Comparisons give pairs at once. Labelled or scored answers (KTO, HelpSteer) are compared with the
other answers to the same prompt, wherever in the data these are. Records that are not used are
skipped with a reason and line numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from khaosz.config import ColumnsConfig
from khaosz.data.records.columns import SYSTEMS, column_names, named
from khaosz.data.records.comparisons import Pair, Rated, levels_of, ranked_pairs, refuse_tools
from khaosz.data.records.conversations import prompt_of
from khaosz.data.records.layouts import fitting, read_record
from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import (
    InputReport,
    LoadReport,
    in_validation,
    nothing_to_train_on,
    open_reports,
    refuse_unread,
    text_hash,
    usable_records,
)
from khaosz.data.records.turns import LeftOut, Message
from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import DataError

__all__ = ["Pair", "load_pairs", "load_prompts", "to_pair", "to_pairs", "to_prompt"]

Paths = str | Path | Iterable[str | Path]
IDENTICAL = "chosen and rejected are the same"


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """int32 ids: prompt (P,) with the generation prompt, chosen (C,) and rejected (R,) with the
    token that ends the turn. P + max(C, R) is at most the window: `truncated` answers were cut to
    it and lack that token."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    truncated: int = 0
    margin: float | None = None
    group: str | None = None
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt; `extra` are the record's other keys, for reward functions.
    `prompt_ids`, (P,) int32 with P below the window, are empty until `load_prompts` adds them."""

    prompt: list[Message]
    extra: dict[str, Any] = field(default_factory=dict)
    prompt_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass
class PreferenceReport(LoadReport):
    """`lengths`: prompt, chosen, rejected -> mean, p50, p95 and max, in tokens."""

    window: int = 0
    truncated: int = 0
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        out = super().lines()
        cut = f", {self.truncated:,} cut to the window of {self.window}" if self.truncated else ""
        out.append(f"{self.kept:,} kept, {self.validation:,} of them for validation{cut}")
        for name, values in self.lengths.items():
            out.append(f"{name} tokens: " + ", ".join(f"{k} {v:.0f}" for k, v in values.items()))
        return out


Item = TypeVar("Item", EncodedPair, Prompt)


@dataclass(frozen=True)
class PreferenceData(Generic[Item]):
    """In the order of the files; no prompt is both in `train` and in `validation`."""

    train: list[Item]
    validation: list[Item]
    report: PreferenceReport


def to_pair(record: Any, columns: ColumnsConfig | None = None) -> Pair:
    """The pair of one record that compares two answers. Raises DataError as `to_pairs` does."""
    pairs = to_pairs(record, columns)
    if len(pairs) != 1:
        raise DataError(f"{len(pairs)} pairs, not one")
    return pairs[0]


def to_pairs(record: Any, columns: ColumnsConfig | None = None) -> list[Pair]:
    """K(K-1)/2 pairs of K ranked answers, fewer where some are equal; one pair of two answers.

    Raises DataError with a short reason for an unknown layout, and for an answer that is not one
    assistant turn of text; `LeftOut` for two answers that are rated equal.
    """
    pairs: list[Pair] = read_record(record, ("comparison",), columns)
    return pairs


def to_prompt(record: Any, columns: ColumnsConfig | None = None) -> Prompt:
    """The prompt of a record of any layout, without trailing assistant turns. Raises DataError."""
    fields = named(record, columns)
    refuse_tools(fields)
    try:
        prompt, used = prompt_of(fields, answered=True)
    except DataError:
        if (row := fitting(record, ("comparison",), columns)) is None:
            raise
        # Whole conversations: the prompt is their common beginning.
        prompt, used = row.read(fields)[0].prompt, list(chain(*row.keys))
    sources = {} if columns is None else column_names(columns)
    known = {*(sources.get(key, key) for key in used), "history", "tools", *SYSTEMS}
    extra = {k: v for k, v in record.items() if v is not None and k not in known}
    return Prompt(prompt, extra)


def prompt_key(prompt: Sequence[Message]) -> str:
    """A hash; equal for prompts that differ only in white space around their messages."""
    turns = [
        (turn["role"], turn.get("content", "").strip(), turn.get("tool_calls")) for turn in prompt
    ]
    return text_hash(json.dumps(turns)).hex()


def encode_pair(tokenizer: Tokenizer, pair: Pair, window: int) -> EncodedPair:
    """Raises DataError for a pair that can't be trained on: an empty answer, equal answers,
    at least up to where the window cuts them, a prompt that leaves no room for an answer, and a
    template that does not render a chat as the prompt, then the answer, then an end token."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise LeftOut("empty answer")
    if pair.chosen == pair.rejected:
        raise LeftOut(IDENTICAL)
    ids = encode_prompt(tokenizer, pair.prompt, window)
    chosen = _answer_ids(tokenizer, pair.prompt, ids, pair.chosen)
    rejected = _answer_ids(tokenizer, pair.prompt, ids, pair.rejected)
    room = window - len(ids)
    if np.array_equal(chosen[:room], rejected[:room]):
        raise LeftOut(f"{IDENTICAL} within the window")
    cut = (len(chosen) > room) + (len(rejected) > room)
    more = pair.margin, pair.group, pair.shared
    return EncodedPair(ids, chosen[:room], rejected[:room], cut, *more)


def load_pairs(
    paths: Paths,
    tokenizer: Tokenizer,
    window: int,
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> PreferenceData[EncodedPair]:
    """Every usable pair, in at most `window` tokens. The hash of a prompt and `seed` decide whether
    it is for validation. Raises DataError when no pair is left to train on, and when more than 1 %
    of the records cannot be read, unless they are allowed."""
    read = partial(read_record, kinds=("comparison", "rated"), columns=columns)
    data = _opened(paths, window, val_fraction)
    rated: dict[str, list[tuple[InputReport, int, Rated]]] = {}
    keep = partial(_keep, data, partial(encode_pair, tokenizer, window=window), val_fraction, seed)
    for entry in data.report.inputs:
        for line, record in usable_records(entry, columns):
            with entry.skipping(line):
                item = read(record)
                if isinstance(item, Rated):
                    rated.setdefault(prompt_key(item.prompt), []).append((entry, line, item))
                    continue
                if not item:
                    raise LeftOut("all answers are ranked equal")
                for pair in item:
                    keep(entry, line, pair)
    for answers in rated.values():
        levels = levels_of(answer.score for _, _, answer in answers)
        if len(levels) < 2:
            for entry, line, _ in answers:
                entry.skip(line, "no other answer to its prompt to compare with", unread=False)
            continue
        texts = [answer.answer for _, _, answer in answers]
        entry, line, first = answers[0]
        for pair in ranked_pairs(first.prompt, texts, levels):
            keep(entry, line, pair)
    return _loaded(data, allow_unread)


def load_prompts(
    paths: Paths,
    tokenizer: Tokenizer | None = None,
    window: int = 0,
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> PreferenceData[Prompt]:
    """Every prompt that leaves room for an answer in `window` tokens; otherwise as `load_pairs`.
    Without a tokenizer, every prompt, not encoded."""

    def encode(item: Prompt) -> Prompt:
        if tokenizer is None:
            return item
        return replace(item, prompt_ids=encode_prompt(tokenizer, item.prompt, window))

    data: PreferenceData[Prompt] = _opened(paths, window, val_fraction)
    for entry in data.report.inputs:
        for line, record in usable_records(entry, columns, every_column=True):
            with entry.skipping(line):
                _keep(data, encode, val_fraction, seed, entry, line, to_prompt(record, columns))
    return _loaded(data, allow_unread)


def _opened(paths: Paths, window: int, val_fraction: float) -> PreferenceData[Any]:
    if not 0.0 <= val_fraction < 1.0:
        raise DataError(f"val_fraction is {val_fraction}, not in [0, 1)")
    files = expand_inputs([paths] if isinstance(paths, str | Path) else paths)
    report = PreferenceReport(open_reports(files), window=window)
    return PreferenceData([], [], report)


def _keep(
    data: PreferenceData[Item],
    encode: Callable[[Any], Item],
    val_fraction: float,
    seed: int,
    entry: InputReport,
    line: int,
    item: Any,
) -> None:
    """Encode an item and add it to its part of the data, or count why it is skipped."""
    with entry.skipping(line):
        encoded = encode(item)
        held_out = in_validation(prompt_key(item.prompt), seed, val_fraction)
        (data.validation if held_out else data.train).append(encoded)
        entry.kept += 1


def _loaded(data: PreferenceData[Item], allow_unread: bool) -> PreferenceData[Item]:
    """The data with its report. Raises DataError as `load_pairs` does."""
    report = data.report
    if not data.train:
        raise nothing_to_train_on(
            report,
            "a record is a prompt, with chosen and rejected or answers and ranking for pairs",
        )
    refuse_unread(report.inputs, allow_unread)
    items = data.train + data.validation
    report.kept, report.validation = len(items), len(data.validation)
    report.truncated = sum(getattr(item, "truncated", 0) > 0 for item in items)
    for name in ("prompt", "chosen", "rejected"):
        if hasattr(items[0], f"{name}_ids"):
            n = [len(getattr(item, f"{name}_ids")) for item in items]
            if not any(n):  # not encoded
                continue
            p50, p95 = map(float, np.percentile(n, (50, 95)))
            report.lengths[name] = {"mean": sum(n) / len(n), "p50": p50, "p95": p95, "max": max(n)}
    return data


def encode_prompt(tokenizer: Tokenizer, prompt: list[Message], window: int) -> np.ndarray:
    ids = encode_chat(tokenizer, prompt, add_generation_prompt=True)[0]
    if len(ids) >= window:
        raise LeftOut(f"the prompt leaves no room for an answer in the window of {window} tokens")
    return np.array(ids, np.int32)


def _answer_ids(
    tokenizer: Tokenizer, prompt: list[Message], prompt_ids: np.ndarray, text: str
) -> np.ndarray:
    """The assistant's turn up to its end token; template text after it is left out."""
    chat = encode_chat(tokenizer, [*prompt, {"role": "assistant", "content": text}])[0]
    start, answer = np.split(np.array(chat, np.int32), [len(prompt_ids)])
    # Where tokens merge across the border, training would differ from generation.
    if not np.array_equal(start, prompt_ids):
        raise DataError("with an answer the chat does not begin with the tokens of its prompt")
    ends = np.flatnonzero(np.isin(answer, tokenizer.end_ids))
    if not ends.size:
        raise DataError("the chat template does not end an answer with a control token")
    return answer[: ends[0] + 1]
