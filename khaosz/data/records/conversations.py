"""Prompts and conversations of records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from khaosz.data.records.columns import ANSWERS, LABELS, PROMPTS, SYSTEMS, TURNS, Fields, key_list
from khaosz.data.records.turns import LeftOut, Message, read_tools, read_turns, text_of
from khaosz.errors import DataError

_JOINED = {"instruction": ("input", "context"), "question": ("context",)}  # Alpaca, Dolly
_LABEL_TEXTS = {"true": True, "false": False, "1": True, "0": False}


@dataclass
class Conversation:
    """A chat that ends with an assistant turn, ready for `encode_chat`. `weights`: one per
    assistant turn, 0 where it is not trained on; None trains on all."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    weights: list[int] | None = None


def prompt_of(fields: Fields, *, answered: bool = False) -> tuple[list[Message], list[str]]:
    """Messages that end with a user or tool turn, and the keys that they are from; trailing
    assistant turns are dropped if it is `answered`. Raises DataError."""
    key = next((key for key in PROMPTS if key in fields and is_prompt(key, fields[key])), None)
    if key is None:
        raise DataError(
            f"unknown layout with keys {key_list(fields)}; nearest is a prompt, without"
            f" {' or '.join(PROMPTS[:3])}"
        )
    used = [key]
    value = fields[key]
    if isinstance(value, str) and key in _JOINED:
        more = [k for k in _JOINED[key] if isinstance(fields.get(k), str)]
        used += more
        value = "\n".join(part for part in (value, *(fields[k] for k in more)) if part)
        if not value.strip():
            raise LeftOut("empty instruction")
    turns = read_turns(value, key, text_role=None if key in TURNS else "user")
    if key != "history" and fields.get("history"):
        used.append("history")
        turns = read_turns(fields["history"], "history") + turns
    system = next((fields[key] for key in SYSTEMS if fields.get(key)), None)
    if system is not None and [turn["role"] for turn in turns[:1]] != ["system"]:
        turns.insert(0, {"role": "system", "content": text_of(system)})
    while answered and turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise DataError("the prompt does not end with a user or tool turn")
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise LeftOut("empty prompt")
    return turns, used


def is_prompt(key: str, value: Any) -> bool:
    """`context` is messages in HelpSteer3 and a text beside a question elsewhere; `history` is the
    post in SHP and earlier pairs elsewhere."""
    if key == "context":
        return isinstance(value, list)
    return isinstance(value, str) if key == "history" else True


def read_conversation(fields: Fields) -> Conversation:
    """Messages; an answer in a column of its own is the last one where they end with a user."""
    key = next(key for key in TURNS if key in fields)
    turns = read_turns(fields[key], key, weights=True)
    system = next((fields[key] for key in SYSTEMS if fields.get(key)), None)
    if system is not None and [turn["role"] for turn in turns[:1]] != ["system"]:
        turns.insert(0, {"role": "system", "content": text_of(system)})
    answer = next((key for key in ANSWERS if key in fields), None)
    if answer is not None and turns and turns[-1]["role"] in ("user", "tool"):
        turns += read_turns(fields[answer], answer, text_role="assistant")
    _refuse_undesirable(fields)
    return _answered(turns, fields)


def read_question_and_answer(fields: Fields) -> Conversation:
    answer = next(key for key in ANSWERS if key in fields)
    turns = prompt_of(fields)[0] + read_turns(fields[answer], answer, text_role="assistant")
    _refuse_undesirable(fields)
    return _answered(turns, fields)


def _refuse_undesirable(fields: Fields) -> None:
    key = next((key for key in LABELS if key in fields), None)
    if key is not None and read_label(fields[key]) is False:
        raise LeftOut(f"the answer is labelled undesirable ({key})")


def _answered(messages: list[Message], fields: Fields) -> Conversation:
    """Turns after the last assistant turn are dropped: nothing in them is trained."""
    last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise DataError("no assistant turn")
    messages = messages[: last + 1]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not all(m.get("content", "").strip() or m.get("tool_calls") for m in answers):
        raise LeftOut("empty assistant turn")
    weights = [message.pop("weight", 1) for message in answers]
    if not any(weights):
        raise LeftOut("every assistant turn has weight 0")
    tools = read_tools(fields.get("tools", fields.get("functions")))
    return Conversation(messages, tools, None if all(weights) else weights)


def read_label(value: Any) -> bool | None:
    """A boolean, 0 or 1, or the text of one; None for anything else."""
    if isinstance(value, str):
        return _LABEL_TEXTS.get(value.strip().lower())
    return bool(value) if type(value) in (bool, int, float) and value in (0, 1) else None
