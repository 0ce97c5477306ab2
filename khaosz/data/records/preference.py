"""Preference records of the common layouts, converted to pairs of answers and to token ids.

Understood are our own `{"prompt", "chosen", "rejected"}` and `{"prompt", "answers", "ranking"}`,
LLaMA-Factory's ShareGPT and Alpaca layouts, and TRL's: standard, conversational, and without a
prompt, where `chosen` and `rejected` are whole conversations. A prompt that is text is one user
turn; a null counts as absent. Unusable records are skipped with a reason and line numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from khaosz.data.records.chat import Message, text_of, to_messages
from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import (
    InputReport,
    LoadReport,
    in_validation,
    nothing_to_train_on,
    text_hash,
    usable_records,
)
from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import DataError

Paths = str | Path | Iterable[str | Path]
IDENTICAL = "chosen and rejected are the same"
_PROMPT_KEYS = ("prompt", "messages", "conversations")
_ALPACA_KEYS = ("instruction", "input", "history")
_STAND_IN = {"role": "assistant", "content": "."}  # `to_messages` reads chats that were answered


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Pairs of one ranking share a `group` and belong in one batch
    (Ouyang et al. 2022, arXiv:2203.02155, section 3.5)."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None = None
    group: str | None = None


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


def to_pair(record: dict[str, Any]) -> Pair:
    """The pair of one record. Raises DataError with a short reason for an unknown layout, and for
    an answer that is not one assistant turn of text."""
    record = _fields(record)
    if "chosen" not in record or "rejected" not in record:
        raise DataError(f"no chosen and rejected among the keys ({', '.join(record)})")
    chosen, rejected = (_turns(record[key], key, "assistant") for key in ("chosen", "rejected"))
    whole = any(turns and turns[0]["role"] != "assistant" for turns in (chosen, rejected))
    if whole or not record.keys() & {*_PROMPT_KEYS, *_ALPACA_KEYS}:
        n = 0
        while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
            n += 1
        # Some datasets repeat the prompt in a field of its own.
        prompt = next((_turns(record[key], key) for key in _PROMPT_KEYS if key in record), [])
        if prompt and prompt != chosen[:n][-len(prompt) :]:
            raise DataError("chosen and rejected do not begin with the prompt")
        record["prompt"], chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    margin = record.get("margin")
    if margin is not None and (type(margin) not in (int, float) or not abs(margin) < 1e30):  # NaN
        raise DataError("margin is not a finite number")
    margin = None if margin is None else float(margin)
    return Pair(_prompt(record), _answer(chosen, "chosen"), _answer(rejected, "rejected"), margin)


def to_pairs(record: dict[str, Any]) -> list[Pair]:
    """K(K-1)/2 pairs of a ranking of K answers, fewer where some are equal; one pair of any other
    record. Raises DataError."""
    record = _fields(record)
    if "ranking" not in record:
        return [to_pair(record)]
    prompt, answers, ranking = _prompt(record), record.get("answers"), record["ranking"]
    if not isinstance(answers, list) or not isinstance(ranking, list):
        raise DataError("answers or ranking is not a list")
    texts = [_answer(_turns(answer, "an answer", "assistant"), "an answer") for answer in answers]
    levels = [level if isinstance(level, list) else [level] for level in ranking]
    indices = list(chain(*levels))
    if not all(type(i) is int for i in indices) or sorted(indices) != list(range(len(texts))):
        raise DataError("ranking does not name every answer once", hint="such as [2, [0, 3], 1]")
    group = text_hash(json.dumps([prompt, texts, ranking])).hex()
    return [
        Pair(prompt, texts[better], texts[worse], group=group)
        for above, below in combinations(levels, 2)
        for better, worse in product(above, below)
    ]


def to_prompt(record: dict[str, Any]) -> Prompt:
    """The prompt of a record of any layout, without trailing assistant turns. Raises DataError."""
    record = _fields(record)
    used = next(([key] for key in _PROMPT_KEYS if key in record), _ALPACA_KEYS)
    extra = {key: value for key, value in record.items() if key not in (*used, "system", "tools")}
    return Prompt(_prompt(record, answered=True), extra)


def prompt_key(prompt: Sequence[Message]) -> str:
    """A hash; equal for prompts that differ only in white space around their messages."""
    turns = [(turn["role"], turn["content"].strip(), turn.get("tool_calls")) for turn in prompt]
    return text_hash(json.dumps(turns)).hex()


def encode_pair(tokenizer: Tokenizer, pair: Pair, window: int) -> EncodedPair:
    """Raises DataError for a pair that can't be trained on: an empty answer, equal answers,
    at least up to where the window cuts them, a prompt that leaves no room for an answer, and a
    template that does not render a chat as the prompt, then the answer, then an end token."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise DataError("empty answer")
    if pair.chosen == pair.rejected:
        raise DataError(IDENTICAL)
    ids = _prompt_ids(tokenizer, pair.prompt, window)
    chosen = _answer_ids(tokenizer, pair.prompt, ids, pair.chosen)
    rejected = _answer_ids(tokenizer, pair.prompt, ids, pair.rejected)
    room = window - len(ids)
    if np.array_equal(chosen[:room], rejected[:room]):
        raise DataError(f"{IDENTICAL} within the window")
    cut = (len(chosen) > room) + (len(rejected) > room)
    return EncodedPair(ids, chosen[:room], rejected[:room], cut, pair.margin, pair.group)


def load_pairs(
    paths: Paths, tokenizer: Tokenizer, window: int, *, val_fraction: float = 0.0, seed: int = 0
) -> PreferenceData[EncodedPair]:
    """Every usable pair, in at most `window` tokens. The hash of a prompt and `seed` decide whether
    it is for validation. Raises DataError when no pair is left to train on."""
    encode = partial(encode_pair, tokenizer, window=window)
    return _load(paths, window, val_fraction, seed, to_pairs, encode)


def load_prompts(
    paths: Paths, tokenizer: Tokenizer, window: int, *, val_fraction: float = 0.0, seed: int = 0
) -> PreferenceData[Prompt]:
    """Every prompt that leaves room for an answer in `window` tokens; otherwise as `load_pairs`."""

    def encode(item: Prompt) -> Prompt:
        return replace(item, prompt_ids=_prompt_ids(tokenizer, item.prompt, window))

    return _load(paths, window, val_fraction, seed, lambda record: [to_prompt(record)], encode)


def _load(
    paths: Paths,
    window: int,
    val_fraction: float,
    seed: int,
    read: Callable[[dict[str, Any]], list[Any]],
    encode: Callable[[Any], Item],
) -> PreferenceData[Item]:
    if not 0.0 <= val_fraction < 1.0:
        raise DataError(f"val_fraction is {val_fraction}, not in [0, 1)")
    files = expand_inputs([paths] if isinstance(paths, str | Path) else paths)
    report = PreferenceReport([InputReport(str(path)) for path in files], window=window)
    data: PreferenceData[Item] = PreferenceData([], [], report)
    for entry in report.inputs:
        for line, record in usable_records(entry):
            items: list[Any] = []
            with entry.skipping(line):
                items = read(record)
                if not items:
                    raise DataError("all answers are ranked equal")
            for item in items:
                with entry.skipping(line):
                    encoded = encode(item)
                    held_out = in_validation(prompt_key(item.prompt), seed, val_fraction)
                    (data.validation if held_out else data.train).append(encoded)
                    entry.kept += 1
    if not data.train:
        raise nothing_to_train_on(
            report,
            "a record is a prompt, with chosen and rejected or answers and ranking for pairs",
        )
    items = data.train + data.validation
    report.kept, report.validation = len(items), len(data.validation)
    report.truncated = sum(getattr(item, "truncated", 0) > 0 for item in items)
    for name in ("prompt", "chosen", "rejected"):
        if hasattr(items[0], f"{name}_ids"):
            n = [len(getattr(item, f"{name}_ids")) for item in items]
            p50, p95 = map(float, np.percentile(n, (50, 95)))
            report.lengths[name] = {"mean": sum(n) / len(n), "p50": p50, "p95": p95, "max": max(n)}
    return data


def _prompt_ids(tokenizer: Tokenizer, prompt: list[Message], window: int) -> np.ndarray:
    ids = encode_chat(tokenizer, prompt, add_generation_prompt=True)[0]
    if len(ids) >= window:
        raise DataError(f"the prompt leaves no room for an answer in the window of {window} tokens")
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


def _fields(record: Any) -> dict[str, Any]:
    """The keys of a record that are not null."""
    if not isinstance(record, dict):
        raise DataError(f"record is a {type(record).__name__}, not an object")
    if to_messages({"messages": [_STAND_IN], "tools": record.get("tools")}).tools:
        raise DataError("tools are not read from preference records")
    return {key: value for key, value in record.items() if value is not None}


def _turns(value: Any, key: str, role: str = "user") -> list[Message]:
    """One turn or several in OpenAI's or ShareGPT's layout; a text is one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = value if isinstance(value, list) else [value]
    if not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{key} is neither text nor messages")
    if any("from" in turn for turn in turns):
        return to_messages({"conversations": [*turns, {"from": "gpt", "value": "."}]}).messages[:-1]
    return to_messages({"messages": [*turns, _STAND_IN]}).messages[:-1]


def _prompt(record: dict[str, Any], answered: bool = False) -> list[Message]:
    """Messages that end with a user or tool turn; trailing assistant turns are dropped if it is
    `answered`."""
    if key := next((key for key in _PROMPT_KEYS if key in record), None):
        prompt = _turns(record[key], key)
        if record.get("system") and [turn["role"] for turn in prompt[:1]] != ["system"]:
            prompt.insert(0, {"role": "system", "content": text_of(record["system"])})
    elif "instruction" in record or "input" in record:
        prompt = to_messages({**record, "output": "."}).messages[:-1]
    else:
        raise DataError(f"no prompt among the keys ({', '.join(record)})")
    while answered and prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise DataError("the prompt does not end with a user or tool turn")
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise DataError("empty prompt")
    return prompt


def _answer(turns: list[Message], key: str) -> str:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise DataError(f"{key} is not one assistant turn after the prompt")
    if turns[0].get("tool_calls"):
        raise DataError(f"{key} calls a tool, and only text is compared")
    return str(turns[0]["content"])
